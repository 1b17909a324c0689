"""`marrq bench`: accuracy, size and latency of exported files beside their float baselines."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from marrq.cli import common
from marrq.files import write_text

compared = partial(typer.Option, rich_help_panel="What is compared")
timed = partial(typer.Option, rich_help_panel="How latency is measured")
checked = partial(typer.Option, rich_help_panel="Checks and advice")

Paths = Annotated[list[Path], typer.Argument(help="Artifacts, or ONNX files of marrq export.")]
Flavor = Annotated[str | None, compared(help="integer, matmulnbits or qdq; default: by scheme.")]
Recommend = Annotated[
    bool, checked("--recommend", help="Measure every flavour of an artifact; name the best.")
]
MaxDrop = Annotated[
    float | None,
    checked(help="Exit with 3 if more points of top-1 are surely lost against fp32.", min=0.0),
]
Parity = Annotated[
    bool, checked("--parity", help="Find what loses: quantization, export or preprocessing.")
]
Throughput = Annotated[
    bool, timed("--throughput", help="Also images per second with 1, 2, 4 … --threads threads.")
]


def bench(
    paths: Paths,
    data: common.DataOption = None,
    flavor: Flavor = None,
    baseline: Annotated[list[str], compared(help="fp16 or fp32; repeat it.")] = ["fp16", "fp32"],
    batch: Annotated[list[int], timed(help="Batch size; may be repeated.", min=1)] = [1, 8],
    threads: common.ThreadsOption = None,
    provider: common.ProviderOption = "cpu",
    rounds: Annotated[int, timed(help="Rounds; each times every model in turn.", min=1)] = 5,
    seconds: Annotated[float, timed(help="Per model, batch size and round.", min=0.0)] = 1.0,
    parity: Parity = False,
    artifact: Annotated[list[Path], checked(help="For --parity: the ONNX file's artifact.")] = [],
    parity_images: Annotated[int, checked(help="For --parity: images, at random.", min=1)] = 256,
    throughput: Throughput = False,
    max_drop: MaxDrop = None,
    recommend: Recommend = False,
    json_file: common.JsonOption = None,
    page_file: Annotated[Path | None, common.output_option("--report", help="HTML page.")] = None,
) -> None:
    """Measure accuracy, size and latency of ONNX files beside their float baselines.

    marrq bench artifact --data IMAGES --json bench.json
    marrq bench model.onnx --max-drop 1.0 --batch 16
    marrq bench artifact --recommend --report bench.html
    """
    from marrq.workflows import bench as workflow
    from runtime.report.html import check_page, page
    from runtime.report.tables import sentences, tables

    if page_file is not None:
        check_page(page_file)
    options = workflow.BenchOptions(
        flavor=flavor, baselines=tuple(baseline), batches=tuple(batch), rounds=rounds,
        seconds=seconds, provider=provider, threads=threads, throughput=throughput,
        max_drop=max_drop, recommend=recommend, artifacts=tuple(artifact),
        parity_images=parity_images if parity else None,
    )  # fmt: skip
    report = workflow.bench(paths, data, options, common.say, common.progress_bars)
    common.write_report(json_file, report.to_json())
    if page_file is not None:
        write_text(page_file, page(report))
    common.stdout.print(*tables(report), sep="\n")
    for sentence in sentences(report):
        common.stdout.print(sentence, highlight=False, soft_wrap=True, markup=False)
    if report.gate is not None:
        for warning in report.gate.warnings:
            common.say(f"warning: {warning}")
        report.gate.demand()
