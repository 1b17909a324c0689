"""What could not be loaded or exported is refused before anything is quantized."""

from dataclasses import replace

import pytest
import torch
from tiny_models import VIT, noise, vision_model, vit
from torch import Tensor

from marrq.errors import MarrqError
from marrq.models.load import ModelSource
from marrq.workflows.feasible import check_feasible


def test_a_model_that_can_be_loaded_and_traced_passes_and_stays_as_it_is():
    model = vision_model(vit())
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    check_feasible(model)
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.isfinite(model.module(noise(2))).all()


def test_a_model_that_chooses_by_what_it_sees_is_refused_in_one_sentence():
    model = vision_model(vit())
    forward = model.module.forward

    def by_brightness(pixels: Tensor) -> Tensor:
        return forward(pixels) if pixels.mean() > 0 else -forward(pixels)

    model.module.forward = by_brightness
    with pytest.raises(MarrqError, match="cannot be traced to ONNX, so it is not quantized") as it:
        check_feasible(model)
    assert "\n" not in str(it.value)


def test_a_model_that_draws_random_numbers_is_refused_by_the_operator():
    model = vision_model(vit())
    forward = model.module.forward
    model.module.forward = lambda pixels: forward(pixels + torch.rand_like(pixels))
    with pytest.raises(MarrqError, match=r"random numbers in its forward \(aten\.rand_like"):
        check_feasible(model)


def test_a_model_that_is_not_the_one_that_its_source_builds_is_refused():
    source = ModelSource("tiny", "timm", {**VIT, "depth": 1}, "", ("logits",))
    with pytest.raises(MarrqError, match=r"could not be loaded: tensor 'blocks\.1"):
        check_feasible(replace(vision_model(vit()), source=source))
