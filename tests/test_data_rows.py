"""Training rows: what is in them, their order, and the store they are kept in."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapt_pruner.data import packing, store
from adapt_pruner.data import pieces as in_pieces
from adapt_pruner.data.fixed import Rows, stage_spans, training_rows
from adapt_pruner.errors import RunError, UsageError
from conftest import byte_tokenizer


class Forbidden(PreTrainedTokenizerFast):
    """A tokenizer that must not be asked to tokenise."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the text was tokenised again")


def forbidden() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Forbidden
    return tokenizer


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """26 documents of 15 letters: with its end-of-text token each fills a row of 16."""
    return jsonl(tmp_path / "letters.jsonl", [chr(97 + i) * 15 for i in range(26)])


def rows_of(
    source: Any, tmp_path: Path, *, tokens: int, tokenizer: Any = None, warnings: list[str] | None = None, **how: Any
) -> Rows:
    how = {"length": 16, "seed": 0, "cache": tmp_path / "cache"} | how
    heard: list[str] = []
    rows = training_rows(tokenizer or byte_tokenizer(), source, tokens=tokens, warn=heard.append, **how)
    assert warnings is not None or not heard, heard
    if warnings is not None:
        warnings += heard
    return rows


def texts_of(rows: Rows, start: int = 0, stop: int | None = None) -> list[str]:
    ids, predicted = rows.batch(start, len(rows) if stop is None else stop)
    assert predicted is None
    return [byte_tokenizer().decode(row) for row in ids]


def test_documents_are_packed_with_an_end_of_text_token_after_each(letters: str, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path, tokens=26 * 16)
    assert (len(rows), rows.length, rows.num_tokens(0, 26), rows.num_tokens(3, 5)) == (26, 16, 416, 32)
    assert sorted(texts_of(rows)) == [chr(97 + i) * 15 + "</s>" for i in range(26)]
    assert rows.batch(0, 1)[0].dtype == torch.int64
    odd = texts_of(rows_of(letters, tmp_path, tokens=400, length=40))
    assert len(odd) == 10, "what does not fill a row at the end is dropped"
    pieces = [piece for row in odd for piece in row.split("</s>") if piece]
    assert all(len(set(piece)) == 1 for piece in pieces), "documents touch only at an end-of-text token"
    assert max(map(len, pieces)) == 15


def test_a_long_document_is_tokenised_in_pieces_and_comes_out_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (packing, in_pieces):
        monkeypatch.setattr(module, "CHARACTERS", 50)
    monkeypatch.setattr(tokenizer, "_tokenizer", byte_tokenizer()._tokenizer)
    spaced, unbroken = " ".join(map(str, range(200))), "x" * 333
    rows = rows_of(jsonl(tmp_path / "t.jsonl", [spaced]), tmp_path, tokens=len(spaced) + 1, length=len(spaced) + 1)
    assert texts_of(rows) == [spaced + "</s>"]
    rows = rows_of(jsonl(tmp_path / "u.jsonl", [unbroken]), tmp_path, tokens=334, length=334)
    assert texts_of(rows) == [unbroken + "</s>"]


@pytest.mark.parametrize("piece", [5, 2**20])
def test_what_the_tokenizer_puts_before_a_text_it_puts_before_every_document(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    for module in (packing, in_pieces):
        monkeypatch.setattr(module, "CHARACTERS", piece)
    rows = rows_of(letters, tmp_path, tokens=26 * 17, length=17, tokenizer=byte_tokenizer(opens=True))
    assert sorted(texts_of(rows)) == ["<s>" + chr(97 + i) * 15 + "</s>" for i in range(26)]


def test_with_such_a_tokenizer_every_row_begins_as_a_text_does(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 8: the 17 tokens of a document do not fill whole ones, so most rows begin inside a document."""
    monkeypatch.setattr(packing, "_LEAST", 1)
    rows = texts_of(rows_of(letters, tmp_path, tokens=60 * 8, length=8, tokenizer=byte_tokenizer(opens=True)))
    assert len(rows) == 60
    assert all(row.startswith("<s>") and not row.startswith("<s><s>") for row in rows)
    pieces = Counter(letter for row in rows for letter in row.replace("<s>", "").replace("</s>", ""))
    assert max(pieces.values()) == 15, "nothing is read twice"
    assert sum(count == 15 for count in pieces.values()) >= 24, "nothing is left out but what is over at the end"
    assert sum("</s><s>" in row for row in rows) >= 8, "documents within a row are told apart as before"


def test_where_one_token_opens_and_ends_texts_it_stands_between_two_once(letters: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(opens=True)
    tokenizer.eos_token = "<s>"
    rows = texts_of(rows_of(letters, tmp_path, tokens=12 * 31, length=31, tokenizer=tokenizer))
    assert all(row.startswith("<s>") for row in rows)
    assert not any("<s><s>" in row for row in rows)


def test_a_text_that_runs_out_is_repeated_in_another_order_and_that_is_said(letters: str, tmp_path: Path) -> None:
    warnings: list[str] = []
    rows = rows_of(letters, tmp_path, tokens=2 * 26 * 16 + 100, warnings=warnings)
    first, second, rest = texts_of(rows, 0, 26), texts_of(rows, 26, 52), texts_of(rows, 52)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 26
    assert first != second
    assert len(rest) == 7, "the last row goes over the tokens asked for"
    assert rows.length == 16
    assert len(warnings) == 1
    assert "has 416 tokens in rows of 16, but 932 are asked for, so it is repeated: it is read 2.2 times" in warnings[0]
    with pytest.raises(UsageError, match="has 416 tokens in rows of 16, but 932 are asked for; give more text, lower"):
        rows_of(letters, tmp_path, tokens=932, repeat=False)
    assert len(rows_of(letters, tmp_path, tokens=416, repeat=False)) == 26


def test_a_feed_that_moves_shares_repeats_no_text_that_may_not_be(letters: str, tmp_path: Path) -> None:
    """By its share half of the text would do; the feed may come to read more of it."""
    other = tmp_path / "other.txt"
    other.write_text("of another kind " * 200)
    both = {letters: 1.0, str(other): 1.0}
    asked: dict[str, Any] = {
        "length": 16,
        "tokens": 600,
        "seed": 0,
        "repeat": False,
        "warn": lambda _: None,
        "cache": tmp_path / "c",
    }
    assert len(training_rows(byte_tokenizer(), both, **asked)) > 30
    with pytest.raises(UsageError, match="has 416 tokens in rows of 16, but 600 may be asked for; give more text"):
        training_rows(byte_tokenizer(), both, moving=True, **asked)


def test_order_is_of_the_seed_and_the_same_for_any_number_of_processes(letters: str, tmp_path: Path) -> None:
    warnings: list[str] = []
    rows = rows_of(letters, tmp_path, tokens=1000, warnings=warnings)
    whole = rows.batch(0, 40)[0]
    for processes in (2, 4, 5):
        each = 40 // processes
        parts = [rows.batch(rank * each, (rank + 1) * each)[0] for rank in range(processes)]
        assert torch.equal(torch.cat(parts), whole)
    elsewhere = rows_of(letters, tmp_path, tokens=1000, cache=tmp_path / "elsewhere", warnings=warnings)
    assert torch.equal(elsewhere.batch(0, 40)[0], whole)
    assert elsewhere.digest() == rows.digest()
    other = rows_of(letters, tmp_path, tokens=1000, seed=1, warnings=warnings)
    assert not torch.equal(other.batch(0, 40)[0], whole)
    assert other.digest() != rows.digest()


def test_documents_are_drawn_at_random_and_only_as_many_as_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packing, in_pieces):
        monkeypatch.setattr(module, "CHARACTERS", 30)
    monkeypatch.setattr(packing, "_LEAST", 1)
    spec = jsonl(tmp_path / "many.jsonl", [f"{i:015d}" for i in range(1000)])
    tokenizer = byte_tokenizer()
    tokenised: list[str] = []
    original = PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: Any, **kwargs: Any) -> Any:
        tokenised.extend(text if isinstance(text, list) else [])
        return original(self, text, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    drawn = [int(text.removesuffix("</s>")) for text in texts_of(rows_of(spec, tmp_path, tokens=160, tokenizer=tokenizer))]
    assert len(set(drawn)) == 10
    assert max(drawn) > 100, "not the first ones"
    assert len(tokenised) == 10


def test_a_mixture_gives_each_text_its_weight_in_every_stretch(tmp_path: Path) -> None:
    source = {jsonl(tmp_path / f"{letter}.jsonl", [letter * 15] * count): weight
              for letter, count, weight in (("a", 90, 3), ("b", 5, 1.5), ("c", 90, 0.5))}  # fmt: skip
    warnings: list[str] = []
    rows = rows_of(source, tmp_path, tokens=100 * 16, warnings=warnings)
    text = "".join(row[0] for row in texts_of(rows))
    assert Counter(text) == {"a": 60, "b": 30, "c": 10}
    for start in range(0, 100, 20):
        counts = Counter(text[start : start + 20])
        assert abs(counts["a"] - 12) <= 2
        assert abs(counts["b"] - 6) <= 2
        assert abs(counts["c"] - 2) <= 2
    assert text != "".join(sorted(text))
    assert [warning for warning in warnings if "b.jsonl" in warning and "read 6.0 times" in warning] == warnings


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"a": 1, "b": 0}, "weight of 'b' is 0; give a number above 0"),
        ({"a": "x"}, "weight of 'a' is 'x'"),
        ({"a": float("nan")}, "weight of 'a' is nan"),
        ({}, "names no text"),
        ({"self": 1, "a": 1}, "'self' cannot be part of a mixture"),
        ("self", "none here"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(source: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        rows_of(source, tmp_path, tokens=100)


def test_stages_take_their_shares_one_after_another(letters: str, tmp_path: Path) -> None:
    rows = rows_of(letters, tmp_path, tokens=400)
    assert stage_spans(rows, [80, 0, 120, 200]) == [range(0, 5), range(5, 5), range(5, 13), range(13, 25)]
    assert stage_spans(rows, [1, 2, 4])[-1].stop == len(rows)
    assert stage_spans(rows, [400]) == [range(25)]


def test_a_text_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is shorter than one block of 512 tokens; give more text"):
        rows_of(jsonl(tmp_path / "short.jsonl", ["x" * 100]), tmp_path, tokens=1024, length=512)


def test_a_text_is_tokenised_once(letters: str, tmp_path: Path) -> None:
    first = rows_of(letters, tmp_path, tokens=400)
    again = rows_of(letters, tmp_path, tokens=400, tokenizer=forbidden())
    assert torch.equal(first.batch(0, 25)[0], again.batch(0, 25)[0])
    assert first.digest() == again.digest()
    padding = forbidden()
    padding.backend_tokenizer.enable_padding(length=7)
    rows_of(letters, tmp_path, tokens=400, tokenizer=padding)  # a setting of a call, not of the tokenizer
    other_seed = rows_of(letters, tmp_path, tokens=400, tokenizer=forbidden(), seed=1)
    fewer = rows_of(letters, tmp_path, tokens=300, tokenizer=forbidden())
    assert (len(fewer), len({first.digest(), other_seed.digest(), fewer.digest()})) == (19, 3), (
        "each its own rows, of the same store"
    )
    with pytest.raises(AssertionError, match="tokenised again"):
        rows_of(letters, tmp_path, tokens=400, tokenizer=forbidden(), length=8)
    other = forbidden()
    other.add_tokens(["abc"])
    with pytest.raises(AssertionError, match="tokenised again"):
        rows_of(letters, tmp_path, tokens=400, tokenizer=other)
    Path(letters).write_text(Path(letters).read_text().replace("zzz", "zyz"))
    with pytest.raises(AssertionError, match="tokenised again"):
        rows_of(letters, tmp_path, tokens=400, tokenizer=forbidden())
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("asked", "kept"), [(1, 1), (160, 160), (161, 176), (320, 320), (400_000, 425_984)])
def test_a_store_holds_at_most_an_eighth_more_than_is_asked_for(
    asked: int, kept: int, letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_LEAST", 1)
    made_from: list[Any] = []

    def stored(inputs: Any, make: Any, **_: Any) -> Any:
        made_from.append(inputs)
        return store.Store(np.zeros(1), np.zeros(1), None, "", 0)

    monkeypatch.setattr(packing, "stored", stored)
    packing.tokenised(byte_tokenizer(), letters, length=16, tokens=asked, cache=tmp_path, warn=pytest.fail)
    assert made_from[0]["limit"] == kept
    assert asked <= kept <= asked * 9 / 8
    monkeypatch.undo()
    with_least = [rows_of(letters, tmp_path, tokens=tokens) for tokens in (16, 400)]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1, "short runs share a store"
    assert [len(rows) for rows in with_least] == [1, 25]


def test_a_hub_data_set_is_streamed_in_its_order_and_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands in for the hub: the same call, no network."""
    monkeypatch.setattr(packing, "_LEAST", 1)
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [f"{i:015d}" for i in range(1000)])
    drawn = [int(text.removesuffix("</s>")) for text in texts_of(rows_of(f"hub:{folder}", tmp_path, tokens=160))]
    assert sorted(drawn) == list(range(10)), "the first, and no more of them than are needed"
    assert drawn != sorted(drawn)
    rows_of(f"hub:{folder}", tmp_path, tokens=160, tokenizer=forbidden())
    jsonl(folder / "train.jsonl", ["y" * 15] * 1000)
    os.utime(folder / "train.jsonl", (1, 1))
    assert texts_of(rows_of(f"hub:{folder}", tmp_path, tokens=160)) == ["y" * 15 + "</s>"] * 10


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", "index.json"])
def test_a_damaged_store_is_made_anew_and_that_is_said(letters: str, tmp_path: Path, name: str) -> None:
    first = rows_of(letters, tmp_path, tokens=400)
    whole = first.batch(0, 25)[0]
    del first
    (path,) = (tmp_path / "cache").rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    warnings: list[str] = []
    assert torch.equal(rows_of(letters, tmp_path, tokens=400, warnings=warnings).batch(0, 25)[0], whole)
    assert len(warnings) == 1
    assert "are damaged" in warnings[0]
    rows_of(letters, tmp_path, tokens=400, tokenizer=forbidden())
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_ids_take_two_bytes_where_the_vocabulary_allows_and_four_where_not(letters: str, tmp_path: Path) -> None:
    rows_of(letters, tmp_path, tokens=400)
    assert next((tmp_path / "cache").rglob("ids.bin")).stat().st_size == 416 * 2, "the whole text"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"</s>": 0} | {token: 70_000 + i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    large = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    rows = rows_of(letters, tmp_path, tokens=400, tokenizer=large, cache=tmp_path / "large")
    assert next((tmp_path / "large").rglob("ids.bin")).stat().st_size == 416 * 4
    ids = rows.batch(0, 25)[0]
    assert int(ids[:, :15].min()) >= 70_000
    assert (ids[:, :15] == ids[:, :1]).all()
    assert (ids[:, 15] == 0).all()


def chunks(value: int) -> list[store.Chunk]:
    return [store.Chunk(np.full(8, value, np.uint32), np.full(2, 4, np.int64))]


def test_of_two_that_write_the_same_store_the_first_to_finish_stays(tmp_path: Path) -> None:
    def stored(make: Any) -> store.Store:
        return store.stored({"text": "x"}, make, dtype="<u2", cache=tmp_path, warn=pytest.fail)

    def slower() -> list[store.Chunk]:
        assert stored(lambda: chunks(7)).ids.tolist() == [7] * 8  # another process begins and ends meanwhile
        return chunks(9)

    assert stored(slower).ids.tolist() == [7] * 8
    assert stored(pytest.fail).ids.tolist() == [7] * 8
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_a_damaged_store_that_another_process_mends_meanwhile_stays_mended(tmp_path: Path) -> None:
    warnings: list[str] = []

    def stored(make: Any) -> store.Store:
        return store.stored({"text": "x"}, make, dtype="<u2", cache=tmp_path, warn=warnings.append)

    stored(lambda: chunks(7))
    (ids,) = tmp_path.rglob("ids.bin")
    ids.write_bytes(b"")

    def slower() -> list[store.Chunk]:
        stored(lambda: chunks(7))
        return chunks(9)

    assert stored(slower).ids.tolist() == [7] * 8
    assert len(warnings) == 2
    assert "ids.bin has 0 of 16 bytes" in warnings[0]


def test_the_digest_tells_the_rows_and_their_order(tmp_path: Path) -> None:
    def kept(value: int) -> store.Store:
        return store.stored({"text": value}, lambda: chunks(value), dtype="<u2", cache=tmp_path, warn=pytest.fail)

    there = [Rows([kept(value)], np.array(order)).digest() for value, order in ((7, [0, 1]), (7, [1, 0]), (7, [0]), (8, [0, 1]))]
    assert len(set(there)) == 4
    assert Rows([kept(7)], np.array([0, 1])).digest() == there[0]


def test_processes_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    code = """
import sys, numpy, pathlib
from adapt_pruner.data.store import Chunk, stored
make = lambda: [Chunk(numpy.full(8, 7, numpy.uint32), numpy.full(2, 4, numpy.int64))]
for number in range(50):
    assert stored({"number": number}, make, dtype="<u2", cache=pathlib.Path(sys.argv[1]), warn=print).ids.tolist() == [7] * 8
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) for _ in range(2)]
    assert [process.communicate()[0].decode() for process in running] == [""] * 2
    assert len(list((tmp_path / "tokens").iterdir())) == 50


def test_a_cache_that_cannot_be_written_is_said(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"tokens cannot be stored in .*file \(Not a directory\).*ADAPT_PRUNER_CACHE=DIR"):
        rows_of(letters, tmp_path, tokens=400, cache=None)
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "named"))
    rows_of(letters, tmp_path, tokens=400, cache=None)
    assert (tmp_path / "named" / "tokens").is_dir()


def test_work_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def make() -> Any:
        yield from chunks(1)
        raise UsageError("line 7 is not JSON")

    with pytest.raises(UsageError, match="line 7"):
        store.stored({"text": "x"}, make, dtype="<u2", cache=tmp_path, warn=pytest.fail)
    assert list((tmp_path / "tokens").iterdir()) == []
