"""A client of a model that `marrq export --format triton` wrote: an image folder in; top-1, latency
and throughput out.

    pip install '.[serve]'                     in the clone of marrq
    python examples/triton_client.py IMAGES --url 127.0.0.1:8000 --name vit
    python examples/triton_client.py IMAGES --url 127.0.0.1:8001 --protocol grpc --requests 2000

IMAGES holds a folder for each class, or val/ with such folders. The folders are named as the model
names its classes. The images are resized as the config on the server says, and normalized if the
model does not normalize them itself.

First, one client sends each image alone: top-1 and latency are those of these requests. With
--requests, several clients then send the images again at once. The server runs queued requests
together, and each answer is compared with the answer that the image got alone. Preparing the images
is not timed. The JSON (schema marrq.triton_client/1) holds the logits too.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils
import typer
from numpy.typing import NDArray
from PIL import Image

from marrq.cli.common import JsonOption, progress_bars, stdout, write_report
from runtime.environment import describe_machine
from runtime.preprocessing import ServedPreprocessing

SCHEMA = "marrq.triton_client/1"
PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
IMAGES = (".jpeg", ".jpg", ".png", ".webp")

Answer = NDArray[np.float32]
"""Logits, or features, of one image."""


def main(
    images: Path,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "vit",
    url: Annotated[
        str, typer.Option(help="HOST:PORT; Triton listens on 8000 for http and 8001 for grpc.")
    ] = "127.0.0.1:8000",
    protocol: Annotated[str, typer.Option(help="http or grpc.")] = "http",
    clients: Annotated[int, typer.Option(help="Clients at once, for --requests.", min=1)] = 8,
    requests: Annotated[
        int, typer.Option(help="Number of further requests, of all clients together.", min=0)
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Number of images, spread over the classes.", min=1)
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Ask a served model for the classes of a folder of images.

    python examples/triton_client.py IMAGES --url 127.0.0.1:8000
    """
    if protocol not in PROTOCOLS:
        raise typer.BadParameter(
            f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}"
        )
    served = Served(PROTOCOLS[protocol], url, name)
    root = images / "val" if (images / "val").is_dir() else images
    files = sorted(file for file in root.glob("*/*") if file.suffix.lower() in IMAGES)
    files = files[:: max(len(files) // limit, 1)][:limit] if limit else files
    if not files:
        raise typer.BadParameter(f"{str(images)!r} has no class folders with images")
    inputs = [served.prepared(file) for file in files]
    with progress_bars(alone=len(files), at_once=requests) as [alone, at_once]:
        asked = list(map(timed(served.connected(), alone.advance), inputs))
        answers = np.stack([answer for answer, _ in asked])
        together = (
            load(served, inputs, answers, clients, requests, at_once.advance) if requests else None
        )
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": name,
        "protocol": protocol,
        "images": len(files),
        "top1": top1(served, files, inputs, answers),
        "alone_ms": percentiles([seconds for _, seconds in asked]),
        "together": together,
    }
    stdout.print(json.dumps(report, indent=2), highlight=False)
    detail = {
        "machine": describe_machine().to_json(),
        "files": [str(file.relative_to(root)) for file in files],
        "logits": answers.tolist(),
    }
    write_report(json_file, report | detail)


class Served:
    """A model on a server. module: tritonclient.http or tritonclient.grpc."""

    def __init__(self, module: Any, url: str, name: str) -> None:
        self.module, self.url, self.name = module, url, name
        client = module.InferenceServerClient(url)
        try:
            config = (
                client.get_model_config(name)
                if module is tritonclient.http
                else client.get_model_config(name, as_json=True)["config"]
            )
        except (OSError, tritonclient.utils.InferenceServerException) as error:
            raise typer.BadParameter(f"no model {name!r} at {url}: {error}") from error
        self.preprocessing = ServedPreprocessing.read(
            config["parameters"]["preprocessing"]["string_value"]
        )
        [self.input], [self.output] = config["input"], config["output"]

    def prepared(self, file: Path) -> NDArray[Any]:
        """The model's input of an image: [1, …]."""
        image = Image.open(file)
        return (
            self.preprocessing.pixels(image)
            if self.input["data_type"] == "TYPE_UINT8"
            else self.preprocessing(image)
        )[None]

    def connected(self) -> Callable[[NDArray[Any]], Answer]:
        """A function from one input to its answer, over a connection of its own."""
        client = self.module.InferenceServerClient(self.url)

        def ask(pixels: NDArray[Any]) -> Answer:
            answer: Answer = client.infer(self.name, [self._given(pixels)]).as_numpy(
                self.output["name"]
            )[0]
            return answer

        return ask

    def label(self, pixels: NDArray[Any]) -> str:
        """The name of the most likely class. The server answers with score:index:name."""
        wanted = self.module.InferRequestedOutput(self.output["name"], class_count=1)
        result = self.module.InferenceServerClient(self.url).infer(
            self.name, [self._given(pixels)], outputs=[wanted]
        )
        best: bytes = result.as_numpy(self.output["name"]).flat[0]
        return best.decode().split(":", 2)[2]

    def _given(self, pixels: NDArray[Any]) -> Any:
        given = self.module.InferInput(
            self.input["name"], list(pixels.shape), self.input["data_type"].removeprefix("TYPE_")
        )
        given.set_data_from_numpy(pixels)
        return given


def top1(
    served: Served,
    files: Sequence[Path],
    inputs: Sequence[NDArray[Any]],
    answers: NDArray[np.float32],
) -> float | None:
    """Share of the images whose most likely class is their folder's; None without classes.

    The server is asked once for the name of each class that some image got.
    """
    if not served.output.get("label_filename"):
        return None
    best = answers.argmax(1)
    names = {
        index: served.label(inputs[place])
        for index, place in zip(*np.unique(best, return_index=True), strict=True)
    }
    return float(
        np.mean([names[index] == file.parent.name for index, file in zip(best, files, strict=True)])
    )


def load(
    served: Served,
    inputs: Sequence[NDArray[Any]],
    alone: NDArray[np.float32],
    clients: int,
    requests: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """What several clients get at once, compared with the answers that the images got alone."""
    shares = [
        list(islice(cycle(range(len(inputs))), start, requests, clients))
        for start in range(clients)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        asked = [
            row
            for rows in pool.map(lambda share: one_client(served, inputs, share, advance), shares)
            for row in rows
        ]
    seconds = time.perf_counter() - started
    answered = [(alone[place], answer) for place, answer, _ in asked if answer is not None]
    return {
        "clients": clients,
        "requests": requests,
        "failed": requests - len(answered),
        "images_per_s": len(answered) / seconds,
        "latency_ms": percentiles([seconds for _, _, seconds in asked]),
        "other_top1": sum(int(before.argmax() != after.argmax()) for before, after in answered),
        "largest_difference": max(
            (
                float(np.abs(before - after).max() / np.abs(before).max())
                for before, after in answered
            ),
            default=None,
        ),
    }


def one_client(
    served: Served,
    inputs: Sequence[NDArray[Any]],
    share: Sequence[int],
    advance: Callable[[], None],
) -> list[tuple[int, Answer | None, float]]:
    """Image, answer and seconds of each request; None for a request that failed."""
    ask, rows = timed(served.connected(), advance), []
    for place in share:
        try:
            rows.append((place, *ask(inputs[place])))
        except (OSError, tritonclient.utils.InferenceServerException):
            rows.append((place, None, float("nan")))
    return rows


def timed(
    ask: Callable[[NDArray[Any]], Answer], advance: Callable[[], None]
) -> Callable[[NDArray[Any]], tuple[Answer, float]]:
    """The same function, with the seconds that it takes."""

    def ask_and_time(pixels: NDArray[Any]) -> tuple[Answer, float]:
        started = time.perf_counter()
        answer = ask(pixels)
        seconds = time.perf_counter() - started
        advance()
        return answer, seconds

    return ask_and_time


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds that half, nine tenths and 99 in a hundred of the requests took at most."""
    return {f"p{share}": float(np.nanpercentile(seconds, share)) * 1000 for share in (50, 90, 99)}


if __name__ == "__main__":
    typer.run(main)
