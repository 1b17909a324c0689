"""`marrq bench`: accuracy, size and latency of exported files beside their float baselines."""

from marrq.cli import bench_options, common, device_options, gate_options
from marrq.files import write_text
from marrq.models.images.counts import GALLERY_IMAGES


def bench(
    paths: bench_options.Paths,
    data: common.DataOption = None,
    gallery: common.GalleryOption = GALLERY_IMAGES,
    classes: common.ClassesOption = None,
    flavor: bench_options.Flavor = None,
    weights_only: device_options.WeightsOnly = False,
    baseline: bench_options.Baselines = [],
    batch: bench_options.Batches = [1, 8],
    threads: common.ThreadsOption = None,
    device: device_options.Device = None,
    provider: device_options.Provider = None,
    cuda_graph: device_options.CudaGraph = False,
    rounds: bench_options.Rounds = 5,
    seconds: bench_options.Seconds = 1.0,
    parity: bench_options.Parity = False,
    artifact: bench_options.Artifacts = [],
    parity_images: bench_options.ParityImages = None,
    throughput: bench_options.Throughput = False,
    max_drop: gate_options.MaxDrop = None,
    min_cosine: gate_options.MinCosine = None,
    recommend: bench_options.Recommend = False,
    json_file: common.JsonOption = None,
    page_file: bench_options.Page = None,
) -> None:
    """Measure accuracy, size and latency of ONNX files beside their float baselines.

    marrq bench artifact --data IMAGES --json bench.json
    marrq bench model.onnx --data IMAGES --max-drop 1.0 --batch 16
    marrq bench embedder.onnx --data IMAGES --min-cosine 0.99
    marrq bench artifact --data IMAGES --recommend --report bench.html
    marrq bench artifact --data IMAGES --device gpu --weights-only --cuda-graph
    """
    from marrq.models.class_embeddings import load_classes
    from marrq.outputs import check_own_files
    from marrq.workflows.bench import bench as run
    from marrq.workflows.bench_options import BenchOptions, images_of_parity
    from runtime.report.html import check_page, page
    from runtime.report.tables import sentences, tables

    check_own_files(json_file, page_file)
    if page_file is not None:
        check_page(page_file)
    options = BenchOptions(
        flavor=flavor, weights_only=weights_only, baselines=tuple(baseline) or None,
        batches=tuple(dict.fromkeys(batch)), rounds=rounds, seconds=seconds, device=device,
        provider=provider, cuda_graph=cuda_graph, threads=threads, throughput=throughput,
        max_drop=max_drop, min_cosine=min_cosine, gallery_images=gallery, recommend=recommend,
        artifacts=tuple(artifact),
        parity_images=images_of_parity(parity, parity_images),
        classes=None if classes is None else load_classes(classes),
    )  # fmt: skip
    report = run(paths, data, options, common.say, common.progress_bars)
    common.write_report(json_file, report.to_json())
    if page_file is not None:
        write_text(page_file, page(report))
        common.say(f"wrote {page_file}")
    common.stdout.print(*tables(report), sep="\n")
    for sentence in sentences(report):
        common.stdout.print(sentence, highlight=False, soft_wrap=True)
    for model in report.models:
        if model.not_finite is not None:
            # The table has no room for more than the fact.
            common.say(f"warning: {model.name} {model.not_finite.sentence}")
    if report.gate is not None:
        common.warn(report.gate.warnings)
        report.gate.demand()
