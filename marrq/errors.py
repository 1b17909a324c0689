"""The error that marrq raises on purpose."""

from collections.abc import Iterable
from difflib import get_close_matches


class MarrqError(Exception):
    """A problem that the user can solve.

    The message is one sentence that names the thing, its value and the way out. The command line
    prints the message without a traceback and exits with 1.
    """


def choices(wrong: str, known: Iterable[str]) -> str:
    """What to choose in place of a wrong word: the known words that look like it, or else all."""
    words = list(known)
    near = get_close_matches(wrong, words)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(words)}"
