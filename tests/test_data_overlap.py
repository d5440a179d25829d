"""Text that calibration, training and evaluation share is named."""

import json
from pathlib import Path

import pytest

from adapt_pruner.data import overlap
from adapt_pruner.data.overlap import overlaps


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", [f"document {number}" for number in range(200)])


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_shared_documents_are_counted_and_named_by_pair(spec: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", ["new", *(f" document\n{number} " for number in (7, 3, 5, 4))])
    said = overlaps({"calibration": spec, "training": spec, "evaluation": other})
    named = f"({spec} line 4, {spec} line 5, {spec} line 6, …)"
    remedy = "; to measure on text of its own, split it: SPEC#train and SPEC#heldout"
    assert said == [f"{role} and evaluation text share 4 documents {named}{remedy}" for role in ("calibration", "training")]
    single = write(tmp_path / "c.jsonl", ["document 9"])
    assert overlaps({"training": spec, "evaluation": single}) == [
        f"training and evaluation text share a document ({spec} line 10){remedy}"
    ]


def test_calibration_and_training_may_be_the_same_text_but_not_unawares(spec: str, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy.jsonl", ["document 0", "document 1"])
    assert overlaps({"calibration": spec, "training": {spec: 1, "python-docs:train": 2}}) == []
    assert overlaps({"calibration": copy, "training": {spec: 1, copy: 2}}) == [
        f"calibration and training text share 2 documents ({copy} line 1, {copy} line 2)"
    ]
    assert "200 documents" in overlaps({"training": spec, "evaluation": spec})[0]


def test_texts_that_are_apart_give_no_warning(spec: str) -> None:
    assert overlaps({"calibration": f"{spec}#train", "training": f"{spec}#train", "evaluation": f"{spec}#heldout"}) == []
    assert overlaps({"calibration": "python-docs:train", "training": None, "evaluation": "python-docs:heldout"}) == []
    assert overlaps({"calibration": "self", "training": None, "evaluation": spec}) == []


def test_each_text_is_read_once_and_only_if_it_is_compared(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = overlap.read
    monkeypatch.setattr(overlap, "read", lambda spec: seen.append(spec) or original(spec))
    overlaps({"calibration": spec, "training": spec, "evaluation": None})
    assert seen == []
    overlaps({"calibration": spec, "training": spec, "evaluation": "python-docs:heldout"})
    assert sorted(seen) == sorted([spec, "python-docs:heldout"])
