"""A model gives the outputs that were asked for, under their names and in their order, from the
library's model to the file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_models import VIT, noise, quantized, randomized, vision_model, vit
from torch import Tensor, nn

from exporters.onnx_file import write, write_baseline
from exporters.trace import trace, trace_quantized
from marrq.artifact.folder import load, save
from marrq.errors import MarrqError
from marrq.models.checkpoint import Checkpoint
from marrq.models.load import load_model
from marrq.models.timm_output import with_outputs
from runtime.session import Model, SessionSettings


@torch.no_grad()
def test_outputs_of_timm_are_what_its_forward_passes_through():
    default = load_model("demo")
    several = load_model("demo", ("tokens", "logits", "features"))
    assert (default.outputs, several.outputs) == (("logits",), ("tokens", "logits", "features"))
    assert several.labels == default.labels
    pixels = torch.randn(2, *default.preprocessing.input_size)
    tokens, logits, features = several.module(pixels)
    model = default.module
    assert torch.equal(logits, model(pixels))
    assert torch.equal(tokens, model.forward_features(pixels))
    assert torch.equal(model.head(features), logits)
    # An embedding has no classes, whatever the model was trained for.
    assert load_model("demo", ("features",)).labels == ()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (("boxes",), "gives no output 'boxes': choose from logits, features, tokens"),
        (("logits", "logits"), "are not 1 to 16 different names"),
        (("../x",), "are not 1 to 16 different names"),
        (("",), "are not 1 to 16 different names"),
    ],
)
def test_outputs_that_a_model_does_not_give_are_refused(outputs: tuple[str, ...], message: str):
    with pytest.raises(MarrqError, match=message):
        load_model("demo", outputs)


@pytest.mark.parametrize(
    "names", [[], ["a b"], "logits", [5], ["x"] * 2, [f"o{i}" for i in range(17)]]
)
def test_an_artifact_with_other_outputs_than_names_is_refused(names: object, tmp_path: Path):
    save(quantized(vit(), noise(4), "W8A8", "rtn"), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model"]["outputs"] == ["logits"]
    config["model"]["outputs"] = names
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MarrqError, match="is damaged"):
        load(tmp_path / "a")


class _Logits(nn.Module):
    """Logits of a shape without the batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.new_zeros(len(pixels), *self.shape)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((3,), ("cat", "dog", "eel")),
        # Maps of a segmenter.
        ((3, 8, 8), ("cat", "dog", "eel")),
        # Boxes of a detector, whose last class is none.
        ((10, 4), ("cat", "dog", "eel", "no object")),
        ((10, 6), ()),
    ],
)
def test_dense_logits_have_labels_if_an_axis_has_as_many_entries(
    shape: tuple[int, ...], labels: tuple[str, ...]
):
    terms = vision_model(vit()).preprocessing
    names = ["cat", "dog", "eel"]
    assert Checkpoint(_Logits(*shape), {}, terms, names, ("logits",)).labels() == labels


def several_outputs() -> nn.Module:
    """A ViT that gives its logits, which read one token, and all tokens, which no pass may drop."""
    return with_outputs(randomized(timm.create_model(**VIT)), ("logits", "tokens"))


@pytest.mark.parametrize("flavor", ["integer", "fp32", "fp16"])
def test_a_file_gives_all_outputs_of_torch_also_where_a_pass_drops_unread_tokens(
    flavor: str, tmp_path: Path
):
    float_model = several_outputs()
    source = replace(vision_model(float_model), outputs=("logits", "tokens"))
    if flavor == "integer":
        made = replace(
            quantized(several_outputs(), noise(8), "W4A8", "rtn,token-weights=off"),
            outputs=source.outputs,
        )
        module = made.module
        write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    else:
        module = float_model
        write_baseline(source, flavor, tmp_path / "m.onnx")
    file = Model(tmp_path / "m.onnx", SessionSettings(threads=1))
    assert [(output.name, output.dims, output.kind) for output in file.outputs] == [
        ("logits", (5,), "classes"),
        ("tokens", (17, 64), "dense"),
    ]
    pixels = noise(5, seed=3)
    with torch.no_grad():
        expected = dict(zip(source.outputs, module(pixels), strict=True))
    given = file.run_all(pixels.numpy())
    np.testing.assert_array_equal(given["logits"], file.run(pixels.numpy()))
    for name, output in expected.items():
        a, b = output.flatten(1).double().numpy(), given[name].reshape(5, -1).astype(float)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert np.median(cosine) >= 0.9999, name


def test_outputs_of_a_graph_have_the_names_that_the_trace_was_given():
    graph = trace(several_outputs(), (3, 32, 32), 20, ("classes", "rest")).graph
    assert [value.name for value in graph.outputs] == ["classes", "rest"]
