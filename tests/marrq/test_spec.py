"""A method and its settings as text, the registry, and the README that lists them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrq.errors import MarrqError
from marrq.methods.registry import ALIASES, METHODS, method_named, methods_table
from marrq.methods.solve import IMPLEMENTATIONS, TARGETS
from marrq.methods.spec import (
    PID,
    AlphaSpec,
    LowRankSpec,
    MethodSpec,
    parse_method,
    settings_table,
    text_of,
)

README = Path(__file__).parents[2] / "marrq/methods/README.md"


def test_every_method_of_the_registry_has_an_implementation_and_no_other_has():
    assert list(IMPLEMENTATIONS) == list(METHODS)


@pytest.mark.parametrize(
    ("name", "table"), [("methods", methods_table), ("settings", settings_table)]
)
def test_a_table_of_the_readme_is_the_one_that_the_code_prints(name: str, table: Callable[[], str]):
    text = README.read_text(encoding="utf-8")
    found = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    assert found.strip() == table()


def test_a_method_is_read_and_written_without_torch():
    code = (
        "import sys; from marrq.methods.spec import parse_method, text_of; "
        "text_of(parse_method('marr,lowrank=srr:8,alpha=grid')); "
        "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert found.strip() == "[]"


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(
        MarrqError,
        match=r"unknown method 'awq': choose one of rtn, gptq, gptaq, .*, marr-stream, marr$",
    ):
        method_named("awq")


def test_marr_is_short_for_the_best_variant():
    assert method_named("marr") == ALIASES["marr"]
    assert parse_method("marr") == MethodSpec(ALIASES["marr"]) == MethodSpec()


@pytest.mark.parametrize(
    "wrong",
    [{"initial": 2.0}, {"lower": 0.5}, {"upper": 0.1}, {"steps": 0}],
)
def test_a_controller_that_cannot_start_is_refused(wrong: dict[str, float]):
    with pytest.raises(MarrqError, match="lower <= initial <= upper and at least one step"):
        PID(**wrong)


@pytest.mark.parametrize(
    "wrong", [("newton",), ("pid", 0.5), ("grid", 0.5), ("global",), ("pid", None, "test set")]
)
def test_an_alpha_that_nobody_can_find_is_refused(wrong: tuple):
    with pytest.raises(MarrqError, match="alpha"):
        AlphaSpec(*wrong)


positive = st.floats(1e-6, 10)
gains = (positive, positive, positive, positive)
bounds = (st.floats(0.1, 0.9), st.floats(-1, 0), st.floats(1, 3))
controllers = st.builds(PID, *gains, *bounds, st.integers(1, 50), positive, positive)
searches = st.builds(
    AlphaSpec,
    st.sampled_from(["pid", "grid"]),
    st.none(),
    st.sampled_from(["held-out", "calibration"]),
    pid=controllers,
)
constants = st.builds(AlphaSpec, st.just("global"), st.floats(-1e9, 1e9))
branches = st.builds(
    LowRankSpec,
    st.sampled_from(["srr", "qera", "lqer"]),
    st.integers(1, 999),
    st.sampled_from([8, 16]),
)
around = {
    "damping": positive,
    "target_damping": positive,
    "act_order": st.booleans(),
    "clip": st.sampled_from(["weights", "outputs"]),
    "correct_bias": st.booleans(),
    "lowrank": st.none() | branches,
    "rotation": st.none() | st.integers(0, 2**31),
}
specs = (
    st.builds(
        MethodSpec,
        st.sampled_from([f"marr-{name}" for name in TARGETS]),
        alpha=searches | constants,
        **around,
    )
    | st.builds(
        MethodSpec, st.sampled_from(list(TARGETS)), alpha=constants | st.just(AlphaSpec()), **around
    )
    | st.builds(MethodSpec, st.sampled_from(["rtn", "gptq"]), **around)
)


@settings(deadline=None)
@given(specs)
def test_a_method_is_read_back_from_its_text(spec: MethodSpec):
    assert parse_method(text_of(spec)) == spec


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_its_defaults_is_written_as_its_name(name: str):
    assert text_of(MethodSpec(name)) == name
    assert parse_method(name) == MethodSpec(name)


def test_only_what_differs_is_written():
    text = (
        "marr-gptaq,alpha=grid,feedback=calibration,bias-correction=off,"
        "lowrank=srr:32:int8,rotate=0,pid.initial=0.5"
    )
    assert text_of(parse_method(text)) == text


REFUSED = {
    "awq": "unknown method 'awq'",
    "gptq,bits=4": r"unknown setting 'bits' of a method: choose one of alpha, .*pid\.settled",
    "marr,pid.gain=1": "unknown setting 'pid.gain' of a method",
    "gptq,damping=much": "setting 'damping' must be a number: got 'much'",
    "marr,rotate=0.5": "setting 'rotate' must be a whole number: got '0.5'",
    "gptq,clip=tokens": "setting 'clip' must be one of weights, outputs: got 'tokens'",
    "gptq,act-order=yes": "setting 'act-order' must be one of on, off: got 'yes'",
    "marr,alpha=global": "goes with the strategy global alone, .*: got global, None",
    "marr,alpha=pid=0.5": "goes with the strategy global alone, .*: got pid, 0.5",
    "marr,feedback=test": "setting 'feedback' must be one of held-out, calibration: got 'test'",
    "marr,pid.initial=9": "lower <= initial <= upper",
    "marr,lowrank=svd": "unknown low-rank branch 'svd'",
    "gptaq,alpha=grid": "method 'gptaq' searches no alpha: choose marr-gptaq",
    "exact,pid.steps=3": "method 'exact' searches no alpha: choose marr-exact",
    "gptq,alpha=global=0.5": "method 'gptq' searches no alpha: choose marr-stream",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_method_text_that_is_wrong_is_refused_with_the_reason(text: str):
    with pytest.raises(MarrqError, match=REFUSED[text]):
        parse_method(text)
