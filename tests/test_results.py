"""Tables in docs/results.md whose figures lie in the repository say what the figures say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_retention_table_is_that_of_its_figures() -> None:
    command = [sys.executable, "benchmarks/retention.py", "--table"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    rows = [line for line in printed if "%" in line or "perplexity" in line]
    assert len(rows) >= 9, printed
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in printed[2:] if row not in text] == [], "put the output of benchmarks/retention.py --table there"


def test_the_figures_name_no_folder_of_the_machine_they_were_made_on() -> None:
    for path in sorted((ROOT / "benchmarks" / "retention").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        assert '": "/' not in text, path
        assert str(Path.home()) not in text, path
