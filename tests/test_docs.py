"""Commands, recipes and keys on the pages of docs/ and in the README are ones that the command line and the schema take."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

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


EXCLUDED = "---\nsearch:\n  exclude: true\n---\n"
"""Front matter that keeps a page out of the site's search."""


def searched() -> list[Path]:
    """The pages that the site's search knows, but the one that the command line writes."""
    return [page for page in PAGES if page.name != "README.md" and not page.read_text(encoding="utf-8").startswith(EXCLUDED)]


def test_what_is_searched_is_read_in_two_hours() -> None:
    words = {page.name: sum(bool(re.search(r"\w", word)) for word in page.read_text("utf-8").split()) for page in searched()}
    assert sum(words.values()) <= 27_000, words


def test_development_is_outside_the_search_and_nothing_else_is() -> None:
    sections = {
        name: pages for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for name, pages in entry.items()
    }
    development = {path for entry in sections["Development"] for path in entry.values()}
    left_out = {page.name for page in PAGES if page not in searched()} - {"README.md"}
    assert left_out == development


def test_commands_of_users_name_no_folder_of_ours() -> None:
    assert [page.name for page in [ROOT / "README.md", *searched()] if "shared/data" in page.read_text(encoding="utf-8")] == []


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site has them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower())
        for heading in plain
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_lead_to_one(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if link[1] not in slugs(page.parent / link[0] if link[0] else page)] == []


def test_make_docs_installs_what_it_imports() -> None:
    """And not torch, which is 2 GB: `make docs` takes the extra `docs` alone."""
    code = (
        "import importlib.metadata as meta, sys, typer, adapt_pruner.cli; typer.main.get_command(adapt_pruner.cli.app)\n"
        "print(*{meta.packages_distributions()[name][0] for name in {name.partition('.')[0] for name in sys.modules} "
        "if name in meta.packages_distributions()})"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.lower().split()
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    waiting, known = [Requirement(line) for line in installed], {"adapt-pruner", "setuptools"}  # whose .pth file runs everywhere
    while waiting:
        need = waiting.pop()
        if need.name.lower() not in known and (need.marker is None or need.marker.evaluate({"extra": ""})):
            known.add(need.name.lower())
            waiting += [Requirement(line) for line in importlib.metadata.requires(need.name) or []]
    assert {name.replace("_", "-") for name in imported} - {name.replace("_", "-") for name in known} == set()
    assert "torch" not in known
