"""Checkpoints as training writes them: prefixes, files of torch, wrappers of one library in the
other, adapters; and what is said if weights do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from marrq.errors import MarrqError
from marrq.models.load import VisionModel, build, load_model
from marrq.models.weights import Misfit, shared_prefix, weights_file

Weights = dict[str, Tensor]

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}


@pytest.fixture
def with_weights(tiny_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """The name of a copy of the tiny timm folder, whose weights a function has changed."""

    def changed(change: Callable[[Weights], Weights]) -> str:
        shutil.copytree(tiny_folder, tmp_path / "changed")
        weights = load_file(tiny_folder / "model.safetensors")
        save_file(change(weights), tmp_path / "changed" / "model.safetensors")
        return f"local-dir:{tmp_path / 'changed'}"

    return changed


@pytest.fixture
def of_torch(tiny_folder: Path, tmp_path: Path) -> Callable[[object, str], str]:
    """The name of a copy of the tiny timm folder with a file of weights that torch saves."""

    def saved(content: object, name: str) -> str:
        folder = tmp_path / "torch"
        folder.mkdir(exist_ok=True)
        shutil.copy(tiny_folder / "config.json", folder)
        torch.save(content, folder / name)
        return f"local-dir:{folder}"

    return saved


def same(a: VisionModel, b: VisionModel) -> bool:
    """Whether two models have the same weights under the same names."""
    return a.source.weights_sha256 == b.source.weights_sha256


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_that_all_weights_share_is_dropped_and_said(
    prefix: str, tiny: str, with_weights: Callable[..., str]
):
    name = with_weights(lambda weights: {prefix + key: value for key, value in weights.items()})
    model = load_model(name)
    assert same(model, load_model(tiny))
    assert model.notes == (f"{prefix!r} before all names of weights was dropped",)


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_a_prefix_that_some_weights_have_is_not_dropped(
    prefix: str, with_weights: Callable[..., str]
):
    name = with_weights(
        lambda weights: {
            (prefix + key if "blocks" in key else key): value for key, value in weights.items()
        }
    )
    with pytest.raises(MarrqError, match=r"lacks \w+\.blocks\.0.* and \d+ more; .*lacks blocks"):
        load_model(name)


def test_a_prefix_is_found_only_if_all_names_fit():
    wanted = ["weight", "block.weight"]
    assert shared_prefix(["a.b.weight", "a.b.block.weight"], wanted) == "a.b."
    assert shared_prefix(wanted, wanted) == ""
    assert shared_prefix(["a.weight", "a.block.weight", "a.extra"], wanted) == ""
    assert shared_prefix(["a.weight", "b.block.weight"], wanted) == ""
    assert shared_prefix([], []) == ""


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "model_ema", "model"])
def test_weights_inside_a_training_checkpoint_are_found(
    key: str, tiny: str, tiny_folder: Path, of_torch: Callable[[object, str], str]
):
    weights = load_file(tiny_folder / "model.safetensors")
    # A moving average wins over the weights that it averages.
    others = {} if key in ("state_dict", "model") else {"state_dict": {"other": torch.zeros(1)}}
    name = of_torch({"epoch": 3, "arch": "vit", **others, key: weights}, "checkpoint.pth.tar")
    assert same(load_model(name), load_model(tiny))


def test_a_checkpoint_of_lightning_is_read(
    tiny: str, tiny_folder: Path, of_torch: Callable[[object, str], str]
):
    weights = load_file(tiny_folder / "model.safetensors")
    wrapped = {f"net.{key}": value for key, value in weights.items()}
    name = of_torch({"state_dict": wrapped, "epoch": 1, "hyper_parameters": {"lr": 1.0}}, "a.ckpt")
    assert same(load_model(name), load_model(tiny))


class _Code:
    """What a pickle may hold besides tensors."""


def test_a_pickle_that_could_run_code_is_refused(of_torch: Callable[[object, str], str]):
    with pytest.raises(MarrqError, match="could run code; give it as safetensors"):
        load_model(of_torch({"state_dict": {}, "callback": _Code()}, "model.pth"))


def test_of_several_files_of_weights_none_is_guessed(tmp_path: Path):
    with pytest.raises(MarrqError, match="no weights"):
        weights_file(tmp_path)
    for name in ("epoch1.pth", "epoch2.pth"):
        (tmp_path / name).touch()
    with pytest.raises(MarrqError, match=r"2 files .*epoch1\.pth and epoch2\.pth"):
        weights_file(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert weights_file(tmp_path).name == "model.safetensors"


def test_a_head_of_another_size_is_named_with_both_shapes(with_weights: Callable[..., str]):
    name = with_weights(lambda w: {**w, "head.weight": w["head.weight"][:2].clone()})
    with pytest.raises(MarrqError) as refused:
        load_model(name)
    message = str(refused.value)
    assert message.startswith(f"cannot load model {name!r}: its weights do not fit")
    assert message.endswith("head.weight is [2, 48] in the checkpoint, [3, 48] in the model")
    assert "\n" not in message


def test_weights_that_are_missing_are_named_and_counted(with_weights: Callable[..., str]):
    name = with_weights(lambda weights: {k: v for k, v in weights.items() if "norm" not in k})
    with pytest.raises(MarrqError, match=r"checkpoint lacks blocks\.0\.norm1\.\w+, .* and 8 more$"):
        load_model(name)


def test_a_misfit_names_each_kind_and_says_how_many_more_there_are():
    zeros = torch.zeros
    misfit = Misfit.between(
        {"a": zeros(2), "x": zeros(1), "y": zeros(1), "z": zeros(1)}, {"a": zeros(3), "b": zeros(1)}
    )
    assert str(misfit.error()).endswith(
        "the model lacks x, y and 1 more; the checkpoint lacks b; a is [2] in the checkpoint, [3] "
        "in the model"
    )
    assert not Misfit.between({"a": zeros(2)}, {"a": zeros(2)})


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("arguments", [TIMM, None])
def test_a_folder_of_transformers_wrapper_of_timm_is_a_model_of_timm(
    prefix: str, arguments: dict[str, int] | None, tmp_path: Path
):
    name = "vit_tiny_patch16_224" if arguments else "test_vit"
    settings = dict(timm.create_model(name, **(arguments or {})).pretrained_cfg)
    config = transformers.TimmWrapperConfig(
        architecture=name,
        model_args=arguments,
        pretrained_cfg=settings,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    theirs = transformers.TimmWrapperForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(f"{prefix}{tmp_path}")
    assert model.labels == ("a", "b", "c")
    assert "'timm_model.'" in model.notes[0]
    pixels = torch.randn(2, *model.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(model.module(pixels), theirs(pixels).logits)
        again = build(model.source)
        again.load_state_dict(model.module.state_dict())
        assert torch.equal(again(pixels), theirs(pixels).logits)


def test_the_wrapper_without_a_classifier_gives_features(tmp_path: Path):
    settings = dict(timm.create_model("vit_tiny_patch16_224", **TIMM).pretrained_cfg)
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=TIMM, pretrained_cfg=settings
    )
    theirs = transformers.TimmWrapperModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.outputs == ("features",)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.module(pixels), theirs(pixels).pooler_output)


def test_a_config_that_does_not_say_how_images_are_prepared_is_refused(
    with_weights: Callable[..., str],
):
    name = with_weights(lambda weights: weights)
    file = Path(name.removeprefix("local-dir:")) / "config.json"
    config = json.loads(file.read_text())
    del config["pretrained_cfg"]
    file.write_text(json.dumps(config))
    with pytest.raises(MarrqError, match=r"how images were prepared .*\"pretrained_cfg\""):
        load_model(name)


def test_a_folder_of_an_old_release_of_timm_is_read(
    tiny: str, tiny_folder: Path, of_torch: Callable[[object, str], str]
):
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    name = of_torch(weights, "pytorch_model.bin")
    settings = {"input_size": [3, 160, 160], "mean": [0.4] * 3, "std": [0.3] * 3}
    old = {"architecture": "test_vit", "num_classes": 3, "labels": ["a", "b", "c"], **settings}
    (Path(name.removeprefix("local-dir:")) / "config.json").write_text(json.dumps(old))
    model = load_model(name)
    assert model.labels == ("a", "b", "c")
    assert model.preprocessing.mean == (0.4, 0.4, 0.4)


def test_a_checkpoint_on_the_hub_is_read_as_a_folder_is(
    tiny: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    config = json.loads((tiny_folder / "config.json").read_text())
    settings = {**config["pretrained_cfg"], "label_names": config["label_names"]}
    weights = load_file(tiny_folder / "model.safetensors")
    monkeypatch.setattr(
        "marrq.models.timm_models.load_model_config_from_hf",
        lambda place: (settings, config["architecture"], config["model_args"]),
    )
    monkeypatch.setattr(
        "marrq.models.timm_models.load_state_dict_from_hf",
        lambda place, name: {f"timm_model.{key}": value for key, value in weights.items()},
    )
    model, expected = load_model("hf-hub:someone/something"), load_model(tiny)
    assert same(model, expected)
    assert (model.labels, model.preprocessing) == (expected.labels, expected.preprocessing)
    assert "'timm_model.'" in model.notes[0]


def test_an_adapter_is_named_with_the_way_out(tmp_path: Path):
    about = {"peft_type": "LORA", "base_model_name_or_path": "google/vit-base-patch16-224"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(MarrqError, match=r"adapter \(LORA\).*google/vit-base.*merge_and_unload"):
        load_model(str(tmp_path))


def test_a_file_of_weights_is_told_from_a_folder(tmp_path: Path):
    file = tmp_path / "model.pth"
    torch.save({}, file)
    for name in (str(file), f"local-dir:{file}"):
        with pytest.raises(MarrqError, match="is a file: give a folder"):
            load_model(name)


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "vit"
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def changed_in_place(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_prefix_is_dropped_from_a_checkpoint_of_transformers(prefix: str, vit_folder: Path):
    whole = load_model(str(vit_folder))
    changed_in_place(vit_folder, lambda w: {prefix + key: value for key, value in w.items()})
    model = load_model(str(vit_folder))
    assert same(model, whole)
    assert repr(prefix) in model.notes[0]


def test_weights_of_transformers_that_are_missing_or_of_another_shape_are_named(vit_folder: Path):
    weights = load_file(vit_folder / "model.safetensors")
    head = "classifier.weight"
    changed_in_place(vit_folder, lambda w: {k: v for k, v in w.items() if k != head})
    with pytest.raises(MarrqError, match=r"checkpoint lacks classifier\.weight$"):
        load_model(str(vit_folder))
    changed_in_place(vit_folder, lambda w: {**weights, head: torch.zeros(7, 32)})
    with pytest.raises(MarrqError, match=r"classifier\.weight is \[7, 32\] in .*\[2, 32\] in the"):
        load_model(str(vit_folder))


def test_a_tower_of_a_whole_checkpoint_loads_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    text = {key: value for key, value in VIT.items() if key not in ("image_size", "patch_size")}
    vision = {**VIT, "projection_dim": 16}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)
    capfd.readouterr()
    assert load_model(str(tmp_path)).outputs == ("image_embeds",)
    assert capfd.readouterr() == ("", "")


def test_an_infinite_bound_in_a_buffer_is_no_broken_weight(
    tiny: str, monkeypatch: pytest.MonkeyPatch
):
    original = timm.create_model

    def with_bound(*arguments: object, **keywords: object) -> torch.nn.Module:
        model = original(*arguments, **keywords)
        model.register_buffer("bound", torch.tensor(torch.inf), persistent=False)
        model._non_persistent_buffers_set.discard("bound")
        return model

    monkeypatch.setattr("marrq.models.timm_models.timm.create_model", with_bound)
    monkeypatch.setattr(
        "marrq.models.timm_models._file_tensors",
        lambda file: {**load_file(file), "bound": torch.tensor(torch.inf)},
    )
    assert load_model(tiny).module.bound == torch.inf


def test_an_encoder_that_wants_more_than_pixels_is_refused_by_name(
    vit_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def forward(self: object, pixel_values: Tensor, grid_thw: Tensor) -> None:
        raise AssertionError

    monkeypatch.setattr(transformers.ViTForImageClassification, "forward", forward)
    with pytest.raises(
        MarrqError, match=r"ViTForImageClassification cannot .* 'grid_thw'\): choose"
    ):
        load_model(str(vit_folder))


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_the_encoder_of_a_masked_auto_encoder_is_read_as_a_vit(tmp_path: Path, kind: str):
    """As marrq/models/README.md tells."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    config = transformers.ViTMAEConfig(
        **sizes, **decoder, intermediate_size=24, image_size=32, patch_size=8, mask_ratio=0.0
    )
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {"model_type": "vit", "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = load_model(str(tmp_path))
    pixels, encoder = torch.randn(2, 3, 32, 32), getattr(theirs, "vit", theirs)
    # Noise in ascending order leaves the patches where they are.
    in_order = torch.arange(16.0).expand(2, 16)
    with torch.no_grad():
        expected = encoder(pixel_values=pixels, noise=in_order).last_hidden_state
        assert torch.allclose(model.module(pixels), expected, atol=1e-5)


def test_the_image_encoder_of_sam_is_taken_from_the_whole_model(tmp_path: Path):
    image = {"image_size": 32, "patch_size": 4}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 24}
    config = transformers.SamConfig(
        vision_config={**vision, **image, "output_channels": 8, "global_attn_indexes": [1]},
        prompt_encoder_config={"hidden_size": 8, **image},
        mask_decoder_config={"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 8},
    )
    theirs = transformers.SamModel(config).eval()
    theirs.save_pretrained(tmp_path)
    transformers.SamImageProcessor(
        size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    model, pixels = load_model(str(tmp_path)), torch.randn(2, 3, 32, 32)
    assert model.outputs == ("last_hidden_state",)
    with torch.no_grad():
        assert torch.equal(model.module(pixels), theirs.get_image_embeddings(pixels))
