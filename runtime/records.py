"""What a report is made of: frozen dataclasses whose fields are the keys of its JSON.

A class is thereby the description of its part of the schema. A field that is added, renamed or
moved changes the JSON that users read: tests/runtime/test_schemas.py holds the keys of each schema.
"""

import math
from dataclasses import fields
from typing import Any

# An object of JSON. Only what is written to a file or read from one is untyped.
Json = dict[str, Any]


class Record:
    """Base of the dataclasses in reports."""

    def to_json(self) -> Json:
        """The fields by their names, in their order, as values that `json` writes."""
        # Every subclass is a dataclass, which the type of this base cannot say.
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in names}


def _plain(value: object) -> object:
    """Records become objects of JSON, tuples become lists, and numbers that are not finite become
    null, at every depth."""
    # A record may add keys, as reports add their schema, so its own method is asked.
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    # JSON has no NaN and no infinity: most readers refuse a file with them.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
