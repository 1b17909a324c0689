"""Checks of an artifact that may come from a stranger. Nothing in an artifact is run, nothing
outside its folder is read, and no more memory is taken than its files are worth.

    files           are real files within the folder; JSON has at most 16 MB
    architecture    is a model that timm or transformers has, with plain values, and nothing that
                    makes the two read, download or import
    sizes           The architecture is built on torch's meta device, without memory, with at most
                    as many modules as the file's tensors can fill. Then it must have the file's
                    tensors, by name and shape.
    preprocessing   has an image size that a model may have
    linears         have parts whose shapes, types and ranges fit the linear that they replace

Each check raises ValueError; `load` turns it into one sentence. README.md in this folder says what
is not checked. In particular the hash in config.json reveals damage, but it protects from nobody
who can write both files.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from marrq.artifact.validate_lowrank import check_branch, check_salient
from marrq.models.preprocessing import Preprocessing
from marrq.quantizers.packing import packed_size
from marrq.schemes import WeightSpec

MAX_JSON_BYTES = 16 * 2**20
MAX_ARCHITECTURE_NUMBER = 2**20
"""More than any number in an architecture, and few enough for the length of a list."""
MAX_IMAGE_SIDE = 4096
MAX_RESIZED_SIDE = 2 * MAX_IMAGE_SIDE
MAX_BUFFER_NUMBERS = 2**26
"""Numbers in buffers that are not in the file: tables of positions, masks of windows."""
BASE_MODULES = 50
MODULES_PER_TENSOR = 4
"""A model has at most BASE_MODULES + MODULES_PER_TENSOR · tensors modules: most modules have a
tensor, and dropouts, activations and containers have none."""

PART_TYPES = {
    "weight_packed": torch.uint8,
    "weight_shape": torch.int64,
    "weight_zero_point": torch.int8,
    "input_zero_point": torch.uint8,
    "salient_columns": torch.int32,
    "salient_packed": torch.uint8,
}
"""Types of the parts of a quantized linear. All other parts are float32, but for the low-rank
branch (`check_branch`) and the scales of mxint."""

REFUSED_KEY = re.compile(
    r"pretrained|pretrained_(cfg|cfg_overlay|strict|filter_fn)|checkpoint_path|cache_dir|"
    r"scriptable|exportable|features_only|feature_cfg|pruned|auto_map|trust_remote_code|"
    r"quantization_config|.*attn_implementation.*|"
    # Numbers and switches of DPT and Sapiens2, which name no other model.
    r"(?!(backbone_out_indices|backbone_featmap_shape|normalize_backbone_outputs)$).*backbone.*"
)
"""Keys that make timm or transformers read, download or import something."""

BACKBONE = "backbone_config"
"""A model inside a model of transformers. A table describes it, a name would be downloaded."""


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of the folder. Raises ValueError if the file is no JSON, too
    large, or nested too deeply."""
    file = real_file(folder, name)
    # Before it is read: a parser takes many times the size of its text.
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{name} has {file.stat().st_size} bytes, more than {MAX_JSON_BYTES}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error


def real_file(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises ValueError if the file does not exist, or if it is a
    link that leads out of the folder."""
    file = folder / name
    # `resolve` follows links: a link to /etc/passwd has another parent.
    if not file.is_file() or file.resolve().parent != folder.resolve():
        raise ValueError(f"{name} is missing or leads out of the folder")
    return file


def check_architecture(library: str, architecture: Any) -> None:
    """Raise ValueError if an architecture does more than describe a model of the library.

    library: `timm` or `transformers`.
    architecture: the arguments of timm.create_model, or the fields of a transformers config.
    """
    if library not in ("timm", "transformers") or not isinstance(architecture, dict):
        raise ValueError(
            f"library {library!r} is neither timm nor transformers, or its architecture no table"
        )
    name = architecture.get("model_name" if library == "timm" else "model_type")
    # timm would download a name such as `hf-hub:…` and read one such as `local-dir:…`.
    if not isinstance(name, str) or not _has_model(library, name):
        raise ValueError(f"{library} has no model {name!r}")
    for key, value in _leaves(architecture):
        # The timm wrapper of transformers hands this name to timm.
        if key == "architecture" and not (isinstance(value, str) and timm.is_model(value)):
            raise ValueError(f"timm has no model {value!r}")
        # A refused key with an empty value does nothing: transformers writes some of them.
        # True stands for a table with content; a name in its place would be downloaded.
        is_table = key == BACKBONE and value is True
        described = is_table and _has_backbone_table(library, architecture)
        if value and REFUSED_KEY.fullmatch(key) and not described:
            raise ValueError(f"its architecture sets {key!r}")
        # `not … <=` and not `>`: NaN is refused too.
        if isinstance(value, int | float) and not abs(value) <= MAX_ARCHITECTURE_NUMBER:
            raise ValueError(
                f"its architecture has {key} {value!r}, a number beyond {MAX_ARCHITECTURE_NUMBER}"
            )


def _has_backbone_table(library: str, architecture: dict[str, Any]) -> bool:
    """Whether a model of transformers has a table for its backbone, of an architecture that there
    is. What the table holds is checked like everything else."""
    table = architecture.get(BACKBONE)
    name = table.get("model_type") if isinstance(table, dict) else None
    return library == "transformers" and isinstance(name, str) and _has_model(library, name)


def _has_model(library: str, name: str) -> bool:
    """Whether the library has an architecture of this name."""
    if library == "timm":
        return bool(timm.is_model(name))
    # transformers takes seconds to import, and an artifact of a timm model does not need it.
    from transformers import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value with its plain value, at any depth. A table or list counts as
    whether it has content. The entries of a list have the key of the list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name), bool(inner) if isinstance(inner, dict | list) else inner
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key) if isinstance(inner, dict | list) else [(key, inner)]


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Raise ValueError if the image size is larger than any model's, or if a field has a value of
    the wrong kind."""
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    if not (_are(size, int, 3) and all(1 <= side <= MAX_IMAGE_SIDE for side in size)):
        raise ValueError(
            f"input_size {size!r} is none of channels, height and width up to {MAX_IMAGE_SIDE}"
        )
    if not (_are(mean, float, size[0]) and _are(std, float, size[0]) and all(std)):
        raise ValueError("mean or std are no numbers for its channels")
    resized = preprocessing.resized
    if resized is not None and not (
        _are(resized, int, 2) and all(1 <= side <= MAX_RESIZED_SIDE for side in resized)
    ):
        raise ValueError(f"{resized!r} is no size up to {MAX_RESIZED_SIDE}")
    preprocessing.check_names()


def _are(values: object, kind: type, count: int) -> bool:
    """Whether `values` is a tuple of `count` values of a kind. Numbers must be finite, an integer
    may stand for a float, and a bool is no integer."""
    # A JSON writer may write 1.0 as 1, and in Python True is an integer.
    kinds = (int, float) if kind is float else kind
    if not isinstance(values, tuple) or len(values) != count:
        return False
    if not all(isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        return False
    return kind is str or all(map(math.isfinite, values))


def check_fit(
    build: Callable[[], nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    linears: Mapping[str, tuple[int, int]],
    image_size: tuple[int, ...],
) -> None:
    """Raise ValueError if an architecture has other tensors than the file, or cannot take an image.
    Nothing here takes memory for a tensor.

    build: builds the architecture.
    shapes: of the tensors that stay in floating point, by name.
    linears: outputs and inputs of the quantized linears, by path.
    image_size: channels, height and width.
    """
    # `depth` of 10⁶ takes no memory for tensors on the meta device, but time and memory for the
    # modules: their number is limited while they are put together.
    limit = BASE_MODULES + MODULES_PER_TENSOR * (len(shapes) + len(linears))
    with _at_most_modules(limit), torch.device("meta"):
        module = build()
    for path, shape in linears.items():
        layer = module.get_submodule(_float_path(module, path))
        if (
            not isinstance(layer, nn.Linear | nn.Conv2d)
            or tuple(layer.weight.flatten(1).shape) != shape
        ):
            raise ValueError(f"linear {path!r} has another shape than its model")
    # Tensors of a float layer whose place a quantized linear takes are not in the file.
    inside = tuple(f"{_float_path(module, path)}." for path in linears)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not name.startswith(inside)
    }
    names = sorted(expected.keys() | shapes.keys())
    differing = [name for name in names if expected.get(name) != shapes.get(name)]
    if differing:
        raise ValueError(f"tensor {differing[0]!r} does not fit the model")
    # Buffers that are no part of the state dict are computed when the model is built.
    if sum(buffer.numel() for buffer in module.buffers()) > MAX_BUFFER_NUMBERS:
        raise ValueError("its architecture takes tables that are larger than any model's")
    # A forward on the meta device computes shapes alone: the image must go through.
    with torch.no_grad():
        module(torch.empty(1, *image_size, device="meta"))


def _float_path(module: nn.Module, path: str) -> str:
    """The path of the float layer that a quantized linear replaces: itself, or the convolution
    around it for a patch embedding (Patches in marrq/models/first_last.py)."""
    parent, _, name = path.rpartition(".")
    is_patches = name == "linear" and isinstance(module.get_submodule(parent), nn.Conv2d)
    return parent if is_patches else path


@contextmanager
def _at_most_modules(limit: int) -> Iterator[None]:
    """Raise ValueError as soon as more modules are put together inside the `with` block."""
    seen = 0

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal seen
        seen += 1
        if seen > limit:
            raise ValueError("its architecture has more modules than the file has tensors for")

    # A hook of torch for all modules: it also sees the modules that timm and transformers build.
    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_linear(parts: Mapping[str, Tensor], weight: WeightSpec) -> tuple[int, int]:
    """Outputs and inputs of a quantized linear. Raises ValueError if its parts do not fit each
    other or the bits and grid of its weight.

    parts: the parts of one linear, by name.
    """
    # A shape of two positive sizes comes first: every other check multiplies by them. Python's
    # integers do not overflow, so that a product of hostile sizes is compared as it is.
    shape = parts["weight_shape"]
    if shape.dtype != torch.int64 or shape.shape != (2,) or not int(shape.min()) > 0:
        raise ValueError("weight_shape is no pair of sizes")
    rows, columns = (int(size) for size in shape)
    packed = parts["weight_packed"]  # [bytes]
    # The bytes in the file must hold these codes, which bounds out · in by the size of the file.
    size = packed_size(rows * columns, weight.num_bits)
    if packed.dim() != 1 or packed.dtype != torch.uint8 or packed.numel() != size:
        raise ValueError(
            f"{rows} × {columns} codes of {weight.num_bits} bits do not take {packed.numel()} bytes"
        )
    wrong = [
        *_wrong_shapes(parts, rows, columns, columns // (weight.group_size or columns)),
        *_wrong_scales(parts),
        *_wrong_types(parts, weight),
    ]
    # Parts that cannot be missing; the other parts are optional.
    needed = ["weight_scale", *(["weight_zero_point"] if weight.grid == "asymmetric" else [])]
    wrong += [name for name in needed if name not in parts]
    if wrong:
        raise ValueError(f"{wrong[0]} does not fit its linear")
    check_branch(parts, rows, columns)
    check_salient(parts, weight.num_bits, rows, columns)
    return rows, columns


def check_widths(widths: Mapping[str, int], paths: Set[str]) -> None:
    """Raise ValueError if a mixed scheme has widths for other linears than the file.

    paths: of the quantized linears of the blocks."""
    # Empty widths: one scheme for all. The numbers are checked by QuantizationSettings.
    differing = sorted(widths.keys() ^ paths) if widths else []
    if differing:
        raise ValueError(f"the widths do not fit linear {differing[0]!r}")


def _wrong_shapes(
    parts: Mapping[str, Tensor], rows: int, columns: int, groups: int
) -> Iterator[str]:
    """Parts that have another shape than the linear wants. At least one group is wanted, which a
    group size beyond the inputs does not leave."""
    expected = {
        "weight_scale": (rows, groups),
        "weight_zero_point": (rows, groups),
        "bias": (rows,),
        "input_smoothing": (columns,),
    }
    for name, shape in expected.items():
        # A dimension of 0 would pass every other check.
        if name in parts and (tuple(parts[name].shape) != shape or 0 in shape):
            yield name
    for name in ("input_scale", "input_zero_point", "input_clip"):
        if name in parts and parts[name].numel() != 1:
            yield name


def _wrong_scales(parts: Mapping[str, Tensor]) -> Iterator[str]:
    """Scales that are not positive and finite."""
    for name in ("weight_scale", "input_scale", "input_clip"):
        if name in parts:
            values = parts[name].float()
            # A scale of 0, NaN or infinity makes every weight of its row the same, or none.
            if not (values.isfinite() & (values > 0)).all():
                yield name


def _wrong_types(parts: Mapping[str, Tensor], weight: WeightSpec) -> Iterator[str]:
    """Parts of another type than the artifact has, the low-rank branch aside."""
    # The type is part of the format: a float64 scale or an int64 zero point would compute too, but
    # would take other memory and give other bits.
    types = dict(PART_TYPES)
    if weight.grid == "mxint":
        types["weight_scale"] = torch.float8_e8m0fnu
    for name, tensor in parts.items():
        is_factor = name in ("lowrank_left", "lowrank_right")
        if not is_factor and tensor.dtype != types.get(name, torch.float32):
            yield name
