"""Text that calibration, training and evaluation share is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.data import overlap
from adapt_pruner.data.overlap import overlaps, same_kind
from adapt_pruner.recipe import read
from adapt_pruner.report.with_card import prune
from conftest import byte_tokenizer


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
    remedy = "; to measure on separate text, split it: SPEC#train and SPEC#heldout"
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
    original = overlap.beginning
    monkeypatch.setattr(overlap, "beginning", lambda spec, most: seen.append(spec) or original(spec, most))
    overlaps({"calibration": spec, "training": spec, "evaluation": None})
    assert seen == []
    overlaps({"calibration": spec, "training": spec, "evaluation": "python-docs:heldout"})
    assert sorted(seen) == sorted([spec, "python-docs:heldout"])


ALIKE = {
    "one data set": ("hub:wikitext:wikitext-2-raw-v1:train", "hub:wikitext:wikitext-2-raw-v1:test", "are from wikitext"),
    "one built-in text": ("python-docs:train", "python-docs:heldout", "are from python-docs"),
    "parts of one file": ("FOLDER/x/a.jsonl#train", "FOLDER/x/a.jsonl#heldout", "are from FOLDER/x/a.jsonl"),
    "a file below a folder": ("FOLDER/x", "FOLDER/x/a.jsonl", "are from FOLDER/x"),
    "a file under a glob": ("FOLDER/x/a.jsonl", "FOLDER/*/*.jsonl", "are from FOLDER"),
    "files of one folder": ("FOLDER/x/a.jsonl", "FOLDER/x/b.jsonl", "are in FOLDER/x"),
    "one name": ("some/wikitext2/valid.txt", "other/wikitext103/test.txt", "names contain 'wikitext'"),
    "the beginning of a name": ("corpus/wiki", "data/wikitext2/test_public.txt", "names contain 'wiki'"),
    "a name in a data set's": ("corpus/c4/en.jsonl.gz", "hub:allenai/c4:en", "names contain 'c4'"),
}
APART = [
    ("self", "python-docs:heldout"),
    ("corpus/web_c4", "wikitext2/test_public.txt"),
    ("corpus/web_c4", "corpus/wiki"),
    ("data/train/books.jsonl.gz", "data/test/code.jsonl.gz"),
    ("hub:allenai/c4:en", "hub:wikitext"),
    ("FOLDER/x/a.jsonl", "FOLDER/x/notes.txt"),
    ("FOLDER/x/a.jsonl", "FOLDER/y/b.jsonl"),
]


def placed(spec: str, folder: Path) -> str:
    for name in ("x/a.jsonl", "x/b.jsonl", "x/notes.txt", "y/b.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return spec.replace("FOLDER", str(folder))


@pytest.mark.parametrize("case", ALIKE)
def test_texts_of_one_kind_are_told_by_their_names(case: str, tmp_path: Path) -> None:
    one, other, why = (placed(spec, tmp_path) for spec in ALIKE[case])
    for pair in ((one, other), (other, one)):
        said = same_kind(["corpus/unlike", pair[0]], [pair[1]])
        assert said is not None
        assert f"(both {why})" in said
        assert repr(pair[0]) in said


@pytest.mark.parametrize("pair", APART, ids=" and ".join)
def test_texts_of_different_kinds_give_no_warning(pair: tuple[str, str], tmp_path: Path) -> None:
    one, other = (placed(spec, tmp_path) for spec in pair)
    assert same_kind([one], [other]) is None
    assert same_kind([other], [one]) is None


def test_a_run_that_measures_its_calibration_ids_is_told(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    ids = byte_tokenizer()(text_file.read_text()[:2000]).input_ids
    (tmp_path / "ids.json").write_text(json.dumps({"input_ids": [ids[5:105], [*range(3, 43)]]}))
    heard: list[dict[str, Any]] = []
    asked = {
        "model": str(tiny_folder), "budget": "90%", "method": "wanda-sp", "calibration": {"ids": str(tmp_path / "ids.json")},
        "evaluation": {"source": str(text_file), "window": 64, "max_windows": 4},
    }  # fmt: skip
    prune(read(asked), tmp_path / "out", listen=heard.append)
    said = [event["message"] for event in heard if event["event"] == "warning"]
    assert [message for message in said if "1 of 2 sequences share text with" in message]
    heard.clear()
    prune(read(asked | {"method": "magnitude-all"}), tmp_path / "without text", listen=heard.append)
    assert not [event for event in heard if event["event"] == "warning" and "share text with" in event["message"]]
