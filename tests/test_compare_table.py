"""What becomes of finished cells: rows, their names, the page and the picture."""

import itertools
import math
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.compare import comparison
from adapt_pruner.compare.request import Request
from adapt_pruner.compare.table import markdown, rows_of, table
from adapt_pruner.core.provenance import to_install
from adapt_pruner.report import paper
from adapt_pruner.report.comparison import comparison_panels, label

DENSE = {"params": 1000, "decoder_params": 800, "nll": {"a": math.log(10), "b": math.log(20)}}


def cell(method: str, size: int, nll: float, **more: Any) -> dict[str, Any]:
    figures = {
        "method": method, "size": size, "params": size - 3, "decoder_params": size - 203, "nll": {"a": nll, "b": nll + 1},
        "seconds": nll, "peak_bytes": 2**30, "speed_up": 1.5,
    }  # fmt: skip
    return figures | more


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "float32, cpu. 1 draw of calibration text. Parameters"),
        ({"draws": 2, "calibration": "books/"}, "2 draws of calibration text (books/); medians over them, the spread"),
        ({"calibration_ids": ["a.json"], "draws": 3}, "1 draw of calibration text (files of token ids). Parameters"),
        ({"overrides": ["step=1", "samples=8"]}, "calibration text. Changed in every recipe: step=1, samples=8. Parameters"),
    ],
)
def test_the_page_says_what_it_was_calibrated_on(asked: dict[str, Any], said: str) -> None:
    plain = {"calibration": None, "calibration_ids": [], "overrides": [], "draws": 1, "methods": ["random"]}
    cells = [cell("random", 900, 3.0)]
    result = {
        "arguments": {"model": "m", "window": 64} | plain | asked, "rows": rows_of(cells, DENSE), "cells": cells, "made_by": "us",
        "texts": [{"text": "a", "windows": 4, "tokens": 252}], "precision": "float32", "device": "cpu",
    }  # fmt: skip
    assert said in markdown(result, picture=False)


def test_rows_are_medians_by_size_with_the_best_first() -> None:
    cells = [cell("poor", 900, math.log(value)) for value in (90, 30, 50)]
    cells += [cell("good", 900, math.log(value), params=899) for value in (40, 12, 41)]
    cells += [{"method": "lame", "size": 900, "error": "it cannot; do otherwise"}, cell("good", 800, 4.0), cell("poor", 800, 3.0)]
    cells += [{"method": "good", "size": 800, "error": "once"}]
    rows = rows_of(cells, DENSE)
    order = [("dense", None), ("good", 900), ("poor", 900), ("lame", 900), ("poor", 800), ("good", 800)]
    assert [(row["method"], row["size"]) for row in rows] == order
    good, poor, lame = rows[1:4]
    assert (good["params"], poor["params"], lame["params"]) == (899, 897, None)
    assert good["texts"]["a"] == pytest.approx({"perplexity": 40, "low": 12, "high": 41, "ratio": 4})
    assert poor["texts"]["b"]["ratio"] == pytest.approx(50 * math.e / 20)
    assert poor["removed"] == pytest.approx(1 - 697 / 800)
    assert (poor["draws"], lame["draws"], lame["failed"], lame["error"]) == (3, 0, 1, "it cannot; do otherwise")
    header, lines = table(rows)
    assert header.count("spread") == 2
    assert header[3] == "perplexity, a"
    words = [line for line in lines if line[0]]
    assert [line[0] for line in words] == ["dense", "at most 900", "good", "poor", "lame", "at most 800", "poor", "good"]
    assert words[2][1:6] == ["899", "12.9%", "40.00", "12.00–41.00", "4.00"]
    assert words[4][-1] == "it cannot", "a few words"
    assert words[7][-1] == "1 of 2 draws: once"
    assert "failed" not in table(rows_of(cells[:3], DENSE))[0]


def test_bits_per_byte_stand_beside_perplexity_where_the_bytes_are_known() -> None:
    cells = [cell("good", 900, nll) for nll in (2.0, 3.0, 2.5)] + [{"method": "lame", "size": 900, "error": "it cannot"}]
    rows = rows_of(cells, DENSE, bytes_a_token={"a": 4.0, "b": 5.0})
    assert rows[0]["texts"]["a"]["bits_per_byte"] == pytest.approx(math.log2(10) / 4)
    assert rows[1]["texts"]["b"]["bits_per_byte"] == pytest.approx(3.5 / math.log(2) / 5), "of the median loss"
    header, lines = table(rows)
    assert header.count("bits/byte") == 2
    good, lame = (next(line for line in lines if line[0] == name) for name in ("good", "lame"))
    assert good[header.index("bits/byte")] == f"{2.5 / math.log(2) / 4:.4f}"
    assert lame[header.index("bits/byte")] == "–"
    assert len(good) == len(lame) == len(header)
    assert "bits/byte" not in table(rows_of(cells, DENSE))[0]


def test_a_row_says_where_it_calibrates_on_text_like_that_which_measures_it() -> None:
    cells = [cell("one", 900, 2.0), cell("both", 900, 3.0), cell("none", 900, 4.0)]
    rows = rows_of(cells, DENSE, in_domain={"one": ["b"], "both": ["a", "b"], "none": []})
    assert [line[0] for line in table(rows)[1] if any(line[1:])] == ["dense", "one (in-domain: b)", "both (in-domain)", "none"]
    assert [row["in_domain"] for row in rows] == [[], ["b"], ["a", "b"], []]


def test_labels_tell_texts_apart() -> None:
    texts = ["/data/wiki/test.jsonl.gz", "/other/books", "python-docs:heldout", "/a/x/same.txt", "/b/x/same.txt"]
    wanted = ["wiki/test", "other/books", "python-docs:heldout", "/a/x/same.txt", "/b/x/same.txt"]
    assert [label(text, texts) for text in texts] == wanted


def test_the_first_draw_of_all_comes_before_the_second_of_any() -> None:
    asked = Request(model="m", methods=("random", "magnitude"), params=("50%", "90", "50"), texts=("t",), draws=2).checked()
    order = [(each.draw, each.size, each.method) for each in asked.cells(100, 80)]
    wanted = [(draw, size, method) for draw in (0, 1) for size in (90, 50) for method in ("random", "magnitude")]
    assert order == wanted
    for each in asked.cells(100, 80):
        assert each.recipe.seed == int(each.words[each.words.index("--seed") + 1]) == each.draw
        assert each.recipe.budget == each.words[each.words.index("--params") + 1] == str(each.size)
    assert not any("--trust-remote-code" in each.words for each in asked.cells(100, 80))
    assert all("--trust-remote-code" in each.words for each in replace(asked, trust_remote_code=True).cells(100, 80))


# The picture.


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [{"text": text, "windows": 4, "tokens": 252} for text in ("a", "b")]
    return {"rows": rows, "texts": texts, "precision": "float32", "arguments": {"model": "some/model", "window": 64}}


def test_the_picture_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [cell(name, size, math.log(2000 / size) + k + lift) for k, name in enumerate(("one", "two"))
             for size in (900, 800) for lift in (0, 0.2)]  # fmt: skip
    seen = []
    for _ in range(2):
        assert comparison.draw(result_of(rows_of(cells, DENSE)), tmp_path, warn=pytest.fail)
        seen.append((tmp_path / "compare.svg").read_bytes())
    assert seen[0] == seen[1]
    xml.etree.ElementTree.fromstring(seen[0])
    for name in ("one", "two", "dense 10.00", "perplexity (log scale)", "897"):
        assert f"<!-- {name} -->".encode() in seen[0], "matplotlib writes what glyphs say beside them"
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"compare.svg", "compare.png"}
    far = [*cells, cell("ruin", 900, 9.0)]
    assert comparison.draw(result_of(rows_of(far, DENSE)), tmp_path, warn=pytest.fail)
    svg = (tmp_path / "compare.svg").read_text()
    assert "Beyond 100 times the dense model, and not shown: ruin at 900." in svg
    assert "<!-- ruin -->" not in svg
    lone = [cell("one", 900, 800.0), cell("two", 900, 3.0)]
    assert comparison.draw(result_of(rows_of(lone, DENSE)), tmp_path, warn=pytest.fail), "a perplexity that overflows is left out"
    assert not comparison.draw(result_of(rows_of([], DENSE)), tmp_path, warn=pytest.fail)
    assert not comparison.draw(result_of(rows_of(lone[:1], DENSE)), tmp_path, warn=pytest.fail), "an empty frame says nothing"


def test_names_are_apart_and_inside() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    cells = [cell(name, size, math.log(2000 / size) + 2 + k / 50)
             for k, name in enumerate(("one", "another", "a-third", "fourth", "the-fifth", "six", "seven")) for size in (900, 890)]  # fmt: skip
    panels = comparison_panels(result_of(rows_of(cells, DENSE)))
    assert panels is not None
    figure = Figure(figsize=(11.2, 4.2), layout="constrained")
    paper._beside(figure, panels)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) == 8, "the dense model and seven methods"
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        frame = axes.get_window_extent()
        assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_without_matplotlib_there_is_a_warning_and_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    warnings: list[str] = []
    assert not comparison.draw(result_of(rows_of([cell("one", 900, 3.0)], DENSE)), tmp_path, warn=warnings.append)
    assert len(warnings) == 1
    assert to_install("plot") in warnings[0]
    assert list(tmp_path.iterdir()) == []
