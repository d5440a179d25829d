"""The report of a comparison: methods by budgets, names that can be told apart, figures beyond numbers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.compare.table import table
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError
from adapt_pruner.report import charts
from adapt_pruner.report.comparison import comparison_page, comparison_pictures, read_comparison, within
from test_cli import call
from test_report import Seen


def comparison_result() -> dict[str, Any]:
    """What compare.json holds, of two methods at two sizes, one of which failed."""

    def row(
        method: str, size: int | None, params: int | None, ppl: float | None, speed: float | None, error: str | None = None
    ) -> dict[str, Any]:
        texts = {} if ppl is None else {"t.txt": {"perplexity": ppl, "low": ppl - 1, "high": ppl + 1, "ratio": ppl / 10}}
        return {
            "method": method, "size": size, "params": params, "decoder_params": params, "removed": 0.1, "texts": texts,
            "seconds": None if size is None else 1.0, "peak_bytes": 2**30, "speed_up": speed, "draws": 0 if error else 2, "failed": int(bool(error)), "error": error,
        }  # fmt: skip

    return {
        "made_by": "x", "device": "cpu", "precision": "float32", "dense": {},
        "arguments": {"model": "m/<b>", "window": 64, "draws": 2, "calibration_ids": [], "calibration": None, "overrides": []},
        "texts": [{"text": "t.txt", "windows": 4, "tokens": 252}],
        "rows": [
            row("dense", None, 100, 10.0, 1.0), row("good", 80, 80, 12.0, 1.3), row("bad", 80, 79, 30.0, 1.1), row("good", 60, 60, 20.0, 1.5),
            row("bad", 60, None, None, None, "out of <memory>"),
        ],
        "cells": [{"method": "bad", "size": 60, "draw": 0, "error": "out of <memory>"}],
    }  # fmt: skip


def test_a_comparison_has_a_page_of_methods_by_budgets(tmp_path: Path) -> None:
    result = comparison_result()
    text = comparison_page(result, ["method", "parameters"], [["dense", "100"]], name="cmp")
    seen = Seen(text)
    assert seen.figures == ["size-0", "speed-0", "seconds-0"]
    assert all(address.startswith(("#", "data:")) for address in seen.addresses)
    assert "★ 12.00 (1.20×)" in text
    assert ">30.00 (3.00×)" in text
    assert "out of &lt;memory&gt;" in text
    size, speed, _ = comparison_pictures(result)
    assert text.count('<i class="star" style=') == 2, "the dense model in both pictures"
    drawn = text.partition('id="speed-0"')[0]
    assert drawn.count('class="thin tone') == drawn.count('class="whisker tone') == 2, (
        "from the star to either method, and its draws"
    )
    assert all(f">{params}</span>" in drawn for params in (100, 80, 60)), "below the axis are the sizes there are"
    named = {series.name: [label for label in series.labels if label] for series in size.series}
    assert named == {"dense": ["dense 10.00"], "good": ["good", "good"], "bad": []}, (
        "the small good one is smaller and better than bad"
    )
    assert {s.name: [label for label in s.labels if label] for s in speed.series}["bad"] == []


def test_methods_that_make_zeros_count_at_the_head_and_no_section_is_empty() -> None:
    result = comparison_result()
    dense, good = result["rows"][:2]
    sparse = [
        dense | {"nonzero": 100},
        *(good | {"method": "wanda", "size": None, "sparsity": zeros, "nonzero": 60} for zeros in ("50%", "2:4")),
    ]
    both = comparison_page(result | {"sparse_rows": sparse}, *table(result["rows"]), name="cmp", sparse=table(sparse))
    assert "3 methods at 2 sizes and 2 patterns of zeros</h1>" in both
    alone = result | {"rows": [dense], "sparse_rows": sparse[:2], "cells": []}
    text = comparison_page(alone, *table(alone["rows"]), name="cmp", sparse=table(alone["sparse_rows"]))
    assert "1 method at 1 pattern of zeros</h1>" in text
    assert 'id="pictures"' not in text
    assert 'id="pictures"' in both


def test_bits_per_byte_stand_beside_perplexity_and_a_winner_on_its_own_kind_of_text_is_called_so() -> None:
    result = comparison_result()
    for row in result["rows"][:3]:
        row["texts"]["t.txt"]["bits_per_byte"] = row["params"] / 100
    result["rows"][1]["in_domain"] = result["rows"][3]["in_domain"] = ["t.txt"]
    text = comparison_page(result, *table(result["rows"][:3]), name="cmp")
    assert "★ 12.00 (1.20×), 0.800 bits" in text
    assert "bits are per byte of text" in text
    assert "Lowest perplexity: good (in-domain) at 80" in text
    assert "good (in-domain)" in {series.name for series in comparison_pictures(result)[0].series}


def test_a_picture_shows_quality_against_the_seconds_of_pruning() -> None:
    result = comparison_result()
    for row, seconds in zip(result["rows"][1:], (5.0, 60.0, 2.0), strict=False):
        row["seconds"] = seconds
    *_, picture = comparison_pictures(result)
    assert (picture.key, picture.x_label) == ("seconds-0", "seconds of pruning")
    points = {series.name: [x for x, _ in series.points] for series in picture.series}
    assert "dense" not in points, "which takes none"
    assert set().union(*points.values()) <= {5.0, 60.0, 2.0, 1.0}
    assert 5.0 in points["good"]


def many_methods() -> dict[str, Any]:
    """A comparison of ten methods, one of which is a ruin."""
    result = comparison_result()
    of = result["rows"][1]
    result["rows"] = [result["rows"][0]] + [
        of | {"method": f"m{i}", "params": 80 - i % 2, "speed_up": 1 + i / 10, "texts": {"t.txt": dict.fromkeys(("perplexity", "low", "high"), y) | {"ratio": y / 10}}}
        for i, y in enumerate([12.0, 12.1, 14, 20, 30, 50, 100, 300, 900, 4e6])
    ]  # fmt: skip
    result["cells"] = []
    return result


def test_many_methods_can_be_told_apart() -> None:
    """Twice through the colours the dots have another form; a ruin is named and does not squeeze the rest together."""
    result = many_methods()
    text = comparison_page(result, *table(result["rows"]), name="cmp")
    size, speed, _ = comparison_pictures(result)
    assert [series.name for series in size.series] == ["dense", *(f"m{i}" for i in range(9))]
    assert size.note == speed.note == "Beyond 100 times the dense model, and not shown: m9 at 80."
    assert text.count(size.note) == 3, "under each picture"
    assert ">4,000,000 (400,000×)</td>" in text
    keys = re.findall(r'<i class="(?:key )?([^"]*)"></i>([^<]*)</span>', text.partition('id="speed-0"')[0])
    assert len({look for look, _ in keys}) == len(keys) == 10
    result["rows"][1]["texts"]["t.txt"] |= {"high": 5e6}
    (one,) = (series for series in comparison_pictures(result)[0].series if series.name == "m0")
    assert (one.points, one.high) == ([(80.0, 12.0)], [1000.0]), "one bad draw of three: the bar ends where the picture does"
    lost = [result["rows"][0], result["rows"][-1]]
    assert within(lost, "t.txt") == lost, "a picture of ruins alone shows them"
    assert dict(map(reversed, keys))["m6"] == "round tone0 second"
    assert text.count('class="dot tone0 second"') == 3


def test_names_are_not_written_over_another() -> None:
    """The lowest of those that lie close together keeps its name; of one size only the best has one, however few parameters another has."""
    size, speed, _ = comparison_pictures(many_methods())
    assert [name for *_, name in size.named()] == ["dense 10.00", "m0"]
    named = [name for *_, name in speed.named()]
    assert named[:2] == ["dense 10.00", "m1"]
    assert [name for series in speed.series for name in series.labels if name] == ["dense 10.00", *(f"m{i}" for i in range(1, 9))]
    near = charts.Lines("k", "", "", [charts.Series("s", [(0, 1.0), (0.5, 1.01), (10, 5.0)], labels=["a", "b", "c"])], "", "")
    assert [name for *_, name in near.named()] == ["a", "c"]


def test_two_sizes_of_a_method_may_give_one_model() -> None:
    """As where whole layers go: both budgets leave as many."""
    result = comparison_result()
    result["rows"].append(result["rows"][1] | {"size": 81})
    size, *_ = comparison_pictures(result)
    assert next(series for series in size.series if series.name == "good").points == [(60.0, 20.0), (80.0, 12.0), (80.0, 12.0)]


def test_a_perplexity_beyond_numbers_is_infinite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In compare.json it is null, at the comparison itself infinity."""
    for beyond in (None, float("inf")):
        result = comparison_result()
        result["rows"][2]["texts"]["t.txt"] = dict.fromkeys(("perplexity", "low", "high", "ratio"), beyond)
        result["rows"][3]["texts"]["t.txt"]["high"] = beyond
        header, lines = table(result["rows"])
        bad = dict(zip(header, next(line for line in lines if line[0] == "bad"), strict=True))
        assert (bad["perplexity"], bad["spread"], bad["× dense"]) == ("∞", "∞–∞", "∞")
        text = comparison_page(result, header, lines, name="cmp")
        assert Seen(text).figures == ["size-0", "speed-0", "seconds-0"]
        assert ">∞</td>" in text
        assert not re.search(r"\b(inf|nan)\b", text)
    (tmp_path / "compare.json").write_text(to_json(result))
    assert call(monkeypatch, capsys, "report", tmp_path)[0] == 0


def test_the_folder_of_a_comparison_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(comparison_result()))
    assert call(monkeypatch, capsys, "report", tmp_path)[0] == 0
    assert "★ 12.00" in (tmp_path / "compare.html").read_text()
    for broken in ("{", "[]", "{}"):
        (tmp_path / "compare.json").write_text(broken)
        with pytest.raises(UsageError, match=r"compare\.json"):
            read_comparison(tmp_path)
    assert call(monkeypatch, capsys, "report", tmp_path)[0] == 2
