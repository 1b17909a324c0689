"""A method written as text: its name, and what differs from the defaults.

    marr-exact
    gptaq,alpha=global=0.5
    marr-gptaq,alpha=grid,feedback=calibration,rotate=0,lowrank=srr:32,pid.initial=0.5

The same settings are options of `marrq quantize`; `marrq compare` takes the text.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast, get_args

from marrq.errors import MarrqError
from marrq.methods import method_named
from marrq.methods.lowrank import parse_lowrank
from marrq.methods.problem import PID, AlphaSpec, AlphaStrategy, Clip, Feedback, MethodSpec

SWITCH = {"on": True, "off": False}


def parse_method(text: str) -> MethodSpec:
    """`NAME[,KEY=VALUE…]` to a MethodSpec. Raises MarrqError naming the unknown name, key or value."""
    name, *settings = text.split(",")
    pairs = [setting.partition("=") for setting in settings]
    return with_settings(name, {key: value for key, _, value in pairs})


def with_settings(name: str, settings: dict[str, str]) -> MethodSpec:
    """The method of that name with settings as text."""
    spec = MethodSpec(method_named(name))
    for key, value in settings.items():
        if key.startswith("pid."):
            spec = _with_gain(spec, key.removeprefix("pid."), value)
        elif key in SETTINGS:
            spec = SETTINGS[key](spec, value)
        else:
            raise MarrqError(f"unknown setting {key!r} of a method: choose one of {', '.join((*SETTINGS, 'pid.GAIN'))}")
    return _checked(spec)


def text_of(spec: MethodSpec) -> str:
    """The text that `parse_method` reads back: only what differs from the defaults."""
    default, alpha = MethodSpec(), spec.alpha
    strategy = f"global={_digits(alpha.value)}" if alpha.value is not None else alpha.strategy
    told = {
        "alpha": "" if strategy == default.alpha.strategy else strategy,
        "feedback": "" if alpha.feedback == default.alpha.feedback else alpha.feedback,
        "damping": "" if spec.damping == default.damping else _digits(spec.damping),
        "target-damping": "" if spec.target_damping == default.target_damping else _digits(spec.target_damping),
        "bias-correction": "" if spec.correct_bias == default.correct_bias else "on" if spec.correct_bias else "off",
        "equalize": "" if spec.equalize == default.equalize else "on" if spec.equalize else "off",
        "act-order": "" if spec.act_order == default.act_order else "on" if spec.act_order else "off",
        "clip": "" if spec.clip == default.clip else spec.clip,
        "lowrank": "" if spec.lowrank is None else str(spec.lowrank),
        "rotate": "" if spec.rotation is None else str(spec.rotation),
        **{f"pid.{gain}": _digits(value) for gain, value in vars(alpha.pid).items() if value != getattr(default.alpha.pid, gain)},
    }
    return ",".join([spec.name, *(f"{key}={value}" for key, value in told.items() if value)])


def _digits(value: float) -> str:
    """As short as it can be read back."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _checked(spec: MethodSpec) -> MethodSpec:
    """A search belongs to the marr methods: what a method would not use is refused, not ignored."""
    default = AlphaSpec()
    if not spec.name.startswith("marr-") and spec.alpha != default and (spec.alpha.value is None or spec.name in ("rtn", "gptq")):
        raise MarrqError(
            f"method {spec.name!r} searches no alpha: choose marr-{spec.name if spec.name not in ('rtn', 'gptq') else 'exact'}"
        )
    return spec


def _alpha(spec: MethodSpec, text: str) -> MethodSpec:
    strategy, _, value = text.partition("=")
    number = _number("alpha", value) if value else None
    return replace(spec, alpha=replace(spec.alpha, strategy=cast(AlphaStrategy, strategy), value=number))


def _feedback(spec: MethodSpec, text: str) -> MethodSpec:
    return replace(spec, alpha=replace(spec.alpha, feedback=cast(Feedback, text)))


def _with_gain(spec: MethodSpec, gain: str, text: str) -> MethodSpec:
    types = {field.name: int if field.name == "steps" else float for field in fields(PID)}
    if gain not in types:
        raise MarrqError(f"unknown setting of the PID {gain!r}: choose one of {', '.join(types)}")
    return replace(spec, alpha=replace(spec.alpha, pid=replace(spec.alpha.pid, **{gain: _number(gain, text, types[gain])})))


def _number(key: str, text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise MarrqError(f"setting {key!r} must be a number: got {text!r}") from error


def _switch(key: str, text: str) -> bool:
    if text not in SWITCH:
        raise MarrqError(f"setting {key!r} must be on or off: got {text!r}")
    return SWITCH[text]


def _clip(text: str) -> Clip:
    if text not in get_args(Clip):
        raise MarrqError(f"setting 'clip' must be one of {', '.join(get_args(Clip))}: got {text!r}")
    return cast(Clip, text)


SETTINGS: dict[str, Callable[[MethodSpec, str], MethodSpec]] = {
    "alpha": _alpha,
    "feedback": _feedback,
    "damping": lambda spec, text: replace(spec, damping=_number("damping", text)),
    "target-damping": lambda spec, text: replace(spec, target_damping=_number("target-damping", text)),
    "bias-correction": lambda spec, text: replace(spec, correct_bias=_switch("bias-correction", text)),
    "equalize": lambda spec, text: replace(spec, equalize=_switch("equalize", text)),
    "act-order": lambda spec, text: replace(spec, act_order=_switch("act-order", text)),
    "clip": lambda spec, text: replace(spec, clip=_clip(text)),
    "lowrank": lambda spec, text: replace(spec, lowrank=parse_lowrank(text)),
    "rotate": lambda spec, text: replace(spec, rotation=_number("rotate", text, int)),
}
"""What can be set, by key."""
