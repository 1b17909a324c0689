"""The error that marrq raises on purpose."""


class MarrqError(Exception):
    """A problem that the user can solve.

    The message is one sentence that names the thing, its value and the way out. The command line
    prints the message without a traceback and exits with 1.
    """
