"""`marrq evaluate`: how right a model or an artifact answers in torch."""

from typing import Annotated

import typer

from marrq.cli import common
from marrq.models.images.counts import GALLERY_IMAGES

Evaluated = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model as for quantize, or the folder of an artifact."),
]


def evaluate(
    model: Evaluated,
    outputs: common.OutputsOption = None,
    data: common.DataOption = None,
    gallery: common.GalleryOption = GALLERY_IMAGES,
    classes: common.ClassesOption = None,
    device: common.DeviceOption = "auto",
    json_file: common.JsonOption = None,
) -> None:
    """Measure accuracy, or embeddings, in torch, of an artifact beside its float model.

    marrq evaluate artifact --data IMAGES
    marrq evaluate clip-artifact --classes classes.safetensors --data IMAGES
    """
    from marrq.models.class_embeddings import load_classes
    from marrq.workflows.checks import check_model, data_for
    from marrq.workflows.devices import choose_device

    check_model(model)
    # A folder that was named is checked at once. Whether the default will do depends on the model.
    if data is not None:
        data_for(model, data)
    given = None if classes is None else load_classes(classes)
    chosen = choose_device(device)

    from marrq.distributed import process_group
    from marrq.models.images.gallery import find_measured
    from marrq.workflows.evaluate import Evaluating, load_candidates, report
    from marrq.workflows.evaluate import evaluate as measure
    from runtime.report.answers import evaluation_tables

    candidates = load_candidates(model, common.names_in(outputs)).classified(given)
    models = candidates.models
    # An artifact of the demo has the demo's images, whatever its folder is called.
    first = next(iter(models.values()))
    source, labels = first.source.name, first.labels
    images = find_measured(data_for(source, data), labels, gallery)
    looked_at = len(images.measured) + (0 if images.gallery is None else len(images.gallery))
    with (
        process_group(chosen) as processes,
        common.progress_bars(processes.is_first, images=looked_at * len(models)) as [bar],
    ):
        found = measure(models, images, Evaluating(chosen, bar.advance, processes))
    # Every process has all logits; one report is enough.
    if not processes.is_first:
        return
    # What is noted of the images is known when they have been read.
    measured = images.measured
    unlabelled = [f"classes are not known: {measured.why_unlabelled}"]
    notes = images.notes if measured.targets else unlabelled
    warnings = [*candidates.warnings, *candidates.flattered_by(measured), *notes, *measured.noted()]
    common.warn(warnings)
    common.write_report(json_file, report(candidates, images, found, chosen, warnings))
    common.stdout.print(*evaluation_tables(found, measured.name), sep="\n")
