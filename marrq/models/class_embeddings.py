"""Classes of a model that gives features: one embedding for each class, as a file.

A model of images and text compares an image with texts. With one text for each class it classifies,
although no classifier was trained (zero-shot; CLIP, Radford et al. 2021, section 3.1):

    logit_c = s · ⟨f / ‖f‖, e_c⟩ + b        f: features of the image;  e_c: embedding of class c

A file of classes is a safetensors file:

    embeddings     float32 [classes, dim]     e_c; every row has norm 1
    logit_scale    float32 [] or [1]          s itself; transformers stores log s
    logit_bias     float32 [] or [1]          b of SigLIP; absent: 0
    metadata       names: JSON list, one for each row
                   format, model, weights_sha256, templates: how `marrq classes` made the file

A file that another program made needs `names` alone of the metadata. It may come from a stranger:
nothing in it is run, and its sizes are checked before its values are read. This file imports no
torch, so that a wrong file of classes is told at once.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from marrq.errors import MarrqError
from marrq.files import write_file
from marrq.outputs import CLASSES_FORMAT, check_output, no_classes

MAX_NAMES_BYTES = 16 * 2**20
"""No list of class names is larger."""

NORM_TOLERANCE = 1e-3
"""How far the norm of a row may be from 1: float16 embeddings that became float32 pass."""

BREAKS = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that a name cannot have: labels are files of UTF-8 with one name a line, and
halves of a surrogate pair, which JSON can express, have no UTF-8."""

PLACE = "{}"
"""Where a template has the name of a class."""

PARTS = {"embeddings": 2, "logit_scale": 1, "logit_bias": 1}
"""The tensors of a file, and the most axes that each has."""


@dataclass(frozen=True, eq=False)
class ClassEmbeddings:
    """What makes classes of features.

    names: of the classes, each once.
    embeddings: float32 [classes, dim]; every row has norm 1.
    logit_scale: s, a factor above 0. logit_bias: b; 0 without one.
    model, weights_sha256: of the float model whose text tower made the embeddings; empty if the
        file does not say.
    templates: texts around each name, with {} in the name's place; empty if the file does not say.

    Raises MarrqError if the values contradict this description.
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]
    logit_scale: float
    logit_bias: float = 0.0
    model: str = ""
    weights_sha256: str = ""
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names(self.names)
        _check_embeddings(self.embeddings, self.names)
        # `not … <` and not `>=`: NaN is refused too.
        if not 0 < self.logit_scale < np.inf:
            raise MarrqError(
                f"logit_scale is {self.logit_scale:g}: give the factor itself, above 0, and not "
                "its logarithm"
            )
        if not np.isfinite(self.logit_bias):
            raise MarrqError(f"logit_bias is {self.logit_bias:g}: give a finite number")

    @property
    def sha256(self) -> str:
        """A hash over all that the logits and their names depend on."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        numbers = np.array([self.logit_scale, self.logit_bias], np.float32)
        # Numbers of fixed size first, so that no two sets of classes have the same bytes.
        digest.update(numbers.tobytes() + np.ascontiguousarray(self.embeddings).tobytes())
        return digest.hexdigest()


def check_names(names: Sequence[str]) -> None:
    """Raise MarrqError for names that cannot be those of classes."""
    if not names:
        raise MarrqError("there are no names of classes: give at least one")
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or name != name.strip():
            raise MarrqError(f"name {row} is {name!r}: give a text without spaces around it")
        if any(unicodedata.category(letter) in BREAKS for letter in name):
            raise MarrqError(f"name {row} is {name!r}: give a text of one line, in UTF-8")
    # Two classes of one name would share the images of that name's folder.
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise MarrqError(f"{count} classes have the name {name!r}: give each class its own")


def check_templates(templates: Sequence[str]) -> None:
    """Raise MarrqError for templates that do not take a name."""
    if not templates:
        raise MarrqError(
            f"there is no template: give at least one, such as 'a photo of a {PLACE}.'"
        )
    for template in templates:
        if template.count(PLACE) != 1:
            raise MarrqError(
                f"template {template!r} has {PLACE} {template.count(PLACE)} times: write it once, "
                "where the class's name stands"
            )


def _check_embeddings(embeddings: NDArray[np.float32], names: Sequence[str]) -> None:
    """Raise MarrqError unless there is a row of norm 1 for each name."""
    if embeddings.dtype != np.float32 or embeddings.ndim != 2:
        raise MarrqError(
            f"the embeddings are {embeddings.dtype} {list(embeddings.shape)}: give float32 "
            "[classes, dim]"
        )
    if len(embeddings) != len(names):
        raise MarrqError(
            f"there are {len(embeddings)} embeddings and {len(names)} names: give a name for each "
            "row"
        )
    # In float64: the square of a large number would overflow, with a warning in place of an error.
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if len(wrong):
        row = int(wrong[0])
        raise MarrqError(
            f"the embedding of {names[row]!r} has the norm {norms[row]:.4g}: divide every row by "
            "its norm"
        )


def load_classes(file: Path | str) -> ClassEmbeddings:
    """The classes of a file. Raises MarrqError if there is no such file, or if it holds none."""
    file = Path(file)
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise MarrqError(f"classes {str(file)!r} {state}: give a file that `marrq classes` wrote")
    try:
        return _read(file)
    # Bytes that are none of the format, or not all of them.
    except SafetensorError as error:
        raise MarrqError(
            f"{str(file)!r} holds no classes: it is no whole safetensors file ({error}); `marrq "
            "classes` makes such a file"
        ) from error
    # Deeply nested JSON overflows.
    except (MarrqError, ValueError, TypeError, RecursionError) as error:
        raise MarrqError(
            f"{str(file)!r} holds no classes: {error}; `marrq classes` makes such a file"
        ) from error


def _read(file: Path) -> ClassEmbeddings:
    """The content of a file. Shapes and types are checked before a value is read."""
    # NumPy arrays, which are no objects that could run code.
    with safe_open(file, framework="numpy") as opened:
        described = opened.metadata() or {}
        if "names" not in described:
            raise ValueError("its metadata lack 'names', a JSON list of the classes")
        parts = list(opened.keys())
        for name in parts:
            _check_part(name, opened.get_slice(name))
        tensors = {name: opened.get_tensor(name) for name in parts}
    missing = [name for name in ("embeddings", "logit_scale") if name not in tensors]
    if missing:
        raise ValueError(f"it has no tensor {missing[0]!r}")
    return ClassEmbeddings(
        names=_texts(described, "names"),
        embeddings=tensors["embeddings"],
        logit_scale=float(tensors["logit_scale"].item()),
        logit_bias=float(tensors["logit_bias"].item()) if "logit_bias" in tensors else 0.0,
        model=described.get("model", ""),
        weights_sha256=described.get("weights_sha256", ""),
        templates=_texts(described, "templates") if "templates" in described else (),
    )


def _check_part(name: str, part: Any) -> None:
    """Raise ValueError for a tensor that no file of classes has. part: its type and shape."""
    shape, kind = part.get_shape(), part.get_dtype()
    if name not in PARTS:
        raise ValueError(f"it has a tensor {name!r}, and not only {', '.join(PARTS)}")
    if kind != "F32" or len(shape) > PARTS[name] or (PARTS[name] == 1 and shape not in ([], [1])):
        raise ValueError(f"its {name} is {kind} {shape}, not float32 of the right shape")


def _texts(described: dict[str, str], key: str) -> tuple[str, ...]:
    """A list of texts among the metadata."""
    found = json.loads(described[key])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"its metadata have no list of texts under {key!r}")
    return tuple(found)


def save_classes(classes: ClassEmbeddings, file: Path | str, overwrite: bool = False) -> None:
    """Write a file of classes in one step. Raises MarrqError if the file exists and `overwrite` is
    off, and if what is there is no file of classes."""
    file = Path(file)
    check_output(file, overwrite, no_classes)
    tensors: dict[str, NDArray[Any]] = {
        "embeddings": np.ascontiguousarray(classes.embeddings),
        "logit_scale": np.array([classes.logit_scale], np.float32),
    }
    # A CLIP has no bias, and its file says so by having none.
    if classes.logit_bias:
        tensors["logit_bias"] = np.array([classes.logit_bias], np.float32)
    described = {
        "format": CLASSES_FORMAT,
        "names": json.dumps(classes.names, ensure_ascii=False),
        "model": classes.model,
        "weights_sha256": classes.weights_sha256,
        "templates": json.dumps(classes.templates, ensure_ascii=False),
    }
    content = save(tensors, described)
    write_file(file, lambda place: place.write_bytes(content))


def read_names(file: Path | str) -> tuple[str, ...]:
    """The class names of a text in UTF-8, one a line. Lines without a name are passed over.

    Raises MarrqError if the file does not exist, is no such text, or repeats a name.
    """
    file = Path(file)
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise MarrqError(f"names {str(file)!r} {state}: give a text with one class name a line")
    if file.stat().st_size > MAX_NAMES_BYTES:
        raise MarrqError(
            f"names {str(file)!r} has {file.stat().st_size} bytes: give a text with one class "
            "name a line"
        )
    try:
        # Editors of Windows put a mark before the first letter.
        text = file.read_text(encoding="utf-8-sig")
        names = tuple(line.strip() for line in text.split("\n") if line.strip())
        check_names(names)
    # A text of another encoding, or none at all.
    except (MarrqError, UnicodeDecodeError) as error:
        raise MarrqError(f"{str(file)!r} is no list of class names: {error}") from error
    return names
