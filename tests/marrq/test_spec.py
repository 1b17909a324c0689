"""A method and its settings as text, the registry, and the README that lists them."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrq.errors import MarrqError
from marrq.methods.alpha_spec import PID, AlphaSpec
from marrq.methods.registry import (
    ALIASES,
    METHODS,
    method_named,
    method_names_for_help,
    methods_table,
)
from marrq.methods.solve import IMPLEMENTATIONS
from marrq.methods.spec import (
    METHOD_SETTINGS,
    LowRankSpec,
    MethodSpec,
    parse_method,
    settings_table,
    text_of,
    with_settings,
)

README = Path(__file__).parents[2] / "marrq/methods/README.md"


def test_every_method_of_the_registry_has_an_implementation_and_no_other_has():
    assert list(IMPLEMENTATIONS) == list(METHODS)


def table_of_readme(name: str) -> str:
    text = README.read_text(encoding="utf-8")
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()


def test_the_settings_of_the_readme_are_those_that_the_code_prints():
    assert table_of_readme("settings") == settings_table()


def test_every_method_of_the_readme_is_described_as_the_registry_prints_it():
    # A method that is added needs no row.
    rows = table_of_readme("methods").splitlines()
    assert len(rows) > 2
    assert set(rows) <= set(methods_table().splitlines())


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


@pytest.mark.parametrize("wrong", [{"initial": 2.0}, {"lower": 0.5}, {"upper": 0.1}])
def test_a_controller_that_starts_outside_its_bounds_is_refused(wrong: dict[str, float]):
    with pytest.raises(MarrqError, match=r"must lie between the bounds: got pid\.lower="):
        PID(**wrong)


NUMBERS = {key: one for key, one in METHOD_SETTINGS.items() if "number" in one.form.values}


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("key", [*NUMBERS, "alpha"])
def test_a_number_that_is_not_finite_is_refused_with_its_key(key: str, text: str):
    value = f"global={text}" if key == "alpha" else text
    with pytest.raises(MarrqError, match=f"setting '{key}' must be .*: got '{text}'"):
        parse_method(f"marr,{key}={value}")


SIGNED = ("pid.initial", "pid.lower", "pid.upper")


@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in SIGNED])
def test_a_negative_number_is_refused_unless_it_bounds_alpha(key: str):
    with pytest.raises(MarrqError, match=f"setting '{key}' must be .*: got '-1'"):
        parse_method(f"marr,{key}=-1")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: MethodSpec(damping=math.nan), "setting 'damping' must be .*: got nan"),
        (lambda: MethodSpec(damping=True), "setting 'damping' must be .*: got True"),
        (lambda: MethodSpec(clip="tokens"), "setting 'clip' must be weights or outputs"),
        (lambda: PID(steps=1.5), "setting 'pid.steps' must be a whole number, 1 or more: got 1.5"),
        (lambda: AlphaSpec("global", math.inf), "alpha must have finite values"),
        (lambda: AlphaSpec("grid", grid=()), "alpha must have finite values, at least one"),
        (lambda: LowRankSpec("srr", 1.5), "rank .* must be a whole number, 1 or more: got 1.5"),
    ],
)
def test_a_spec_that_is_built_in_python_is_checked_as_text_is(
    build: Callable[[], object], reason: str
):
    with pytest.raises(MarrqError, match=reason):
        build()


def test_all_settings_of_the_controller_are_applied_together():
    spec = parse_method("marr,pid.initial=2,pid.upper=3")
    assert (spec.alpha.pid.initial, spec.alpha.pid.upper) == (2, 3)
    assert parse_method(text_of(spec)) == spec


def test_what_is_off_by_default_can_be_written():
    assert parse_method("marr,rotate=none,lowrank=none") == MethodSpec()


def test_settings_behind_a_name_are_refused_if_a_name_alone_is_taken():
    with pytest.raises(MarrqError, match="settings go in --alpha or --set"):
        with_settings("marr,alpha=grid", {})


def test_the_help_names_every_method():
    text = method_names_for_help()
    assert all(name.removeprefix("marr-") in text for name in (*METHODS, *ALIASES))


@pytest.mark.parametrize(
    "wrong", [("newton",), ("pid", 0.5), ("grid", 0.5), ("global",), ("pid", None, "test set")]
)
def test_an_alpha_that_nobody_can_find_is_refused(wrong: tuple):
    with pytest.raises(MarrqError, match=r"alpha|feedback"):
        AlphaSpec(*wrong)


positive = st.floats(1e-6, 10)
gains = (positive, positive, positive, st.floats(0, 1))
# All on either side of the defaults: the text has initial before the bounds.
shifts = st.sampled_from([-10.0, 0.0, 10.0])
bounds = shifts.flatmap(
    lambda shift: st.tuples(
        st.floats(0.1 + shift, 0.9 + shift),
        st.floats(-1 + shift, shift),
        st.floats(1 + shift, 3 + shift),
    )
)
controllers = bounds.flatmap(
    lambda three: st.builds(
        PID, *gains, *map(st.just, three), st.integers(1, 50), positive, positive
    )
)
# A grid and a closed form use the bounds of the controller alone.
bounded = bounds.map(sorted).map(lambda three: (min(three[0], 0.25), max(three[2], 0.25)))
searches = st.builds(
    AlphaSpec,
    st.just("pid"),
    st.none(),
    st.sampled_from(["held-out", "calibration"]),
    pid=controllers,
) | st.builds(
    AlphaSpec,
    st.sampled_from(["grid", "closed"]),
    st.none(),
    st.sampled_from(["held-out", "calibration"]),
    pid=bounded.map(lambda two: PID(lower=two[0], upper=two[1])),
)
constants = st.builds(AlphaSpec, st.just("global"), st.floats(-1e9, 1e9))
branches = st.builds(
    LowRankSpec,
    st.sampled_from(["srr", "qera", "lqer"]),
    st.integers(1, 999),
    st.sampled_from([8, 16]),
) | st.builds(LowRankSpec, st.just("serq"), st.integers(1, 999), st.none())
around = {
    "correct_bias": st.booleans(),
    "lowrank": st.none() | branches,
    "rotation": st.none() | st.integers(0, 2**31),
}
swept = {
    "damping": positive,
    "act_order": st.booleans(),
    "clip": st.sampled_from(["weights", "outputs"]),
    **around,
}
solved = {"target_damping": positive, **swept}
fixed = constants | st.just(AlphaSpec())
specs = st.one_of(
    st.builds(MethodSpec, st.just("rtn"), **around),
    st.builds(MethodSpec, st.just("gptq"), **swept),
    st.builds(MethodSpec, st.sampled_from(["gptaq", "rescomp"]), alpha=fixed, **swept),
    st.builds(MethodSpec, st.sampled_from(["exact", "stream"]), alpha=fixed, **solved),
    st.builds(
        MethodSpec,
        st.sampled_from(["marr-gptaq", "marr-rescomp"]),
        alpha=searches | constants,
        **swept,
    ),
    st.builds(
        MethodSpec,
        st.sampled_from(["marr-exact", "marr-stream"]),
        alpha=searches | constants,
        **solved,
    ),
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
        "lowrank=srr:32:int8,rotate=0,pid.upper=2"
    )
    assert text_of(parse_method(text)) == text


REFUSED = {
    "awq": "unknown method 'awq'",
    "gptq,bits=4": r"unknown setting 'bits' of a method: choose one of alpha, .*pid\.settled",
    "marr,pid.gain=1": "unknown setting 'pid.gain' of a method",
    "marr,token_weights=off": r"unknown setting 'token_weights' .* did you mean token-weights\?",
    "mar": r"unknown method 'mar': did you mean marr",
    "gptq,damping=much": "setting 'damping' must be a number, 0 or more: got 'much'",
    "gptq,damping": "setting 'damping' has no value: write KEY=VALUE",
    "marr,rotate=0.5": "setting 'rotate' must be none, or a whole number from 0 .*: got '0.5'",
    "gptq,clip=tokens": "setting 'clip' must be weights or outputs: got 'tokens'",
    "gptq,act-order=yes": "setting 'act-order' must be on or off: got 'yes'",
    "marr,alpha=0.5": "must be pid, grid, closed, or global=VALUE for a fixed α: got '0.5'",
    "marr,alpha=global": "alpha=global needs a value: write global=0.5",
    "marr,alpha=pid=0.5": "alpha=pid takes no value: got 0.5; for a fixed α write global=0.5",
    "marr,feedback=test": "setting 'feedback' must be held-out or calibration: got 'test'",
    "marr,pid.initial=9": "got pid.lower=0, pid.initial=9, pid.upper=1.5",
    "marr,lowrank=svd": "unknown low-rank branch 'svd'",
    "gptaq,alpha=grid": "method 'gptaq' searches no α: choose marr-gptaq",
    "exact,pid.steps=3": "method 'exact' searches no α: choose marr-exact",
    "gptaq,alpha=pid": "method 'gptaq' searches no α: choose marr-gptaq",
    "exact,feedback=held-out": "method 'exact' searches no α: choose marr-exact",
    "exact,alpha=global=0.5,feedback=held-out": "a fixed α by alpha=global=0.5 without feedback",
    "gptq,alpha=pid": "method 'gptq' has no α",
    "marr,alpha=global=0.5,feedback=calibration": "alpha=global has no use for feedback: leave it",
    "marr,alpha=global=0.5,pid.steps=3": r"alpha=global has no use for pid\.steps",
    "marr,alpha=closed,pid.steps=20": r"alpha=closed has no use for pid\.steps",
    "marr,alpha=grid,pid.initial=1": r"alpha=grid has no use for pid\.initial",
    "rtn,feedback=held-out": "method 'rtn' has no α",
    "gptq,pid.initial=0.25": "method 'gptq' has no α",
    "rtn,damping=0.01": "method 'rtn' has no use for damping: leave it out",
    "rtn,act-order=on": "method 'rtn' has no use for act-order",
    "rtn,clip=weights": "method 'rtn' has no use for clip",
    "rtn,target-damping=1": "method 'rtn' has no use for target-damping",
    "gptq,lowrank=srr:4,target-damping=1": "method 'gptq' has no use for target-damping",
    "marr-gptaq,target-damping=1": "method 'marr-gptaq' has no use for target-damping",
    "gptaq,lowrank=serq:4,target-damping=1": "method 'gptaq' has no use for target-damping",
    "marr,lowrank=srr": "low-rank branch 'srr' has no rank: write srr:32",
    "gptq,alpha=global=0.5": "method 'gptq' has no α: leave out alpha, .* choose the method marr",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_method_text_that_is_wrong_is_refused_with_the_reason(text: str):
    with pytest.raises(MarrqError, match=REFUSED[text]):
        parse_method(text)


@pytest.mark.parametrize("method", ["exact", "marr-stream", "gptaq,lowrank=srr:4"])
def test_the_damping_of_the_exact_target_is_taken_if_there_is_such_a_target(method: str):
    assert parse_method(f"{method},target-damping=1").target_damping == 1
