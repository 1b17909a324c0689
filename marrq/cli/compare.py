"""`marrq compare`: methods × schemes × seeds on one model, as a table, JSON and a plot."""

from functools import partial
from itertools import product, starmap

from marrq.cli import common, compare_options
from marrq.models.images.counts import GALLERY_IMAGES


def compare(
    model: common.ModelArgument,
    *,
    outputs: common.OutputsOption = None,
    classes: common.ClassesOption = None,
    data: common.DataOption = None,
    gallery: common.GalleryOption = GALLERY_IMAGES,
    samples: common.SamplesOption = None,
    seeds: compare_options.Seeds = 3,
    scheme: common.SchemesOption = ["W4A8"],
    method: common.MethodsOption = [],
    device: common.DeviceOption = "auto",
    ray: compare_options.Ray = None,
    output: compare_options.Output,
    plot: common.PlotOption = None,
) -> None:
    """Compare methods over several draws of the calibration images.

    marrq compare demo --method gptq --method marr -o compare.json
    marrq compare demo --scheme W4A4:per-token --seeds 5 -o compare.json --plot compare.svg
    """
    from marrq.methods.registry import METHODS
    from marrq.methods.spec import parse_method
    from marrq.models.class_embeddings import load_classes
    from marrq.outputs import check_own_files
    from marrq.schemes import parse_scheme
    from marrq.workflows import checks
    from marrq.workflows.devices import choose_device
    from runtime.report.comparison import SCHEMA, ComparisonReport, markdown, table

    # All that can be wrong without torch is checked first, and not told after hours.
    methods, schemes = [*map(parse_method, method or METHODS)], [*map(parse_scheme, scheme)]
    checks.check_float_model(model)
    given = None if classes is None else load_classes(classes)
    name = checks.calibration_data_for(model, data, samples)
    checks.check_data(name)
    known = {} if samples is None else {"samples": samples}
    checks.check_comparison(output, {"schema": SCHEMA, "model": model, **known})
    check_own_files(output, plot)
    if plot is not None:
        from runtime.report.plots import check_plot, plot_comparison

        check_plot(plot)
    # A cluster may have GPUs if this machine has none.
    kind = device if ray is not None and device in ("cpu", "cuda") else choose_device(device).type

    from marrq.workflows.compare import Combination, Task
    from marrq.workflows.compare import compare as run_comparison
    from marrq.workflows.compare_on_ray import runs_on_ray

    # Seeds vary slowest: runs of one seed share the full-precision tokens.
    combinations = [*dict.fromkeys(starmap(Combination, product(range(seeds), schemes, methods)))]
    distribute = None if ray is None else partial(runs_on_ray, ray)
    task = Task(model, name, samples, kind, gallery, common.names_in(outputs), given)
    with common.progress_bars(runs=len(combinations)) as [bar]:
        found = run_comparison(task, combinations, output, bar.show, distribute)
    common.warn(found["warnings"])
    report = ComparisonReport.read(found)
    common.stdout.print(table(report))
    common.stdout.print(markdown(report), highlight=False, soft_wrap=True)
    if plot is not None:
        plot_comparison(report, plot)
