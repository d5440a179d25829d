"""Text that calibration, training and evaluation share is named, and near copies of held-out text are not trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.data import overlap
from adapt_pruner.data.overlap import overlaps, same_kind
from adapt_pruner.data.sources import documents
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.report.with_card import prune, run
from conftest import as_dicts, byte_tokenizer


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", [f"document {number}" for number in range(200)])


def prose(seed: int, count: int) -> str:
    """Words that no other seed has."""
    return " ".join(hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:7] for number in range(count))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def sentences(**sources: Any) -> list[str]:
    return [found.sentence for found in overlaps(sources)]


ELSEWHERE = "to measure on separate text, name another one, or remove the copies"


def test_shared_documents_are_counted_and_named_by_pair(spec: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", ["new", *(f" document\n{number} " for number in (7, 3, 5, 4))])
    named = f"({other} line 2, {other} line 3, {other} line 4, …)"
    assert sentences(calibration=spec, training=spec, evaluation=other) == [
        f"the {role} text contains 4 of the 5 passages of the evaluation text {named}; {ELSEWHERE}"
        for role in ("calibration", "training")
    ]
    single = write(tmp_path / "c.jsonl", ["document 9"])
    assert sentences(training=spec, evaluation=single) == [
        f"the training text contains 1 of the 1 passage of the evaluation text ({single} line 1); {ELSEWHERE}"
    ]


def test_calibration_and_training_may_be_the_same_text_but_not_unawares(spec: str, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy.jsonl", ["document 0", "document 1"])
    assert sentences(calibration=spec, training={spec: 1, "python-docs:train": 2}) == []
    assert sentences(calibration=copy, training={spec: 1, copy: 2}) == [
        f"the training text contains 2 of the 2 passages of the calibration text ({copy} line 1, {copy} line 2)"
    ]


def test_the_remedy_is_a_split_only_where_it_separates_the_texts(spec: str, tmp_path: Path) -> None:
    split = f"to measure on separate text, split it: {spec}#train and {spec}#heldout"
    for training, evaluation in ((spec, spec), (spec, f"{spec}#heldout"), (f"{spec}#train", spec)):
        assert [found.remedy for found in overlaps({"training": training, "evaluation": evaluation})] == [split]
    (found,) = overlaps({"training": "python-docs", "evaluation": "python-docs:heldout"})
    assert found.remedy.endswith("split it: python-docs:train and python-docs:heldout")


def test_a_copy_is_found_behind_other_words_and_within_a_longer_text(tmp_path: Path) -> None:
    text = " ".join(prose(number, 80) for number in range(30))
    (tmp_path / "a.txt").write_text(f"{prose(100, 50)}\n\n{text}\n\n{prose(101, 900)}")
    other = write(tmp_path / "b.jsonl", [f"[copy] {text}", prose(102, 100), f"{prose(103, 60)} {prose(1, 20)}"])
    (found,) = overlaps({"training": str(tmp_path / "a.txt"), "evaluation": other})
    pieces = len(text) // 4000 + 1
    assert found.found.startswith(f"the training text contains {pieces} of the {pieces + 2} passages of the evaluation text")


def test_texts_that_are_apart_give_no_warning(spec: str) -> None:
    assert sentences(calibration=f"{spec}#train", training=f"{spec}#train", evaluation=f"{spec}#heldout") == []
    assert sentences(calibration="python-docs:train", training=None, evaluation="python-docs:heldout") == []
    assert sentences(calibration="self", training=None, evaluation=spec) == []


def test_each_text_is_read_once_and_only_if_it_is_compared(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = overlap.beginning
    monkeypatch.setattr(overlap, "beginning", lambda spec, most: seen.append(spec) or original(spec, most))
    overlaps({"calibration": spec, "training": spec, "evaluation": None})
    assert seen == []
    overlaps({"calibration": spec, "training": spec, "evaluation": "python-docs:heldout"})
    assert sorted(seen) == sorted([spec, "python-docs:heldout"])


def near_copies(folder: Path, kind: str) -> str:
    """A text of which everything stands twice, almost."""
    if kind == "files":
        folder.mkdir()
        text = "\n\n".join(prose(number, 30 + number % 40) for number in range(900))
        for name, size in (("a", 40), ("b", 777)):
            (folder / f"{name}.txt").write_text(f"{prose(5000 + size, size)}\n\n{text}\n")
        return str(folder)
    documents = [f"[copy {copy}] {prose(number, 60)}" for number in range(150) for copy in (1, 2)]
    if kind == "rows":
        return write(folder, documents)
    chats = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}] for text in documents]
    folder.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(folder)


@pytest.mark.parametrize("kind", ["files", "rows", "chats"])
def test_near_copies_are_on_one_side_of_the_split(kind: str, tmp_path: Path) -> None:
    spec = near_copies(tmp_path / ("text" if kind == "files" else "text.jsonl"), kind)
    training, held_out, whole = (documents(f"{spec}{part}") for part in ("#train", "#heldout", ""))
    paragraphs = {line[9:] if kind != "files" else line for text in held_out for line in text.splitlines() if len(line) > 200}
    everything = "\n".join(training)
    assert len(paragraphs) > 5
    assert not [paragraph for paragraph in paragraphs if paragraph in everything]
    assert sum(map(len, training)) > 0.75 * sum(map(len, whole)), "only copies are left out"
    assert sentences(training=f"{spec}#train", evaluation=f"{spec}#heldout") == []


def test_a_text_without_copies_is_split_by_its_digests_alone(tmp_path: Path) -> None:
    """What all have in common is no copy: a licence above every document, a prompt before every answer."""
    licence = prose(9000, 60)
    spec = write(tmp_path / "a.jsonl", [f"{licence}\n{prose(number, 40)}" for number in range(200)])
    train, held_out = documents(f"{spec}#train"), documents(f"{spec}#heldout")
    assert sorted(train + held_out) == sorted(documents(spec))
    prompt = {"role": "system", "content": licence}
    chats = [
        [prompt, {"role": "user", "content": "Go on."}, {"role": "assistant", "content": prose(number, 20)}]
        for number in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    parts = [documents(f"{tmp_path / 'chat.jsonl'}#{part}") for part in ("train", "heldout")]
    assert sum(map(len, parts)) == 60


def test_a_text_that_only_repeats_itself_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join([prose(0, 500)] * 15))
    with pytest.raises(UsageError, match=r"is empty: .* stand in the held-out part, too; give a text that repeats itself less"):
        documents(f"{tmp_path / 'a.txt'}#train")


def test_a_text_that_changes_is_searched_again(tmp_path: Path) -> None:
    spec = near_copies(tmp_path / "text.jsonl", "rows")
    before = documents(f"{spec}#train")
    write(tmp_path / "text.jsonl", [prose(number, 60) for number in range(1000, 1200)])
    assert len(documents(f"{spec}#train")) + len(documents(f"{spec}#heldout")) == 200
    assert len(before) < 290


def test_page_and_card_say_what_of_the_text_was_not_held_out(tiny_folder: Path, tmp_path: Path) -> None:
    texts = [prose(number, 60) for number in range(120)]
    train, measured = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", [f"[again] {text}" for text in texts[:9]])
    asked = {
        "model": str(tiny_folder), "budget": "90%", "method": "magnitude-all", "training": {"source": train, "tokens": 2048, "length": 64},
        "evaluation": {"source": measured, "window": 64, "max_windows": 4},
    }  # fmt: skip
    run(read(asked), tmp_path / "run")
    found = "the training text contains 9 of the 9 passages of the evaluation text"
    page, card = ((tmp_path / "run" / name).read_text() for name in ("report.html", "model/README.md"))
    assert f"<dt>text that is not all held out</dt><dd>FOLDER/b.jsonl</dd><dt>of this text</dt><dd>{found}" in page
    assert "on text that is not all held out" in page
    assert "on held-out text" not in page.partition("recovery")[0]
    assert f"This text is not all held out: {found}" in card
    run(read(asked | {"evaluation": asked["evaluation"] | {"source": "python-docs:heldout"}}), tmp_path / "apart")
    assert "not all held out" not in (tmp_path / "apart" / "model" / "README.md").read_text()
    assert "not all held out" not in (tmp_path / "apart" / "report.html").read_text()


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
    prune(read(asked), tmp_path / "out", listen=as_dicts(heard.append))
    said = [event["message"] for event in heard if event["event"] == "warning"]
    assert [message for message in said if "1 of 2 sequences share text with" in message]
