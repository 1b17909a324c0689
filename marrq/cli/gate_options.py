"""The options of `marrq bench` that demand something: exit code 3 if it is surely not met."""

from typing import Annotated

from marrq.cli.bench_options import checked

MaxDrop = Annotated[
    float | None,
    checked(
        metavar="POINTS",
        help="Exit with 3 if top-1 (of k-NN for embeddings) surely dropped by more.",
        min=0.0,
    ),
]
MinCosine = Annotated[
    float | None,
    checked(
        metavar="X",
        help="Exit with 3 if the mean cosine with fp32 is surely less.",
        min=-1.0,
        max=1.0,
    ),
]
