"""The house in numbers: lines, files, rooms, floors, what a small run walks through; of the code here, or of another commit beside it.

    python benchmarks/house.py --base 6fb363c

A room is a folder or module right below `adapt_pruner`; its floor stands in docs/design.md. The run that is traced has two stages with
training between the cuts, on a tiny random model, through the command line.
"""

import argparse
import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MANY = 7
"""Arguments of a function, beyond which it is counted."""
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
"""Kinds of tokens that make no line a line of code."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", help="commit to show beside the code here")
    parser.add_argument("--walk", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.walk:
        print(json.dumps(walk(Path(options.walk[0]), Path(options.walk[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model(place)
        columns = {"here": measured(ROOT, place / "here", place)}
        if options.base:
            tree = place / "base"
            tree.mkdir()
            packed = subprocess.run(
                ["git", "-C", ROOT, "archive", options.base, "src", "docs"], check=True, stdout=subprocess.PIPE
            ).stdout
            subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)
            columns = {options.base: measured(tree, place / "before", place), **columns}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for what in columns["here"]:
        print(f"| {what} | {' | '.join(f'{column[what]:,}' for column in columns.values())} |")


def measured(tree: Path, out: Path, place: Path) -> dict[str, int]:
    """All numbers of one tree."""
    package, floors = tree / "src/adapt_pruner", floors_of(tree)
    files = list(package.rglob("*.py"))
    rooms = {room_of(path, package) for path in files}
    arrows = {(room_of(path, package), other) for path in files for other in imports(path)}
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ADAPT_PRUNER_CACHE": str(out / "cache")
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__)), "--walk", str(place), str(out)]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    walked = json.loads(done.stdout.splitlines()[-1])
    executed = {Path(file) for file in walked["files"]}
    handed = [(one, other) for one, other in walked["handed"] if one in floors and other in floors]
    return {
        "lines of code": sum(num_lines_of_code(path.read_text(encoding="utf-8")) for path in files),
        "files": len(files),
        "modules that a two-stage run imports": len(walked["modules"]),
        "rooms at the root": len(rooms - {"__init__", "__main__"}),
        "floors": len(set(floors.values())),
        "pairs of rooms of which one imports the other": len({(one, other) for one, other in arrows if one != other}),
        "files that a two-stage run executes": len(executed),
        "rooms in which these files lie": len({room_of(path, package) for path in executed}),
        "rooms that the recipe enters": len({room for pair in handed for room in pair}),
        "pairs of rooms between which the recipe or the `Work` is passed": len({pair for pair in handed if pair[0] != pair[1]}),
        "of these up, to a higher floor": len({(one, other) for one, other in handed if floors[other] > floors[one]}),
        "functions that it is handed to": len(set(walked["functions"])),
        f"functions of more than {MANY} arguments outside cli": sum(
            many for path in files if room_of(path, package) != "cli" for many in [num_many(path)]
        ),
    }


def num_lines_of_code(text: str) -> int:
    """Lines that hold more than a comment or a docstring."""
    expressions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    strings = [node for node in expressions if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    docstrings = {line for node in strings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in LAYOUT]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def room_of(path: Path, package: Path) -> str:
    """The room that a file lies in."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def floors_of(tree: Path) -> dict[str, int]:
    """Room -> floor, by the table in docs/design.md."""
    rows = re.findall(r"^\| (\d+) \| (`[^|]*) \|", (tree / "docs/design.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        room.removesuffix("/").removesuffix(".py"): int(floor)
        for floor, named in rows
        for room in re.findall(r"`([^`]*)`", named)
    }


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports, type checking left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in checked for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("adapt_pruner"):
            continue
        parts = (node.module or "").split(".")
        yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def num_many(path: Path) -> int:
    """Functions of more than `MANY` arguments."""
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]  # fmt: skip
    sizes = [len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) for node in functions]
    own = [any(argument.arg in ("self", "cls") for argument in node.args.args) for node in functions]
    return sum(size - is_own > MANY for size, is_own in zip(sizes, own, strict=True))


def make_model(place: Path) -> None:
    """A tiny random model with a byte tokenizer, and a text."""
    sys.path.insert(0, str(ROOT / "tests"))
    conftest = importlib.import_module("conftest")

    conftest.tiny_model(vocab_size=conftest.VOCAB).save_pretrained(place / "model")
    conftest.byte_tokenizer().save_pretrained(place / "model")
    lines = (f"Line {number}: the quick brown fox jumps over {number**2} lazy dogs.\n\n" for number in range(400))
    (place / "text.txt").write_text("".join(lines), encoding="utf-8")


def walk(place: Path, out: Path) -> dict[str, Any]:
    """Run in this process; the files of the package that were executed, and who handed the recipe to whom."""
    from adapt_pruner import cli

    package = str(Path(cli.__file__).parents[1])
    files: set[str] = set()
    handed: list[tuple[str, str]] = []
    functions: list[str] = []

    def room(file: str) -> str:
        return Path(file).relative_to(package).parts[0].removesuffix(".py")

    def imports_run(frame: Any) -> bool:
        """Whether a module of the package is being imported, which makes its classes and constants."""
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(package):
                return True
            frame = frame.f_back
        return False

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package) or imports_run(frame):
            return
        files.add(code.co_filename)
        values = (frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        if any(type(value).__name__ in ("Recipe", "Work") for value in values):
            caller = frame.f_back
            while caller is not None and not caller.f_code.co_filename.startswith(package):
                caller = caller.f_back
            if caller is not None:
                handed.append((room(caller.f_code.co_filename), room(code.co_filename)))
                functions.append(f"{code.co_filename}:{code.co_qualname}")

    text = str(place / "text.txt")
    recipe = {
        "method": "adapt-pruner", "model": str(place / "model"), "budget": "70%", "stages": 2, "device": "cpu", "dtype": "float32",
        "calibration": {"source": text, "samples": 8, "length": 16},
        "training": {"source": text, "tokens": 1024, "batch_tokens": 128, "length": 32},
        "evaluation": {"source": text, "window": 32, "max_windows": 4},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    sys.argv = ["adapt-pruner", "run", str(out / "recipe.yaml"), "-o", str(out / "run")]
    sys.setprofile(watch)
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.setprofile(None)
    modules = sorted(name for name in sys.modules if name.partition(".")[0] == "adapt_pruner")
    return {"modules": modules, "files": sorted(files), "handed": sorted(set(handed)), "functions": sorted(set(functions))}


if __name__ == "__main__":
    main()
