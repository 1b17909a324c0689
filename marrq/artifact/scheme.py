"""The scheme of an artifact, read without torch: the command line compares it with a flavour before
it loads the model."""

import json
from pathlib import Path
from typing import Any

from marrq.errors import MarrqError
from marrq.schemes import ActivationSpec, Scheme, WeightSpec

SCHEME_KEYS = {"outer_layers": "edges"}
"""Keys of a scheme that differ from the name of the field."""


def scheme_from_json(fields: dict[str, Any]) -> Scheme:
    """The scheme that a config.json has. Raises KeyError, TypeError or MarrqError for one that is
    damaged."""
    # A text would count as true.
    for key in ("edges", "mixed"):
        if not isinstance(fields[key], bool):
            raise TypeError(f"{key} is neither true nor false: {fields[key]!r}")
    activation = fields["activation"]
    spec = None if activation is None else ActivationSpec(**activation)
    return Scheme(WeightSpec(**fields["weight"]), spec, fields["edges"], fields["mixed"])


def read_scheme(folder: Path) -> Scheme | None:
    """The scheme of an artifact; None if its config.json is damaged, which is told with the reason
    when the artifact is loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return scheme_from_json(config["scheme"])
    except (KeyError, TypeError, ValueError, MarrqError):
        return None
