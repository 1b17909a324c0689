"""Checks that need neither torch nor timm, so that a mistake is told at once."""

from importlib.util import find_spec
from pathlib import Path

from marrq.errors import MarrqError
from marrq.files import check_data_folder


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


def data_for(model: str, data: str | None) -> str:
    """The name of the images for a model: `data`, or the built-in images of the model demo.

    Raises MarrqError if a model other than demo has no data, and if the data folder does not exist.
    """
    if data is None and model != "demo":
        raise MarrqError(
            "no images given: pass --data with a folder of class folders (only the model demo "
            "has built-in images)"
        )
    name = data or "demo"
    check_data_folder(name)
    return name
