"""Commands, recipes and keys on the pages of docs/ and in the README are ones that the command line and the schema take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from adapt_pruner import cli, recipe
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import schema

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if path.name != "command-line.md")])
_Refused: Any = typer.BadParameter.__mro__[2]  # of the click that typer brings
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|…")
"""What stands for a value of the reader's, such as MODEL."""


def commands(text: str) -> list[str]:
    """Every command of a page's code blocks, with its continued lines."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    whole = re.sub(r"\\\n\s*", "", "\n".join([*blocks, indented]))
    return [line for line in whole.splitlines() if line.startswith("adapt-pruner ")]


def parsed(command: str) -> dict[str, Any]:
    """The values of a command's parameters, as the command line reads them; nothing is run."""
    words = shlex.split(command, comments=True)[1:]
    group: Any = typer.main.get_command(cli.app)
    if words[0].startswith("-"):
        with pytest.raises(typer.Exit):
            group.make_context("adapt-pruner", words)
        return {}
    return dict(group.commands[words[0]].make_context(words[0], words[1:]).params)


def test_pages_have_commands() -> None:
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page: Path) -> None:
    wrong = []
    for command in commands(page.read_text(encoding="utf-8")):
        if PLACEHOLDER.search(command.partition("#")[0]):
            continue
        try:
            asked = parsed(command)
            if asked.get("method"):
                recipe.read({"method": asked["method"]})
            for method in (asked.get("methods") or "").split(","):
                recipe.read({"method": method} if method else {})
        except (_Refused, KeyError, UsageError) as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_is_one(page: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        data = yaml.safe_load(block)
        if isinstance(data, dict) and "method" in data:
            recipe.read(data | ({"method": "uniform"} if "paper" in data else {}))  # one with a paper is a new row


def test_two_texts_that_the_model_writes_have_two_names() -> None:
    """Self-written text to calibrate on, and repair text: a phrase that could be either is not used where people read."""
    places = [*PAGES, *ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.yaml"), ROOT / "docs" / "reference" / "command-line.md"]
    either = re.compile(r"model\s+(?:writes|wrote)\s+itself|no\s+text\s+of\s+its\s+own|(?:writes|written by)\s+itself")
    found = {path.name: either.findall(path.read_text(encoding="utf-8")) for path in places if path.is_file()}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}


def test_pages_have_recipes() -> None:
    """So that the test above looks at some."""
    blocks = [block for page in PAGES for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)]
    assert sum(isinstance(data := yaml.safe_load(block), dict) and "method" in data for block in blocks) >= 5


def test_every_key_is_in_the_table() -> None:
    text = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    keys = set(
        re.findall(r"`([a-z_.]+)`", "\n".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")))
    )
    tables = {"calibration": schema.Calibration, "training": schema.Training, "evaluation": schema.Evaluation}
    known = {name for name in recipe.Recipe.model_fields if name not in tables}
    known |= {f"{table}.{name}" for table, model in tables.items() for name in model.model_fields}
    assert keys == known
