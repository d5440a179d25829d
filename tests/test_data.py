"""Text in all its forms, and what becomes of it: windows, blocks, batches."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from adapt_pruner.core.system import files as marks
from adapt_pruner.data import selfwritten
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import documents, read, texts
from adapt_pruner.data.tokens import batches_of, calibration_ids, calibration_windows, evaluation_windows, opening
from adapt_pruner.data.windows import calibration_feed, held_out_windows
from adapt_pruner.errors import UsageError
from conftest import VOCAB, byte_tokenizer, tiny_model, zstd

ROWS = ["first document, with an é", "second document", "third"]
LINES = "".join(json.dumps({"text": row, "source": "x"}) + "\n" for row in ROWS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(LINES.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "n": [1, 2, 3]}), tmp_path / "d.parquet")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.txt").write_text("plain text", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_files_of_rows(corpus: Path, name: str) -> None:
    assert documents(str(corpus / name)) == ROWS


def test_text_files_folders_and_globs(corpus: Path) -> None:
    assert documents(str(corpus / "deeper" / "e.txt")) == ["plain text"]
    assert documents(str(corpus)) == [*ROWS * 4, "plain text"]
    assert documents(str(corpus / "*.jsonl*")) == ROWS * 3
    assert documents(str(corpus / "**" / "*.txt")) == ["plain text"]


def test_names_may_be_in_capitals_and_json_lines_have_two_endings(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text(LINES)
    (tmp_path / "b.ndjson").write_text(LINES)
    (tmp_path / "c.ndjson.GZ").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "d.TXT").write_text("plain text")
    assert documents(str(tmp_path)) == [*ROWS * 3, "plain text"]
    assert documents(str(tmp_path / "A.JSONL")) == ROWS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + LINES.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mark + LINES.encode()))
    (tmp_path / "c.txt").write_bytes(mark + b"plain text")
    assert documents(str(tmp_path)) == [*ROWS * 2, "plain text"]


def test_a_folder_is_read_without_hidden_files_and_without_what_we_wrote(tmp_path: Path) -> None:
    """A run may write its folder, with a log of rows without text, into the folder of the text that it reads."""
    for name in (
        "a.txt",
        "deep/b.md",
        ".hidden.txt",
        ".venv/c.txt",
        "small/log.jsonl",
        "small/model/README.md",
        "pruned/README.md",
        "hf/README.md",
        "hf/merges.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    marks.mark(tmp_path / "small", "run")
    (tmp_path / "pruned" / "pruning.json").write_text("{}")
    (tmp_path / "hf" / "README.md").write_text("---\ntags:\n- adapt-pruner\n- pruned\n---\n# An export\n")
    assert list(texts(str(tmp_path))) == ["a.txt", "deep/b.md"]
    assert list(texts(str(tmp_path / "pruned"))) == ["pruned/README.md"], "a folder that is named itself is read"


def test_a_data_set_through_the_datasets_library(corpus: Path) -> None:
    """A local folder stands in for the hub: the same call, no network."""
    folder = corpus / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES, encoding="utf-8")
    (folder / "test.jsonl").write_text(json.dumps({"text": "held out", "source": "y"}) + "\n", encoding="utf-8")
    assert documents(f"hub:{folder}") == ROWS
    assert documents(f"hub:{folder}::test:source") == ["y"]
    with pytest.raises(UsageError, match="no text in a field 'body'; its fields: text, source"):
        documents(f"hub:{folder}::train:body")
    with pytest.raises(UsageError, match="could not be loaded"):
        documents(f"hub:{folder}::validation")


def test_python_docs_are_real_text_and_the_held_out_part_is_held_out() -> None:
    train, held_out = documents("python-docs:train"), documents("python-docs:heldout")
    assert sum(map(len, train)) > 300_000
    assert sum(map(len, held_out)) > 20_000

    def paragraphs(texts: list[str]) -> set[str]:
        return {" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()}

    assert not paragraphs(train) & paragraphs(held_out)
    with pytest.raises(UsageError, match="known: train, heldout"):
        documents("python-docs:test")


def test_a_folder_that_datasets_saved(corpus: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ROWS, "source": ["x"] * 3})
    rows.save_to_disk(corpus / "saved")
    assert documents(str(corpus / "saved")) == ROWS
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(corpus / "splits")
    assert documents(str(corpus / "splits")) == ROWS
    assert documents(str(corpus / "splits" / "test")) == ROWS[1:2]
    datasets.DatasetDict({"test": rows}).save_to_disk(corpus / "tests")
    with pytest.raises(UsageError, match=r"no split 'train'; name one by its folder, for example .*/tests/test"):
        documents(str(corpus / "tests"))
    rows.rename_column("text", "body").save_to_disk(corpus / "other")
    with pytest.raises(UsageError, match="row 1, has no text.* its fields: body, source"):
        documents(str(corpus / "other"))


def test_a_row_whose_text_is_null_is_left_out_of_a_data_set(tmp_path: Path) -> None:
    """As of a parquet file. A row without the field is refused still."""
    rows = datasets.Dataset.from_dict({"text": ["one", None, "three"], "source": ["x", None, "x"]})
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    for spec in (str(tmp_path / "saved"), f"hub:{tmp_path / 'hub'}", str(tmp_path / "hub" / "train.parquet")):
        assert [(document.name[-5:], document.text) for document in read(spec)] == [("row 1", "one"), ("row 3", "three")], spec
    with pytest.raises(UsageError, match="has no text in a field 'body'; its fields: text, source"):
        documents(f"hub:{tmp_path / 'hub'}:::body")


def test_documents_go_by_file_and_row(corpus: Path) -> None:
    assert [document.name for document in read(str(corpus))] == [
        *(f"{corpus}/{file} line {number}" for file in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst") for number in (1, 2, 3)),
        *(f"{corpus}/d.parquet row {number}" for number in (1, 2, 3)),
        f"{corpus}/deeper/e.txt",
    ]


def test_one_document_in_twenty_is_held_out_whatever_surrounds_it(tmp_path: Path) -> None:
    texts = [f"document number {number}" for number in range(2000)]
    path, turned = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    turned.write_text("".join(json.dumps({"text": f" {text.replace(' ', '  ')}\n"}) + "\n" for text in reversed(texts)))
    train, held_out = documents(f"{path}#train"), documents(f"{path}#heldout")
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 70 < len(held_out) < 130
    assert held_out[0] == "document number 35", "the same on every machine and in every release"
    assert [" ".join(text.split()) for text in documents(f"{turned}#heldout")] == held_out[::-1]


def test_a_part_that_is_none_is_refused(corpus: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"e.txt' has 10 characters, too few to train on one part and hold out another; give at least 40,000",
    ):
        documents(f"{corpus}/deeper/e.txt#heldout")
    with pytest.raises(UsageError, match="has no part 'test'; known: train, heldout"):
        documents(f"{corpus}/a.jsonl#test")
    (corpus / "issue#train").write_text("a file may have any name")
    assert documents(str(corpus / "issue#train")) == ["a file may have any name"]
    assert documents("python-docs#heldout") == documents("python-docs:heldout")
    with pytest.raises(UsageError, match="no part 'train:heldout'"):
        documents("python-docs:train#heldout")


def flushed_twice() -> tuple[bytes, bytes]:
    """A .zst file as far as its first whole block, which ends with a line, and all of it."""
    file = io.BytesIO()
    file.close = lambda: None  # type: ignore[method-assign]
    packer = pyarrow.CompressedOutputStream(file, "zstd")
    packer.write(LINES.encode())
    packer.flush()
    first = file.getvalue()
    packer.write(LINES.encode())
    packer.close()
    return first, file.getvalue()


def test_a_zst_file_may_have_blocks_and_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(flushed_twice()[1] + zstd(LINES.encode()))
    (tmp_path / "b.jsonl").write_text(LINES * 3)
    assert documents(str(path)) == documents(str(tmp_path / "b.jsonl"))


def test_half_a_character_becomes_a_mark_for_it(tmp_path: Path) -> None:
    """JSON may hold it, and web corpora do; UTF-8 cannot, and no tokenizer takes it."""
    (tmp_path / "a.jsonl").write_text('{"text": "one \\ud83d, whole \\ud83d\\ude42, two \\ude42"}\n')
    assert documents(str(tmp_path / "a.jsonl")) == ["one \ufffd, whole 🙂, two \ufffd"]
    message = {"messages": [{"role": "user", "content": "\ud83d?"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(message) + "\n")
    (document,) = read(str(tmp_path / "b.jsonl"))
    assert document.messages[0]["content"] == "\ufffd?"
    assert len(document.digest) == 32


BAD_TEXTS = {
    "empty.txt": (b"  \n", "is empty"),
    "latin1.txt": ("caf\xe9".encode("latin1"), r"not UTF-8 text \(byte 3 is 0xe9\).*iconv"),
    "latin1.jsonl": (b'{"text": "a"}\n' * 9000 + b'{"text": "caf\xe9"}', r"not UTF-8 text \(it has the byte 0xe9\).*iconv"),
    "packed.txt.gz": (gzip.compress(b"text"), "is packed by gzip; unpack it"),
    "model.bin": (b"\x80\x02\x00\x00", "is no text"),
    "broken.jsonl": (b'{"text": "fine"}\n{"text": \n', "line 2, is not JSON"),
    "other.jsonl": (b'{"body": "x"}\n', "line 1, has no text in a field 'text'"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 50)[:-20], "cannot be read"),
    "junk.jsonl.zst": (b"no such thing", "cannot be read: ZSTD decompress failed"),
    "cut.jsonl.zst": (zstd(LINES.encode() * 50)[:-3], "cannot be read: Truncated compressed stream"),
    "cut2.jsonl.zst": (flushed_twice()[0], "cannot be read: Truncated compressed stream"),
    "not.parquet": (b"PAR1 no", "is not a parquet file"),
    "rows.csv": (b"text\nhello\n", "is a table; convert it to a .jsonl or .parquet file with a column 'text'"),
    "empty.jsonl": (b'{"messages": []}', "line 1, has no messages in its field 'messages'"),
    "tools.jsonl": (
        b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null}]}',
        "line 1, has no text in 'content' of message 2",
    ),
}


@pytest.mark.parametrize("name", BAD_TEXTS)  # no bytes in the tests' names: gzip's have the time in them
def test_bad_text_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    content, said = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        documents(str(tmp_path / name))


def test_a_missing_text_names_the_forms_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist; give a file .*hub:NAME, python-docs or self"):
        documents(str(tmp_path / "nothing.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="contains no text file"):
        documents(str(tmp_path / "folder"))


def test_calibration_windows_are_distinct_pieces_of_the_text(tokenizer: Any) -> None:
    text = "".join(f"{i:05d}" for i in range(2000))
    windows = calibration_windows(tokenizer, [text], samples=50, length=100, seed=1)
    assert windows.shape == (50, 100)
    pieces = [tokenizer.decode(row) for row in windows]
    assert all(piece in text for piece in pieces)
    spans = sorted(text.index(piece) for piece in pieces)
    assert all(b - a >= 100 for a, b in zip(spans, spans[1:], strict=False)), "no two overlap"
    assert torch.equal(windows, calibration_windows(tokenizer, [text], samples=50, length=100, seed=1))
    assert not torch.equal(windows, calibration_windows(tokenizer, [text], samples=50, length=100, seed=2))


def test_calibration_takes_one_window_a_document_first_then_more_then_joins_short_ones(tokenizer: Any) -> None:
    texts = [letter * 1000 for letter in "abcdefgh"]
    one_each = calibration_windows(tokenizer, texts, samples=8, length=100, seed=0)
    assert len({row[0].item() for row in one_each}) == 8
    assert calibration_windows(tokenizer, texts, samples=60, length=100, seed=0).shape == (60, 100)
    short = calibration_windows(tokenizer, ["0123456789"] * 30, samples=3, length=100, seed=0)
    assert tokenizer.decode(short[0]) == "0123456789" * 10


def test_too_short_a_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="gives 2 windows of 100 tokens, but 3 are asked for"):
        calibration_windows(tokenizer, ["x" * 250], samples=3, length=100, seed=0)
    with pytest.raises(UsageError, match="1 tokens long"):
        evaluation_windows(tokenizer, ["x"], window=512, max_windows=None)
    with pytest.raises(UsageError, match="window 1 predicts nothing"):
        evaluation_windows(tokenizer, ["xyz"], window=1, max_windows=None)


def test_calibration_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"input_ids": [[1, 2, 3], [4, 5, 6], [7, 8]]}))
    rows = calibration_ids(path, vocab_size=9)
    assert [row.tolist() for row in rows] == [[[1, 2, 3]], [[4, 5, 6]], [[7, 8]]]
    assert [tuple(batch.shape) for batch in batches_of(rows, max_tokens=6)] == [(2, 3), (1, 2)]
    assert [tuple(batch.shape) for batch in batches_of(rows, max_tokens=1)] == [(1, 3), (1, 3), (1, 2)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"input_ids": [[1, 99]]}', "token id 99, but the model's vocabulary is 0 to 8"),
        ('{"input_ids": [[1, -1]]}', "token id -1"),
        ('{"input_ids": []}', "at least one sequence"),
        ('{"input_ids": [[1]]}', "at least 2 token ids"),
        ('{"ids": [[1]]}', "does not contain token ids"),
        ("[1, 2", "does not contain token ids"),
        ('{"input_ids": [[1.7, 2.9]]}', "not all of them are whole numbers"),
        ('{"input_ids": [[1, true]]}', "not all of them are whole numbers"),
    ],
)
def test_bad_calibration_ids(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        calibration_ids(tmp_path / "ids.json", vocab_size=9)
    with pytest.raises(UsageError, match="do not exist"):
        calibration_ids(tmp_path / "none.json", vocab_size=9)


def test_evaluation_windows_cover_the_text_once(tokenizer: Any) -> None:
    text = "abcdefghij" * 5
    windows = evaluation_windows(tokenizer, [text], window=20, max_windows=None)
    assert [window.shape[1] for window in windows] == [20, 20, 10]
    assert tokenizer.decode(torch.cat(windows, dim=1)[0]) == text, "no special token is added"
    assert len(evaluation_windows(tokenizer, [text], window=20, max_windows=2)) == 2
    assert len(evaluation_windows(tokenizer, ["x" * 21], window=20, max_windows=None)) == 1, "a single token predicts nothing"


def test_windows_open_as_the_model_was_trained(tokenizer: Any, opening_tokenizer: Any) -> None:
    """Where the tokenizer puts <s> before a text, every window has it, within its length; no token of the text is lost."""
    text = "".join(f"{i:04d}" for i in range(250))
    assert (opening(tokenizer), opening(opening_tokenizer)) == ([], [1])
    windows = evaluation_windows(opening_tokenizer, [text[:50]], window=20, max_windows=None)
    assert [window.shape[1] for window in windows] == [20, 20, 13]
    assert [opening_tokenizer.decode(window[0]) for window in windows] == [f"<s>{text[i : min(i + 19, 50)]}" for i in (0, 19, 38)]
    last = evaluation_windows(opening_tokenizer, [text[:20]], window=20, max_windows=None)[-1]
    assert opening_tokenizer.decode(last[0]) == f"<s>{text[19]}", "<s> predicts a single token"

    rows = calibration_windows(opening_tokenizer, [text] + ["short"] * 9, samples=45, length=21, seed=1)
    said = [opening_tokenizer.decode(row) for row in rows]
    assert rows.shape == (45, 21)
    assert all(row.startswith("<s>") and row.count("<s>") == 1 for row in said)
    spans = sorted(text.index(row[3:]) for row in said if row[3:] in text)
    assert len(spans) >= 43
    assert all(b - a >= 20 for a, b in zip(spans, spans[1:], strict=False)), "no two overlap"


@pytest.mark.parametrize("opens", [False, True])
def test_self_written_text_opens_as_the_model_was_trained(opens: bool) -> None:
    tokenizer = byte_tokenizer(opens=opens)
    rows = selfwritten_windows(tiny_model(vocab_size=VOCAB), tokenizer, samples=30, length=12, seed=5)
    assert rows.shape == (30, 12)
    assert bool((rows[:, 0] == 1).all()) is opens
    assert int((rows[:, 1] == 1).sum()) < 10


def test_calibration_draws_anew_each_iteration_unless_fixed(text_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB)
    common = {"samples": 4, "length": 32, "seed": 0}
    drawn = calibration_feed(model, tokenizer, source=str(text_file), ids=None, **common)
    assert not torch.equal(drawn(1)[0], drawn(2)[0])
    assert torch.equal(drawn(1)[0], drawn(1)[0])
    written = calibration_feed(model, tokenizer, source="self", ids=None, **common)
    assert written(1)[0].shape == (4, 32)
    assert torch.equal(written(1)[0], written(2)[0])


def test_a_mixture_gives_calibration_and_evaluation_their_shares(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB)
    for letter in "abc":
        (tmp_path / letter).write_text(letter * 1000)
    source = {str(tmp_path / letter): weight for letter, weight in (("a", 5), ("b", 3), ("c", 2))}
    drawn = calibration_feed(model, tokenizer, source=source, samples=9, length=32, ids=None, seed=0)(1)
    starts = [tokenizer.decode(row[:1]) for batch in drawn for row in batch]
    assert [starts.count(letter) for letter in "abc"] == [4, 3, 2]
    windows = held_out_windows(tokenizer, source=source, window=100, max_windows=10)
    assert [tokenizer.decode(ids[0, :1]) for ids in windows] == ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    assert len(held_out_windows(tokenizer, source=source, window=100, max_windows=None)) == 30
    with pytest.raises(UsageError, match=r"calibration.samples 2 leaves nothing for '.*c', whose share is 20.0%"):
        calibration_feed(model, tokenizer, source=source, samples=2, length=32, ids=None, seed=0)
    with pytest.raises(UsageError, match="max_windows 2 leaves nothing"):
        held_out_windows(tokenizer, source=source, window=100, max_windows=2)


def test_self_written_text_is_the_same_in_batches_of_any_size(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(vocab_size=VOCAB)
    whole = selfwritten_windows(model, tokenizer, samples=20, length=12, seed=5)
    assert not torch.equal(whole, selfwritten_windows(model, tokenizer, samples=20, length=12, seed=6))
    monkeypatch.setattr(selfwritten, "BATCH", 7)
    assert torch.equal(whole, selfwritten_windows(model, tokenizer, samples=20, length=12, seed=5))


def test_self_written_text_has_the_probabilities_of_the_model(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfwritten, "BATCH", 20_000)
    model = tiny_model(vocab_size=VOCAB, initializer_range=0.3)
    first = selfwritten_windows(model, tokenizer, samples=20_000, length=2, seed=5)[:, 0]
    with torch.no_grad():
        expected = model(torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id]])).logits[0, -1].softmax(-1)
    found = torch.bincount(first, minlength=VOCAB) / len(first)
    assert expected.max() > 5 / VOCAB, "not all tokens alike"
    assert float((found - expected).abs().sum()) < 0.12
    assert bool((found[expected > 0.02] / expected[expected > 0.02] - 1).abs().max() < 0.2)


def test_self_written_text_is_the_models_own(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB).train()
    state = torch.get_rng_state()
    rows = selfwritten_windows(model, tokenizer, samples=40, length=12, seed=5)
    assert rows.shape == (40, 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.equal(rows, selfwritten_windows(model, tokenizer, samples=40, length=12, seed=5))
    generator = torch.Generator().manual_seed(0)
    chance = torch.randint(0, VOCAB, (40, 12), generator=generator)
    with torch.no_grad():
        own, other = (float(model.eval()(ids, labels=ids).loss) for ids in (rows, chance))
    assert own < other - 0.2, "the model finds its own text likelier than chance"
