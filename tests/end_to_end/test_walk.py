"""A sample of the walk over all families of models: kinds that once failed after quantization, or
quantized a model that then computed something else."""

import json
from pathlib import Path

import pytest
import torch
import walk_families
import walk_timm
from walk_families import tried
from walked_kind import Kind

KINDS = (
    Kind("timm", "levit_128", "levit", 64),  # a linear called linear, beside a norm
    Kind("timm", "convit_tiny", "convit", 32),  # asks a linear for its weight's device
    Kind("transformers", "CLIPForImageClassification"),  # a classifier on a tower
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_works_from_its_checkpoint_to_its_file(kind: Kind):
    outcome = tried(kind)
    assert outcome.result == "works", outcome.reason
    assert outcome.linears > 1
    assert outcome.cosine >= walk_families.LEAST_COSINE


def test_a_model_with_two_streams_of_tokens_is_refused():
    outcome = tried(Kind("timm", "tnt_s_patch16_224", "tnt", 32))
    assert (outcome.result, outcome.linears) == ("refused", 0)
    assert "what else it reads depends on the images" in outcome.reason


def test_a_failure_is_a_row_and_names_its_stage(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise KeyError("anything")

    monkeypatch.setattr(walk_families, "save", broken)
    outcome = tried(Kind("timm", "test_vit", "vision_transformer", 32))
    assert outcome.result == "failed"
    assert outcome.reason == "save: KeyError: 'anything'"


def test_a_walk_goes_on_if_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    monkeypatch.setattr(walk_timm, "kinds", lambda: [Kind("timm", "a"), Kind("timm", "b")])
    monkeypatch.setattr(
        walk_families,
        "tried",
        lambda kind: seen.append(kind.name) or walk_families.Outcome("works"),
    )
    file = tmp_path / "timm.json"
    walk_families.walk("timm", file, [])
    report = json.loads(file.read_text())
    del report["rows"]["b"]
    file.write_text(json.dumps(report))
    walk_families.walk("timm", file, [])
    walk_families.walk("timm", file, ["a"])
    assert seen == ["a", "b", "b", "a"]


def test_architectures_that_compute_the_same_are_one_kind(monkeypatch: pytest.MonkeyPatch):
    names = ["test_vit", "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_384"]
    monkeypatch.setattr(walk_timm, "SHRINK", {"vision_transformer": walk_timm.SHRINK["deit"]})
    monkeypatch.setattr(walk_timm.timm, "list_models", lambda module: names)
    [first, second] = walk_timm.kinds()
    assert {first.name, *first.same} == set(names[1:])
    assert second.name == "test_vit"
    assert torch.equal(first.images(2), first.images(2))
