"""A page beside the model that tells a client what to send, and what comes back."""

from importlib.metadata import version
from typing import Any

from tritonclient.grpc import model_config_pb2 as protocol

from exporters.choices import BASELINES
from exporters.onnx_file import Export
from exporters.triton.config import LABELS, classes_of
from exporters.triton.serving import Serving
from marrq.models.preprocessing import MODES, Preprocessing


def card(export: Export, config: Any, serving: Serving) -> str:
    """The page, in Markdown. config: the model's ModelConfig."""
    model = export.model
    # Colours as a client has to open the image.
    channels = model.preprocessing.input_size[0]
    image = f"an image of mode {MODES[channels]}" if channels in MODES else f"{channels} channels"
    return f"""# {serving.name}

{model.source.name}, {_what(export)}. Made by marrq {version("marrq")}.

| | |
|---|---|
{_row("input", config.input[0], serving)}
{_outputs(config, serving)}
{_classes(config, model.labels)}
Of {image}: {_resize(model.preprocessing)} {_by(model.preprocessing)}, then \
{_send(export, serving)}.
The same, for programs, is in the config's parameter `preprocessing`. Serve the repository that \
holds the folder `{serving.name}` with

    tritonserver --model-repository REPOSITORY
"""


def _what(export: Export) -> str:
    if export.flavor in BASELINES:
        return f"not quantized, as `{export.flavor}`"
    model = export.model
    how = f"quantized to {export.scheme.description} by {model.method_name}, as `{export.flavor}`"
    return f"{how} for a {export.device.upper()}"


def _row(direction: str, tensor: Any, serving: Serving) -> str:
    # TYPE_FP32 in the config is FP32 in a client's request.
    data_type = protocol.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    shape = f"`{tensor.name}`, {data_type} {list(tensor.dims)}"
    return f"| {direction} | {shape}, up to {serving.max_batch} at once |"


def _outputs(config: Any, serving: Serving) -> str:
    return "\n".join(_row("output", output, serving) for output in config.output)


def _classes(config: Any, labels: tuple[str, ...]) -> str:
    if not classes_of(config, labels):
        return ""
    return (
        f"\nClass i is line i + 1 of `../{LABELS}`; ask for `class_count` to get classes by name.\n"
    )


def _resize(preprocessing: Preprocessing) -> str:
    _, height, width = preprocessing.input_size
    crop, cut = f"{height} × {width}", f"cut {height} × {width} out of the middle"
    if preprocessing.resized is None:
        return cut
    larger = "{} × {}".format(*preprocessing.resized)
    # How the libraries crop, in words (marrq/models/resizing.py).
    ways = {
        "center": f"resize the shorter side to that of {larger}, and {cut}",
        "squash": f"resize to {larger}, and {cut}",
        "border": f"resize the longer side to that of {larger}, and fill up to {crop} with the "
        "mean",
        "corner": f"resize the longer side to that of {larger}, and put it into the upper left "
        f"corner of {crop}, which is zero after normalization",
    }
    return ways[preprocessing.crop_mode]


def _by(preprocessing: Preprocessing) -> str:
    """What resizes: other libraries round pixels otherwise."""
    name = preprocessing.interpolation
    if preprocessing.resampling == "pillow":
        return f"(Pillow, {name})"
    pixels = preprocessing.resampling.removesuffix("-tensor")
    return (
        f"(torchvision's resize of a tensor in {pixels}, {name} with antialiasing; Pillow's "
        "differs by a level of 255 in some pixels)"
    )


def _send(export: Export, serving: Serving) -> str:
    # The graph divides, subtracts and turns axes itself (exporters/pixels.py).
    if serving.preprocess:
        return "send its pixels as they are, rows first: the model normalizes them"
    preprocessing = export.model.preprocessing
    order = "exchange red and blue, and " if preprocessing.bgr else ""
    return (
        f"{order}send (x / 255 - mean) / std with mean {list(preprocessing.mean)} and std "
        f"{list(preprocessing.std)} per channel, channels first"
    )
