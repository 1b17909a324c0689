"""Families of models end to end: from a checkpoint folder to an artifact and to every flavour,
which gives torch's outputs.

The table of families in marrq/models/README.md is what these tests find:
`python tests/end_to_end/test_families.py` prints it. All models are tiny and their weights random.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
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
from torch import Tensor

from exporters.flavors import floating
from exporters.onnx_file import write, write_baseline
from exporters.opsets import OPSET
from exporters.trace import trace, trace_quantized
from marrq.artifact.folder import load, save
from marrq.errors import MarrqError
from marrq.methods.spec import parse_method
from marrq.models.load import VisionModel, load_model
from marrq.models.named_outputs import OutputKind, output_kind
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
    outputs: that the user asks for; none for the default ones.
    frames: of a model of videos; none for a model of images.
    """

    name: str
    model: str
    arguments: dict[str, Any]
    size: int = 32
    note: str = ""
    outputs: tuple[str, ...] = ()
    frames: int | None = None

    @property
    def library(self) -> str:
        return "transformers" if hasattr(transformers, self.model) else "timm"

    @torch.no_grad()
    def write_checkpoint(self, folder: Path) -> Mapping[str, Tensor]:
        """A checkpoint as its library writes it, and the model's outputs for `noise` by name, as
        its library computes them."""
        if self.library == "timm":
            model, images = self._write_timm(folder), self.images(4)
            tokens, own = model.forward_features(images), model(images)
            return {"tokens": tokens, "logits": own, "features": own}
        kind = getattr(transformers, self.model)
        inner = randomized(kind(kind.config_class(**self.arguments)))
        inner.save_pretrained(folder)
        size = {"height": self.size, "width": self.size}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
        found: Mapping[str, Tensor] = inner(pixel_values=self.images(4))
        return found

    def _write_timm(self, folder: Path) -> Any:
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
        images = noise(count, seed).repeat(1, 1, 4, 4)[..., : self.size, : self.size]
        return images if self.frames is None else torch.stack([images] * self.frames, 1)


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
PYRAMID = {
    "image_size": 32,
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "num_labels": 5,
}
SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 48,
    "image_size": 32,
    "patch_size": 4,
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
}
MIXED = {
    "num_classes": 5,
    "img_size": 64,
    "depths": (1, 1),
    "embed_dim": (32, 32),
    "stem_width": 16,
}
STAGED = {
    "num_classes": 5,
    "embed_dims": (16, 32),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_sizes": (2, 2),
}
CROSS_COVARIANCE = {name: value for name, value in TIMM.items() if name != "patch_size"}
NAFLEX = {name: value for name, value in TIMM.items() if name != "img_size"}
SEGMENTER = {**{name: value for name, value in PYRAMID.items() if name != "image_size"}}
SEGMENTER["decoder_hidden_size"] = 24
DETECTOR = {**CLASSIFIER, "image_size": [32, 32], "num_detection_tokens": 6}
DETECTOR_OF_MAPS = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    ),
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
    "num_labels": 5,
}
DEPTH = {
    **PLAIN,
    "num_hidden_layers": 2,
    "backbone_out_indices": [0, 1],
    "neck_hidden_sizes": [8, 16],
    "reassemble_factors": [2, 0.5],
    "fusion_hidden_size": 16,
    "is_hybrid": False,
}
VIDEO = {**CLASSIFIER, "num_frames": 2}
VIDEOS = "refused: it takes videos"
CONVOLVED = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "depths": [1, 1, 1],
    "num_attention_heads": [2, 2, 2],
    "key_dim": [8, 8, 8],
    "num_labels": 5,
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
    Family("DeiT III", "deit3_small_patch16_224", TIMM),
    Family("FlexiViT", "flexivit_small", TIMM),
    Family("NaFlexViT", "naflexvit_base_patch16_gap", NAFLEX, note="one size of images"),
    Family("CaiT", "cait_xxs24_224", TIMM),
    Family("XCiT", "xcit_nano_12_p16_224", CROSS_COVARIANCE),
    Family("TinyViT", "tiny_vit_5m_224", STAGED),
    Family("MaxViT", "maxvit_pico_rw_256", MIXED, 64),
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
    Family("data2vec-vision", "Data2VecVisionForImageClassification", CLASSIFIER),
    Family("PVT v2", "PvtV2ForImageClassification", PYRAMID),
    Family("LeViT", "LevitForImageClassification", CONVOLVED, 64),
    Family("SegFormer", "SegformerForSemanticSegmentation", SEGMENTER, note="`logits` of pixels"),
    Family("YOLOS", "YolosForObjectDetection", DETECTOR, note="`logits` and `pred_boxes`"),
    Family(
        "DETR",
        "DetrForObjectDetection",
        DETECTOR_OF_MAPS,
        64,
        note="refused: its decoder reads the image beside its own tokens; take YOLOS",
    ),
    Family("DPT", "DPTForDepthEstimation", DEPTH, note="`predicted_depth`"),
    Family("SAM, image encoder", "SamVisionModel", SAM, note="`last_hidden_state`: a map"),
    Family(
        "DINOv2, tokens",
        "Dinov2Model",
        PLAIN,
        note="`last_hidden_state` and `pooler_output`, by `--outputs`",
        outputs=("last_hidden_state", "pooler_output"),
    ),
    Family("VideoMAE", "VideoMAEForVideoClassification", VIDEO, note=VIDEOS, frames=2),
    Family("TimeSformer", "TimesformerForVideoClassification", VIDEO, note=VIDEOS, frames=2),
)


QUICK = ("vit_tiny_patch16_224", "mobilevitv2_050", "ViTForImageClassification")
"""One family of each library and one that is refused; the others that load are marked slow."""

CASES = [
    pytest.param(
        family,
        id=f"{family.library} {family.model}",
        marks=[] if family.model in QUICK or family.frames else pytest.mark.slow,
    )
    for family in FAMILIES
]
LOADED = [case for case, family in zip(CASES, FAMILIES, strict=True) if not family.frames]


# Their q, k and v leave the linear in another order than `split_qkv` knows, or without one.
QKV_IN_ONE = (
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "tiny_vit_5m_224",
    "maxvit_pico_rw_256",
    "SamVisionModel",
)


@dataclass(frozen=True)
class Found:
    """What became of a family.

    difference: largest relative difference of the loaded model's outputs from its library's.
    outputs: kind of each output, by name.
    cosines: the median of each flavour, of the worst output; empty if the model was refused.
    in_float32, fp16_on_gpu: the median of `folded --float32`, and of `fp16` for a GPU.
    off_gpu: nodes of the files for GPUs that the CUDA provider has no kernel for.
    whole: paths of fused q, k and v that are one product in the integer file.
    refusal: the message, if the model was refused.
    """

    difference: float
    outputs: dict[str, OutputKind]
    cosines: dict[str, float]
    whole: tuple[str, ...]
    in_float32: float = 1.0
    fp16_on_gpu: float = 1.0
    off_gpu: tuple[str, ...] = ()
    refusal: str = ""


@cache
def found(family: Family) -> Found:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        folder.mkdir()
        expected = family.write_checkpoint(folder)
        try:
            model = load_model(f"local-dir:{folder}", family.outputs)
        except MarrqError as error:
            return Found(0, {}, {}, (), refusal=str(error))
        outputs = outputs_of(model, family.images(4))
        kinds = {
            name: output_kind(name, output.dim(), model.labels) for name, output in outputs.items()
        }
        difference = max(
            float((output - expected[name]).abs().max() / expected[name].abs().max())
            for name, output in outputs.items()
        )
        try:
            artifacts = {
                scheme: quantized(model, family, scheme, folder / scheme)
                for scheme in dict.fromkeys(QUANTIZED.values())
            }
        except MarrqError as error:
            return Found(difference, kinds, {}, (), refusal=str(error))
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
            kinds,
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
    first = trace(model.module, model.preprocessing.input_size, OPSET, model.outputs)
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
def outputs_of(model: VisionModel | QuantizedModel, pixels: Tensor) -> dict[str, Tensor]:
    found = model.module(pixels)
    several = found if isinstance(found, tuple) else (found,)
    return dict(zip(model.outputs, several, strict=True))


def median_cosine(model: VisionModel | QuantizedModel, family: Family, file: Path) -> float:
    """Of torch's and ONNX Runtime's outputs for 16 images; the least of the outputs."""
    pixels = family.images(16, seed=1)
    running = Model(file, SessionSettings(threads=1))
    given, wanted = running.run_all(pixels.numpy()), outputs_of(model, pixels)
    # The same names in the same order.
    assert list(given) == list(wanted)
    assert [output.name for output in running.outputs] == list(wanted)
    medians = []
    for name, expected in wanted.items():
        a, b = expected.flatten(1).double().numpy(), given[name].reshape(16, -1).astype(float)
        medians.append(
            np.median((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
        )
    return float(min(medians))


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


@pytest.mark.parametrize("family", LOADED)
def test_a_loaded_model_is_that_of_its_library(family: Family):
    seen = found(family)
    assert seen.difference <= 1e-5
    kinds = set(seen.outputs.values())
    assert (kinds == {"features"}) == (family.note == "features")
    # Outputs that are no logits of classes and no embedding are named in the table.
    named = all(f"`{name}`" in family.note for name in seen.outputs)
    assert ("dense" in kinds) == named or seen.refusal
    assert bool(seen.whole) == (family.model in QKV_IN_ONE)
    assert seen.in_float32 >= FOLDED_IN_FLOAT32
    assert seen.fp16_on_gpu >= PARITY["fp16"]
    assert not seen.off_gpu


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            "VideoMAEForVideoClassification",
            "VideoMAEForVideoClassification takes videos, which marrq does not read: choose a "
            "model of images",
        ),
        (
            "TimesformerForVideoClassification",
            "TimesformerForVideoClassification takes videos, which marrq does not read: choose a "
            "model of images",
        ),
        (
            "DetrForObjectDetection",
            "block 'model.model.decoder.layers.0' gives other tokens alone than in the model: what "
            "else it reads depends on the images",
        ),
        ("mobilevitv2_050", "the model has no repeated blocks with linear layers"),
    ],
)
def test_a_refused_family_says_why(model: str, reason: str):
    [family] = [family for family in FAMILIES if family.model == model]
    assert family.note.startswith("refused: ")
    assert found(family).refusal.startswith(reason)


def test_the_readme_lists_the_families_and_no_others():
    names = [
        tuple(text.strip() for text in found_line.split("|")[1:4])
        for found_line in table_in_the_readme()
    ]
    assert names[2:] == [(family.name, family.library, f"`{family.model}`") for family in FAMILIES]


if __name__ == "__main__":
    print("\n".join([line(HEADINGS), line(("---",) * len(HEADINGS)), *map(row, FAMILIES)]))
