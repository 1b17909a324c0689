"""What the user chooses beside the codes, and its text: `srr:32`, `lqer:8:int8`, `serq:32`.

methods/lowrank.py finds the branch of srr, qera and lqer, methods/serq.py the columns of serq.
Nothing here imports torch, see methods/spec.py.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from marrq.errors import MarrqError
from marrq.methods.setting import COUNT, Form

LowRankKind = Literal["srr", "qera", "lqer", "serq"]

SERQ = "serq"

LOW_RANK = re.compile(r"(\w+):(\d+)(?::(\w+))?", re.ASCII)
NUM_BITS: dict[str | None, int] = {None: 16, "fp16": 16, "int8": 8}


def parse_lowrank(text: str) -> "LowRankSpec":
    """`srr:32`, the same as `srr:32:fp16`, `srr:32:int8`, or `serq:32` to a LowRankSpec. Raises
    MarrqError for anything else."""
    if text in get_args(LowRankKind):
        raise MarrqError(f"low-rank branch {text!r} has no rank: write {text}:32")
    # KIND:RANK[:STORAGE]; without a storage, 16 bits.
    match = LOW_RANK.fullmatch(text)
    if not match or match[3] not in NUM_BITS:
        raise MarrqError(
            f"unknown low-rank branch {text!r}: write {{srr,qera,lqer}}:RANK[:fp16|:int8] or "
            "serq:RANK, for example srr:32"
        )
    kind, rank = cast(LowRankKind, match[1]), int(match[2])
    # The bits of serq's second codes follow from the weight's: without a storage, there is none.
    storage = None if kind == SERQ and match[3] is None else NUM_BITS[match[3]]
    return LowRankSpec(kind, rank, storage)


BRANCH = Form(
    "srr, qera or lqer, then :RANK, then :int8 or :fp16 (the default); or serq:RANK",
    parse_lowrank,
    lambda value: isinstance(value, LowRankSpec),
    str,
)


@dataclass(frozen=True)
class LowRankSpec:
    """A low-rank branch L R beside the codes (methods/lowrank.py), or salient columns, which have
    two codes for each weight (methods/serq.py).

    kind: how L and R are found; `serq` for salient columns
    rank: r; the number of salient columns
    num_bits: 16 stores L and R as float16; 8 as int8, with a float32 scale for each of the r
    components of L and of R; None for serq, whose second codes have bits by those of the weight"""

    kind: LowRankKind
    rank: int
    num_bits: int | None = 16

    def __post_init__(self) -> None:
        if self.kind not in get_args(LowRankKind):
            raise MarrqError(
                f"a low-rank branch must be one of {', '.join(get_args(LowRankKind))}: got "
                f"{self.kind!r}"
            )
        if not COUNT.allows(self.rank):
            raise MarrqError(
                f"the rank of a low-rank branch must be {COUNT.values}: got {self.rank}; leave the "
                "branch out for none"
            )
        if self.kind == SERQ and self.num_bits is not None:
            raise MarrqError(
                "the bits of a weight decide those of serq's second codes: write serq:RANK without "
                "a storage"
            )
        if self.is_branch and self.num_bits not in NUM_BITS.values():
            raise MarrqError(
                "a low-rank branch is stored with 8 (int8) or 16 (float16) bits: got "
                f"{self.num_bits}"
            )

    @property
    def is_branch(self) -> bool:
        """Whether it is a product L R in floating point beside the codes."""
        return self.kind != SERQ

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}" + (":int8" if self.num_bits == 8 else "")
