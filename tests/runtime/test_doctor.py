"""The doctor names what keeps a file from being loaded, here or on a server, and what would help;
what may be worse only warns."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from exporters.onnx_file import write
from exporters.trace import TracedModel
from marrq.cli import main
from runtime.audit.inspect import inspect_file
from runtime.doctor.diagnose import diagnose
from runtime.doctor.file import examine_file
from runtime.doctor.machine import (
    SATURATES,
    WITHOUT_CUDA,
    ExaminedMachine,
    ImportedRuntime,
)
from runtime.doctor.releases import (
    NEWEST,
    TRIED,
    loads_under,
    lowest_onnxruntime,
    parse_version,
)
from runtime.report.diagnosis import diagnosis_table
from runtime.session import SessionSettings


def value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def written(
    file: Path,
    *nodes: onnx.NodeProto,
    opset: int = 20,
    ir_version: int = 8,
    tensors: tuple[onnx.TensorProto, ...] = (),
    **more: Any,
) -> Path:
    """A model from x to y [4, 4]; one Identity without nodes. more: goes to make_model."""
    nodes = nodes or (helper.make_node("Identity", ["x"], ["y"]),)
    graph = helper.make_graph(nodes, "g", [value("x", 4, 4)], [value("y", 4, 4)], tensors)
    domains = {node.domain for node in nodes if node.domain}
    opsets = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(domain, 1) for domain in domains),
    ]
    onnx.save(helper.make_model(graph, ir_version=ir_version, opset_imports=opsets, **more), file)
    return file


def with_data_beside_it(file: Path) -> Path:
    """A product with a tensor in `weights.bin`; returns where that is."""
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.load(
        written(file, product, tensors=(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),))
    )
    onnx.save(model, file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return file.with_name("weights.bin")


def doctored(*arguments: str | Path, folder: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    code = main(["doctor", *map(str, arguments), "--json", str(folder / "d.json")])
    return code, json.loads((folder / "d.json").read_text())


def machine(*flags: str) -> ExaminedMachine:
    """A machine with those flags and nothing wrong."""
    return ExaminedMachine(
        processor="P",
        processor_flags=flags,
        cores=2,
        system="S",
        python="3.11",
        int8_dot_products=tuple(flag for flag in flags if flag in ("avx_vnni", "asimddp")),
        packages={},
        onnxruntime=ImportedRuntime("1.32.0", ("CPUExecutionProvider",), None),
        torch=None,
        gpu=None,
    )


def test_the_report_has_the_schema_it_names(integer_file: Path, tmp_path: Path):
    code, alone = doctored(folder=tmp_path)
    assert (code, alone["files"], alone["models"], alone["server"], alone["problems"]) == (
        0,
        [],
        [],
        None,
        [],
    )
    code, report = doctored(integer_file, "--ort", "99.1", folder=tmp_path)
    assert code == 0
    assert report["schema"] == alone["schema"] == "marrq.doctor/1"
    assert report["machine"]["onnxruntime"]["version"] == ort.__version__
    assert report["machine"]["onnxruntime"]["providers"] == ort.get_available_providers()
    assert {"torch", "onnx", "timm", "transformers"} < set(report["machine"]["packages"])
    [file] = report["files"]
    assert (report["server"], file["loads_on_server"]) == ("99.1", True)


def test_our_file_needs_what_its_metadata_says_and_our_operators_are_no_warning(
    integer_file: Path, tmp_path: Path
):
    metadata = {entry.key: entry.value for entry in onnx.load(integer_file).metadata_props}
    lowest = metadata["marrq.lowest_onnxruntime"]
    code, report = doctored(integer_file, "--ort", lowest, folder=tmp_path)
    assert (code, report["files"][0]["lowest_onnxruntime"], report["files"][0]["stated"]) == (
        0,
        lowest,
        True,
    )
    assert report["files"][0]["operators"]["com.microsoft"] > 0
    assert report["files"][0]["producer"].startswith("marrq ")
    assert not any("com.microsoft" in warning for warning in report["warnings"])
    code, report = doctored(integer_file, "--ort", "1.18", folder=tmp_path)
    assert (code, report["files"][0]["loads_on_server"]) == (3, False)
    assert f"{lowest} is the first that was seen to run it" in report["problems"][0]
    assert "or export with --no-fuse" in report["problems"][0]
    # What is done already is no advice.
    model = onnx.load(integer_file)
    next(entry for entry in model.opset_import if entry.domain == "").version = 21
    onnx.save(model, tmp_path / "older.onnx")
    _, report = doctored(tmp_path / "older.onnx", "--ort", "1.18", folder=tmp_path)
    assert any("or quantize to other bits, which need" in one for one in report["problems"])


def test_an_opset_too_new_for_the_server_names_the_lowest_version_that_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = written(tmp_path / "m.onnx", opset=22)
    assert main(["doctor", str(file), "--ort", "1.18"]) == 3
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert sentence == "marrq: 1 problem is found, see above"
    _, report = doctored(file, "--ort", "1.18", folder=tmp_path)
    [problem] = report["problems"]
    assert problem.startswith("ONNX Runtime 1.18 is too old")
    assert (
        "1.21.0 is the first that was seen to load opset 22 with IR version 8; update the server"
        in problem
    )
    assert main(["doctor", str(file), "--ort", "1.21"]) == 0


def test_a_file_newer_than_all_that_was_tried_is_refused_for_tried_servers_only(
    tmp_path: Path,
):
    facts = examine_file(written(tmp_path / "m.onnx", opset=1000))
    assert facts.lowest_onnxruntime is None
    tried, later = (diagnose(machine(), [facts], version) for version in (NEWEST, "99.0"))
    assert [report.files[0].loads_on_server for report in (tried, later)] == [False, None]
    assert f"no ONNX Runtime up to {NEWEST} was seen to load opset 1000" in tried.problems[-1]
    assert tried.problems[-1] == later.warnings[-1]
    assert len(later.problems) == 1  # it does not load here either
    assert "cannot load" in later.problems[0]


@pytest.mark.parametrize(
    ("server", "lowest", "loads"),
    [
        ("1.18", "1.18.0", True),
        ("1.18.1", "1.18.0", True),
        ("1.24", "1.24.1", True),  # any release of 1.24
        ("1.24.0", "1.24.1", False),
        ("1.9", "1.18.0", False),  # numbers, not text
        ("2", "1.18.0", True),
        (NEWEST, None, False),
        ("99", None, None),
    ],
)
def test_versions_are_compared_number_by_number_as_far_as_they_are_given(
    server: str, lowest: str | None, loads: bool | None
):
    assert loads_under(server, lowest) is loads


def test_this_onnx_runtime_loads_what_the_table_says_and_nothing_later(tmp_path: Path):
    options = ort.SessionOptions()
    options.log_severity_level = 4

    def opens(opset: int, ir_version: int) -> bool:
        try:
            ort.InferenceSession(
                str(written(tmp_path / "m.onnx", opset=opset, ir_version=ir_version)),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception:
            return False
        return True

    here = parse_version(ort.__version__)
    known = [highest for release, highest in TRIED.items() if parse_version(release) <= here]
    assert opens(*known[-1])
    assert all(opens(opset, ir_version) for opset, ir_version in known)
    if here <= parse_version(NEWEST):
        opset, ir_version = known[-1]
        assert not opens(opset + 1, ir_version)
        assert not opens(opset, ir_version + 1)


def test_every_pair_of_the_table_needs_the_release_that_brought_it():
    for release, (opset, ir_version) in TRIED.items():
        assert lowest_onnxruntime(opset, ir_version) == release
    assert list(TRIED) == sorted(TRIED, key=parse_version)
    assert lowest_onnxruntime(7, 13) == "1.24.1"  # the IR version decides
    assert lowest_onnxruntime(26, 3) == "1.25.0"  # the opset does


@pytest.mark.parametrize("version", ["v1.18", "1.18rc1", "", "1..2", "latest", "-1"])
def test_what_is_no_version_is_one_sentence(
    version: str, integer_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["doctor", str(integer_file), f"--ort={version}"]) == 1
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert f"{version!r} is no version of ONNX Runtime" in sentence


def test_a_server_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--ort", "1.18"]) == 1
    assert "marrq doctor FILE --ort 1.18" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "is no model repository"), ("nowhere.onnx", "does not exist: give an ONNX file")],
)
def test_an_empty_folder_and_nothing_at_all_are_refused(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["doctor", str(tmp_path / name)]) == 1
    assert f"{str(tmp_path / name)!r} {reason}" in capsys.readouterr().err


def test_an_artifact_is_no_model_repository_and_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text("{}")
    assert main(["doctor", str(tmp_path)]) == 1
    assert "is an artifact or a model's checkpoint" in " ".join(capsys.readouterr().err.split())


def test_a_command_that_ctrl_c_ends_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.doctor.diagnose.examine", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "marrq: stopped"


@pytest.mark.slow
def test_of_a_repository_every_model_and_every_version_is_examined(
    demo_artifact: Path, tmp_path: Path
):
    export = ["export", str(demo_artifact), "--format", "triton", "-o", str(tmp_path / "r")]
    for options in (
        ["--name", "a"],
        ["--name", "b", "--flavor", "fp32", "--no-fuse"],
        ["--name", "b", "--flavor", "fp32", "--no-fuse", "--model-version", "2"],
    ):
        assert main([*export, *options]) == 0
    code, report = doctored(tmp_path / "r", "--ort", "1.18", folder=tmp_path)
    assert code == 3
    assert [(model["name"], model["versions"]) for model in report["models"]] == [
        ("a", [1]),
        ("b", [1, 2]),
    ]
    assert [(file["lowest_onnxruntime"], file["loads_on_server"]) for file in report["files"]] == [
        ("1.24.1", False),
        ("1.17.0", True),
        ("1.17.0", True),
    ]
    config = tmp_path / "r" / "b" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: 10", "dims: 11"))
    file = tmp_path / "r" / "a" / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    code, report = doctored(tmp_path / "r", folder=tmp_path)
    assert (code, len(report["files"])) == (3, 2)
    assert any(
        re.match("a: version 1: '.*model.onnx' is no ONNX file", problem)
        for problem in report["problems"]
    )
    assert (
        "b: version 2: the output 'logits' is [11] in the config, [10] in the file"
        in report["problems"]
    )


@pytest.mark.parametrize("content", ["cut", "empty", "other"])
def test_what_is_not_the_whole_of_an_onnx_file_is_one_sentence(
    content: str, integer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = integer_file.read_bytes()
    file = tmp_path / "m.onnx"
    file.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "other": b"no protobuf at all"}[content]
    )
    assert main(["doctor", str(file)]) == 1
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert sentence.endswith(
        "m.onnx' is no ONNX file, or not the whole of one: export or copy it again"
    )


def test_data_beside_a_file_is_named_and_its_absence_is_a_problem(tmp_path: Path):
    file = tmp_path / "m.onnx"
    data = with_data_beside_it(file)
    code, report = doctored(file, folder=tmp_path)
    assert (code, report["files"][0]["external_data"], report["problems"]) == (
        0,
        {"weights.bin": True},
        [],
    )
    data.unlink()
    code, report = doctored(file, folder=tmp_path)
    assert (code, report["files"][0]["external_data"]) == (3, {"weights.bin": False})
    [problem] = report["problems"]
    assert problem.endswith(
        "has tensors in weights.bin, missing here: copy that to where the file is"
    )
    assert report["files"][0]["load_error"] is not None


def test_a_file_that_this_onnx_runtime_refuses_is_a_problem_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = written(tmp_path / "m.onnx", helper.make_node("NoSuch", ["x"], ["y"]))
    assert main(["doctor", str(file)]) == 3
    printed = capsys.readouterr()
    [sentence] = printed.err.strip().splitlines()
    assert sentence == "marrq: 1 problem is found, see above"
    told = " ".join(printed.out.split())
    assert f"ONNX Runtime {ort.__version__} cannot load" in told
    assert "NoSuch" in told
    assert ["loads", "here", "no"] in [line.split() for line in printed.out.splitlines()]


def test_a_file_that_takes_nothing_is_a_problem(tmp_path: Path):
    graph = helper.make_graph(
        [helper.make_node("RandomNormal", [], ["y"], shape=[4, 4])], "g", [], [value("y", 4, 4)]
    )
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 20)]),
        tmp_path / "m.onnx",
    )
    code, report = doctored(tmp_path / "m.onnx", folder=tmp_path)
    assert code == 3
    assert [problem.rpartition("'")[2] for problem in report["problems"]] == [
        " has no input: give a model of images"
    ]


def test_where_onnx_runtime_was_built_does_not_stand_in_its_reason(tmp_path: Path):
    error = examine_file(written(tmp_path / "m.onnx", ir_version=1000)).load_error
    assert error is not None
    assert "1000" in error
    assert ".cc:" not in error
    assert "::" not in error


def test_a_file_whose_linears_have_no_cuda_kernel_is_a_problem_on_a_gpu(
    integer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, report = doctored(integer_file, "--device", "gpu", folder=tmp_path)
    [file] = report["files"]
    assert code == 3
    assert file["without_cuda_kernel"]["MatMulIntegerToFloat"] == 12  # of two blocks
    assert any("12 × MatMulIntegerToFloat" in problem for problem in report["problems"])
    assert "12 × MatMulIntegerToFloat" in capsys.readouterr().out.partition("CUDA kernels")[2]
    assert WITHOUT_CUDA in report["warnings"]
    assert any("was made for the cpu" in warning for warning in report["warnings"])
    _, here = doctored(integer_file, "--device", "cpu", folder=tmp_path)
    assert here["files"][0]["without_cuda_kernel"] is None
    assert here["problems"] == []


def test_a_file_for_a_gpu_needs_kernels_for_what_reads_images_alone(
    traced_vit: TracedModel, tmp_path: Path
):
    """Constants are folded on the CPU and arithmetic on shapes stays there."""
    options = {"weights_only": True}
    write(traced_vit, "folded", tmp_path / "m.onnx", options, device="gpu")
    # A server with a GPU is asked about, so what this machine lacks is no problem.
    code, report = doctored(
        tmp_path / "m.onnx", "--device", "gpu", "--ort", "1.24.1", folder=tmp_path
    )
    assert (code, report["files"][0]["without_cuda_kernel"]) == (0, {})
    assert WITHOUT_CUDA in report["warnings"]


def test_a_machine_without_cuda_is_a_problem_itself_and_not_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """So that a machine that builds files can tell whether a GPU would run them."""
    code, report = doctored(written(tmp_path / "m.onnx"), "--device", "gpu", folder=tmp_path)
    assert (code, report["problems"], report["files"][0]["without_cuda_kernel"]) == (0, [], {})
    assert WITHOUT_CUDA in report["warnings"]
    assert re.search(r"CUDA kernels +every node has one", capsys.readouterr().out)
    code, report = doctored("--device", "gpu", folder=tmp_path)
    assert (code, report["problems"]) == (3, [WITHOUT_CUDA])


def test_operators_that_are_not_standard_warn_in_files_of_other_tools(tmp_path: Path):
    file = written(
        tmp_path / "m.onnx",
        helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft"),
    )
    code, report = doctored(file, "--ort", "1.18", folder=tmp_path)
    assert (code, report["files"][0]["other_domains"]) == (0, ["com.microsoft"])
    assert report["files"][0]["operators"] == {"com.microsoft": 1}
    assert any(
        "operators of com.microsoft are not covered by what opset 20" in warning
        for warning in report["warnings"]
    )


def test_operators_count_in_subgraphs_and_a_function_of_the_file_counts_by_what_it_is_made_of(
    tmp_path: Path,
):
    branch = helper.make_graph(
        [helper.make_node("FusedMatMul", ["x", "x"], ["z"], domain="com.microsoft")],
        "b",
        [],
        [value("z", 4, 4)],
    )
    nodes = (
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Twice", ["x"], ["unused"], domain="mine"),
    )
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 20)]
    )
    condition = numpy_helper.from_array(np.array(True), "c")
    facts = examine_file(
        written(tmp_path / "m.onnx", *nodes, tensors=(condition,), functions=[function])
    )
    assert facts.operators == {"ai.onnx": 2, "com.microsoft": 2}
    assert facts.other_domains == ("com.microsoft",)


def test_files_of_other_tools_are_read_as_onnx_runtime_reads_them(tmp_path: Path):
    """Constants written as numbers, functions of the file's own, comparisons, and ONNX's domain in
    full."""
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    product = helper.make_function(
        "mine", "Product", ["a", "b"], ["c"], body, [helper.make_opsetid("", 20)]
    )
    nodes = (
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("Mul", ["w", "half"], ["halved"]),
        helper.make_node("Product", ["x", "halved"], ["xw"], domain="mine"),
        helper.make_node("Unsqueeze", ["xw", "axes"], ["wide"]),
        helper.make_node("Squeeze", ["wide", "axes"], ["product"]),
        helper.make_node("Greater", ["product", "half"], ["large"]),
        helper.make_node("Not", ["large"], ["small"]),
        helper.make_node("Where", ["small", "product", "half"], ["y"], domain="ai.onnx"),
    )
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    file = written(tmp_path / "m.onnx", *nodes, tensors=(weight,), functions=[product])
    model = onnx.load(file)
    opsets = [helper.make_opsetid("ai.onnx", 20), helper.make_opsetid("mine", 1)]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    onnx.save(model, file)
    facts = examine_file(file, tensorrt=True, device="gpu")
    assert (facts.load_error, facts.without_cuda_kernel) == (None, {})
    assert not facts.broken("problem")
    linears = inspect_file(file, SessionSettings()).audit
    assert [row.nominal for row in linears] == ["float"]


def test_two_packages_of_onnx_runtime_are_a_problem_that_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("runtime.environment.version", lambda package: "1.30.0")
    code, report = doctored(folder=tmp_path)
    assert code == 3
    assert report["machine"]["packages"]["onnxruntime-gpu"] == "1.30.0"
    [problem] = report["problems"]
    assert problem.startswith("onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are both installed")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in problem
    assert capsys.readouterr().err.endswith("marrq: 1 problem is found, see above\n")


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("None", "ONNX Runtime is not installed: pip install"),
        ("types.ModuleType('onnxruntime')", "is not whole: pip uninstall"),
    ],
)
def test_an_onnx_runtime_that_is_absent_or_damaged_is_one_problem_of_machine_and_file(
    module: str, problem: str, tmp_path: Path
):
    arguments = ["doctor", str(written(tmp_path / "m.onnx")), "--json", str(tmp_path / "d.json")]
    code = (
        f"import sys, types; sys.modules['onnxruntime'] = {module}\n"
        f"from marrq.cli import main; sys.exit(main({arguments!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 3
    [sentence] = json.loads((tmp_path / "d.json").read_text())["problems"]
    assert problem in sentence
    assert result.stderr.splitlines() == [
        f"wrote {tmp_path / 'd.json'}",
        "marrq: 1 problem is found, see above",
    ]


@pytest.mark.parametrize(
    ("flags", "warns"),
    [(("avx", "avx2"), True), (("avx", "avx_vnni"), False), (("asimd",), False), ((), False)],
)
def test_only_x86_without_dot_products_of_int8_is_warned_of_saturation(
    flags: tuple[str, ...], warns: bool
):
    report = diagnose(machine(*flags))
    assert report.problems == ()
    assert report.warnings == ((SATURATES,) if warns else ())


def test_the_dot_products_are_among_the_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(
        "runtime.environment._processor_flags",
        lambda: ["avx", "avx512_vnni", "amx_tile", "amx_int8"],
    )
    _, report = doctored(folder=tmp_path)
    assert report["machine"]["int8_dot_products"] == ["avx512_vnni", "amx_int8"]


def test_the_table_fits_100_columns_and_loses_nothing(tmp_path: Path):
    file = tmp_path / f"{'long' * 30}.onnx"
    with_data_beside_it(file).unlink()
    report = diagnose(machine("avx", "avx2"), [examine_file(file)], "1.15")
    assert len(report.problems) == 2
    assert len(report.warnings) == 1
    console = Console(width=100)
    with console.capture() as captured:
        console.print(diagnosis_table(report))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 100
    printed = "".join("".join(lines).split())
    for text in (
        *report.problems,
        *report.warnings,
        "weights.bin (missing)",
        "loads under 1.15",
    ):
        assert text.replace(" ", "") in printed
