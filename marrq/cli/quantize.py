"""`marrq quantize`: model and calibration images in, artifact out."""

from typing import TYPE_CHECKING, cast

from marrq.cli import common

if TYPE_CHECKING:
    from marrq.schemes import ActivationStrategy


def quantize(
    model: common.ModelArgument,
    *,
    data: common.DataOption = None,
    samples: common.SamplesOption = 256,
    seed: common.SeedOption = 0,
    scheme: common.SchemeOption = "W4A8",
    activations: common.ActivationsOption = "per-tensor",
    method: common.MethodOption = "marr",
    alpha: common.AlphaOption = None,
    feedback: common.FeedbackOption = None,
    lowrank: common.LowrankOption = None,
    rotate: common.RotateOption = False,
    refine: common.RefineOption = False,
    setting: common.SettingOption = [],
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
    from marrq.methods.spec import read_settings, with_settings
    from marrq.schemes import parse_scheme
    from marrq.workflows.checks import check_model, data_for
    from marrq.workflows.destination import Destination, folders_read
    from marrq.workflows.devices import choose_device

    # All that can be wrong without torch is checked first, so that a mistake is told at once.
    # What a setting is if it is asked for; that of the rotation is a seed.
    flags = {"rotate": "0" if rotate else None, "refine": "on" if refine else None}
    named = {"alpha": alpha, "feedback": feedback, "lowrank": lowrank, **flags}
    spec = with_settings(method, read_settings(named, setting))
    parsed_scheme = parse_scheme(scheme, cast("ActivationStrategy", activations))
    check_model(model)
    name = data_for(model, data, samples)
    destination = Destination(output, force, resume, work_dir, folders_read(model, data))
    destination.check(parsed_scheme, spec, samples, seed)
    chosen = choose_device(device)

    # From here on torch and timm are imported, which takes seconds.
    from marrq.distributed import process_group
    from marrq.models.images import find_images
    from marrq.models.load import load_model
    from marrq.pipeline.quantize import RunOptions
    from marrq.workflows.quantize import Recipe, note_of, quantize_to_folder

    loaded = load_model(model)
    # The model's class names say which folders there may be.
    images = find_images(name, "train", loaded.labels)
    recipe = Recipe(parsed_scheme, spec, samples, seed)
    stages = ("quantizing", "refining") if spec.refinement.on else ("quantizing",)
    with (
        process_group(chosen) as processes,
        # Of the processes of torchrun the first one alone draws.
        common.progress_bars(processes.is_first, **dict.fromkeys(stages)) as bars,
    ):
        run = RunOptions(
            chosen,
            processes,
            block_done=lambda done, count, new: bars[0].show(done, count, note_of(new)),
        )
        sentences = quantize_to_folder(loaded, images, recipe, destination, run, bars[-1].show)
    for sentence in sentences:
        common.say(sentence)
