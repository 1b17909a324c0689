"""The rules of the folders: who may import whom, and what the command line may load before it is
asked to work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "marrq": {"exporters", "runtime"},
    "exporters": {"runtime"},
    "runtime": {"marrq", "exporters", "torch", "timm", "transformers"},
}


def imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_what_its_place_forbids(package: str):
    files = [
        file for file in (ROOT / package).rglob("*.py") if "cli" not in file.relative_to(ROOT).parts
    ]
    assert files
    found = {
        str(file.relative_to(ROOT)): sorted(imports(file) & FORBIDDEN[package]) for file in files
    }
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize("statement", ["import marrq", "import marrq.cli", "import runtime.errors"])
def test_the_way_to_the_help_loads_nothing_heavy(statement: str):
    heavy = "torch timm transformers onnx onnxruntime numpy"
    code = f"{statement}; import sys; print([name for name in {heavy!r}.split() if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_every_module_says_what_it_is_for():
    files = [file for package in FORBIDDEN for file in (ROOT / package).rglob("*.py")]
    assert [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text()))] == []
