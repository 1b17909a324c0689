"""The errors of this package: one sentence that names the thing, the value and the way out."""


class BenchError(Exception):
    """Something the user can mend. The command line prints its message as it is and exits with
    1."""


class GateError(Exception):
    """A demand that the user made does not hold of what was measured. The command line prints its
    message as it is and exits with 3."""
