"""The error that marrq raises on purpose: one sentence that names the thing, the value and the way
out."""


class MarrqError(Exception):
    """Something the user can mend. The command line prints its message as it is and exits with
    1."""
