"""One setting of a method: a field of a frozen dataclass that knows how it is written as text.

    damping: float = field(default=0.01, metadata=setting("damping", "λ / mean(diag H)", NUMBER))

The field is the one place that names key, default, meaning and form. methods/spec.py derives
reading, writing, the list of known settings and the table of the README from the fields.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from marrq.errors import MarrqError

METADATA = "setting"
NONE = "none"
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Form:
    """Which values a setting takes, and how a value is written as text.

    values: what may be written, for people; follows "must be" in an error
    parse: text to a value; raises ValueError for text that is no such value
    allows: whether a value is one of `values`; also tells NaN, infinity and a wrong type
    write: a value to text that `parse` takes"""

    values: str
    parse: Callable[[str], Any]
    allows: Callable[[Any], bool]
    write: Callable[[Any], str]

    def read(self, key: str, text: str) -> Any:
        """Text to a value. Raises MarrqError that names the key if the value is not allowed."""
        try:
            value = self.parse(text)
        except ValueError as error:
            raise self.refusal(key, text) from error
        # Told here and not by the dataclass, so that the error shows the text: 1e400, not inf.
        if not self.allows(value):
            raise self.refusal(key, text)
        return value

    def refusal(self, key: str, value: object) -> MarrqError:
        """The error for a value that is not allowed."""
        return MarrqError(f"setting {key!r} must be {self.values}: got {value!r}")


@dataclass(frozen=True)
class Setting:
    """One setting of a method.

    key: its name in text
    meaning: one sentence
    form: how its values are written
    argument: the field that holds the number behind a second `=`, as in alpha=global=0.5, or ""
    field: the name of its own field
    owner: the attributes that lead from a MethodSpec to the object that has the field"""

    key: str
    meaning: str
    form: Form
    argument: str = ""
    field: str = ""
    owner: tuple[str, ...] = ()

    def read(self, text: str) -> dict[str, Any]:
        """The values of the fields that the text sets. Raises MarrqError for a wrong value."""
        if not self.argument:
            return {self.field: self.form.read(self.key, text)}
        # alpha=global=0.5: the text before the second `=` is this field's, the number another's.
        text, _, number = text.partition("=")
        value = NUMBER.read(self.key, number) if number else None
        return {self.field: self.form.read(self.key, text), self.argument: value}

    def write(self, spec: object) -> str:
        """The value in a spec as text."""
        owner: Any = spec
        for name in self.owner:
            owner = getattr(owner, name)
        # The inverse of `read`.
        text = self.form.write(getattr(owner, self.field))
        number = getattr(owner, self.argument) if self.argument else None
        return text if number is None else f"{text}={NUMBER.write(number)}"


def changed(spec: Any, owner: tuple[str, ...], changes: dict[str, Any]) -> Any:
    """A copy of the frozen dataclass with some fields changed in what `owner` leads to."""
    # Frozen: every object on the way is replaced by a copy, from the innermost out.
    if not owner:
        return replace(spec, **changes)
    first, *others = owner
    inner = changed(getattr(spec, first), tuple(others), changes)
    return replace(spec, **{first: inner})


def check_settings(spec: Any, prefix: str = "") -> None:
    """Raise MarrqError for the first field of a dataclass whose value its form does not allow.

    For specs that are built in Python or read from JSON; text is checked when it is read."""
    for attribute in fields(spec):
        if METADATA in attribute.metadata:
            declared: Setting = attribute.metadata[METADATA]
            value = getattr(spec, attribute.name)
            if not declared.form.allows(value):
                raise declared.form.refusal(prefix + declared.key, value)


def number(values: str, lowest: float = -math.inf, highest: float = math.inf) -> Form:
    """The form of a finite number from `lowest` to `highest`."""
    return Form(values, float, lambda value: _is_between(value, lowest, highest), digits)


def whole_number(values: str, lowest: int, highest: float = math.inf) -> Form:
    """The form of a whole number from `lowest` to `highest`."""

    def allows(value: Any) -> bool:
        return isinstance(value, int) and _is_between(value, lowest, highest)

    return Form(values, int, allows, str)


def _is_between(value: Any, lowest: float, highest: float) -> bool:
    """Whether the value is a finite number from `lowest` to `highest`."""
    # bool is a kind of int, and a `true` of a JSON file must not pass for 1.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails every comparison, infinity only the second.
    return is_number and lowest <= value <= highest and abs(value) < math.inf


def digits(value: float) -> str:
    """The shortest text that reads back to the same number."""
    # %g has six digits, which is enough for numbers that people choose but not for all.
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def choice(literal: Any, values: str = "") -> Form:
    """The form of a value that is one of the texts of a Literal.

    values: what may be written, if the names alone do not say it"""
    *others, last = names = get_args(literal)
    return Form(values or f"{', '.join(others)} or {last}", str, lambda text: text in names, str)


def none_or(form: Form) -> Form:
    """The same form, with `none` for None."""
    return Form(
        f"{NONE}, or {form.values}",
        lambda text: None if text == NONE else form.parse(text),
        lambda value: value is None or form.allows(value),
        lambda value: NONE if value is None else form.write(value),
    )


NUMBER = number("a finite number")
NOT_NEGATIVE = number("a number, 0 or more", 0)
SHARE = number("a number from 0 to 1", 0, 1)
COUNT = whole_number("a whole number, 1 or more", 1)
SEED = whole_number("a whole number from 0 to 2⁶³ - 1", 0, LARGEST_SEED)
ON_OFF = Form(
    "on or off",
    lambda text: {"on": True, "off": False}.get(text),
    lambda value: isinstance(value, bool),
    lambda value: "on" if value else "off",
)


def setting(key: str, meaning: str, form: Form, argument: str = "") -> dict[str, Setting]:
    """The metadata of a dataclass field that is a setting."""
    return {METADATA: Setting(key, meaning, form, argument)}


def settings_of(spec: type, owner: tuple[str, ...] = (), prefix: str = "") -> dict[str, Setting]:
    """The settings among the fields of a dataclass, by key."""
    # The field itself cannot know its name, nor what leads to its object: both are added here.
    found = {}
    for attribute in fields(spec):
        if METADATA in attribute.metadata:
            declared: Setting = attribute.metadata[METADATA]
            key = prefix + declared.key
            found[key] = replace(declared, key=key, field=attribute.name, owner=owner)
    return found
