"""benchmarks/frontier.py: answers in batches are llama.cpp's own, files that store the same are one point, and the page says what the figures say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import frontier  # noqa: E402

from adapt_pruner.export import export, verify  # noqa: E402
from test_export import as_loaded, bpe, unequal  # noqa: E402


def point(arm: str, quant: str, megabytes: float, bits: float, digest: str = "") -> dict[str, Any]:
    return {
        "arm": arm, "quant": quant, "minutes": 20, "bytes": megabytes * 1e6, "bits": 8.5, "digest": digest or f"{arm}{quant}", "windows": 4,
        "texts": dict.fromkeys(frontier.MEASURED, bits), "chat": {"asked": 100, "right": [1, 2], "ended": 9, "looping": 0}, "trained_tokens": 0,
    }  # fmt: skip


def read(points: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(frontier, "CELLS", folder)
    (folder / "smollm2").mkdir()
    for each in points:
        (folder / "smollm2" / f"{each['arm']}-{each['quant']}.json").write_text(json.dumps(each))
    return frontier.points_of("smollm2", 20)


def test_files_that_store_the_same_are_one_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [point("dense", "q8_0", 145, 1.2, "a"), point("dense", "q6_k", 145, 1.2, "a"), point("dense", "q4_0", 90, 1.3)]
    found = read(same, tmp_path, monkeypatch)
    assert [frontier.title(each) for each in found] == ["as it is, Q4_0", "as it is, Q8_0 = Q6_K"]
    assert len(list(frontier.table(found))) == 4


def test_a_trained_file_has_the_speed_of_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"1": {"prefill": {"median": 1.5}, "decode": {"median": 2.5}}}
    dense = {**point("dense", "q8_0", 145, 1.2), "speed": speed}
    found = read([dense, point("trained", "q8_0", 145, 1.1), point("60", "q8_0", 99, 1.4)], tmp_path, monkeypatch)
    rows = list(frontier.table(found))[2:]
    assert [row.count("2.50×") for row in rows] == [0, 1, 1]


@pytest.mark.parametrize(
    ("pruned", "words"),
    [
        ((60, 1.5), "Up to 60 MB prune and quantise; above, quantise alone"),
        ((100, 1.5), "no pruned one is worth its bytes: quantise alone"),
        ((100, 1.25), "Pruned files and whole ones take turns"),
    ],
)
def test_the_verdict_is_that_of_the_files(
    pruned: tuple[float, float], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(
        [point("dense", "q8_0", 145, 1.2), point("trained", "q4_0", 90, 1.3), point("60", "q4_k_m", *pruned)],
        tmp_path,
        monkeypatch,
    )
    assert words in frontier.verdict(found)
    assert "No pruned file has been measured yet" in frontier.verdict([each for each in found if each["arm"] != "60"])


def test_answers_in_batches_are_those_one_by_one(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed", exc_type=ImportError)
    path = tmp_path / "x.gguf"
    export(as_loaded(unequal(), bpe()), path, to="gguf", quant="f32")
    openings = [[5, 6, 7], [9, 4, 3, 8, 20], [11]]
    with verify.opened(path, context=128) as engine:
        alone = [engine.greedy(ids, frontier.LONGEST) for ids in openings]
    end = alone[1][5]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in alone]
    assert frontier._written(path, openings, [end]) == expected
    assert len(expected[1]) <= 6


def test_the_page_says_what_its_figures_say() -> None:
    page = frontier.PAGE.read_text(encoding="utf-8")
    cells = list((BENCHMARKS / "frontier").glob("*/*.json"))
    assert cells
    for name in frontier.MODELS:
        minutes = [cell["minutes"] for cell in map(json.loads, map(Path.read_text, cells)) if cell["arm"] != "dense"]
        points = frontier.points_of(name, max(minutes, default=60))
        assert not points or "\n".join(frontier.table(points)) in page, "run benchmarks/frontier.py --page"
