"""One setting of a method: a field of a frozen dataclass that knows how it is written as text.

    damping: float = field(default=0.01, metadata=setting("damping", "λ / mean(diag H)", NUMBER))

The field is the one place that names key, default, meaning and form. methods/spec.py derives
reading, writing, the list of known settings and the table of the README from the fields.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_args

from marrq.errors import MarrqError

Spec = TypeVar("Spec", bound=Any)

METADATA = "setting"
SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Form:
    """How the values of a setting are written as text.

    values: what may be written, for people
    read: (key, text) to a value; raises MarrqError that names the key
    write: a value to text that `read` takes"""

    values: str
    read: Callable[[str, str], Any]
    write: Callable[[Any], str]


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

    def read(self, spec: Spec, text: str) -> Spec:
        """The spec with this setting read from text. Raises MarrqError for a wrong value."""
        changes: dict[str, Any] = {}
        # alpha=global=0.5: the text before the second `=` is this field's, the number another's.
        if self.argument:
            text, _, number = text.partition("=")
            changes[self.argument] = NUMBER.read(self.key, number) if number else None
        changes[self.field] = self.form.read(self.key, text)
        return _changed(spec, self.owner, changes)

    def write(self, spec: object) -> str:
        """The value in a spec as text."""
        owner: Any = spec
        for name in self.owner:
            owner = getattr(owner, name)
        # The inverse of `read`.
        text = self.form.write(getattr(owner, self.field))
        number = getattr(owner, self.argument) if self.argument else None
        return text if number is None else f"{text}={NUMBER.write(number)}"


def _changed(spec: Spec, owner: tuple[str, ...], changes: dict[str, Any]) -> Spec:
    """A copy of the frozen dataclass with some fields changed in what `owner` leads to."""
    # Frozen: every object on the way is replaced by a copy, from the innermost out.
    if not owner:
        return replace(spec, **changes)
    first, *others = owner
    inner = _changed(getattr(spec, first), tuple(others), changes)
    return replace(spec, **{first: inner})


def _read_number(kind: type) -> Callable[[str, str], Any]:
    wanted = "a number" if kind is float else "a whole number"

    def read(key: str, text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise MarrqError(f"setting {key!r} must be {wanted}: got {text!r}") from error

    return read


def _read_choice(choices: Mapping[str, Any]) -> Callable[[str, str], Any]:
    def read(key: str, text: str) -> Any:
        if text not in choices:
            raise MarrqError(f"setting {key!r} must be one of {', '.join(choices)}: got {text!r}")
        return choices[text]

    return read


def digits(value: float) -> str:
    """The shortest text that reads back to the same number."""
    # %g has six digits, which is enough for numbers that people choose but not for all.
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def choice(literal: Any) -> Form:
    """The form of a value that is one of the texts of a Literal."""
    names = get_args(literal)
    return Form(", ".join(names), _read_choice({name: name for name in names}), str)


def none_or(write: Callable[[Any], str]) -> Callable[[Any], str]:
    """A writer that writes `none` for None; `none` is only shown, never read."""
    return lambda value: "none" if value is None else write(value)


NUMBER = Form("a number", _read_number(float), digits)
COUNT = Form("a whole number", _read_number(int), str)
SEED = Form("a whole number", _read_number(int), none_or(str))
ON_OFF = Form("on, off", _read_choice(SWITCH), lambda value: "on" if value else "off")


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
