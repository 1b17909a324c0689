"""`marrq sensitivity`: what each linear costs at each width, and what a size buys."""

from typing import TYPE_CHECKING, cast

from marrq.cli import budget_options, common

if TYPE_CHECKING:
    from marrq.schemes import ActivationStrategy


def sensitivity(
    model: common.ModelArgument,
    *,
    outputs: common.OutputsOption = None,
    data: common.DataOption = None,
    samples: common.SamplesOption = None,
    seed: common.SeedOption = 0,
    scheme: budget_options.MixedScheme = None,
    activations: common.ActivationsOption = "per-tensor",
    method: common.MethodOption = "marr",
    rotate: common.RotateOption = False,
    setting: budget_options.SettingOfCosts = [],
    device: common.DeviceOption = "auto",
    json_file: common.JsonOption = None,
    plot: common.PlotOption = None,
) -> None:
    """Show what each linear costs at each width, and the curve of size against divergence.

    marrq sensitivity demo
    marrq sensitivity vit_base_patch16_224 --data IMAGES --json costs.json --plot costs.svg
    marrq quantize vit_base_patch16_224 --data IMAGES --budget 3 --sensitivity costs.json -o a
    """
    from marrq.budget import Budget, check_costs, scheme_of
    from marrq.outputs import check_own_files
    from marrq.workflows.checks import calibration_data_for, check_float_model
    from marrq.workflows.devices import choose_device
    from runtime.report.plots import check_plot

    check_own_files(json_file, plot)
    spec = common.method_spec(method, setting, {}, rotate=rotate)
    check_costs(spec)
    mixed = scheme_of(scheme, cast("ActivationStrategy", activations), Budget())
    check_float_model(model)
    name = calibration_data_for(model, data, samples)
    chosen = choose_device(device)
    if plot is not None:
        check_plot(plot)

    # From here on torch and timm are imported, which takes seconds.
    from marrq.distributed import process_group
    from marrq.models.load import load_model
    from marrq.workflows.budget import images_for
    from marrq.workflows.quantize import Recipe
    from marrq.workflows.sensitivity import MEASURING, Progress, sensitivity_of
    from runtime.report.sensitivity import costs_table, plot_sensitivity, sizes_table
    from runtime.sensitivity import SensitivityReport

    loaded = load_model(model, common.names_in(outputs))
    images = images_for(name, loaded.labels, None).train
    recipe = Recipe(mixed, spec, images.samples(samples), seed)
    with (
        process_group(chosen) as processes,
        common.progress_bars(processes.is_first, measuring=None) as [bar],
    ):
        progress = Progress.of(chosen, processes, {MEASURING: bar.show})
        found = sensitivity_of(loaded, images, recipe, progress).to_json()
    # Every process has the same figures; one report is enough.
    if not processes.is_first:
        return
    common.warn([*loaded.notes, *images.noted()])
    common.write_report(json_file, found)
    report = SensitivityReport.read(found)
    if plot is not None:
        plot_sensitivity(report, plot)
        common.say(f"wrote {plot}")
    common.stdout.print(costs_table(report), sizes_table(report), sep="\n")
