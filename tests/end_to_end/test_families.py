"""Families of models end to end: from a checkpoint folder to an artifact and to every flavour,
which gives torch's outputs.

The table of families in marrq/models/README.md is what these tests find:
`python tests/end_to_end/test_families.py` prints it. All models are tiny and their weights random.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import timm
import torch
import transformers
from flavor_files import without_kernel
from safetensors.torch import save_file
from tiny_models import noise, randomized
from torch import Tensor, nn

from exporters.flavors import floating
from exporters.onnx_file import write, write_baseline
from exporters.opsets import OPSET
from exporters.trace import trace, trace_quantized
from marrq.artifact.folder import load, save
from marrq.errors import MarrqError
from marrq.methods.spec import parse_method
from marrq.models.load import VisionModel, load_model
from marrq.models.transformers_output import TransformersOutput
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings, QuantizedModel
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import parse_scheme
from runtime.session import Model, SessionSettings

README = Path(__file__).parents[2] / "marrq" / "models" / "README.md"
QUANTIZED = {"integer": "W4A8", "qdq": "W4A8", "matmulnbits": "W4A16", "folded": "W4A16"}
"""The scheme that is tried with each flavour."""

PARITY = {
    "integer": 0.9999,
    "qdq": 0.9999,
    "matmulnbits": 0.9999,
    "folded": 0.999,
    "fp32": 0.9999,
    "fp16": 0.999,
}
"""The least median cosine of torch's outputs and ONNX Runtime's; float16 has eleven bits."""

FOLDED_IN_FLOAT32 = 0.9999
"""The same of `folded --float32`."""


@dataclass(frozen=True, eq=False)
class Family:
    """A row of the table.

    model: a timm architecture or a class of transformers, built with `arguments` for images of
    `size` pixels.
    """

    name: str
    model: str
    arguments: dict[str, Any]
    size: int = 32
    note: str = ""

    @property
    def library(self) -> str:
        return "transformers" if hasattr(transformers, self.model) else "timm"

    @torch.no_grad()
    def write_checkpoint(self, folder: Path) -> Tensor:
        """A checkpoint as its library writes it, and the model's outputs for `noise`, as its
        library computes them."""
        if self.library == "timm":
            model = self._write_timm(folder)
        else:
            kind = getattr(transformers, self.model)
            inner = randomized(kind(kind.config_class(**self.arguments)))
            inner.save_pretrained(folder)
            transformers.ViTImageProcessor(
                size={"height": self.size, "width": self.size}
            ).save_pretrained(folder)
            model = TransformersOutput(inner)
        return model(self.images(4))

    def _write_timm(self, folder: Path) -> nn.Module:
        model = randomized(timm.create_model(self.model, **self.arguments))
        arguments = {name: value for name, value in self.arguments.items() if name != "num_classes"}
        preprocessing = {
            "input_size": [3, self.size, self.size],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
        }
        classes = self.arguments["num_classes"]
        config = {
            "architecture": self.model,
            "num_classes": classes,
            "model_args": arguments,
            "pretrained_cfg": preprocessing,
        }
        (folder / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / "model.safetensors")
        return model

    def images(self, count: int, seed: int = 0) -> Tensor:
        return noise(count, seed).repeat(1, 1, 2, 2)[..., : self.size, : self.size]


TIMM = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 5,
}
FEATURES = {**TIMM, "num_classes": 0}
WINDOWS = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 24,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_classes": 5,
}
PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
CLASSIFIER = {**PLAIN, "num_labels": 5}
STAGES = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 24,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
HYBRID = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40],
    "num_attention_heads": 2,
}

FAMILIES = (
    Family("ViT", "vit_tiny_patch16_224", TIMM),
    Family("DeiT, distilled", "deit_tiny_distilled_patch16_224", TIMM, note="mean of two heads"),
    Family("DINOv2, registers", "vit_small_patch14_reg4_dinov2", FEATURES, note="features"),
    Family("DINOv3", "vit_small_patch16_dinov3", FEATURES, note="features"),
    Family("Swin", "swin_tiny_patch4_window7_224", WINDOWS, 16),
    Family("Swin v2", "swinv2_tiny_window8_256", WINDOWS, 16),
    Family("EVA-02", "eva02_tiny_patch14_336", TIMM),
    Family("EVA-02, q, k and v apart", "eva02_base_patch14_448", TIMM),
    Family("BEiT", "beit_base_patch16_224", TIMM),
    Family("SigLIP", "vit_base_patch16_siglip_224", FEATURES, note="features"),
    Family("CLIP", "vit_base_patch16_clip_224", TIMM),
    Family("MobileViT", "mobilevit_xxs", {"num_classes": 5}, 64),
    Family(
        "MobileViT v2",
        "mobilevitv2_050",
        {"num_classes": 5},
        64,
        note="refused: its projections are convolutions",
    ),
    Family("ViT", "ViTForImageClassification", CLASSIFIER),
    Family("ViT", "ViTModel", PLAIN, note="features"),
    Family(
        "DeiT, distilled",
        "DeiTForImageClassificationWithTeacher",
        CLASSIFIER,
        note="mean of two heads",
    ),
    Family("DINOv2", "Dinov2ForImageClassification", CLASSIFIER),
    Family("DINOv2, registers", "Dinov2WithRegistersModel", PLAIN, note="features"),
    Family("DINOv3", "DINOv3ViTModel", PLAIN, note="features"),
    Family("Swin", "SwinForImageClassification", STAGES, 16),
    Family("Swin v2", "Swinv2ForImageClassification", STAGES, 16),
    Family(
        "BEiT", "BeitForImageClassification", {**CLASSIFIER, "use_relative_position_bias": True}
    ),
    Family("SigLIP", "SiglipVisionModel", PLAIN, note="features"),
    Family(
        "CLIP", "CLIPVisionModelWithProjection", {**PLAIN, "projection_dim": 16}, note="features"
    ),
    Family("MobileViT", "MobileViTForImageClassification", {**HYBRID, "num_labels": 5}, 64),
)


QUICK = ("vit_tiny_patch16_224", "mobilevitv2_050", "ViTForImageClassification")
"""One family of each library and one that is refused; the others are marked slow."""

CASES = [
    pytest.param(
        family,
        id=f"{family.library} {family.model}",
        marks=[] if family.model in QUICK else pytest.mark.slow,
    )
    for family in FAMILIES
]


@dataclass(frozen=True)
class Found:
    """What became of a family.

    difference: largest relative difference of the loaded model's outputs from its library's.
    output: logits or features.
    cosines: the median of each flavour; empty if the model was refused.
    in_float32, fp16_on_gpu: the median of `folded --float32`, and of `fp16` for a GPU.
    off_gpu: nodes of the files for GPUs that the CUDA provider has no kernel for.
    whole: paths of fused q, k and v that are one product in the integer file.
    """

    difference: float
    output: str
    cosines: dict[str, float]
    whole: tuple[str, ...]
    in_float32: float = 1.0
    fp16_on_gpu: float = 1.0
    off_gpu: tuple[str, ...] = ()


@cache
def found(family: Family) -> Found:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        folder.mkdir()
        expected = family.write_checkpoint(folder)
        model = load_model(f"local-dir:{folder}")
        with torch.no_grad():
            difference = float(
                (model.module(family.images(4)) - expected).abs().max() / expected.abs().max()
            )
        try:
            artifacts = {
                scheme: quantized(model, family, scheme, folder / scheme)
                for scheme in dict.fromkeys(QUANTIZED.values())
            }
        except MarrqError:
            return Found(difference, model.output, {}, ())
        with one_float_trace(model):
            for flavor in ("fp32", "fp16"):
                write_baseline(model, flavor, folder / f"{flavor}.onnx")
            write_baseline(model, "fp16", folder / "fp16 gpu.onnx", device="gpu")
        # Around the quantized linears the graphs of all schemes are the same.
        graph = trace_quantized(artifacts["W4A8"], "hash")
        for scheme, artifact in artifacts.items():
            traced = replace(graph, model=artifact)
            for flavor in (flavor for flavor, taken in QUANTIZED.items() if taken == scheme):
                write(traced, flavor, folder / f"{flavor}.onnx", device=DEVICE.get(flavor, "cpu"))
        # The trace of the last scheme, which is that of `folded`.
        write(traced, "folded", folder / "float32.onnx", {"float32": True}, device="gpu")
        sources = {
            flavor: artifacts[QUANTIZED[flavor]] if flavor in QUANTIZED else model
            for flavor in PARITY
        }
        cosines = {
            flavor: median_cosine(source, family, folder / f"{flavor}.onnx")
            for flavor, source in sources.items()
        }
        values = ir.load(folder / "integer.onnx").graph.initializers
        fused = (
            path for path in quantized_linears(artifacts["W4A8"].module) if path.endswith("qkv")
        )
        return Found(
            difference,
            model.output,
            cosines,
            tuple(path for path in fused if f"{path}.q.weight_codes" not in values),
            median_cosine(artifacts["W4A16"], family, folder / "float32.onnx"),
            median_cosine(model, family, folder / "fp16 gpu.onnx"),
            tuple(
                place
                for name in ("folded", "float32", "fp16 gpu")
                for place in without_kernel(folder / f"{name}.onnx")
            ),
        )


@contextmanager
def one_float_trace(model: VisionModel) -> Iterator[None]:
    """Inside, all float flavours of the model begin with one trace: a trace takes most of a test's
    time."""
    first = trace(model.module, model.preprocessing.input_size, OPSET, model.output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floating, "trace", lambda *_: first.clone())
        yield


def quantized(model: VisionModel, family: Family, scheme: str, folder: Path) -> QuantizedModel:
    """The artifact of a copy of the model, saved and loaded.

    Without scales in the norms, which would differ from scheme to scheme; tests/walk_families.py
    has them.
    """
    copied = replace(model, module=copy.deepcopy(model.module))
    settings = QuantizationSettings(
        parse_scheme(scheme),
        parse_method("rtn,equalize=off"),
        CalibrationRecord("noise", 4, 0, ""),
    )
    made = quantize(copied, family.images(4), settings, RunOptions(torch.device("cpu")))
    save(made, folder)
    return load(folder)


@torch.no_grad()
def median_cosine(model: VisionModel | QuantizedModel, family: Family, file: Path) -> float:
    """Of torch's and ONNX Runtime's outputs for 16 images."""
    pixels = family.images(16, seed=1)
    running = Model(file, SessionSettings(threads=1))
    assert [value.name for value in running.session.get_outputs()] == [model.output]
    a, b = model.module(pixels).flatten(1).numpy(), running.run(pixels.numpy()).reshape(16, -1)
    return float(np.median((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


DEVICE = {"folded": "gpu"}
"""What a flavour is written for, if not for a CPU."""

HEADINGS = ("family", "library", "model tried", "quantize", *PARITY, "note")


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def row(family: Family) -> str:
    """The family's line in the README of marrq/models."""
    seen = found(family)
    columns = ["yes" if seen.cosines else "–"]
    columns += [
        "yes" if seen.cosines.get(flavor, 0) >= least else "–" for flavor, least in PARITY.items()
    ]
    return line((family.name, family.library, f"`{family.model}`", *columns, family.note))


def table_in_the_readme() -> list[str]:
    return (
        README.read_text()
        .partition("<!-- families -->\n")[2]
        .partition("<!-- /families -->")[0]
        .splitlines()
    )


@pytest.mark.parametrize("family", CASES)
def test_the_readme_says_of_a_family_what_is_found(family: Family):
    assert row(family) in table_in_the_readme()


@pytest.mark.parametrize("family", CASES)
def test_a_loaded_model_is_that_of_its_library(family: Family):
    seen = found(family)
    assert seen.difference <= 1e-5
    assert (seen.output == "features") == (family.note == "features")
    assert not seen.whole
    assert seen.in_float32 >= FOLDED_IN_FLOAT32
    assert seen.fp16_on_gpu >= PARITY["fp16"]
    assert not seen.off_gpu


def test_the_readme_lists_the_families_and_no_others():
    names = [
        tuple(text.strip() for text in found_line.split("|")[1:4])
        for found_line in table_in_the_readme()
    ]
    assert names[2:] == [(family.name, family.library, f"`{family.model}`") for family in FAMILIES]


if __name__ == "__main__":
    print("\n".join([line(HEADINGS), line(("---",) * len(HEADINGS)), *map(row, FAMILIES)]))
