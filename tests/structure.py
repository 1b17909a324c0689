"""Measure the structure of the source: how wide, how long, how commented, how entangled.

    python tests/structure.py [--json]

Reads `marrq/`, `exporters/` and `runtime/` as text and syntax trees; nothing is imported. The rules
that these figures must meet are in tests/test_architecture.py.
"""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PACKAGES = ("marrq", "exporters", "runtime")
WIDTH = 100
MANY_PARAMETERS = 7


@dataclass(frozen=True)
class Function:
    """A function or method. file: relative to the root; lines: of its body and signature."""

    file: str
    name: str
    lines: int
    parameters: int


@dataclass(frozen=True)
class Structure:
    """The figures of the table.

    comments: whole-line comments as a share of all lines, 0 … 1; entangled: functions outside the
    command line with 7 parameters or more; longest: file with the most lines; untyped: places in
    runtime/ that say `dict[str, Any]`; circles: files that import each other at import time.
    """

    files: int
    lines: int
    wide_lines: int
    comments: float
    functions: int
    function_lines: float
    entangled: list[Function]
    most_parameters: int
    longest: tuple[str, int]
    untyped: int
    circles: list[list[str]]


def sources() -> dict[str, str]:
    """The text of every module, by its path from the root."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def functions(file: str, tree: ast.Module) -> Iterator[Function]:
    """Every function of a module, nested ones too. `self` and `cls` are no parameters. A kernel in
    the Triton language is left out: it takes pointers and sizes, and cannot take objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_kernel(node):
            arguments = node.args
            names = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
            count = len([name for name in names if name not in ("self", "cls")])
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(file, node.name, lines, count)


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    # With or without arguments.
    names = (ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)
    return "triton.jit" in names


def imported(tree: ast.Module, everywhere: bool = True) -> set[str]:
    """Dotted names that a module imports; `from a import b` counts as `a` and `a.b`.

    everywhere: also inside functions; else only what runs when the module is imported, without
    `if TYPE_CHECKING`.
    """
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else _at_import_time(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            continue
        yield statement
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _at_import_time(getattr(statement, inner, []))


def circles(trees: dict[str, ast.Module]) -> list[list[str]]:
    """Groups of files that reach each other by imports, whenever those imports run."""
    modules = {_module(file): file for file in trees}
    arrows = {
        file: {modules[name] for name in _imported_modules(tree, modules)} - {file}
        for file, tree in trees.items()
    }
    reached = {file: _reached(file, arrows) for file in arrows}
    groups = {
        tuple(sorted(other for other in reached[file] if file in reached[other]))
        for file in arrows
        if file in reached[file]
    }
    return sorted(map(list, groups))


def _imported_modules(tree: ast.Module, modules: dict[str, str]) -> set[str]:
    """Of `from a import b` the module `a.b` if b is a module, else the module a."""
    names = imported(tree) & modules.keys()
    packages = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and all(f"{node.module}.{alias.name}" in modules for alias in node.names)
    }
    return names - packages


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _reached(start: str, arrows: dict[str, set[str]]) -> set[str]:
    """What can be reached from a file; the file itself only if an arrow leads back to it."""
    found: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += arrows[file]
    return found


def measure() -> Structure:
    """The figures of the working tree."""
    texts = sources()
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = [(file, line) for file, text in texts.items() for line in text.splitlines()]
    found = [one for file, tree in trees.items() for one in functions(file, tree)]
    outside = [one for one in found if not one.file.startswith("marrq/cli/")]
    lengths = {file: len(text.splitlines()) for file, text in texts.items()}
    longest = max(lengths, key=lambda file: lengths[file])
    return Structure(
        files=len(texts),
        lines=len(lines),
        wide_lines=sum(len(line) > WIDTH for _, line in lines),
        comments=sum(line.lstrip().startswith("#") for _, line in lines) / len(lines),
        functions=len(found),
        function_lines=median(one.lines for one in found),
        entangled=[one for one in outside if one.parameters >= MANY_PARAMETERS],
        most_parameters=max(one.parameters for one in outside),
        longest=(longest, lengths[longest]),
        untyped=sum(
            line.count("dict[str, Any]") for file, line in lines if file.startswith("runtime/")
        ),
        circles=circles(trees),
    )


def table(found: Structure) -> str:
    """The figures as lines for people."""
    rows = {
        "files": found.files,
        "lines": found.lines,
        f"lines over {WIDTH} columns": found.wide_lines,
        "whole-line comments": f"{100 * found.comments:.1f} %",
        "functions, median lines": f"{found.functions}, {found.function_lines:g}",
        "longest file": f"{found.longest[0]}, {found.longest[1]} lines",
        "`dict[str, Any]` in runtime/": found.untyped,
        f"functions with {MANY_PARAMETERS} parameters or more": "; ".join(
            f"{one.file}:{one.name} {one.parameters}" for one in found.entangled
        )
        or "none",
        "import circles": "; ".join(" ".join(group) for group in found.circles) or "none",
    }
    return "\n".join(f"{name:38} {value}" for name, value in rows.items())


if __name__ == "__main__":
    result = measure()
    print(json.dumps(asdict(result), indent=2) if "--json" in sys.argv else table(result))
