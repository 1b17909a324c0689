"""The estimate of what quantizing takes holds, and chooses the batch."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import noise, swin

from marrq.errors import MarrqError
from marrq.memory import Need, _Live, fitting_batch, need, parse_size

RUN = """
import json, sys, torch
from marrq.memory import need
from marrq.methods.settings import parse_method
from marrq.pipeline import CalibrationSet, quantize
from marrq.schemes import parse_scheme
from runtime.memory import resident_peak_mb
sys.path.insert(0, "tests")
from tiny_models import vision_model, vit
module = vit(embed_dim=384, depth=1, num_heads=6, mlp_ratio=4, img_size=112)
images, method = torch.randn(48, 3, 112, 112), parse_method(sys.argv[1])
estimate = need(module, images[:1], len(images), method.name, in_files=False).of(16)
torch.set_num_threads(1)
quantize(vision_model(module), images, CalibrationSet("noise", 48, 0, ""), parse_scheme("W4A8", "per-tensor"), method, torch.device("cpu"))
print(json.dumps([estimate, 1e6 * resident_peak_mb()]))
"""


@pytest.mark.parametrize("method", ["marr", "marr-gptaq"])
def test_the_estimate_is_no_less_than_what_is_taken_and_not_far_above(method: str):
    done = subprocess.run([sys.executable, "-c", RUN, method], capture_output=True, text=True, check=False, cwd=sys.path[0] + "/..")
    assert done.returncode == 0, done.stderr
    estimate, peak = json.loads(done.stdout)
    assert peak <= estimate <= 2 * peak


def test_the_batch_is_halved_until_it_fits():
    found = Need(fixed=1000, per_image=100, streams=50)
    assert [fitting_batch(found, limit, 16) for limit in (2650, 2649, 1450, 1249, 1150)] == [16, 8, 4, 1, 1]
    with pytest.raises(MarrqError, match=r"are too few: 0\.00 GB are needed with one image at a time .* lower --samples"):
        fitting_batch(found, 1149, 16)


def test_tokens_in_files_take_no_memory_and_more_images_more():
    in_files, few, many = (need(swin(), noise(1), count, "gptq", files).streams for count, files in ((8, True), (8, False), (16, False)))
    assert (in_files, many) == (0, 2 * few)
    assert few == 4 * 8 * 16 * 16 * 24 * 4  # images, tokens and channels of the first block, bytes


def test_live_bytes_are_counted_once_however_often_they_are_seen():
    with _Live() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)
        del x
        for _ in range(5):
            torch.ones(500)
        y = y + 1
    assert live.peak == 8000


@pytest.mark.parametrize(("text", "size"), [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MB", 512 * 10**6)])
def test_sizes_are_read(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "-1GB", "6gb", "1e3GB", ""])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(MarrqError, match="a size is a number with MB, GB, MiB, GiB"):
        parse_size(text)
