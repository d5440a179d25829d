"""The house stands: imports run downwards only, nothing heavy loads before it is needed, names and parts are in order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adapt_pruner
from adapt_pruner import recipe
from adapt_pruner.recipe import parts

ROOT = Path(adapt_pruner.__file__).parent

DESIGN = Path(__file__).parent.parent / "docs" / "design.md"


def floors() -> dict[str, int]:
    """Room -> floor, as the table in docs/design.md has them; the only place where they stand."""
    rows = re.findall(r"^\| (\d+) \| (`[^|]*) \|", DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        room.removesuffix("/").removesuffix(".py"): int(floor)
        for floor, named in rows
        for room in re.findall(r"`([^`]*)`", named)
    }


FLOORS = floors()
WAY_IN = ("__init__", "__main__")
"""They lie above all floors."""


def imports_of(path: Path) -> list[str]:
    """The rooms of this package that a file imports, wherever in the file, type checking excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adapt_pruner"):
            assert node.level == 0
            module = node.module.split(".")
            found += [module[1]] if len(module) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("adapt_pruner.")]
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    inside = path.relative_to(ROOT).parts
    room = inside[0].removesuffix(".py")
    for imported in imports_of(path):
        assert imported == room or room in WAY_IN or FLOORS[imported] < FLOORS[room], (
            f"{room} (floor {FLOORS[room]}) imports {imported} (floor {FLOORS[imported]})"
        )
    assert len(inside) <= 3, "at most two folders deep"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_answer(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    assert ast.get_docstring(ast.parse(text)), "the first docstring line of a file is the question it answers"


def test_the_walk_sees_an_upward_import(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "def f():\n    from adapt_pruner.run.loop import run\n    import adapt_pruner.cli.run\n    from adapt_pruner import recipe\n"
    )
    assert imports_of(tmp_path / "x.py") == ["run", "cli", "recipe"]


@pytest.mark.parametrize(
    "statement",
    [
        "import adapt_pruner",
        "import adapt_pruner.cli",
        "import adapt_pruner.recipe",
        "from adapt_pruner.report import card, comparison, hub, page, screen",  # what reads a folder's JSON only
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names_are_sorted_and_there() -> None:
    assert adapt_pruner.__all__ == sorted(adapt_pruner.__all__)
    for name in adapt_pruner.__all__:
        assert getattr(adapt_pruner, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = adapt_pruner.nonsense


def test_every_part_has_a_line_and_can_be_bound() -> None:
    for key in parts.FOLDERS:
        found = parts.summaries(key)
        assert found, key
        for name, line in found.items():
            assert len(line) > 20, name
            assert callable(parts.bind(key, name))


@pytest.mark.parametrize("name", [*recipe.methods(), *recipe.builtin()])
def test_every_recipe_that_comes_along_is_valid(name: str) -> None:
    found = recipe.read(name)
    assert found.about
    assert recipe.read(name, overrides=["seed=3"]).seed == 3


def test_the_design_names_every_room_and_no_other() -> None:
    there = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__pycache__", *WAY_IN}
    assert FLOORS.keys() == there
    assert len(set(FLOORS.values())) <= 11
    assert sum((ROOT / room).is_dir() for room in FLOORS) <= 15


def test_public_functions_win_over_folders_of_their_name() -> None:
    """Also once modules of these folders have been imported, here or by a test before."""
    from adapt_pruner.run.folder import RunFolder
    from adapt_pruner.score import weights

    assert {"adapt_pruner.run", "adapt_pruner.score"} < sys.modules.keys()
    assert (callable(adapt_pruner.run), callable(adapt_pruner.score)) == (True, True)
    assert (RunFolder.__name__, weights.__name__) == ("RunFolder", "adapt_pruner.score.weights")


@pytest.mark.parametrize(
    "page", sorted(DESIGN.parents[1].glob("*.md")) + sorted(DESIGN.parent.glob("*.md")), ids=lambda path: path.name
)
def test_no_line_of_a_page_is_too_long_to_read(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.lstrip().startswith("|")] == []
