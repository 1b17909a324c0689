"""Checks that need neither torch nor timm, so that a mistake is told at once."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from marrq.errors import MarrqError
from marrq.files import check_data_folder
from marrq.models.images.counts import FEWEST_IMAGES
from marrq.outputs import check_place, is_artifact


def check_packages() -> None:
    """Raise MarrqError if Python would import another package for `exporters` or `runtime`.

    Both are common names, and the folder that Python starts in is searched first.
    """
    for name in ("exporters", "runtime"):
        # The three packages lie side by side, in the repository and in site-packages alike.
        ours = Path(__file__).parents[2] / name / "__init__.py"
        # find_spec looks where an import would look, and imports nothing.
        found = find_spec(name)
        if found is None or found.origin != str(ours):
            place = found.origin if found else "nothing"
            raise MarrqError(
                f"marrq's package {name!r} is shadowed by {place}: run from another folder, or "
                "remove that package"
            )


def check_model(name: str) -> None:
    """Raise MarrqError if a model is named by a path and the path does not exist.

    Any other name may be a model of timm or of the hub, which marrq/models/load.py finds out.
    """
    scheme, _, rest = name.partition(":")
    path = rest if scheme == "local-dir" else name
    # `owner/name` may be a checkpoint of the hub; no checkpoint begins as these paths do.
    is_path = scheme == "local-dir" or path.startswith(("/", "./", "../"))
    if path.endswith(".onnx") and Path(path).is_file():
        raise MarrqError(
            f"{path!r} is an ONNX file, which marrq bench and marrq inspect take: give the model "
            "that it was made from"
        )
    if is_path and not Path(path).exists():
        raise MarrqError(f"{path!r} does not exist: give a model's folder, or a model's name")


def check_float_model(name: str) -> None:
    """Raise MarrqError as `check_model`, and for an artifact, which is quantized already."""
    check_model(name)
    folder = name.removeprefix("local-dir:")
    if is_artifact(Path(folder)):
        raise MarrqError(
            f"{folder!r} is an artifact, quantized already: give the float model that it was made "
            "from"
        )


def data_for(model: str, data: str | None, samples: int | None = None) -> str:
    """The name of the images for a model: `data`, or the built-in images of the model demo.

    samples: how many images to calibrate on; None for images to measure on.

    Raises MarrqError if a model other than demo has no data, and if the data folder does not exist
    or has too few images.
    """
    if data is None and model != "demo":
        raise MarrqError(
            "no images given: pass --data with a folder of images (only the model demo has "
            "built-in images)"
        )
    name = data or "demo"
    check_data(name, samples)
    return name


def calibration_data_for(model: str, data: str | None, samples: int | None) -> str:
    """As `data_for`, for images to calibrate on. samples: None for the default number, which any
    images will do for."""
    return data_for(model, data, FEWEST_IMAGES if samples is None else samples)


def check_data(name: str, samples: int | None = None) -> None:
    """Raise MarrqError for images that cannot serve, as `data_for`."""
    check_data_folder(name)
    if name != "demo":
        # It imports Pillow and NumPy, which `--help` has no use for.
        from marrq.models.images.folders import check_images

        check_images(name, samples)


def check_comparison(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison that a file holds (schema marrq.compare/2); None if there is no file.

    about: values that the file must have. Raises MarrqError if the file is no comparison, or has
    another value: accuracies of other weights, images or samples cannot stand in one table.
    """
    check_place(file)
    if not file.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if report["schema"] != about["schema"]:
            raise ValueError("another schema")
        # A report of an earlier marrq does not say all of this.
        differing = [key for key, value in about.items() if report.get(key) != value]
    except (ValueError, KeyError, TypeError) as error:
        raise MarrqError(
            f"{str(file)!r} is no comparison: choose another file to write to"
        ) from error
    if differing:
        raise MarrqError(
            f"{str(file)!r} compares with another {differing[0]}: choose another file to write to"
        )
    return report
