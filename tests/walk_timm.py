"""Architectures of timm at tiny size, one of each kind.

`SHRINK` has the arguments that make an architecture small: fewer blocks, fewer channels, smaller
images. All other choices of an architecture (norms, activations, positions, pooling, gates) stay as
timm made them. Many architectures do not let their caller choose all arguments, so `tiny` puts them
in where timm builds the class.

Two architectures that give the same output from the same weights are one kind, and the walk tries
the first of them.
"""

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from tiny_models import randomized
from torch import nn
from walked_kind import CLASSES, Kind

Arguments = dict[str, Any]

NATURAL = -1

PLAIN: Arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2}
FOUR: Arguments = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}
SWIN: Arguments = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "patch_size": 2}

SHRINK: dict[str, tuple[int, Arguments]] = {
    "beit": (0, PLAIN),
    "byoanet": (256, {}),
    "cait": (0, PLAIN),
    "coat": (64, {"embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1)}),
    "convit": (32, {"embed_dim": 8, "depth": 2, "num_heads": 4, "local_up_to_layer": 1}),
    "convmixer": (64, {"dim": 32, "depth": 2}),
    "convnext": (64, FOUR),
    "cpubone": (64, {"width_list": (16, 16, 32, 32, 32), "depth_list": (0, 1, 1, 1, 1)}),
    "crossvit": (NATURAL, {"embed_dim": (16, 32), "depth": ((1, 1, 0),), "num_heads": (2, 2)}),
    "csatv2": (64, {"transformer_depths": (0, 0, 1, 1), "depths": (1, 1, 2, 2)}),
    "davit": (64, {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4)}),
    "deepseek_vit": (84, PLAIN),
    "deit": (0, PLAIN),
    "edgenext": (64, {**FOUR, "depths": (1, 1, 2, 1)}),
    "efficientformer": (224, {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32)}),
    "efficientformer_v2": (
        64,
        {"depths": (1, 1, 2, 2), "embed_dims": (16, 16, 32, 32), "num_vit": 1, "mlp_ratios": 2},
    ),
    "efficientvim": (64, {"embed_dim": (16, 32, 32), "depths": (1, 1, 1)}),
    "efficientvit_mit": (64, {}),
    "efficientvit_msra": (64, {"depth": (1, 1, 1), "embed_dim": (48, 48, 48)}),
    "eva": (0, PLAIN),
    "fastvit": (64, {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64)}),
    "focalnet": (64, {"depths": (1, 1), "embed_dim": 32}),
    "gcvit": (64, {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (2, 2, 2, 2)}),
    "gemma4_vit": (
        96,
        {**PLAIN, "head_dim": 16, "intermediate_size": 64, "position_embedding_size": 64},
    ),
    "hiera": (64, {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "hieradet_sam2": (64, {"embed_dim": 16, "stages": (1, 2, 1, 1), "global_att_blocks": (2,)}),
    "iformer": (64, {**FOUR, "depths": (1, 1, 5, 5), "attn_groups": (0, 0, 1, 1)}),
    "inception_next": (64, FOUR),
    "levit": (
        64,
        {"embed_dim": (32, 32, 48), "depth": (1, 1, 1), "num_heads": (2, 2, 3), "key_dim": 16},
    ),
    "lowformer": (64, {"width_list": (16, 16, 32, 32, 32), "depth_list": (0, 1, 1, 1, 1)}),
    "mambaout": (64, FOUR),
    "maxxvit": (
        64,
        {"depths": (1, 1, 2, 1), "embed_dim": (32, 64, 128, 256), "stem_width": 32},
    ),
    "metaformer": (64, {**FOUR, "dims": (32, 32, 64, 64)}),
    "mlp_mixer": (0, {"num_blocks": 1, "embed_dim": 32}),
    "mobilenetv5": (128, {}),
    "mobilevit": (64, {}),
    "mvitv2": (64, {}),
    "naflexvit": (0, PLAIN),
    "nest": (32, {"depths": (1, 1, 1), "embed_dims": (16, 32, 32), "num_heads": (2, 2, 2)}),
    "nextvit": (64, {"depths": (3, 1, 5, 3)}),
    "pit": (0, {"base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 2)}),
    "pvt_v2": (
        64,
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)},
    ),
    "qwen3_vit": (64, {**PLAIN, "pos_embed_grid_size": 8}),
    "repvit": (64, {"embed_dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1)}),
    "sequencer": (
        56,
        {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
    ),
    "shvit": (128, {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "partial_dim": (8, 12, 16)}),
    "swiftformer": (64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}),
    "swin_transformer": (32, {**SWIN, "window_size": 4}),
    "swin_transformer_v2": (32, {**SWIN, "window_size": 4}),
    "swin_transformer_v2_cr": (32, SWIN),
    "tiny_vit": (
        64,
        {"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    ),
    "tnt": (32, {"embed_dim": 32, "inner_dim": 16, "depth": 1, "num_heads_outer": 2}),
    "twins": (
        64,
        {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 2, 1)},
    ),
    "visformer": (64, {"init_channels": 16, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3}),
    "vision_transformer": (0, PLAIN),
    "vision_transformer_hybrid": (64, {"depth": 1}),
    "vision_transformer_relpos": (0, PLAIN),
    "vision_transformer_sam": (
        64,
        {**PLAIN, "depth": 2, "window_size": 2, "global_attn_indexes": (1,)},
    ),
    "vitamin": (64, {"depth": 1}),
    "volo": (
        64,
        {"layers": (1, 1, 1, 1), "embed_dims": (32, 48, 48, 48), "num_heads": (2, 3, 3, 3)},
    ),
    "xcit": (0, PLAIN),
}
"""By module of timm: the side of an image in pixels (0: two patches; NATURAL: as the architecture
has it), and arguments of the class."""

MVIT: Arguments = {
    "depths": (1, 1, 1, 1),
    "embed_dim": (16, 16, 32, 32),
    "num_heads": (1, 1, 2, 2),
}
"""Fields of the configuration of an MViT."""

IF_SET = {"num_kv_heads": (1,), "parallel_depth": 1}
"""Arguments that are replaced if an architecture sets them."""


def kinds() -> Iterator[Kind]:
    """One architecture of each kind, with the names of the others."""
    found: dict[str, Kind] = {}
    for module in SHRINK:
        for name in timm.list_models(module=module):
            kind = Kind("timm", name, module, _side(module, name))
            try:
                key = _fingerprint(kind)
            # The walk tells what is wrong with it.
            except Exception:
                key = name
            found.setdefault(key, kind).same.append(name)
    for kind in found.values():
        kind.same.remove(kind.name)
    # Many names first, and each module once before any module twice.
    by_names = sorted(found.values(), key=lambda kind: -len(kind.same))
    firsts = {kind.group: kind for kind in reversed(by_names)}.values()
    yield from sorted(by_names, key=lambda kind: all(kind is not first for first in firsts))


def _side(module: str, name: str) -> int:
    """Side of the images of an architecture, in pixels."""
    side = SHRINK[module][0]
    if side == NATURAL:
        return int(timm.get_pretrained_cfg(name).input_size[-1])
    patch = re.search(r"(?:patch|_p|_b|s)(8|14|16|32)(?!\d)", name)
    return side or 2 * int(patch.group(1) if patch else 16)


@contextmanager
def tiny(kind: Kind) -> Iterator[None]:
    """Inside, timm builds the architectures of the kind's module at tiny size."""
    module = importlib.import_module(f"timm.models.{kind.group}")
    original = module.build_model_with_cfg

    def shrunk(model_cls: Any, *arguments: Any, **keywords: Any) -> nn.Module:
        # A subclass may take everything and pass it on.
        known = {name for part in model_cls.__mro__ for name in inspect.signature(part).parameters}
        changes = dict(SHRINK[kind.group][1])
        if "img_size" in known:
            changes["img_size"] = kind.size
        changes |= {name: value for name, value in IF_SET.items() if keywords.get(name)}
        if kind.group == "mvitv2":
            keywords["model_cfg"] = replace(keywords["model_cfg"], **MVIT)
        return original(model_cls, *arguments, **{**keywords, **changes})

    module.build_model_with_cfg = shrunk
    try:
        yield
    finally:
        module.build_model_with_cfg = original


def _built(kind: Kind) -> nn.Module:
    """The tiny model with random weights."""
    with tiny(kind):
        try:
            return randomized(timm.create_model(kind.name, num_classes=CLASSES))
        except TypeError as error:
            # An encoder has no classes.
            if "num_classes" not in str(error):
                raise
            return randomized(timm.create_model(kind.name))


@torch.no_grad()
def _fingerprint(kind: Kind) -> str:
    """What is equal for two architectures that compute the same."""
    model = _built(kind)
    output = model(kind.images(1))
    if not isinstance(output, torch.Tensor):
        return str(model)
    names = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    values = [round(value, 2) for value in output.flatten()[:20].tolist()]
    return str((type(model).__name__, names, values))


def write_checkpoint(kind: Kind, folder: Path) -> None:
    """A folder as timm writes it."""
    model = _built(kind)
    settings = {
        "input_size": [3, kind.size, kind.size],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    classes = getattr(model, "num_classes", 0)
    config = {"architecture": kind.name, "num_classes": classes, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    # safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
