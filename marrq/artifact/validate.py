"""An artifact may come from a stranger: nothing in it runs, reads what is outside of its folder, or
takes more memory than it is worth.

    files           real ones within the folder; JSON of at most 16 MB
    architecture    a name that timm or transformers has, and plain values; nothing that makes them read, download or import
    sizes           the architecture is built without memory first (on torch's meta device), at most as many modules as the file's tensors
                    can fill; it must then have the file's tensors, by name and shape, before anything is allocated
    preprocessing   a size of image that a model may have
    linears         shapes, types and ranges of all parts of a quantized linear fit the linear that it stands for

The hash of the tensors in config.json tells damage; it protects from nobody who can write both.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from marrq.models.preprocessing import Preprocessing
from marrq.quantizers.packing import packed_size
from marrq.schemes import WeightSpec

MAX_JSON = 16 * 2**20
MAX_INTEGER = 2**20
"""Of an architecture: more than any has, and few enough for a list."""
MAX_SIDE = 4096
MAX_BUFFERS = 2**26
"""Numbers in buffers that are no part of the file: tables of positions, masks of windows."""

TYPES = {
    "weight_packed": torch.uint8,
    "weight_shape": torch.int64,
    "weight_zero_point": torch.int8,
    "input_zero_point": torch.uint8,
}
"""Of the parts of a quantized linear; the others are float32, and those of a branch see
`_check_branch`."""

REFUSED = re.compile(
    r"pretrained|pretrained_(cfg|cfg_overlay|strict|filter_fn)|checkpoint_path|cache_dir|scriptable|exportable|features_only|feature_cfg|"
    r"pruned|auto_map|trust_remote_code|quantization_config|.*backbone.*|.*attn_implementation.*"
)
"""Keys for which timm and transformers would read, download or import something."""


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of the folder. Raises ValueError for one that is no JSON, too large or nested too
    deeply."""
    file = real_file(folder, name)
    if file.stat().st_size > MAX_JSON:
        raise ValueError(f"{name} has {file.stat().st_size} bytes, more than {MAX_JSON}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error


def real_file(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises ValueError where it is none, or leads out of the
    folder."""
    file = folder / name
    if not file.is_file() or file.resolve().parent != folder.resolve():
        raise ValueError(f"{name} is missing or leads out of the folder")
    return file


def check_architecture(library: str, architecture: Any) -> None:
    """Raise ValueError for an architecture that does more than to describe a model of the
    library."""
    if library not in ("timm", "transformers") or not isinstance(architecture, dict):
        raise ValueError(
            f"library {library!r} is neither timm nor transformers, or its architecture no table"
        )
    name = architecture.get("model_name" if library == "timm" else "model_type")
    known: Callable[[str], object] = (
        timm.is_model if library == "timm" else transformers.CONFIG_MAPPING.__contains__
    )
    if not isinstance(name, str) or not known(name):
        raise ValueError(f"{library} has no model {name!r}")
    for key, value in _leaves(architecture):
        if key == "architecture" and not (
            isinstance(value, str) and timm.is_model(value)
        ):  # transformers hands it to timm
            raise ValueError(f"timm has no model {value!r}")
        if value and REFUSED.fullmatch(key):
            raise ValueError(f"its architecture sets {key!r}")
        if isinstance(value, int | float) and not abs(value) <= MAX_INTEGER:
            raise ValueError(f"its architecture has {key} {value!r}, a number beyond {MAX_INTEGER}")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its plain value, at any depth; entries of lists under the key of the list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name), bool(inner) if isinstance(inner, dict | list) else inner
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key) if isinstance(inner, dict | list) else [(key, inner)]


def check_fit(
    build: Callable[[], nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    linears: Mapping[str, tuple[int, int]],
    size: tuple[int, ...],
) -> None:
    """Raise ValueError where the module that is built has other tensors than those given, or takes
    no image, before it takes memory.

    shapes: of the tensors that stay in floating point; linears: outputs and inputs of those that
    are quantized, by path; size: of an image."""
    with _at_most_modules(50 + 4 * (len(shapes) + len(linears))), torch.device("meta"):
        module = build()
    for path, shape in linears.items():
        parent, _, name = path.rpartition(".")
        layer = module.get_submodule(
            parent
            if name == "linear" and isinstance(module.get_submodule(parent), nn.Conv2d)
            else path
        )
        if (
            not isinstance(layer, nn.Linear | nn.Conv2d)
            or tuple(layer.weight.flatten(1).shape) != shape
        ):
            raise ValueError(f"linear {path!r} has another shape than its model")
    inside = tuple(f"{path.removesuffix('.linear')}." for path in linears)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not name.startswith(inside)
    }
    differing = sorted(
        name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)
    )
    if differing:
        raise ValueError(f"tensor {differing[0]!r} does not fit the model")
    if sum(buffer.numel() for buffer in module.buffers()) > MAX_BUFFERS:
        raise ValueError("its architecture takes tables that are larger than any model's")
    with torch.no_grad():
        module(torch.empty(1, *size, device="meta"))


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Raise ValueError for a size that is none, or larger than any model's, and for numbers that
    are none."""
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    if not (_are(size, int, 3) and all(1 <= side <= MAX_SIDE for side in size)):
        raise ValueError(
            f"input_size {size!r} is none of channels, height and width up to {MAX_SIDE}"
        )
    if not (
        _are(mean, float, size[0])
        and _are(std, float, size[0])
        and _are((preprocessing.crop_pct,), float, 1)
    ):
        raise ValueError("mean, std or crop_pct are no numbers for its channels")
    if (
        not 0 < preprocessing.crop_pct <= 1
        or not all(std)
        or not _are((preprocessing.interpolation, preprocessing.crop_mode), str, 2)
    ):
        raise ValueError("crop_pct, std, interpolation or crop_mode are none of an image's")


def _are(values: object, kind: type, count: int) -> bool:
    """Whether it is a tuple of so many values of a kind: finite ones; an integer serves for a
    float."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(values, tuple) or len(values) != count:
        return False
    if not all(isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        return False
    return kind is str or all(map(math.isfinite, values))


@contextmanager
def _at_most_modules(limit: int) -> Iterator[None]:
    """Raise ValueError inside where more modules are put together."""
    seen = 0

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal seen
        seen += 1
        if seen > limit:
            raise ValueError("its architecture has more modules than the file has tensors for")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_linear(tensors: Mapping[str, Tensor], weight: WeightSpec) -> tuple[int, int]:
    """Outputs and inputs of a quantized linear. Raises ValueError where its tensors do not fit each
    other or the numbers of its weight."""
    shape = tensors["weight_shape"]
    if shape.dtype != torch.int64 or shape.shape != (2,) or not int(shape.min()) > 0:
        raise ValueError("weight_shape is no pair of sizes")
    rows, columns = (int(size) for size in shape)
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    if (
        packed.dim() != 1
        or packed.dtype != torch.uint8
        or packed.numel() != packed_size(rows * columns, weight.num_bits)
    ):
        raise ValueError(
            f"{rows} × {columns} codes of {weight.num_bits} bits do not take {packed.numel()} bytes"
        )
    groups = columns // (weight.group_size or columns)
    expected = {
        "weight_scale": (rows, groups),
        "weight_zero_point": (rows, groups),
        "bias": (rows,),
        "input_smoothing": (columns,),
    }
    wrong = [
        name
        for name, wanted in expected.items()
        if name in tensors and tuple(tensors[name].shape) != wanted
    ]
    scalars = ("input_scale", "input_zero_point", "input_clip")
    wrong += [name for name in scalars if name in tensors and tensors[name].numel() != 1]
    wrong += [
        name
        for name in ("weight_scale", "input_scale", "input_clip")
        if name in tensors and not _is_positive(tensors[name])
    ]
    types = TYPES | ({"weight_scale": torch.float8_e8m0fnu} if weight.grid == "mxint" else {})
    branch = ("lowrank_left", "lowrank_right")
    wrong += [
        name
        for name, tensor in tensors.items()
        if name not in branch and tensor.dtype != types.get(name, torch.float32)
    ]
    wrong += (
        ["weight_zero_point"]
        if weight.grid == "asymmetric" and "weight_zero_point" not in tensors
        else []
    )
    if wrong or scale.shape[0] * groups == 0:
        raise ValueError(f"{(wrong or ['weight_scale'])[0]} does not fit its linear")
    _check_branch(tensors, rows, columns)
    return rows, columns


def _is_positive(tensor: Tensor) -> bool:
    values = tensor.float()
    return bool((values.isfinite() & (values > 0)).all())


def _check_branch(tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Raise ValueError where L [rows, rank], R [rank, columns] or their scales do not fit."""
    if "lowrank_left" not in tensors and "lowrank_right" not in tensors:
        return
    left, right = tensors["lowrank_left"], tensors["lowrank_right"]
    rank = left.shape[-1]
    expected = {"lowrank_left": (rows, rank), "lowrank_right": (rank, columns)}
    expected |= (
        {"lowrank_left_scale": (1, rank), "lowrank_right_scale": (rank, 1)}
        if left.dtype == torch.int8
        else {}
    )
    if right.dtype != left.dtype or left.dtype not in (torch.int8, torch.float16):
        raise ValueError("lowrank_right is of another type than its linear wants")
    for name, wanted in expected.items():
        if tuple(tensors[name].shape) != wanted or math.prod(wanted) == 0:
            raise ValueError(f"{name} does not fit its linear")
