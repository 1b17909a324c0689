"""marrq turns a pretrained vision transformer into an ONNX file with 2-, 3-, 4- or 8-bit weights
that is small, fast and accurate, and measures it.

    model = marrq.load_model("demo")
    images = marrq.find_images("demo", "train")
    quantized = marrq.quantize(model, images, scheme="W4A8", method="marr", seed=0)
    marrq.save(quantized, "artifact")
    marrq.export(quantized, "model.onnx")
    report = marrq.bench(["model.onnx"], data="demo")

`models` loads, `pipeline` quantizes block by block with one of the `methods`, `artifact` stores the
integer codes, the package `exporters` writes ONNX graphs from them, and the package `runtime`
measures these graphs. `import marrq` loads none of this: a function is imported when it is first
used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

# For type checkers: at run time these imports would load torch and timm, which takes seconds.
if TYPE_CHECKING:
    from marrq.artifact.folder import load, save
    from marrq.models.class_embeddings import load_classes, save_classes
    from marrq.models.images import find_images
    from marrq.models.load import load_model
    from marrq.models.text_tower import embed_classes
    from marrq.workflows.bench import bench
    from marrq.workflows.export import export
    from marrq.workflows.in_memory import quantize
    from marrq.zero_shot import with_classes

__version__ = "0.1.0"

__all__ = [
    "bench",
    "embed_classes",
    "export",
    "find_images",
    "load",
    "load_classes",
    "load_model",
    "quantize",
    "save",
    "save_classes",
    "with_classes",
]

HOMES = {
    "load_model": "marrq.models.load",
    "find_images": "marrq.models.images",
    "quantize": "marrq.workflows.in_memory",
    "export": "marrq.workflows.export",
    "bench": "marrq.workflows.bench",
    "save": "marrq.artifact.folder",
    "load": "marrq.artifact.folder",
    "embed_classes": "marrq.models.text_tower",
    "save_classes": "marrq.models.class_embeddings",
    "load_classes": "marrq.models.class_embeddings",
    "with_classes": "marrq.zero_shot",
}
"""The module of each public function."""


def __getattr__(name: str) -> object:
    """Import a public function when it is first used."""
    if name not in HOMES:
        raise AttributeError(f"module 'marrq' has no attribute {name!r}")
    from marrq.workflows.checks import check_packages

    # Another package in place of ours would fail later, with an error that does not say why.
    check_packages()
    found: object = getattr(import_module(HOMES[name]), name)
    # From now on the name is found without this function.
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names too, which are not imported yet."""
    return sorted({*globals(), *__all__})
