"""`marrq export`: an artifact becomes an ONNX file, or a model on a Triton Inference Server."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli import common, export_options
from marrq.errors import MarrqError

FORMATS = ("onnx", "triton")


def export(
    context: typer.Context,
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Folder that marrq quantize wrote.")
    ],
    *,
    classes: common.ClassesOption = None,
    flavor: export_options.Flavor = None,
    device: export_options.Device = "cpu",
    symmetric: export_options.Symmetric = None,
    accuracy_level: export_options.Level = None,
    fuse: export_options.Fuse = None,
    float32: export_options.Float32 = None,
    weights_only: export_options.WeightsOnly = None,
    name: export_options.Name = "vit",
    model_version: export_options.Version = 1,
    backend: export_options.Backend = "onnxruntime",
    instances: export_options.Instances = 1,
    threads: export_options.Threads = None,
    max_batch: export_options.MaxBatch = 8,
    queue_delay: export_options.QueueDelay = 0,
    bench: export_options.Bench = None,
    preprocess: export_options.Preprocess = False,
    format: export_options.Format = "onnx",
    output: common.OutputOption,
    force: common.ForceOption = False,
) -> None:
    """Export an artifact as an ONNX file, or as a model in a Triton repository.

    marrq export artifact -o model.onnx
    marrq export artifact --format triton --name digits -o repository
    marrq export clip-artifact --classes classes.safetensors -o model.onnx
    """
    from dataclasses import fields

    from exporters.choices import FLAGS
    from exporters.triton.serving import Serving
    from marrq.models.class_embeddings import load_classes
    from marrq.workflows.export import ArtifactWithClasses
    from marrq.workflows.export import export as run

    if format not in FORMATS:
        raise MarrqError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    about_server = [field.name for field in fields(Serving)]
    for option in about_server:
        # An option that has its default value may still have been given.
        source = context.get_parameter_source(option)
        if format == "onnx" and source is not None and source.name != "DEFAULT":
            flag = f"--{option.replace('_', '-')}"
            raise MarrqError(f"{flag} is about a server: use it with --format triton")
    # None: the option was not given, and the flavour has its own default.
    given = {option: context.params[option] for option in FLAGS}
    options = {option: value for option, value in given.items() if value is not None}
    server = Serving(**{option: context.params[option] for option in about_server})
    serving = server if format == "triton" else None
    what = artifact if classes is None else ArtifactWithClasses(artifact, load_classes(classes))
    done = run(what, output, flavor, options, device, serving, force, common.say)
    form = f"{done.scheme} {done.flavor}" if done.scheme else done.flavor
    common.say(f"wrote {done.path} as {form}: {done.size_bytes / 1e6:.2f} MB")
    if done.warning is not None:
        common.say(f"warning: {done.warning}")
    if format == "triton":
        common.say(f"serve it with: tritonserver --model-repository {output}")
