"""`marrq classes`: names of classes become embeddings, by the text tower of the model."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli import common

TowerArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A CLIP or SigLIP of transformers, images and text: an id of the hub, or a folder.",
    ),
]
Names = Annotated[
    Path,
    common.input_option("--names", metavar="FILE", help="Text with one class name a line."),
]
Templates = Annotated[
    list[str],
    common.input_option(
        "--template",
        metavar="TEXT",
        help="Text around a name, which takes the place of {}. May be repeated; the embeddings of "
        "several are averaged.",
    ),
]


def classes(
    model: TowerArgument,
    *,
    names: Names,
    template: Templates = ["a photo of a {}."],
    output: common.OutputOption,
    force: common.ForceOption = False,
) -> None:
    """Make classes for a CLIP or SigLIP from their names alone (zero-shot).

    marrq classes openai/clip-vit-base-patch32 --names names.txt -o classes.safetensors
    marrq export artifact --classes classes.safetensors -o model.onnx
    """
    from marrq.models.class_embeddings import check_templates, read_names, save_classes
    from marrq.outputs import check_output, no_classes
    from marrq.workflows.checks import check_float_model

    # All that can be wrong without torch is told at once.
    check_float_model(model)
    found = read_names(names)
    check_templates(template)
    check_output(output, force, no_classes, {"--names": names})

    from marrq.models.text_tower import embed_classes

    with common.progress_bars(texts=len(found) * len(template)) as [bar]:
        made = embed_classes(model, found, template, bar.advance)
    save_classes(made, output, overwrite=force)
    common.say(
        f"wrote {output}: {len(found)} classes of {made.embeddings.shape[1]} numbers; give it to "
        "export, bench and evaluate as --classes"
    )
