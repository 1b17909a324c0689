"""How long does the fp32 baseline take, beside a trace of the same model that no pass has touched?

    python examples/float_baselines.py vit_small_patch16_224
    python examples/float_baselines.py local-dir:FOLDER --rounds 20

A low-bit file is compared with the baseline, so the baseline has to be the fastest float graph that
marrq can write. The script writes the untouched trace, the baseline for the CPU, and that for a
GPU, whose operators the CPU has too. It runs them on the CPU with one thread in interleaved rounds,
one session at a time. A time is the processor time of a run, which other programs on the machine
disturb less than the time on the clock. A ratio is the median over the rounds of the ratio of the
medians within a round.

A name of timm gives a model with random weights: the time does not depend on them. Any other name
is one of `marrq quantize`. The script prints JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import timm

from exporters.flavors.floating import FLOAT_FLAVORS
from exporters.opsets import IR_VERSIONS, OPSET
from exporters.trace import INPUT, trace
from marrq.models.load import load_model
from runtime.environment import describe_machine

SCHEMA = "marrq.float_baselines/1"
RUNS = {1: 6, 8: 3}
"""Runs of a session at each batch size, the first of which is a warm-up."""


def write_graphs(name: str, folder: Path) -> dict[str, Path]:
    """The file of each graph."""
    if timm.is_model(name):
        module = timm.create_model(name).eval()
        size = module.pretrained_cfg["input_size"]
    else:
        loaded = load_model(name)
        module, size = loaded.module, loaded.preprocessing.input_size
    graphs = {"untouched": trace(module, size, OPSET)}
    for device in ("cpu", "gpu"):
        graphs[device] = graphs["untouched"].clone()
        FLOAT_FLAVORS["fp32"]().rewrite(graphs[device], device)
    files = {}
    for kind, graph in graphs.items():
        graph.ir_version = IR_VERSIONS[graph.opset_imports[""]]
        files[kind] = folder / f"{kind}.onnx"
        ir.save(graph, files[kind])
    return files


def times(file: Path) -> dict[int, float]:
    """Median processor time of a run in milliseconds, by batch size."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    [pixels] = session.get_inputs()
    found = {}
    for batch, runs in RUNS.items():
        shape = (batch, *pixels.shape[1:])
        images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        spent = []
        for _ in range(runs):
            # With one thread the kernels run in this one.
            begin = time.thread_time()
            session.run(None, {INPUT: images})
            spent.append(1000 * (time.thread_time() - begin))
        found[batch] = float(np.median(spent[1:]))
    return found


def compared(rounds: list[dict[str, dict[int, float]]], batch: int) -> dict[str, float]:
    """Times in milliseconds at a batch size, and their ratios to that of the untouched trace."""
    found = {}
    for kind in rounds[0]:
        times_ms = np.array([one[kind][batch] for one in rounds])
        untouched_ms = np.array([one["untouched"][batch] for one in rounds])
        found[f"{kind}_ms"] = round(float(np.median(times_ms)), 2)
        found[f"{kind}_ratio"] = round(float(np.median(times_ms / untouched_ms)), 3)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=10)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = write_graphs(chosen.model, Path(scratch))
        rounds = [{kind: times(file) for kind, file in files.items()} for _ in range(chosen.rounds)]
    report = {
        "schema": SCHEMA,
        "model": chosen.model,
        "processor": describe_machine().processor,
        "onnxruntime": ort.__version__,
        "threads": 1,
        "rounds": chosen.rounds,
        "batches": {batch: compared(rounds, batch) for batch in RUNS},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
