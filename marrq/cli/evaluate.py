"""`marrq evaluate`: top-1 and top-5 of a model or an artifact in torch."""

from typing import Annotated

import typer

from marrq.cli import common

SCHEMA = "marrq.evaluate/1"

Evaluated = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model as for quantize, or the folder of an artifact."),
]


def evaluate(
    model: Evaluated,
    data: common.DataOption = None,
    device: common.DeviceOption = "auto",
    json_file: common.JsonOption = None,
) -> None:
    """Measure top-1 and top-5 in torch, of an artifact beside its float model.

    marrq evaluate artifact --data IMAGES
    """
    from marrq.workflows.checks import check_model, data_for
    from marrq.workflows.devices import choose_device

    check_model(model)
    # A folder that was named is checked at once. Whether the default will do depends on the model.
    if data is not None:
        data_for(model, data, is_measured=True)
    chosen = choose_device(device)

    from marrq.distributed import process_group
    from marrq.models.images import find_images
    from marrq.workflows.evaluate import evaluate as measure
    from marrq.workflows.evaluate import load_candidates
    from runtime.report.tables import accuracy_table

    candidates = load_candidates(model)
    models = candidates.models
    # An artifact of the demo has the demo's images, whatever its folder is called.
    first = next(iter(models.values()))
    source, labels = first.source.name, first.labels
    images = find_images(data_for(source, data), "val", labels)
    with (
        process_group(chosen) as processes,
        common.progress_bars(processes.is_first, images=len(images) * len(models)) as [bar],
    ):
        found = measure(models, images, chosen, bar.advance, processes)
    # Every process has all logits; one report is enough.
    if not processes.is_first:
        return
    # What is noted of the images is known when they have been read.
    warnings = [*candidates.warnings, *images.noted()]
    report = {
        "schema": SCHEMA,
        "model": source,
        "data": images.description(),
        "models": {title: accuracy.to_json() for title, accuracy in found.items()},
        "warnings": warnings,
    }
    common.warn(warnings)
    common.write_report(json_file, report)
    common.stdout.print(accuracy_table(found, images.name))
