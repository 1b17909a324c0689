"""How a result page is laid out: title, words, commands, conditions, tables."""

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill
from typing import Any

from runtime.report.comparison import ComparisonReport

WIDTH = 100

Json = dict[str, Any]
"""What record.py wrote (commit, date, machine, versions, commands, reports), or a part of it."""


def comparison(report: Json) -> ComparisonReport:
    """A report of `marrq compare`; record.py has left out where its images lie."""
    return ComparisonReport.read({**report, "data": {"path": "", **report["data"]}})


def joined(reports: list[ComparisonReport]) -> ComparisonReport:
    """One report of several that differ in their runs alone."""
    runs = tuple(run for one in reports for run in one.runs)
    return replace(reports[0], runs=runs)


def first_draws(report: ComparisonReport) -> ComparisonReport:
    """The first run of each scheme and method."""
    first = {(run.scheme, run.method): run for run in reversed(report.runs)}
    return replace(report, runs=tuple(reversed(first.values())))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first column holds names, the others figures."""
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(record: Json) -> str:
    """A table of what the commands ran on."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = {"machine": record["machine"], "versions": versions, "date": record["date"]}
    rows = [*facts.items(), ("commit", f"`{record['commit']}`")]
    return "\n".join(["| measured on | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def page(record: Json, title: str, intro: str, *parts: str) -> str:
    """A whole page. parts: headings and tables, which stay as they are, and paragraphs."""
    commands = "\n".join(["```sh", *record["commands"], "```"])
    whole = [f"# {title}", intro, commands, conditions(record), *parts]
    return "\n\n".join(map(laid_out, whole)) + "\n"


def laid_out(part: str) -> str:
    """A paragraph filled to the width; a heading, a table or a block of code as it is."""
    if part.startswith(("#", "|", "```")):
        return part
    return fill(" ".join(part.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
