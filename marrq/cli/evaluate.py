"""`marrq evaluate`: top-1 and top-5 of a model or an artifact in torch."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marrq.cli.common import (
    DataOption,
    DeviceOption,
    JsonOption,
    choose_device,
    data_for,
    progress_bars,
    stdout,
    write_json,
)

if TYPE_CHECKING:
    from marrq.models.load import VisionModel
    from marrq.quantized_model import QuantizedModel


def evaluate(
    model: Annotated[str, typer.Argument(help="A model as for quantize, or an artifact folder.")],
    data: DataOption = None,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Top-1 and top-5 in torch, an artifact also against its float model: marrq evaluate artifact
    --data demo"""
    import numpy as np

    from marrq.distributed import local_device, process_group
    from marrq.models.images import find_images
    from marrq.models.load import VisionModel, load_source
    from marrq.workflows.evaluate import predict
    from runtime.measure.accuracy import measure_accuracy

    target = local_device(choose_device(device))
    loaded = _load(model)
    name = loaded.source.name
    images = find_images(data_for(name, data), "val", loaded.labels)
    candidates: dict[str, VisionModel | QuantizedModel] = {}
    if isinstance(loaded, VisionModel):
        candidates["float"] = loaded
    else:
        candidates = {
            "float": load_source(loaded.source),
            f"{loaded.scheme.description} {loaded.method.name}": loaded,
        }
    results = {}
    with (
        process_group(target) as processes,
        progress_bars(processes.is_first, images=len(images) * len(candidates)) as [bar],
    ):
        reference = None
        for title, candidate in candidates.items():
            logits = predict(
                candidate.module, images, loaded.preprocessing, target, bar.advance, processes
            ).numpy()
            reference = logits if reference is None else reference
            results[title] = asdict(measure_accuracy(logits, np.array(images.targets), reference))
    if not processes.is_first:
        return
    report = {
        "schema": "marrq.evaluate/1",
        "model": name,
        "data": images.description(),
        "models": results,
    }
    for title, accuracy in results.items():
        interval = f"{100 * accuracy['top1_low']:.1f}–{100 * accuracy['top1_high']:.1f}"
        stdout.print(
            f"{title}: top-1 {100 * accuracy['top1']:.2f} % ({interval}), top-5 "
            f"{100 * accuracy['top5']:.2f} %, "
            f"agreement {100 * accuracy['agreement']:.2f} %, divergence "
            f"{accuracy['divergence']:.4f}, {accuracy['images']} images",
            highlight=False,
        )
    write_json(json_file, report)


def _load(name: str) -> "VisionModel | QuantizedModel":
    """An artifact where the folder is one, else a float model."""
    from marrq.artifact.folder import is_artifact, load
    from marrq.models.load import load_model

    return load(Path(name)) if is_artifact(Path(name)) else load_model(name)
