"""What a GPU's driver tells, from a program in the place of nvidia-smi; nodes that run elsewhere
than asked; sessions of one batch size. Nothing here needs a GPU."""

import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime import session
from runtime.audit.graph import Graph
from runtime.audit.linears import examine
from runtime.audit.placement import misplaced, misplacement
from runtime.doctor.file import examine_file
from runtime.doctor.gpu import without_cuda_kernel
from runtime.environment import describe
from runtime.errors import BenchError
from runtime.gpu import Gpu, describe_gpu, memory_used_mb
from runtime.measure.bench import _about_gpu, _what_runs
from runtime.measure.latency import Plan, measure_latency
from runtime.measure.measured import Entry
from runtime.session import ExecutedNode, Model, SessionSettings, check_provider, executed_nodes

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "driver_version": "580.95.05",
    "memory.total": "81559",
    "pstate": "P0",
    "clocks.sm": "1980",
    "clocks.max.sm": "1980",
    "clocks.mem": "2619",
    "clocks_event_reasons.active": "0x0000000000000000",
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH alone; an `nvidia-smi` in it answers what `says` puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def says(folder: Path, answers: dict[str, str]) -> None:
    """Have nvidia-smi answer what it is asked, and refuse a question about anything else."""
    program = folder / "nvidia-smi"
    program.write_text(
        f"""#!{sys.executable}
import sys
open({str(folder / "asked")!r}, "a").write(" ".join(sys.argv[1:]))
[queries] = [one.partition("=")[2].split(",") for one in sys.argv if one.startswith("--query")]
answers = {answers!r}
if set(queries) - set(answers):
    print("Field is not a valid field to query.")
    sys.exit(2)
print(", ".join(answers[query] for query in queries))
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_a_gpu_is_described_as_its_driver_does(driver: Path):
    says(driver, H100)
    assert describe_gpu() == Gpu(
        "NVIDIA H100 80GB HBM3", "580.95.05", 81559 * 2**20 / 1e6, "P0", 1980, 1980, 2619, False
    )
    asked = (driver / "asked").read_text()
    assert asked.startswith("--id=0 --query-gpu=name,driver_version,memory.total,pstate")


def test_what_a_driver_does_not_tell_is_none_and_never_a_guess(driver: Path):
    old = {
        **dict.fromkeys(H100, "[N/A]"),
        "name": "Tesla T4",
        "driver_version": "535.1",
        "clocks.sm": "300",
        "clocks.max.sm": "[Not Supported]",
    }
    says(driver, old)
    assert describe_gpu() == Gpu("Tesla T4", "535.1", None, None, 300, None, None, None)
    # A driver that does not run refuses every question.
    says(driver, {})
    assert describe_gpu() is None
    assert memory_used_mb() is None
    (driver / "nvidia-smi").unlink()
    assert describe_gpu() is None


@pytest.mark.parametrize("name", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
@pytest.mark.parametrize(("reasons", "held"), [("0x1", False), ("0x4", True), ("0x41", True)])
def test_a_clock_that_is_held_down_is_told_from_one_that_rests_by_old_and_new_drivers(
    driver: Path, name: str, reasons: str, held: bool
):
    known = {query: answer for query, answer in H100.items() if "reasons" not in query}
    says(driver, {**known, name: reasons})
    found = describe_gpu()
    assert found is not None
    assert found.throttled is held


def test_the_gpu_that_cuda_sees_first_is_asked_about(driver: Path, monkeypatch: pytest.MonkeyPatch):
    says(driver, {"memory.used": "1024"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert memory_used_mb() == pytest.approx(1073.741824)
    assert "--id=3 --query-gpu=memory.used" in (driver / "asked").read_text()


def graph_of_shapes(path: Path) -> Path:
    """x → MatMul → Reshape to [batch, 8], whose shape comes of Shape, Gather and Concat."""
    nodes = [
        helper.make_node("MatMul", ["pixels", "w"], ["product"], name="fc/MatMul_0"),
        helper.make_node("Shape", ["product"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], name="gather"),
        helper.make_node("Concat", ["batch", "eight"], ["wanted"], axis=0, name="concat"),
        helper.make_node("Reshape", ["product", "wanted"], ["logits"], name="reshape"),
    ]
    tensors = [
        helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4).ravel()),
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("eight", TensorProto.INT64, [1], [8]),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 2, 4])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path
    )
    return path


def ran(graph: Graph, on_cpu: set[str]) -> list[ExecutedNode]:
    return [
        ExecutedNode(node.name, node.op_type, CPU if node.name in on_cpu else CUDA)
        for node in graph.nodes
    ]


def test_arithmetic_on_shapes_may_run_on_the_cpu_and_nothing_else(tmp_path: Path):
    graph = Graph.load(graph_of_shapes(tmp_path / "m.onnx"))
    assert misplaced(graph, ran(graph, {"shape", "gather", "concat"}), CUDA) == []
    for name in ("fc/MatMul_0", "reshape"):
        [found] = misplaced(graph, ran(graph, {name, "gather"}), CUDA)
        assert found.name == name
    stranger = [ExecutedNode("fused", "FusedMatMul", CPU)]
    assert misplaced(graph, stranger, CUDA) == stranger


def test_nodes_without_names_are_told_apart_if_a_file_is_held_against_the_cuda_provider(
    tmp_path: Path,
):
    model = onnx.load(graph_of_shapes(tmp_path / "m.onnx"))
    # No CUDA kernel, and none is needed: it reads the shape alone.
    size = helper.make_node("Unique", ["shape"], ["size"])
    model.graph.node.insert(2, size)
    for node in model.graph.node:
        node.name = ""
    assert without_cuda_kernel(Graph(model)) == {}
    size.input[0] = "product"
    model.graph.node[2].CopyFrom(size)
    onnx.save(model, tmp_path / "other.onnx")
    facts = examine_file(tmp_path / "other.onnx", device="gpu")
    assert facts.without_cuda_kernel == {"Unique": 1}
    assert "1 × Unique; write it with a lower opset" in facts.problems[0]


@pytest.mark.parametrize(
    ("operator", "opset", "type_of_x", "has_one"),
    [
        ("DepthToSpace", 17, TensorProto.FLOAT, True),
        ("LogSoftmax", 17, TensorProto.FLOAT, True),
        ("LpNormalization", 17, TensorProto.FLOAT, False),
        ("Mish", 20, TensorProto.FLOAT, True),
        ("Not", 17, TensorProto.BOOL, True),
        ("ReduceProd", 17, TensorProto.INT64, False),
        ("ReduceProd", 17, TensorProto.FLOAT, True),
        ("Reshape", 25, TensorProto.FLOAT, False),
        ("GroupNormalization", 21, TensorProto.FLOAT, True),
    ],
)
def test_kernels_are_those_of_the_operator_its_definition_and_its_type(
    operator: str, opset: int, type_of_x: int, has_one: bool
):
    node = helper.make_node(operator, ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, type_of_x, [1]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    assert without_cuda_kernel(Graph(model)) == ({} if has_one else {operator: 1})


def test_the_linear_that_ran_elsewhere_is_named_by_its_path(integer_file: Path, tmp_path: Path):
    examined = examine(integer_file, SessionSettings())
    executed = executed_nodes(integer_file, SessionSettings(), tmp_path)
    assert misplacement(examined, executed) is None
    asked = replace(examined, settings=SessionSettings("cuda"))
    sentence = misplacement(asked, executed)
    assert sentence is not None
    assert sentence.startswith(
        f"the linear 'patch_embed.proj' ran on {CPU} by Conv, for which {CUDA} has no kernel; in "
    )
    assert "MatMulIntegerToFloat" in sentence


def test_a_candidate_that_ran_elsewhere_is_an_error_and_a_baseline_a_note(
    integer_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("runtime.measure.bench.misplacement", lambda *given: "it ran elsewhere")
    entry = Entry("m", integer_file, "m", "baseline", "fp16", "gpu", "fp16", "none", 16.0)
    assert _what_runs(entry, SessionSettings()).misplaced == "it ran elsewhere"
    with pytest.raises(BenchError, match="m: it ran elsewhere; export it with --device gpu"):
        _what_runs(replace(entry, role="candidate"), SessionSettings())


def test_what_is_not_known_of_a_gpu_and_a_clock_that_was_held_down_are_warned_of():
    gpu = Gpu("G", "1", None, "P2", 900.0, 1980.0, None, throttled=False)
    assert _about_gpu(gpu) == []
    assert _about_gpu(replace(gpu, throttled=True)) == ["the clock of G was held down, to 900 MHz"]
    assert _about_gpu(None) == [
        "nvidia-smi tells of no GPU: its name, driver, clocks and memory are not known"
    ]


def test_a_session_for_a_cuda_graph_has_one_batch_size_and_memory_that_stays(
    integer_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """The path of CUDA graphs, on the processor's memory."""
    monkeypatch.setitem(session.DEVICES, "cpu", "cpu")
    plain, fixed = (
        Model(integer_file, SessionSettings(threads=1, graph_batch=batch)) for batch in (None, 3)
    )
    assert fixed.input.shape[0] == 3
    pixels, bound = fixed.random_input(3), {}
    bind = session.ort.IOBinding.bind_ortvalue_output

    def recorded(binding: object, name: str, value: session.ort.OrtValue) -> None:
        bound[name] = value
        bind(binding, name, value)

    monkeypatch.setattr(session.ort.IOBinding, "bind_ortvalue_output", recorded)
    forward = fixed.forward(pixels)
    forward()
    assert list(bound) == ["logits"]
    np.testing.assert_allclose(bound["logits"].numpy(), plain.run(pixels), rtol=1e-4, atol=1e-5)


def test_a_kernel_that_fails_when_it_runs_is_one_sentence(
    integer_file: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Model(integer_file, SessionSettings(threads=1))
    wrong = np.zeros((1, 3, 5, 5), np.float32)
    with pytest.raises(BenchError, match=r"loads '.*model.onnx' and fails when it runs: "):
        model.run(wrong)
    monkeypatch.setattr(model, "device", "cpu")
    with pytest.raises(BenchError, match="fails when it runs"):
        model.forward(wrong)


def test_cuda_graphs_are_timed_in_a_session_for_each_batch_size():
    opened = []

    class Recorded:
        def __init__(self, path: Path, settings: SessionSettings) -> None:
            opened.append(settings.graph_batch)

        def random_input(self, batch: int) -> int:
            return batch

        def forward(self, batch: int) -> object:
            return lambda: None

    plan = Plan((1, 8), rounds=2, seconds=0, cuda_graph=True)
    [speed] = measure_latency([Path("m")], SessionSettings("cuda"), plan, open_model=Recorded)
    assert opened == [1, 8, 1, 8]
    assert [latency.batch for latency in speed.latency] == [1, 8]


def test_only_cuda_is_told_to_record_a_graph(integer_file: Path, monkeypatch: pytest.MonkeyPatch):
    given = []

    def open_session(path: str, options: object, providers: list[object]) -> None:
        given.extend(providers)
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(session.ort, "InferenceSession", open_session)
    monkeypatch.setattr(session, "available_providers", lambda: [CUDA, CPU])
    for settings in (SessionSettings("cuda", graph_batch=1), SessionSettings("cuda")):
        with pytest.raises(BenchError, match="no GPU here"):
            Model(integer_file, settings)
    assert given == [(CUDA, {"enable_cuda_graph": "1"}), (CUDA, {})]


def test_a_gpu_without_its_onnx_runtime_is_an_error_with_the_package_to_install():
    with pytest.raises(BenchError, match=r"uninstall onnxruntime, then pip install '.\[gpu\]'"):
        check_provider(SessionSettings("cuda"))
    assert describe(SessionSettings()).provider == "cpu"
