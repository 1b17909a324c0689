"""Classes of CLIP and SigLIP against transformers itself: text embeddings, and logits of images.

The models are tiny and have random weights. Each oracle tokenizes with the checkpoint's tokenizer
as transformers' documentation does for the family, and runs the whole model at once.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
import torch
import transformers
from tiny_models import noise, quantized, vision_model, vit

from marrq.artifact.folder import save
from marrq.errors import MarrqError
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.load import load_model
from marrq.models.text_tower import BATCH_SIZE, embed_classes
from marrq.quantizers.linear import quantized_linears
from marrq.workflows.feasible import check_feasible
from marrq.zero_shot import with_classes, without_classes

NAMES = ("cat", "sea lion", "an electric eel", "dog")
TEMPLATES = ("a photo of a {}.", "{}!", "the {} at night")
FAMILIES = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The name of a checkpoint of each family."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    return {
        "clip": tiny_towers.write_clip(folders["clip"]),
        "siglip": tiny_towers.write_siglip(folders["siglip"]),
    }


@torch.no_grad()
def of_transformers(family: str, checkpoint: str, texts: list[str], images: torch.Tensor) -> Any:
    """What the whole model of transformers returns for texts and images."""
    model = FAMILIES[family].from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    if family == "clip":
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
    else:
        # Its training knows no mask; SigLIP 2's texts are lower-case.
        lower = [text.lower() for text in texts]
        inputs = tokenizer(lower, padding="max_length", max_length=40, return_tensors="pt")
        inputs = {"input_ids": inputs["input_ids"]}
    return model(**inputs, pixel_values=images)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_logits_are_those_of_transformers(family: str, checkpoints: dict[str, str]):
    classes = embed_classes(checkpoints[family], NAMES, TEMPLATES[:1])
    texts = [TEMPLATES[0].replace("{}", name) for name in NAMES]
    expected = of_transformers(family, checkpoints[family], texts, noise(5))
    np.testing.assert_allclose(classes.embeddings, expected.text_embeds, atol=1e-5)
    model = with_classes(load_model(checkpoints[family]), classes)
    assert (model.labels, model.outputs) == (NAMES, ("logits",))
    with torch.no_grad():
        logits = model.module(noise(5))
    np.testing.assert_allclose(logits, expected.logits_per_image, atol=1e-4)
    # The images are told apart: equal rows would agree with anything.
    assert logits.std(0).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_several_templates_are_averaged_as_unit_vectors(family: str, checkpoints: dict[str, str]):
    classes = embed_classes(checkpoints[family], NAMES, TEMPLATES)
    total = np.zeros_like(classes.embeddings)
    for template in TEMPLATES:
        texts = [template.replace("{}", name) for name in NAMES]
        total += of_transformers(family, checkpoints[family], texts, noise(1)).text_embeds.numpy()
    mean = total / len(TEMPLATES)
    np.testing.assert_allclose(
        classes.embeddings, mean / np.linalg.norm(mean, axis=1)[:, None], atol=1e-5
    )
    assert classes.templates == TEMPLATES


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_the_other_names(family: str, checkpoints: dict[str, str]):
    many = tuple(f"{name} {number}" for number in range(BATCH_SIZE) for name in ("a", "a long eel"))
    done: list[int] = []
    together = embed_classes(checkpoints[family], many, ("{}",), done.append)
    alone = embed_classes(checkpoints[family], many[-1:], ("{}",))
    np.testing.assert_allclose(together.embeddings[-1:], alone.embeddings, atol=1e-5)
    assert done == [BATCH_SIZE, BATCH_SIZE]


@pytest.mark.parametrize("family", FAMILIES)
def test_large_letters_do_not_matter(family: str, checkpoints: dict[str, str]):
    small, large = (
        embed_classes(checkpoints[family], names, ("a {}",))
        for names in (("sea lion",), ("Sea LION",))
    )
    np.testing.assert_array_equal(small.embeddings, large.embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_too_long_is_named_and_never_cut(family: str, checkpoints: dict[str, str]):
    with pytest.raises(MarrqError, match=r"'x{50}' has 5\d tokens, and the text tower takes 40"):
        embed_classes(checkpoints[family], ("cat", "x" * 50), ("{}",))


def test_the_classes_say_which_model_made_them(checkpoints: dict[str, str]):
    classes = embed_classes(checkpoints["clip"], NAMES, TEMPLATES[:1])
    source = load_model(checkpoints["clip"]).source
    assert (classes.model, classes.weights_sha256) == (source.name, source.weights_sha256)


def test_a_model_without_a_text_tower_is_refused_with_a_way_out(tmp_path: Path):
    with pytest.raises(MarrqError, match="'demo' is a model of timm, which has no text tower"):
        embed_classes("demo", NAMES, TEMPLATES)
    with pytest.raises(MarrqError, match="'vit_base_patch16_clip_224' is a model of timm"):
        embed_classes("vit_base_patch16_clip_224", NAMES, TEMPLATES)
    save(quantized(vit(depth=1), noise(8), "W4A8", "rtn"), tmp_path / "artifact")
    with pytest.raises(MarrqError, match="is an artifact, which has no text tower"):
        embed_classes(str(tmp_path / "artifact"), NAMES, TEMPLATES)
    vision = transformers.CLIPVisionConfig(**tiny_towers.VISION, projection_dim=16)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(MarrqError, match="give a whole model of images and text, clip or siglip"):
        embed_classes(str(tmp_path), NAMES, TEMPLATES)


def classes_of(dim: int, **changes: Any) -> ClassEmbeddings:
    rows = np.random.default_rng(0).normal(size=(3, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return ClassEmbeddings(("cat", "dog", "eel"), rows, 50.0, **changes)


def embedder() -> Any:
    """A model that gives features of 64 numbers."""
    model = replace(vision_model(vit(num_classes=0)), labels=(), outputs=("features",))
    return replace(model, source=replace(model.source, outputs=("features",)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: (vision_model(vit()), classes_of(64)), "has classes of its own"),
        (lambda: (embedder(), classes_of(48)), "gives features of 64 numbers, and the classes"),
        (
            lambda: (embedder(), classes_of(64, model="other", weights_sha256="12")),
            "made with 'other', whose weights are not those of 'tiny'",
        ),
        (
            lambda: (
                replace(embedder(), module=vit(num_classes=0, global_pool="")),
                classes_of(64),
            ),
            "classes need one vector an image",
        ),
    ],
    ids=["a classifier", "another length", "another model", "tokens"],
)
def test_classes_that_do_not_fit_the_model_are_refused(
    make: Callable[[], tuple[Any, ClassEmbeddings]], sentence: str
):
    model, classes = make()
    with pytest.raises(MarrqError) as error:
        with_classes(model, classes)
    assert sentence in str(error.value)


def test_the_model_given_stays_as_it_is_and_comes_back():
    model, images = embedder(), noise(2)
    before = model.module(images)
    with_them = with_classes(model, classes_of(64))
    assert with_them.module(images).shape == (2, 3)
    torch.testing.assert_close(model.module(images), before, rtol=0, atol=0)
    again = without_classes(with_them)
    torch.testing.assert_close(again.module(images), before, rtol=0, atol=0)
    assert (again.labels, again.classes) == ((), None)


def test_unnamed_logits_are_an_embedding_as_timm_has_that_of_a_clip():
    model = replace(vision_model(vit(num_classes=16)), labels=tuple(map(str, range(16))))
    model = replace(model, source=replace(model.source, outputs=("logits",)))
    with_them = with_classes(model, classes_of(16))
    assert with_them.module(noise(2)).shape == (2, 3)
    again = without_classes(with_them)
    assert (again.labels, again.outputs) == (model.labels, ("logits",))


def test_a_quantized_model_keeps_the_paths_and_codes_of_its_linears():
    model = quantized(vit(num_classes=0), noise(8), "W4A8", "rtn")
    model = replace(model, labels=(), outputs=("features",))
    with_them = with_classes(model, classes_of(64))
    ours, theirs = (quantized_linears(one.module) for one in (with_them, model))
    assert list(ours) == list(theirs)
    assert all(ours[path].codes is theirs[path].codes for path in ours)


def test_classes_are_no_part_of_an_artifact(tmp_path: Path):
    model = quantized(vit(num_classes=0), noise(8), "W4A8", "rtn")
    with_them = with_classes(replace(model, labels=(), outputs=("features",)), classes_of(64))
    with pytest.raises(MarrqError, match="no part of an artifact"):
        save(with_them, tmp_path / "artifact")
    with pytest.raises(MarrqError, match="quantize the model without them"):
        check_feasible(with_classes(embedder(), classes_of(64)))
