"""Tables in docs/measurements.md whose figures lie in the repository say what the figures say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapt_pruner.compare.table import rows_of, table

ROOT = Path(__file__).parent.parent


def table_of(figures: Path) -> list[str]:
    command = [sys.executable, "benchmarks/retention.py", "--table", "-o", str(figures)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()


def test_the_retention_table_is_that_of_its_figures() -> None:
    printed = table_of(ROOT / "benchmarks" / "retention")
    rows = [line for line in printed if "%" in line or "perplexity" in line]
    assert len(rows) >= 9, printed
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in printed[2:] if row not in text] == [], "put the output of benchmarks/retention.py --table there"


@pytest.mark.parametrize(("compared", "least"), [("compared", 30), ("compared-gemma3", 7)])
def test_the_table_of_methods_is_that_of_its_cells(compared: str, least: int) -> None:
    """As `adapt-pruner compare` writes it where all cells are there."""
    folder = ROOT / "benchmarks" / compared / "cells"
    cells, dense = [], {}
    for path in folder.glob("*.json"):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if named := re.fullmatch(r"(.+)-(\d+)-(\d+)-[0-9a-f]{12}", path.stem):
            cells.append({"method": named[1], "size": int(named[2]), "draw": int(named[3]), **figures})
        else:
            dense = figures
    _, lines = table(rows_of(cells, dense))
    assert len(lines) > least
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8").splitlines()
    rows = [f"| {' | '.join(line)} |" for line in lines if any(line)]
    assert [row for row in rows if row not in text] == [], "put the table of compare.md there"


def test_the_figures_name_no_folder_of_the_machine_they_were_made_on() -> None:
    for path in sorted(
        [*(ROOT / "benchmarks" / "retention").glob("*.json"), *(ROOT / "benchmarks").glob("compared*/cells/*.json")]
    ):
        text = path.read_text(encoding="utf-8")
        assert '": "/' not in text, path
        assert str(Path.home()) not in text, path


def test_the_average_of_a_model_is_there_once_all_its_scores_are(tmp_path: Path) -> None:
    figures = Path(shutil.copytree(ROOT / "benchmarks" / "retention", tmp_path / "retention"))
    found = json.loads((figures / "dense-piqa.json").read_text(encoding="utf-8"))
    for name, value in (("dense", 0.5), ("92M-recovered", 0.25)):
        found["tasks"][0] |= {"task": "hellaswag", "value": value, "stderr": 0.01}
        (figures / f"{name}-hellaswag.json").write_text(json.dumps(found), encoding="utf-8")
    for path in figures.glob("113.3M-pruned-hellaswag.json"):
        path.unlink()
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table_of(figures)}
    columns = [rows[task] for task in rows if "acc" in task and "mmlu" not in task]
    assert len(columns) == 8
    values = [[float(cells[number].split(" ")[0]) for cells in columns] for number in (0, 5)]
    dense, recovered = (sum(those) / 8 for those in values)
    said = rows["average of the eight"]
    assert abs(float(said[0].split(" ± ")[0]) - dense) < 0.1
    assert abs(float(said[5].split(" ± ")[0]) - recovered) < 0.1
    assert said[5].endswith(f"({100 * recovered / dense:.0f} %)")
    assert said[1] == "–"
