"""`marrq quantize`: model and calibration images in, artifact out."""

from typing import TYPE_CHECKING, cast

from marrq.cli import budget_options, common

if TYPE_CHECKING:
    from marrq.schemes import ActivationStrategy


def quantize(
    model: common.ModelArgument,
    *,
    outputs: common.OutputsOption = None,
    data: common.DataOption = None,
    samples: common.SamplesOption = None,
    seed: common.SeedOption = 0,
    scheme: common.SchemeOption = None,
    activations: common.ActivationsOption = "per-tensor",
    method: common.MethodOption = "marr",
    alpha: common.AlphaOption = None,
    feedback: common.FeedbackOption = None,
    lowrank: common.LowrankOption = None,
    rotate: common.RotateOption = False,
    refine: common.RefineOption = False,
    setting: common.SettingOption = [],
    budget: budget_options.Budget = None,
    max_size: budget_options.MaxSize = None,
    max_drop: budget_options.MaxDrop = None,
    sensitivity: budget_options.SensitivityFile = None,
    device: common.DeviceOption = "auto",
    work_dir: common.WorkDirOption = None,
    resume: common.ResumeOption = False,
    output: common.OutputOption,
    force: common.ForceOption = False,
) -> None:
    """Quantize a pretrained vision transformer to a low-bit artifact.

    marrq quantize demo -o artifact
    marrq quantize vit_base_patch16_224 --data IMAGES --scheme W4A8 -o artifact
    torchrun --nproc-per-node 2 -m marrq quantize demo -o artifact
    """
    from marrq.budget import budget_of, check_method, scheme_of
    from marrq.workflows.checks import calibration_data_for, check_float_model
    from marrq.workflows.destination import Destination, folders_read
    from marrq.workflows.devices import choose_device

    # All that can be wrong without torch is checked first, so that a mistake is told at once.
    named = {"alpha": alpha, "feedback": feedback, "lowrank": lowrank}
    spec = common.method_spec(method, setting, named, rotate=rotate, refine=refine)
    limit = budget_of(budget, max_size, max_drop, sensitivity)
    check_method(spec, limit, resume)
    parsed_scheme = scheme_of(scheme, cast("ActivationStrategy", activations), limit)
    check_float_model(model)
    name = calibration_data_for(model, data, samples)
    destination = Destination(output, force, resume, work_dir, folders_read(model, data))
    destination.check(parsed_scheme, spec, samples, seed)
    chosen = choose_device(device)

    # From here on torch and timm are imported, which takes seconds.
    from marrq.distributed import process_group
    from marrq.models.load import load_model
    from marrq.workflows.budget import images_for, quantize_within, stages_of
    from marrq.workflows.quantize import Recipe
    from marrq.workflows.sensitivity import Progress

    loaded = load_model(model, common.names_in(outputs))
    images = images_for(name, loaded.labels, limit)
    recipe = Recipe(parsed_scheme, spec, images.train.samples(samples), seed)
    stages = stages_of(recipe, limit)
    with (
        process_group(chosen) as processes,
        # Of the processes of torchrun the first one alone draws.
        common.progress_bars(processes.is_first, **dict.fromkeys(stages)) as bars,
    ):
        shows = {stage: bar.show for stage, bar in zip(stages, bars, strict=True)}
        progress = Progress.of(chosen, processes, shows)
        sentences = quantize_within(loaded, images, recipe, limit, destination, progress)
    for sentence in sentences:
        common.say(sentence)
