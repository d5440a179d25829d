"""What becomes of finished cells: rows, their names, the page and the picture."""

import itertools
import math
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.compare import comparison
from adapt_pruner.compare.request import Request
from adapt_pruner.compare.table import markdown, rows_of, table
from adapt_pruner.core.system.provenance import to_install
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
        assert (each.recipe.seed, each.recipe.budget) == (each.draw, str(each.size))


# The picture.


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [{"text": text, "windows": 4, "tokens": 252} for text in ("a", "b")]
    return {"rows": rows, "texts": texts, "precision": "float32", "arguments": {"model": "some/model", "window": 64}}


def test_the_picture_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    cells = [cell(name, size, math.log(2000 / size) + k + lift) for k, name in enumerate(("one", "two"))
             for size in (900, 800) for lift in (0, 0.2)]  # fmt: skip
    seen = []
    for _ in range(2):
        assert comparison.draw(result_of(rows_of(cells, DENSE)), tmp_path, warn=pytest.fail)
        seen.append((tmp_path / "compare.svg").read_bytes())
    assert seen[0] == seen[1]
    words = [element.text for element in xml.etree.ElementTree.fromstring(seen[0]).iter() if element.tag.endswith("}text")]
    assert {"one", "two", "dense 10.00", "perplexity (log scale)", "897", "a", "b"} <= set(words)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"compare.svg", "compare.png"}
    far = [*cells, cell("ruin", 900, 9.0)]
    assert comparison.draw(result_of(rows_of(far, DENSE)), tmp_path, warn=pytest.fail)
    svg = (tmp_path / "compare.svg").read_text()
    assert "Beyond 100 times the dense model, and not shown: ruin at 900." in svg
    assert ">ruin<" not in svg
    lone = [cell("one", 900, 800.0), cell("two", 900, 3.0)]
    assert comparison.draw(result_of(rows_of(lone, DENSE)), tmp_path, warn=pytest.fail), "a perplexity that overflows is left out"
    assert not comparison.draw(result_of(rows_of([], DENSE)), tmp_path, warn=pytest.fail)
    assert not comparison.draw(result_of(rows_of(lone[:1], DENSE)), tmp_path, warn=pytest.fail), "an empty frame says nothing"


def test_names_are_apart_and_inside() -> None:
    """By the width that the widest letters of names have on average; `test_report_browser` has the browser measure them."""
    cells = [cell(name, size, math.log(2000 / size) + 2 + k / 50)
             for k, name in enumerate(("one", "another", "a-third", "fourth", "the-fifth", "six", "seven")) for size in (900, 890)]  # fmt: skip
    panels = comparison_panels(result_of(rows_of(cells, DENSE)))
    assert panels is not None
    tree = xml.etree.ElementTree.fromstring(paper.picture(panels))
    svg = "{http://www.w3.org/2000/svg}"
    frames = tree.findall(f"{svg}g")
    assert len(frames) == 2, "a panel for each text"
    for frame in frames:
        canvas = frame.find(f"{svg}svg")
        assert canvas is not None
        names = [element for element in frame.findall(f"{svg}text") if element.get("class", "").startswith("tone")]
        names += [element for element in frame.findall(f"{svg}text") if (element.text or "").startswith("dense")]
        assert len(names) == 8, "the dense model and seven methods"
        boxes = []
        for name in names:
            x, long = float(name.get("x", "nan")), 7.0 * len(name.text or "")
            boxes.append((x - long * (name.get("text-anchor") == "end"), float(name.get("y", "nan")), long))
        assert not any(
            x < a + c and a < x + wide and abs(y - b) < 12 for (x, y, wide), (a, b, c) in itertools.combinations(boxes, 2)
        )
        assert all(x >= 0 and x + wide <= float(canvas.get("width", "0")) for x, _, wide in boxes)
        assert all(12 <= y <= float(canvas.get("height", "0")) for _, y, _ in boxes)


def test_without_vl_convert_there_is_a_warning_and_only_the_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    warnings: list[str] = []
    cells = [cell("one", 900, 3.0), cell("two", 900, 4.0)]
    assert comparison.draw(result_of(rows_of(cells, DENSE)), tmp_path, warn=warnings.append)
    assert len(warnings) == 1
    assert to_install("plot") in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == ["compare.svg"]


def test_right_answers_stand_in_a_column_if_models_were_asked() -> None:
    asked = {"asked": 5, "dense": [0, 1, 2]}
    cells = [cell("good", 900, 3.0, chat={**asked, "right": right}) for right in ([0, 1, 4], [0, 1, 2], [3])]
    cells += [cell("poor", 900, 4.0)]
    rows = rows_of(cells, DENSE)
    assert [row["answers"] for row in rows] == [None, {"right": 2, "of": 3}, None]
    header, lines = table(rows)
    assert {line[0]: line[header.index("right answers")] for line in lines if line[0]} | {"at most 900": ""} == {
        "dense": "–", "good": "2 of 3", "poor": "–", "at most 900": "",
    }  # fmt: skip
    assert "right answers" not in table(rows_of([cell("poor", 900, 4.0)], DENSE))[0]
