"""Compare what two commits make of the demo: tensors of its artifacts, outputs of its graphs.

    python tests/same_codes.py COMMIT                 this working tree against COMMIT
    python tests/same_codes.py COMMIT --keep FOLDER   keep what COMMIT gave, for the next comparison

For each case (a scheme with its options) `marrq quantize demo` must write the same
`model.safetensors`, by SHA-256, and each flavour that can express the scheme must export a graph
that gives the same outputs on 64 images, bit for bit. Prints one line a comparison and exits with
1 if any differs.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

REPOSITORY = Path(__file__).parents[1]
SAMPLES = "64"
IMAGES = 64

CASES = {
    "W4A8": [],
    "W4A4-per-token": ["--scheme", "W4A4", "--activations", "per-token"],
    "W3A8": ["--scheme", "W3A8"],
    "W2A8-srr": ["--scheme", "W2A8", "--lowrank", "srr:8"],
    "W4A8-rotated": ["--rotate"],
    "W4A8-g80": ["--scheme", "W4A8-g80"],
    "W4A16-g80": ["--scheme", "W4A16-g80"],
    "W4A16-g32-sym": ["--scheme", "W4A16-g32-sym"],
    "W4A8-e8": ["--scheme", "W4A8-e8"],
    "W8A8": ["--scheme", "W8A8"],
}
"""Options of `marrq quantize`, by the name of the case. Groups have 80 or 32 inputs, because the
demo's linears have 160 or 640, which 64 and 128 do not divide."""

FLAVORS = {
    "integer": ["--flavor", "integer"],
    "integer-no-fuse": ["--flavor", "integer", "--no-fuse"],
    "matmulnbits": ["--flavor", "matmulnbits"],
    "matmulnbits-level-4": ["--flavor", "matmulnbits", "--accuracy-level", "4"],
    "qdq": ["--flavor", "qdq"],
    "qdq-symmetric": ["--flavor", "qdq", "--symmetric"],
    "fp32": ["--flavor", "fp32"],
    "fp16": ["--flavor", "fp16"],
}
"""Options of `marrq export`, by the name of the file. If a flavour refuses a scheme, there is no
file."""

DRIVER = """
import sys
from marrq.cli import main
for line in sys.stdin:
    main(line.split())
"""
"""Runs one command line a line, in one process: starting marrq takes longer than an export."""


def make(tree: Path, output: Path) -> None:
    """Quantize and export every case with the checkout `tree`."""
    output.mkdir(parents=True, exist_ok=True)
    commands = []
    for case, options in CASES.items():
        artifact = output / case
        if not artifact.exists():
            arguments = ["quantize", "demo", "--samples", SAMPLES, "-o", str(artifact)]
            commands.append([*arguments, *options])
        for flavor, chosen in FLAVORS.items():
            file = output / f"{case}.{flavor}.onnx"
            if not file.exists():
                commands.append(
                    ["export", str(artifact), "--format", "onnx", "-o", str(file), *chosen]
                )
    text = "\n".join(" ".join(command) for command in commands)
    subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=text,
        text=True,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stderr=subprocess.DEVNULL,
        check=True,
    )


def outputs(file: Path) -> np.ndarray:
    """What a graph gives for 64 images of normal noise, [images, ...]."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [pixels] = session.get_inputs()
    images = np.random.default_rng(0).standard_normal((IMAGES, *pixels.shape[1:]), dtype=np.float32)
    return session.run(None, {pixels.name: images})[0]


def sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def differences(before: Path, after: Path) -> int:
    """Print each comparison; return how many differ."""
    found = 0
    for case in CASES:
        tensors = f"{case}/model.safetensors"
        same = sha256(before / tensors) == sha256(after / tensors)
        found += not same
        print(f"{'same' if same else 'DIFFERENT'}  {case}  {sha256(after / tensors)[:16]}")
        for flavor in FLAVORS:
            files = [folder / f"{case}.{flavor}.onnx" for folder in (before, after)]
            exist = [file.exists() for file in files]
            if not any(exist):
                continue
            same = all(exist) and np.array_equal(*map(outputs, files), equal_nan=True)
            found += not same
            print(f"{'same' if same else 'DIFFERENT'}  {case}  {flavor}", flush=True)
    return found


def main() -> None:
    """Make both sides and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before = chosen.keep or Path(scratch) / "before"
        tree, after = Path(scratch) / "tree", Path(scratch) / "after"
        worktree = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run(
            [*worktree, "add", "--quiet", "--detach", str(tree), chosen.commit], check=True
        )
        try:
            make(tree, before)
        finally:
            subprocess.run([*worktree, "remove", "--force", str(tree)], check=True)
        make(REPOSITORY, after)
        count = differences(before, after)
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
