"""The file of classes: what is written is read again, and what is wrong is told in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from marrq.errors import MarrqError
from marrq.models.class_embeddings import (
    ClassEmbeddings,
    check_templates,
    load_classes,
    read_names,
    save_classes,
)

NAMES = ("cat", "sea lion", "Wölfin 🐺")


def unit_rows(count: int = len(NAMES), dim: int = 8) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def classes(**changes: Any) -> ClassEmbeddings:
    fields = {
        "names": NAMES,
        "embeddings": unit_rows(),
        "logit_scale": 100.0,
        "logit_bias": -12.5,
        "model": "clip",
        "weights_sha256": "ab",
        "templates": ("a {}.", "{}"),
    }
    return ClassEmbeddings(**{**fields, **changes})


@pytest.mark.parametrize("bias", [0.0, -12.5])
def test_what_is_written_is_read_again(bias: float, tmp_path: Path):
    written = classes(logit_bias=bias)
    save_classes(written, tmp_path / "c.safetensors")
    read = load_classes(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(read.embeddings, written.embeddings)
    for field in ("names", "logit_scale", "logit_bias", "model", "weights_sha256", "templates"):
        assert getattr(read, field) == getattr(written, field)
    assert read.sha256 == written.sha256


def test_the_file_has_the_tensors_that_its_description_says(tmp_path: Path):
    save_classes(classes(), tmp_path / "c.safetensors")
    tensors = load_file(tmp_path / "c.safetensors")
    assert {name: (str(one.dtype), one.shape) for name, one in tensors.items()} == {
        "embeddings": ("float32", (3, 8)),
        "logit_scale": ("float32", (1,)),
        "logit_bias": ("float32", (1,)),
    }


def test_a_file_of_another_program_needs_names_embeddings_and_the_scale(tmp_path: Path):
    import torch

    tensors = {"embeddings": torch.tensor(unit_rows()), "logit_scale": torch.tensor(100.0)}
    save_torch_file(tensors, tmp_path / "c.safetensors", {"names": json.dumps(NAMES)})
    read = load_classes(tmp_path / "c.safetensors")
    assert (read.names, read.logit_scale, read.logit_bias) == (NAMES, 100.0, 0.0)
    assert (read.model, read.weights_sha256, read.templates) == ("", "", ())


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("cat", "sea lion", "dog")},
        {"embeddings": unit_rows(dim=9)},
        {"logit_scale": 99.0},
        {"logit_bias": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_the_logits_depend_on_changes_the_hash(change: dict[str, Any]):
    assert classes(**change).sha256 != classes().sha256


def large() -> np.ndarray:
    rows = unit_rows()
    rows[1] *= 7
    return rows


def infinite() -> np.ndarray:
    rows = unit_rows()
    rows[2, 3] = np.nan
    return rows


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"names": ("cat", "cat", "dog")}, "2 classes have the name 'cat'"),
        ({"names": ("cat", "dog")}, "3 embeddings and 2 names"),
        ({"names": ("cat", "dog", "a\nb")}, "name 2 is 'a\\nb': give a text of one line"),
        ({"names": ("cat", "dog", "\ud800")}, "give a text of one line, in UTF-8"),
        ({"names": ("cat", "dog", " eel")}, "without spaces around it"),
        ({"names": ("cat", "dog", "")}, "name 2 is ''"),
        ({"names": (), "embeddings": unit_rows(0)}, "no names of classes"),
        ({"embeddings": large()}, "'sea lion' has the norm 7"),
        ({"embeddings": infinite()}, "has the norm nan"),
        ({"embeddings": unit_rows().astype(np.float64)}, "float64 [3, 8]"),
        ({"embeddings": unit_rows()[0]}, "float32 [8]"),
        ({"logit_scale": 0.0}, "logit_scale is 0"),
        ({"logit_scale": -4.6}, "not its logarithm"),
        ({"logit_scale": float("inf")}, "logit_scale is inf"),
        ({"logit_bias": float("nan")}, "logit_bias is nan"),
    ],
)
def test_values_that_are_no_classes_are_refused(change: dict[str, Any], sentence: str):
    with pytest.raises(MarrqError) as error:
        classes(**change)
    assert sentence in str(error.value)


Part = dict[str, np.ndarray]


def changed(change: Callable[[Part, dict[str, str]], object], file: Path) -> Path:
    """A file of classes that a function has changed."""
    tensors: Part = {"embeddings": unit_rows(), "logit_scale": np.array([100.0], np.float32)}
    described = {"names": json.dumps(NAMES)}
    change(tensors, described)
    save_file(tensors, file, described)
    return file


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors, described: described.clear(), "its metadata lack 'names'"),
        (lambda tensors, described: described.update(names='{"a": 1}'), "no list of texts"),
        (lambda tensors, described: described.update(names="[1, 2, 3]"), "no list of texts"),
        (lambda tensors, described: described.update(names="[" * 100_000), "holds no classes"),
        (lambda tensors, described: described.update(templates='"x"'), "under 'templates'"),
        (lambda tensors, described: tensors.pop("embeddings"), "no tensor 'embeddings'"),
        (lambda tensors, described: tensors.pop("logit_scale"), "no tensor 'logit_scale'"),
        (lambda tensors, described: tensors.update(extra=unit_rows()), "a tensor 'extra'"),
        (
            lambda tensors, described: tensors.update(embeddings=unit_rows().astype(np.float16)),
            "its embeddings is F16 [3, 8]",
        ),
        (
            lambda tensors, described: tensors.update(embeddings=unit_rows().astype(np.int32)),
            "its embeddings is I32 [3, 8]",
        ),
        (
            lambda tensors, described: tensors.update(logit_scale=np.ones(2, np.float32)),
            "its logit_scale is F32 [2]",
        ),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    change: Callable[[Part, dict[str, str]], object], sentence: str, tmp_path: Path
):
    file = changed(change, tmp_path / "c.safetensors")
    with pytest.raises(MarrqError) as error:
        load_classes(file)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"cat\ndog\n", b"\xff" * 64, (2**60).to_bytes(8, "little") + b"{}"]
)
def test_bytes_of_another_format_are_refused(content: bytes, tmp_path: Path):
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(MarrqError, match="holds no classes"):
        load_classes(tmp_path / "c.safetensors")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path):
    save_classes(classes(), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        with pytest.raises(MarrqError, match="holds no classes"):
            load_classes(tmp_path / "cut.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(MarrqError, match=r"'.*nothing' does not exist"):
        load_classes(tmp_path / "nothing")
    with pytest.raises(MarrqError, match="is a folder"):
        load_classes(tmp_path)


def test_a_file_is_replaced_if_marrq_wrote_it_and_force_is_given(tmp_path: Path):
    file = tmp_path / "c.safetensors"
    save_classes(classes(), file)
    with pytest.raises(MarrqError, match="exists"):
        save_classes(classes(logit_scale=1.0), file)
    assert load_classes(file).logit_scale == 100
    save_classes(classes(logit_scale=1.0), file, overwrite=True)
    assert load_classes(file).logit_scale == 1


@pytest.mark.parametrize("kind", ["weights", "text", "folder"])
def test_what_marrq_did_not_write_is_never_replaced(kind: str, tmp_path: Path):
    place = tmp_path / "model.safetensors"
    if kind == "weights":
        save_file({"embeddings": unit_rows()}, place)
    elif kind == "text":
        place.write_text("thesis")
    else:
        place.mkdir()
        (place / "thesis").touch()
    with pytest.raises(MarrqError, match="marrq replaces only what it wrote"):
        save_classes(classes(), place, overwrite=True)


def test_names_are_the_lines_of_a_text(tmp_path: Path):
    (tmp_path / "names").write_bytes("\ufeffcat\r\n\r\n  sea lion \nWölfin 🐺".encode())
    assert read_names(tmp_path / "names") == NAMES


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "there are no names of classes"),
        (b"cat\ndog\ncat\n", "2 classes have the name 'cat'"),
        ("Wölfin".encode("latin-1"), "is no list of class names"),
        (b"cat\x00dog", "give a text of one line"),
    ],
)
def test_a_text_that_is_no_list_of_names_is_refused(content: bytes, sentence: str, tmp_path: Path):
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(MarrqError) as error:
        read_names(tmp_path / "names")
    assert sentence in str(error.value)


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{} and {}",), ("a {}", "b")])
def test_a_template_has_one_place_for_the_name(templates: tuple[str, ...]):
    with pytest.raises(MarrqError, match="template"):
        check_templates(templates)
