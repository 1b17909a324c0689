"""Damage an artifact at random, as a stranger would who can write every file of it, and load it.

    python tests/fuzz_artifact.py --seconds 600 --seed 0

A case changes config.json, quantization.json or model.safetensors (values for hostile ones, keys
gone, types changed, bytes flipped, cut off; tensors of other shapes, types and values, with the
hash put right). `load` must raise MarrqError, or give a model that runs; within five seconds, and
with no more memory than the limit on the process allows. Prints JSON."""

import argparse
import copy
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import noise, quantized, vit

from marrq.artifact.folder import CONFIG, REPORTS, TENSORS, load, save
from marrq.errors import MarrqError
from marrq.files import sha256
from runtime.measure.memory import resident_peak_mb

HEADROOM = 512 * 2**20
"""Bytes of address space beyond what the process has when it begins; the artifact has 80 kB."""
SECONDS_A_CASE = 5

HOSTILE: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        2**31,
        2**63,
        10**9,
        10**30,
        -(10**9),
        1e308,
        float("nan"),
        float("inf"),
        0.5,
        -0.0,
        True,
        False,
        None,
    ),
    *(
        "",
        "../../etc/passwd",
        "/dev/zero",
        "hf-hub:timm/vit_tiny_patch16_224",
        "local-dir:/",
        "<script>",
        "\x00",
        "é" * 50,
        "vit",
        "swin",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        [0] * 1000,
        [10**9] * 3,
        {"model_type": "vit"},
        {"checkpoint_path": "/etc/passwd"},
    ),
)
KEYS = (
    "pretrained",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "features_only",
    "auto_map",
    "depth",
    "embed_dim",
    "img_size",
    "window_size",
)


class TooLong(BaseException):
    """No Exception: `load` takes every one of those for damage."""


def ran_out(error: BaseException) -> bool:
    """Whether memory was wanted that there was not: torch says so by a RuntimeError, and `load`
    makes a MarrqError of it."""
    cause = error.__cause__ or error
    return isinstance(cause, MemoryError) or "allocate memory" in str(cause)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within a JSON value, with each of its keys."""
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [(value, key) for key, _ in inner] + [
        place for _, part in inner for place in places(part)
    ]


def change_json(value: Any, chance: random.Random) -> Any:
    """One to three changes."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        container, key = chance.choice(places(value) or [([value], 0)])
        kind = chance.randrange(6)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[chance.choice((*KEYS, "", "extra"))] = copy.deepcopy(chance.choice(HOSTILE))
        elif kind == 2 and isinstance(container, list):
            container *= chance.choice((0, 2, 50))
        elif (
            kind == 3
            and isinstance(container[key], int | float)
            and not isinstance(container[key], bool)
        ):
            container[key] = container[key] * chance.choice(
                (-1, 2, 16, 1000, 10**6, 0.5)
            ) + chance.choice((0, 1))
        else:
            container[key] = copy.deepcopy(chance.choice(HOSTILE))
    return value


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, a piece cut out or put in; most often near the start, where headers are."""
    changed = bytearray(data)
    reach = chance.choice((8, 64, 2000, len(changed)))
    for _ in range(chance.choice((1, 2, 8))):
        place = chance.randrange(max(1, min(reach, len(changed))))
        piece = chance.choice((b"", bytes([chance.randrange(256)]), b"9", b"}", b"\xff" * 8))
        changed[place : place + chance.choice((0, 1, 1, 8))] = piece
    return (
        bytes(changed[: chance.randrange(len(changed) + 1)])
        if chance.random() < 0.1
        else bytes(changed)
    )


def change_tensors(
    tensors: dict[str, torch.Tensor], chance: random.Random
) -> dict[str, torch.Tensor]:
    """A tensor gone, renamed, of another shape or type, or with other values."""
    name = chance.choice(
        [key for key in tensors if "weight_" in key or "input_" in key or chance.random() < 0.2]
        or list(tensors)
    )
    tensor = tensors.pop(name)
    hostile = [2**62, -1, 0, 10**9, 1]
    changes: list[Callable[[], torch.Tensor | None]] = [
        lambda: None,
        lambda: tensor.flatten()[: chance.randrange(tensor.numel() + 1)].clone(),
        lambda: torch.cat([tensor.flatten(), tensor.flatten()]),
        lambda: tensor.to(
            chance.choice((torch.float16, torch.int64, torch.bool, torch.uint8, torch.float64))
        ),
        lambda: torch.full_like(
            tensor,
            chance.choice((0, 1)) if tensor.dtype == torch.bool else chance.choice((0, 1, 100)),
        ),
        lambda: (
            torch.full_like(tensor, float("nan"))
            if tensor.is_floating_point()
            else tensor.flip(0)
            if tensor.dim()
            else tensor
        ),
        lambda: torch.tensor(
            [chance.choice(hostile) for _ in range(chance.choice((0, 1, 2, 2, 2, 3)))]
        ),
    ]
    changed = chance.choice(changes)()
    if changed is not None:
        tensors[chance.choice((name, name, name, name + "x", "blocks.0." + name))] = (
            changed.contiguous()
        )
    return tensors


class Case:
    """The artifact as it was, and a folder in which it is damaged."""

    def __init__(self, folder: Path) -> None:
        save(quantized(vit(), noise(4), "W4A8-e8", "rtn"), folder / "whole")
        self.whole = {file.name: file.read_bytes() for file in (folder / "whole").iterdir()}
        self.tensors = load_file(folder / "whole" / TENSORS)
        self.place = folder / "damaged"
        self.place.mkdir()

    def write(self, chance: random.Random) -> None:
        """A damaged copy."""
        files = dict(self.whole)
        target = chance.choice(
            (CONFIG, CONFIG, CONFIG, REPORTS, TENSORS, TENSORS, "shapes", "shapes", "bytes")
        )
        if target in (CONFIG, REPORTS):
            files[target] = json.dumps(change_json(json.loads(files[target]), chance)).encode(
                errors="surrogatepass"
            )
        elif target == TENSORS:
            files[TENSORS] = change_bytes(files[TENSORS], chance)
        elif target == "bytes":
            name = chance.choice((CONFIG, REPORTS))
            files[name] = change_bytes(files[name], chance)
        for name, data in files.items():
            (self.place / name).write_bytes(data)
        if target == "shapes":
            save_file(change_tensors(dict(self.tensors), chance), self.place / TENSORS)
        if target in (TENSORS, "shapes"):
            config = json.loads(files[CONFIG])
            (self.place / CONFIG).write_text(
                json.dumps({**config, "tensors_sha256": sha256(self.place / TENSORS)})
            )


def outcome(place: Path) -> str:
    """What loading came to: refused, loaded, or a failure, named."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        model = load(place)
        size = model.preprocessing.input_size
        model.module(
            torch.zeros(1, *size) if tuple(size) == (3, 32, 32) else torch.zeros(1, 3, 32, 32)
        )
        return "loaded"
    except MarrqError as error:
        return (
            "refused"
            if "\n" not in str(error) and not ran_out(error)
            else f"failed: {error!r}"[:300]
        )
    except TooLong:
        return "failed: too long"
    except BaseException as error:
        return f"failed: {error!r}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(seconds: float, cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Cases until either is reached."""

    def ring(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, ring)
    case, start, found, slowest = Case(folder), time.monotonic(), Counter[str](), 0.0
    load(
        folder / "whole"
    )  # what is imported and cached at the first time is no allocation of a case
    before = resident_peak_mb() or 0.0
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, limits[1]))
    try:
        while found.total() < cases and time.monotonic() - start < seconds:
            number = found.total()
            case.write(random.Random(f"{seed} {number}"))
            begun = time.monotonic()
            result = outcome(case.place)
            slowest = max(slowest, time.monotonic() - begun)
            if result.startswith("failed"):
                print(f"case {number}: {result}", file=sys.stderr)
            found[result.partition(":")[0]] += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = (resident_peak_mb() or 0.0) - before
    return {
        "cases": found.total(),
        **found,
        "seconds": time.monotonic() - start,
        "slowest_s": slowest,
        "grown_mb": grown,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        print(
            json.dumps(
                run(arguments.seconds, arguments.cases, arguments.seed, Path(temporary)), indent=2
            )
        )
