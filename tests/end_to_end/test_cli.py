"""Commands do what the README says, and bad input is one sentence, an exit code, and nothing
half-written."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch

import marrq
from marrq.cli import main
from marrq.schemes import parse_scheme
from runtime.measure.accuracy import PairedDrop

README = Path(__file__).parents[2] / "README.md"
FEW = ["--samples", "32"]
ONE_ROUND = split("--batch 1 --rounds 1 --seconds 0")


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_the_demo(somewhere: Path):
    """The first block that quantizes, with the model and the data of the demo."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    block = next(block for block in blocks if "marrq quantize" in block)
    lines = [line for line in block.splitlines() if line.startswith("marrq ")]
    commands = [split(line, comments=True)[1:] for line in lines]
    assert {"quantize", "export", "bench"} <= {words[0] for words in commands}
    quick = {
        "quantize": FEW,
        "bench": ["--rounds", "1", "--seconds", "0"],
        "compare": [*FEW, "--seeds", "1"],
    }
    for words in commands:
        named = ["demo" if word in ("MODEL", "IMAGES") else word for word in words]
        assert main([*named, *quick.get(words[0], [])]) == 0, words
        for option, file in itertools.pairwise(named):
            if option in ("-o", "--output", "--json", "--plot", "--report"):
                assert Path(file).exists(), file


@pytest.mark.slow
def test_the_bench_report_has_the_schema_it_names(
    demo_artifact: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [*ONE_ROUND, "--batch", "2", "--data", "demo", "--json", "b.json"]
    assert main(["bench", str(demo_artifact), *arguments]) == 0
    report = json.loads(Path("b.json").read_text())
    shared = {"schema", "environment", "data", "models", "gate", "recommendation", "warnings"}
    assert set(report) == {*shared, "gallery"}
    assert report["gate"] is report["recommendation"] is None
    assert set(report["data"]) == {"path", "images", "hash"}
    assert [(model["flavor"], model["role"]) for model in report["models"]] == [
        ("fp16", "baseline"),
        ("fp32", "baseline"),
        ("integer", "candidate"),
    ]
    for model in report["models"]:
        about = {
            "name",
            "path",
            "role",
            "flavor",
            "device",
            "scheme",
            "method",
            "size_bytes",
            "bits_per_weight",
        }
        speed = {"latency", "load_ms", "throughput", "executed", "executed_on"}
        memory = {"peak_memory_mb", "peak_gpu_memory_mb"}
        quality = {"accuracy", "agreement", "not_finite", "audit", "precision", "parity"}
        # What embeddings and dense outputs have, and what a refinement did.
        others = {"quantization", "embedding", "outputs", "refinement"}
        assert set(model) == about | quality | others | speed | memory
        shares = {
            "top1",
            "top1_low",
            "top1_high",
            "top5",
            "top5_low",
            "top5_high",
            "agreement",
            "divergence",
        }
        assert set(model["accuracy"]) == shares | {"images", "against", "hits"}
        assert (
            model["accuracy"]["top1_low"]
            < model["accuracy"]["top1"]
            < model["accuracy"]["top1_high"]
        )
        for row, batch in zip(model["latency"], (1, 2), strict=True):
            assert set(row) == {
                "batch",
                "p50_ms",
                "p90_ms",
                "p99_ms",
                "images_per_s",
                "rounds_ms",
                "ratio_fp16",
                "ratio_fp32",
            }
            assert row["batch"] == batch
        assert model["load_ms"] > 0
        assert model["throughput"] == []
        assert model["executed_on"] == {"CPUExecutionProvider": sum(model["executed"].values())}
        against = model["accuracy"]["against"]
        if model["name"] == "fp32":
            assert against is None
        else:
            assert set(against) == {
                "baseline",
                "drop",
                "drop_low",
                "drop_high",
                "only_baseline",
                "only_model",
                "p_value",
            }
            assert against["baseline"] == "fp32"
            assert against["drop"] == pytest.approx(
                report["models"][1]["accuracy"]["top1"] - model["accuracy"]["top1"]
            )
    assert [model["scheme"] for model in report["models"]] == ["fp16", "fp32", "W4A8"]
    linears = [row for row in report["models"][2]["audit"] if row["nominal"] == "W4A8"]
    assert len(linears) == 16
    assert all(row["integer"] and row["reason"] is None for row in linears)
    assert [model["precision"]["kernel_weight_bits"] for model in report["models"]] == [
        32,
        32,
        8,
    ]  # the CPU casts float16
    sizes = {model["flavor"]: model["size_bytes"] for model in report["models"]}
    assert sizes["integer"] < 0.2 * sizes["fp32"]
    assert (
        report["models"][2]["executed"]["MatMulIntegerToFloat"] == 24
    )  # 16 linears, q, k and v apart
    assert report["models"][2]["accuracy"]["agreement"] >= 0.95
    printed = capsys.readouterr()
    assert "fp32" in printed.out
    assert "\x1b" not in printed.err  # no bars where stderr is no terminal
    assert max(map(len, printed.out.splitlines())) <= 80


@pytest.fixture(scope="module")
def tiny_artifact(tiny: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a scheme that two flavours, one of them in two variants, can express."""
    folder = tmp_path_factory.mktemp("tiny") / "artifact"
    few = ["--data", str(image_folder), "--samples", "8", "--method", "rtn", "--scheme", "W4A16"]
    assert main(["quantize", tiny, *few, "-o", str(folder)]) == 0
    return folder


def bench_tiny(artifact: Path, images: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a quick bench beside fp32 alone."""
    quick = [*ONE_ROUND, "--baseline", "fp32", "--data", str(images), "--json", "b.json"]
    return main(["bench", str(artifact), *quick, *options]), json.loads(Path("b.json").read_text())


@pytest.mark.slow
def test_throughput_is_measured_for_every_batch_size_and_number_of_threads(
    tiny_artifact: Path, image_folder: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    code, report = bench_tiny(
        tiny_artifact, image_folder, "--throughput", "--threads", "3", "--batch", "2"
    )
    assert code == 0
    for model in report["models"]:
        assert [(row["batch"], row["threads"]) for row in model["throughput"]] == [
            (b, t) for t in (1, 2, 3) for b in (1, 2)
        ]
        assert all(row["images_per_s"] > 0 for row in model["throughput"])
    assert "images per second" in capsys.readouterr().out


@pytest.mark.slow
def test_a_gate_on_few_images_is_undecided_and_says_how_many_would_tell(
    tiny_artifact: Path, image_folder: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    code, report = bench_tiny(tiny_artifact, image_folder, "--max-drop", "1.0")
    assert code == 0
    [verdict] = report["gate"]["models"]
    assert verdict["verdict"] == "undecided"  # 24 images cannot tell a point
    assert verdict["images_needed"] > 24
    printed = capsys.readouterr()
    assert verdict["sentence"] in printed.out
    assert "warning: the gate of 1 points is undecided for W4A16 rtn" in printed.err


def test_a_gate_that_failed_exits_with_three_and_leaves_the_report(
    tiny_artifact: Path,
    image_folder: Path,
    somewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    drops = iter([PairedDrop(0.5, 0.3, 0.7, 12, 0, 0.0)])
    monkeypatch.setattr("runtime.measure.judge.paired_drop", lambda baseline, model: next(drops))
    code, report = bench_tiny(tiny_artifact, image_folder, "--max-drop", "1.0")
    assert code == 3
    assert report["gate"]["models"][0]["verdict"] == "failed"
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "marrq: W4A16 rtn lost more than 1 points against fp32"
    )


@pytest.mark.slow
def test_recommend_measures_every_flavour_that_can_express_the_scheme(
    tiny_artifact: Path, image_folder: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    code, report = bench_tiny(tiny_artifact, image_folder, "--recommend")
    assert code == 0
    names = [model["name"] for model in report["models"] if model["role"] == "candidate"]
    flavors = ("folded float32", "matmulnbits", "matmulnbits level 4", "qdq")
    assert sorted(names) == [f"W4A16 rtn {flavor}" for flavor in flavors]
    assert list(report["recommendation"]) == ["size", "latency", "accuracy"]
    printed = capsys.readouterr().out
    for choice in report["recommendation"].values():
        assert set(choice) == {"name", "flavor", "value", "sentence"}
        assert choice["name"] in names
        assert choice["sentence"] in printed


def test_recommend_does_not_take_a_flavour(
    tiny_artifact: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", str(tiny_artifact), "--recommend", "--flavor", "qdq"]) == 1
    assert "leave out --flavor qdq" in capsys.readouterr().err


def test_evaluate_sets_an_artifact_beside_its_float_model(demo_artifact: Path, somewhere: Path):
    assert main(["evaluate", str(demo_artifact), "--json", "e.json"]) == 0
    models = json.loads(Path("e.json").read_text())["models"]
    assert list(models) == ["float", "W4A8 per-tensor marr-stream"]
    assert models["float"]["agreement"] == 1
    assert 0.95 <= models["W4A8 per-tensor marr-stream"]["agreement"] < 1.0001


@pytest.mark.slow
def test_a_flavour_that_cannot_express_the_scheme_leaves_nothing_behind_and_another_takes_it(
    somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(split("quantize demo --scheme W4A16 --method gptq --samples 16 -o a")) == 0
    assert main(["export", "a", "--flavor", "integer", "-o", "m.onnx"]) == 1
    assert not Path("m.onnx").exists()
    assert "use --flavor matmulnbits or qdq" in capsys.readouterr().err.replace("\n", " ")
    for options in ([], ["--flavor", "qdq"], ["--flavor", "matmulnbits", "--accuracy-level", "4"]):
        assert main(["export", "a", *options, "-o", "m.onnx", "--force"]) == 0
    assert main(["bench", "a", *ONE_ROUND, "--baseline", "fp32", "--json", "b.json"]) == 0
    assert json.loads(Path("b.json").read_text())["models"][1]["executed"]["MatMulNBits"] == 24
    assert main(["evaluate", "a"]) == 0


QUANTIZE = split("quantize demo -o out")
COMPARE = split("compare demo -o out")
BAD_INPUT = {
    "scheme": ([*QUANTIZE, "--scheme", "W5A7"], "unknown scheme 'W5A7'"),
    "group": ([*QUANTIZE, "--scheme", "W4A16-mxint-g8"], "unknown scheme"),
    "budget": ([*QUANTIZE, "--budget", "three"], "bits a weight, such as 3.0, or auto"),
    "budget below widths": ([*QUANTIZE, "--budget", "1.5"], "more than 2 bits a weight"),
    "size": ([*QUANTIZE, "--max-size", "10"], "a size such as 10MB"),
    "two budgets": (
        [*QUANTIZE, *split("--budget 3 --max-size 10MB")],
        "--budget 3 and --max-size 10MB are both given",
    ),
    "budget with widths": (
        [*QUANTIZE, *split("--budget 3 --scheme W4A8-sym")],
        "write --scheme WmixA8-sym, not W4A8-sym",
    ),
    "widths without a budget": ([*QUANTIZE, "--scheme", "WmixA8"], "give --budget or --max-size"),
    "auto without a limit": ([*QUANTIZE, "--budget", "auto"], "give both or neither"),
    "limit without auto": ([*QUANTIZE, *split("--budget 3 --max-drop 1")], "give both or neither"),
    "costs without a budget": ([*QUANTIZE, "--sensitivity", "mine"], "serves a budget"),
    "budget with a branch": (
        [*QUANTIZE, *split("--budget 3 --lowrank srr:4")],
        "not the low-rank branch srr:4",
    ),
    "auto goes on": (
        [*QUANTIZE, *split("--budget auto --max-drop 1 --resume")],
        "leave out --resume",
    ),
    "costs of a branch": (split("sensitivity demo --set lowrank=srr:4"), "not the low-rank branch"),
    "costs of a width": (split("sensitivity demo --scheme W4A8"), "write --scheme WmixA8"),
    "activations": ([*QUANTIZE, "--activations", "per-row"], "per-row"),
    "method": ([*QUANTIZE, "--method", "awq"], "unknown method 'awq'"),
    "alpha without a search": (
        [*QUANTIZE, "--method", "gptq", "--alpha", "grid"],
        "has no α",
    ),
    "alpha": ([*QUANTIZE, "--alpha", "newton"], "newton"),
    "feedback": ([*QUANTIZE, "--feedback", "both"], "both"),
    "setting given twice": (
        [*QUANTIZE, "--set", "alpha=grid", "--alpha", "pid"],
        "--alpha and --set alpha=grid are both given",
    ),
    "low-rank branch": ([*QUANTIZE, "--lowrank", "svd:4"], "srr, qera, lqer"),
    "costs of a refinement": (
        split("sensitivity demo --set refine=on"),
        "which no refinement changes: leave out refine",
    ),
    "gain": ([*QUANTIZE, "--set", "pid.speed=3"], "unknown setting 'pid.speed'"),
    "setting": ([*QUANTIZE, "--set", "order=1"], "unknown setting 'order'"),
    "data folder": ([*QUANTIZE, "--data", "nowhere"], "data folder 'nowhere' does not exist"),
    "no data": (split("quantize vit_tiny_patch16_224 -o out"), "pass --data"),
    "device": ([*QUANTIZE, "--device", "tpu"], "unknown device 'tpu'"),
    "output": (split("quantize demo -o mine"), "pass --force"),
    "no images": (split("quantize ./flat --data empty -o out"), "no images in 'empty'"),
    "no images to measure on": (split("evaluate demo --data empty"), "no images in 'empty'"),
    "few images": (
        [*QUANTIZE, "--data", "flat", "--samples", "3"],
        "'flat' has 2 images for calibration, fewer than the 3 samples",
    ),
    "output that is read": (
        split("quantize demo --data flat --samples 2 --force -o flat"),
        "output 'flat' is what --data reads",
    ),
    "exported checkpoint": (split("export model -o out"), "'model' is a model's checkpoint"),
    "inspected checkpoint": (split("inspect model"), "'model' is a model's checkpoint"),
    "exported config": (split("export model/config.json -o out"), "give 'model'"),
    "output below a file": (split("quantize demo -o mine/x"), "'mine' is a file"),
    "resumed below a file": (split("quantize demo --resume -o mine/x"), "'mine' is a file"),
    "demo below a file": (split("demo -o mine"), "'mine' is a file"),
    "doctor's version": (split("doctor mine --ort abc"), "'abc' is no version"),
    "inspected file": (split("inspect mine"), "'mine' is no ONNX file, or not the whole of one"),
    "compared scheme": ([*COMPARE, "--scheme", "W4A4:per-row"], "per-row"),
    "compared method": ([*COMPARE, "--method", "gptq,alpha=grid"], "has no α"),
    "compared data": ([*COMPARE, "--data", "nowhere"], "'nowhere' does not exist"),
    "benched file": (split("bench nowhere"), "'nowhere' does not exist"),
    "benched data": (split("bench mine --data nowhere"), "folder 'nowhere' does not exist"),
    "benched folder": (split("bench ."), "'.' is no artifact"),
    "inspected path": (split("inspect nowhere"), "'nowhere' does not exist"),
    "inspected folder": (split("inspect ."), "'.' is no artifact"),
    "exported artifact": (split("export nowhere -o out"), "'nowhere' does not exist"),
    "exported folder": (split("export . -o out"), "'.' is no artifact"),
    "exported format": (split("export mine -o out --format pickle"), "unknown format 'pickle'"),
    "exported flavour": (split("export mine -o out --flavor int4"), "int4"),
    "exported output": (split("export quantized -o mine"), "pass --force"),
    "evaluated data": (split("evaluate demo --data nowhere"), "'nowhere' does not exist"),
    "evaluated model": (split("evaluate local-dir:none"), "'none' does not exist"),
    "quantized model": (split("quantize ./none --data demo -o out"), "'./none' does not exist"),
    "quantized twice": (
        split("quantize quantized --data demo -o out"),
        "'quantized' is an artifact, quantized already",
    ),
    "comparison": (split("compare demo -o mine"), "'mine' is no comparison"),
    "baseline": (split("bench mine --baseline fp8"), "unknown baseline 'fp8'"),
    "flavour of a file": (split("bench mine --flavor qdq"), "'mine' is exported already"),
    "recommendation of a file": (split("bench mine --recommend"), "'mine' is exported already"),
}
"""Mistakes that need neither torch nor timm to be seen."""

SLOWER = {
    "model": (
        split("quantize no_such_model --data demo -o out"),
        "unknown model 'no_such_model', and no folder",
    ),
    "a slip in the model": (
        split("quantize vit_bas_patch16_224 --data demo -o out"),
        "(did you mean vit_base_patch16_224?)",
    ),
    "samples": (
        [*QUANTIZE, "--samples", "600"],
        "512 images for calibration, fewer than the 600 samples",
    ),
}


def answers(commands: dict[str, list[str]], missing: str = "") -> tuple[list[Any], str]:
    """Name, exit code and heavy imports of each command, run one after the other in one process;
    and what they wrote to stderr. missing: a package that is not installed."""
    code = """
import json, sys
if sys.argv[2]:
    sys.modules[sys.argv[2]] = None
from marrq.cli import main
from marrq.schemes import parse_scheme
heavy = {"torch", "timm", "transformers", "matplotlib", "ray"}
for name, arguments in json.loads(sys.argv[1]).items():
    print(json.dumps([name, main(arguments), sorted(heavy & set(sys.modules))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands), missing],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def with_mistakes(folder: Path) -> None:
    """What the commands of BAD_INPUT name: a file of no kind, folders of images, a checkpoint."""
    (folder / "mine").write_text("")
    (folder / "quantized").mkdir()
    (folder / "quantized/config.json").write_text('{"format": "marrq.artifact"}')
    for name in ("empty", "flat", "model"):
        (folder / name).mkdir()
    # Only their names are read.
    for name in ("a.png", "b.png"):
        (folder / "flat" / name).touch()
    (folder / "model" / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')


def test_a_mistake_is_told_before_anything_heavy_is_imported(somewhere: Path):
    """Modules are counted, not seconds: torch and timm take five of them."""
    with_mistakes(somewhere)
    found, _ = answers({name: arguments for name, (arguments, _) in BAD_INPUT.items()})
    assert found == [[name, 1, []] for name in BAD_INPUT]


def test_what_an_artifact_cannot_become_is_told_without_torch(somewhere: Path):
    (somewhere / "a").mkdir()
    scheme = asdict(parse_scheme("W4A16"))
    scheme["edges"] = scheme.pop("outer_layers")
    (somewhere / "a" / "config.json").write_text(json.dumps({"scheme": scheme}))
    (somewhere / "repository" / "vit" / "1").mkdir(parents=True)
    refused = {
        "export a --flavor integer -o m.onnx": "needs quantized activations",
        "bench a --flavour integer": "use --flavor matmulnbits or qdq",
        "export a --format triton -o repository": "pass another --model-version",
        "inspect a --plot a.jpg": "a plot is written as .png or .svg",
    }
    found, errors = answers({command: split(command) for command in refused})
    assert found == [[command, 1, []] for command in refused]
    for line, expected in zip(errors.splitlines(), refused.values(), strict=True):
        assert expected in line
    found, errors = answers({"": split("export a --format triton -o new")}, "tritonclient")
    assert found == [["", 1, []]]
    assert "pip install '.[serve]' in the clone" in errors


@pytest.mark.parametrize("case", [*BAD_INPUT, *SLOWER])
def test_bad_input_is_one_sentence_and_leaves_nothing(
    case: str, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    with_mistakes(somewhere)
    arguments, expected = (BAD_INPUT | SLOWER)[case]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("marrq: ")
    assert len(error.strip().splitlines()) == 1
    assert sorted(entry.name for entry in somewhere.iterdir()) == [
        *("empty", "flat", "mine", "model", "quantized"),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_never_replaced_by_another(
    somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*QUANTIZE, "--device", "cuda"]) == 1
    assert "device 'cuda' is not available" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"marrq {marrq.__version__}\n"


COMMANDS = ("quantize", "export", "bench", "evaluate", "inspect", "doctor", "compare", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_on_two_screens_and_shows_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith((f"marrq {command}", "torchrun")) for line in lines)


@pytest.mark.parametrize(
    "command", ["quantize", "quantize demo -o x --samples 1", "polish demo", "bench --batch 0 x"]
)
def test_wrong_usage_exits_with_two(command: str, somewhere: Path):
    assert main(split(command)) == 2
    assert list(somewhere.iterdir()) == []


def test_a_corrupt_image_is_named_and_nothing_is_written(
    tiny: str, image_folder: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    data = shutil.copytree(image_folder, somewhere / "data")
    for name in "01234567":
        (data / "train" / "dog" / f"{name}.png").write_bytes(b"no image")
    assert main(["quantize", tiny, "--data", str(data), "--samples", "24", "-o", "out"]) == 1
    assert ".png'" in capsys.readouterr().err
    assert not (somewhere / "out").exists()


def test_a_truncated_artifact_and_one_of_a_later_version_are_refused(
    demo_artifact: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    artifact = shutil.copytree(demo_artifact, somewhere / "a")
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    assert main(["export", "a", "-o", "m.onnx"]) == 1
    assert "upgrade marrq" in capsys.readouterr().err
    (artifact / "config.json").write_text(json.dumps(config))
    (artifact / "model.safetensors").write_bytes(
        (artifact / "model.safetensors").read_bytes()[:-100]
    )
    assert main(["bench", "a"]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert [entry.name for entry in somewhere.iterdir()] == ["a"]


@pytest.mark.slow
def test_an_output_that_exists_is_kept_without_force(
    demo_artifact: Path, somewhere: Path, capsys: pytest.CaptureFixture[str]
):
    Path("out").write_text("mine")
    assert main(QUANTIZE) == 1
    export = ["export", str(demo_artifact), "-o", "out"]
    assert main(export) == 1
    assert "pass --force" in capsys.readouterr().err
    assert main([*export, "--force"]) == 1
    assert "is no ONNX file of marrq's" in capsys.readouterr().err
    assert Path("out").read_text() == "mine"
    # What is replaced is a file of marrq's.
    Path("out").unlink()
    assert main(export) == 0
    assert main(export) == 1
    assert main([*export, "--force"]) == 0
    assert Path("out").stat().st_size > 100_000


def test_without_onnx_runtime_the_bench_says_which_extra_to_install(
    demo_artifact: Path, somewhere: Path
):
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        f"from marrq.cli import main; sys.exit(main(['bench', {str(demo_artifact)!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install '.[cpu]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_file_of_another_tool_is_refused(somewhere: Path, capsys: pytest.CaptureFixture[str]):
    from onnx import TensorProto, helper, save

    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in ("x", "y")
    ]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:]
    )
    save(
        helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)]),
        "other.onnx",
    )
    assert main(["bench", "other.onnx", "--data", "demo"]) == 1
    assert "was not written by `marrq export`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exporters", "runtime"])
def test_a_package_that_shadows_one_of_ours_is_named(name: str, somewhere: Path):
    shadow = somewhere / name / "__init__.py"
    shadow.parent.mkdir()
    shadow.write_text("")
    code = "from marrq.cli import main; import sys; sys.exit(main(['demo']))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=somewhere
    )
    assert result.returncode == 1
    assert f"{name!r} is shadowed by {shadow}" in result.stderr
