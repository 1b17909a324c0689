"""Which ONNX Runtime loads which file, by opset and IR version.

A file of marrq says itself what it needs (`marrq.lowest_onnxruntime`). For other files the table
gives a lower bound: a release may know an opset and have no kernel for one of its operators.
"""

from runtime.errors import BenchError

# Highest opset and IR version that ONNX Runtime loads from that release on.
#
# The first release of each minor version from 1.15 to 1.32 was seen to load an Identity of every
# opset from 7 on, with every IR version from 3 on, up to these, and to refuse the next of either.
TRIED = {
    "1.15.0": (18, 9),
    "1.16.0": (19, 9),
    "1.17.0": (20, 9),
    "1.18.0": (21, 10),
    "1.21.0": (22, 10),
    "1.23.0": (23, 11),
    "1.24.1": (25, 13),
    "1.25.0": (26, 13),
    "1.32.0": (28, 14),
}

NEWEST = list(TRIED)[-1]


def parse_version(text: str) -> tuple[int, ...]:
    """Numbers of a version. Raises BenchError if the text has something else."""
    # int() would take signs, blanks and underscores, which no version has.
    parts = text.split(".")
    if not all(part.isdecimal() for part in parts):
        raise BenchError(
            f"{text!r} is no version of ONNX Runtime: give numbers with points between them, like "
            "1.18 or 1.18.1"
        )
    return tuple(map(int, parts))


def lowest_onnxruntime(opset: int, ir_version: int) -> str | None:
    """First release that was seen to load both; None if none did."""
    # From the oldest on, so that the first hit is the lowest release.
    for release, (highest_opset, highest_ir_version) in TRIED.items():
        if opset <= highest_opset and ir_version <= highest_ir_version:
            return release
    return None


def loads_under(server: str, lowest: str | None) -> bool | None:
    """Whether an ONNX Runtime is new enough; None if that is not known.

    server: a version; without its last number it stands for all releases that begin so.
    lowest: the first release that loads the file; None if none was seen to.
    """
    version = parse_version(server)
    if lowest is not None:
        # 1.18 stands for 1.18.0 and all that follow, so only as many numbers are compared.
        return version >= parse_version(lowest)[: len(version)]
    # A release that was tried refused the file; a later one may know more.
    return None if version > parse_version(NEWEST)[: len(version)] else False
