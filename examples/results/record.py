r"""Put measured reports beside the result pages: NAME.json, from which pages.py makes NAME.md.

    python examples/results/record.py dinov2_small --commit HASH --date 2026-11-26 \
        --machine 'processor and cores' --commands commands.sh --report bench=bench.json

A record holds the commit, the date, the machine, the versions, the commands and the reports as
they were measured. What no page shows is left out: data of single images and of single linears,
and paths.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LEFT_OUT = {
    "hits",
    "same",
    "quantization",
    "audit",
    "alphas",
    "executed",
    "executed_on",
    "path",
    "curve",
}
PACKAGES = ("marrq", "torch", "onnxruntime")


def trimmed(value: Any) -> Any:
    """The value without the keys that no page shows, at any depth, and a model in a folder by the
    name that the commands give it."""
    if isinstance(value, str) and value.startswith("local-dir:/"):
        return f"local-dir:OUT/{Path(value).name}"
    if isinstance(value, dict):
        return {key: trimmed(part) for key, part in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [trimmed(part) for part in value]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="Write NAME.json beside the result pages.")
    parser.add_argument("name")
    parser.add_argument("--commit", required=True, help="The commit that was measured, in full.")
    parser.add_argument("--date", required=True)
    parser.add_argument("--machine", required=True, help="What was measured on, in words.")
    parser.add_argument("--commands", required=True, type=Path, help="A file of shell commands.")
    parser.add_argument("--report", action="append", required=True, metavar="LABEL=FILE")
    options = parser.parse_args()
    files = dict(text.split("=", 1) for text in options.report)
    reports = {label: json.loads(Path(file).read_text()) for label, file in files.items()}
    record = {
        "commit": options.commit,
        "date": options.date,
        "machine": options.machine,
        "versions": {package: version(package) for package in PACKAGES},
        "commands": options.commands.read_text().splitlines(),
        "reports": trimmed(reports),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / f"{options.name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
