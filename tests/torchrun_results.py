"""Run by torchrun: quantizes small models together, and prints from the first process what came
out, as JSON."""

import json
import sys

import torch
from tiny_models import hashed, noise, quantized, swin, vit

from marrq.distributed import ONE_PROCESS, Processes, process_group

CASES = {
    "marr": (vit, "W4A8", "marr", "per-tensor"),
    "balanced, per token": (vit, "W4A4", "marr", "per-token"),
    "groups": (vit, "W3A8-g16", "exact", "per-tensor"),
    "edges": (vit, "W4A8-e8", "stream", "per-tensor"),
    "search by grid, branch": (vit, "W2A16", "marr-rescomp,alpha=grid,lowrank=srr:4", "per-tensor"),
    "salient columns": (vit, "W3A8", "marr,lowrank=serq:4", "per-tensor"),
    "rotated": (vit, "W4A8", "marr-gptaq,rotate=0", "per-tensor"),
    "windows": (swin, "W4A8", "gptq", "per-tensor"),
}


def results(processes: Processes = ONE_PROCESS) -> dict[str, str]:
    return {
        name: hashed(
            quantized(
                build(),
                noise(13),
                scheme,
                method,
                strategy=strategy,
                batch_size=2,
                processes=processes,
            )
        )
        for name, (build, scheme, method, strategy) in CASES.items()
    }


if __name__ == "__main__":
    with process_group(torch.device("cpu")) as joined_team:
        found = results(joined_team)
        if joined_team.is_first:
            json.dump(found, sys.stdout)
