"""Which of two methods finds more with its embeddings, query by query, from a bench's report.

    marrq bench OUT/* --data IMAGES --json bench.json
    python examples/methods_apart.py bench.json gptq marr-stream > apart.json

For each scheme that both methods have, and each share that a bench of embeddings measures, the
drop from the second method to the first: the share of queries that the second alone answers right,
less the share that the first alone does. Its 95 % interval and p-value are those of a drop against
a baseline (runtime/measure/accuracy.py).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from runtime.measure.accuracy import bits_of, paired_drop

SHARES = ("knn1", "knn20", "recall1")


def by_scheme(report: dict[str, Any], method: str) -> dict[str, dict[str, Any]]:
    """What embeddings find, of the models of one method."""
    models = [model for model in report["models"] if model["method"] == method]
    return {model["scheme"]: model["embedding"]["retrieval"] for model in models}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two methods query by query.")
    parser.add_argument("report", type=Path)
    parser.add_argument("methods", nargs=2)
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    first, second = (by_scheme(report, method) for method in options.methods)
    rows = []
    for scheme in [scheme for scheme in second if scheme in first]:
        for share in SHARES:
            found = [side[scheme][share] for side in (second, first)]
            better, worse = (bits_of(one["hits"], one["queries"]) for one in found)
            drop = paired_drop(better, worse).to_json()
            rows.append({"scheme": scheme, "share": share, "queries": len(better), **drop})
    print(json.dumps({"methods": options.methods, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
