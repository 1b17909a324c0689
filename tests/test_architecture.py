"""The rules of the folders: who may import whom, and what the command line may load before it is
asked to work."""

import ast
import subprocess
import sys

import pytest
from structure import ROOT, Structure, imported, measure, sources

LIBRARIES = {"torch", "timm", "transformers"}
FORBIDDEN = {
    "marrq/": {"exporters", "runtime"},
    "marrq/methods/": {"marrq.models", "marrq.pipeline", "marrq.artifact", "marrq.transforms"},
    "marrq/quantizers/": {"marrq.models", "marrq.pipeline", "marrq.artifact", "marrq.methods"},
    "marrq/models/": {"marrq.pipeline", "marrq.artifact", "marrq.methods", "marrq.transforms"},
    "marrq/transforms/": {"marrq.pipeline", "marrq.artifact"},
    "marrq/pipeline/": {"marrq.artifact", "marrq.refinement"},
    "marrq/refinement/": {"marrq.artifact", "marrq.transforms", "exporters", "runtime"},
    "exporters/": {"runtime", "marrq.workflows", "marrq.cli", "marrq.pipeline"},
    "runtime/": {"marrq", "exporters", *LIBRARIES},
}
"""What the files of a folder may not import, at the top or inside a function."""
FREE = ("marrq/cli/", "marrq/workflows/")
"""The folders that import all three packages."""


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_folder_imports_what_its_place_forbids(folder: str):
    files = {
        file: text
        for file, text in sources().items()
        if file.startswith(folder) and not file.startswith(FREE)
    }
    assert files
    found = {}
    for file, text in files.items():
        names = imported(ast.parse(text))
        parents = {".".join(name.split(".")[: n + 1]) for name in names for n in range(3)}
        found[file] = sorted(parents & FORBIDDEN[folder])
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "statement", ["import marrq", "import marrq.cli.app", "import runtime.errors"]
)
def test_the_way_to_the_help_loads_nothing_heavy(statement: str):
    heavy = "torch timm transformers onnx onnxruntime numpy"
    code = (
        f"{statement}; import sys; "
        f"print([name for name in {heavy!r}.split() if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_is_for():
    found = [file for file, text in sources().items() if not ast.get_docstring(ast.parse(text))]
    assert found == []


@pytest.fixture(scope="module")
def structure() -> Structure:
    return measure()


def test_no_line_is_wider_than_a_screen_and_no_file_longer_than_a_sitting(structure: Structure):
    assert structure.wide_lines == 0
    assert structure.longest[1] <= 350


def test_comments_say_why_throughout(structure: Structure):
    assert structure.comments >= 0.06


def test_few_functions_take_many_things(structure: Structure):
    assert len(structure.entangled) <= 5
    assert structure.most_parameters <= 8


def test_no_files_import_each_other_in_a_circle(structure: Structure):
    assert structure.circles == []


def test_reports_have_types(structure: Structure):
    assert structure.untyped <= 8


def test_a_command_parses_calls_and_prints():
    commands = {
        file: len(text.splitlines())
        for file, text in sources().items()
        if file.startswith("marrq/cli/") and "from marrq.cli import common" in text
    }
    assert {file: lines for file, lines in commands.items() if lines > 80} == {}
