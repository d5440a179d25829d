"""benchmarks/gpu.py, which only a machine with a card needs, runs on tiny models without one, and sees what it is there to see."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark sets is set for it alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_all_of_it_runs_on_tiny_models_without_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "-o", str(file)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    table, rows = capsys.readouterr().out, json.loads(file.read_text())["rows"]
    assert not ended.value.code, table
    assert {row["part"] for row in rows} == {"law", "masks", "prune", "train"}
    assert all(row["what"] in table for row in rows)
    assert all(row["holds"] for row in rows if row["part"] in ("law", "masks"))
    left = {row["what"]: row["left_out"] for row in rows if row["left_out"]}
    assert left.keys() <= {"from disk", "ours, 8-bit moments", "ours, LoRA"}
    assert all("is not known" in why or "pip install" in why for why in left.values()), left
    assert all(row["tokens_per_second"] > 0 for row in rows if row["part"] == "train" and not row["left_out"])


def test_a_cut_that_forgets_something_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapt_pruner.core.model.cut.cut", lambda *given: None)
    (row,) = gpu.law("cpu", 1)
    assert row.holds is False


def test_a_part_that_fails_leaves_the_others_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("CUDA out of memory\nand more")

    for part in ("masks", "pruned", "trained"):
        monkeypatch.setattr(gpu, part, fails)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "-o", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert ended.value.code
    assert [(row["part"], row["holds"]) for row in rows] == [
        ("law", True), ("law", True), ("masks", False), ("prune", False), ("train", False),
    ]  # fmt: skip
    assert rows[-1]["found"] == "RuntimeError: CUDA out of memory"


def test_it_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*given: Any) -> Any:
        try:
            time.sleep(gpu.SECONDS + 60)
        except Exception:
            pytest.fail("a library took the end for a failure of its own")
        yield

    monkeypatch.setattr(gpu, "SECONDS", 1)
    monkeypatch.setattr(gpu, "law", hangs)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "-o", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit):
        gpu.main()
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (row["part"], row["left_out"]) == ("law", "the 1 seconds are over")


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("yaml", "accelerate") else found(name))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"lacks accelerate>=1.10, pyyaml>=6; install these"):
        gpu.main()
