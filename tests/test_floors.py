"""The house stands: imports run downwards only, nothing heavy loads before it is needed, names and parts are in order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adapt_pruner
from adapt_pruner import parts, recipe

ROOT = Path(adapt_pruner.__file__).parent

FLOORS = {
    "errors": -1,
    "core": 0,
    "families": 1,
    "metrics": 2,
    "data": 2,
    "repair": 2,
    "train": 2,
    "choose": 3,
    "evaluate": 3,
    "checkpoint": 3,
    "parts": 4,
    "slicing": 4,
    "export": 4,
    "recipe": 5,
    "estimate": 6,
    "plan": 6,
    "position": 6,
    "card": 6,
    "report": 4,
    "runs": 6,
    "hub": 7,
    "prepare": 7,
    "bench": 7,
    "latency": 8,
    "stage": 8,
    "measure": 8,
    "trackers": 8,
    "outcome": 9,
    "pipeline": 10,
    "forecast": 10,
    "compare": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 12,
}


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
        assert imported == room or FLOORS[imported] < FLOORS[room], (
            f"{room} (floor {FLOORS[room]}) imports {imported} (floor {FLOORS[imported]})"
        )
    assert len(inside) <= 2, "at most two levels deep"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_answer(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    assert ast.get_docstring(ast.parse(text)), "the first docstring line of a file is the question it answers"


def test_the_walk_sees_an_upward_import(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "def f():\n    from adapt_pruner.pipeline import run\n    import adapt_pruner.cli.run\n    from adapt_pruner import recipe\n"
    )
    assert imports_of(tmp_path / "x.py") == ["pipeline", "cli", "recipe"]


@pytest.mark.parametrize("statement", ["import adapt_pruner", "import adapt_pruner.cli", "import adapt_pruner.recipe"])
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


@pytest.mark.parametrize("room", [room for room in FLOORS if (ROOT / room).is_dir()])
def test_a_folder_says_on_which_floor_it_is(room: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert said.startswith(f"Floor {FLOORS[room]}: ")


def test_the_design_names_every_room_on_its_floor() -> None:
    text = (Path(__file__).parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`[^|]*) \|", text, re.MULTILINE)
    named = {
        room.removesuffix("/").removesuffix(".py"): int(floor)
        for floor, rooms in rows
        for room in re.findall(r"`([^`]*)`", rooms)
    }
    assert named == {room: floor for room, floor in FLOORS.items() if room != "errors"}
