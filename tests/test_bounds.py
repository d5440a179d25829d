"""What has no end, or is no value at all, is refused in one sentence that says the bound; nothing waits, and no memory fills."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from adapt_pruner.checkpoint import load as loading
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.system.files import read_plain
from adapt_pruner.data import readers
from adapt_pruner.data.fixed import training_rows
from adapt_pruner.data.sources import documents
from adapt_pruner.data.tokens import calibration_ids
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.answer import answer
from adapt_pruner.recipe import read
from conftest import byte_tokenizer, zstd
from test_cli import ask, one_sentence

__all__ = ["ask"]  # a fixture

LAUGHS = "\n".join(["a0: &a0 [lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)), "about: *a19"])
YAML = {
    "aliases without end": (LAUGHS, "aliases expand to more than 100,000 values"),
    "a value in itself": ("axes: &a [*a]", "line 1: a value contains itself"),
    "deep lists": ("axes: " + "[" * 3000, "nested more than 32 deep; use fewer levels"),
    "deep tables": ("{a: " * 3000, "nested more than 32 deep; use fewer levels"),
    "a date that is none": ("about: !!timestamp x", "line 1: 'x' is not a valid timestamp; quote it"),
    "no whole number": ("stages: !!int abc", "line 1: 'abc' is not a valid int; quote it"),
    "a long number": ("stages: " + "1" * 5000, "a number has 5,000 characters; at most 100 are allowed"),
    "a key that is no word": ("calibration: {source: {5: 1}}", "line 1: the key 5 is not a string; quote it"),
    "NUL": ('model: "a\\0b"', "line 1: a value contains the character NUL"),
    "stages": ("stages: 1000000000", "'stages' is 1000000000: input should be less than or equal to 1000"),
    "tokens": ("training: {source: x, tokens: 900000T}", "'training.tokens' .*10000000000000"),
    "own text": ("calibration: {self_generated: 1000000000000}", "'calibration.self_generated' .*1000000"),
    "rank": ("training: {lora: {rank: 1000000000}}", "'training.lora.rank' .*65536"),
    "a long word": ("dtype: " + "a" * 5000, "'dtype' is 'a{199}…: input should be"),
}


@pytest.mark.parametrize("case", YAML)
def test_a_recipe_has_bounds(case: str, tmp_path: Path) -> None:
    text, wanted = YAML[case]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=wanted):
        read(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "value", [*(text.partition(": ")[2] for text, _ in YAML.values()), "2026-13-45", "{5: 1}", "[[]]", "0x" + "f" * 90]
)
def test_so_has_a_key_on_the_command_line(value: str) -> None:
    lengths = [0]
    for key in ("about", "stages", "training", "calibration.source", "axes"):
        try:
            read({}, overrides=[f"{key}={value}"])
        except UsageError as error:
            lengths.append(len(str(error)))
    assert max(lengths) < 700
    assert read({}, overrides=["about=2026-01-01"]).about == "2026-01-01", "a date is a word"


def test_an_alias_that_ends_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("calibration: {source: &text a.txt}\ntraining: {source: *text, tokens: 1M}\n")
    assert read(tmp_path / "r.yaml").training.source == "a.txt"


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="cannot be read: it is a pipe or a device, and only files are read"):
        read(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="cannot be read: it is a pipe"):
        calibration_ids(tmp_path / "pipe.yaml", vocab_size=9)
    with pytest.raises(OSError, match="pipe or a device"):
        read_plain(Path("/dev/zero"))
    (tmp_path / "large").write_bytes(b"123456")
    with pytest.raises(OSError, match="it has 6 bytes, and at most 5 are read"):
        read_plain(tmp_path / "large", most=5)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe.txt' is a pipe or a device; give a file"):
        documents(str(tmp_path / "pipe.txt"))


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
def test_a_packed_file_does_not_unfold_without_end(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / f"t.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(pack(b'{"text": "again and again"}\n' * 40_000))
    assert len(documents(str(path))) == 40_000, "a small file may be packed as well as it can"
    monkeypatch.setattr(readers, "_UNPACKED", 1000)
    with pytest.raises(UsageError, match=r"bytes unpacks to more than [\d,]+, which is more than 100 times its size; unpack it"):
        documents(str(path))


def test_a_parquet_file_does_not_unfold_without_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pages may be packed beyond any use, which the file says itself, or one long row may stand for many, which it does not."""
    packed, repeated = tmp_path / "packed.parquet", tmp_path / "repeated.parquet"
    rows = pyarrow.table({"text": ["again and again"] * 100_000})
    pyarrow.parquet.write_table(rows, packed, compression="zstd", use_dictionary=False)
    indices = pyarrow.array([0] * 10_000, pyarrow.int32())
    row = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a" * 2**20]))
    pyarrow.parquet.write_table(pyarrow.table({"text": row}), repeated, compression="zstd", store_schema=False)
    assert len(documents(str(packed))) == 100_000, "a small file may be packed as well as it can"
    monkeypatch.setattr(readers, "_UNPACKED", 2**20)
    said = (
        r"bytes unpacks to more than [\d,]+, which is more than 100 times its size; write its rows to a .jsonl file if you trust"
    )
    with pytest.raises(UsageError, match=said):
        next(readers.local(str(packed)))
    monkeypatch.setattr(readers, "_UNPACKED", 2**22)
    read = 0
    with pytest.raises(UsageError, match=said):
        for _ in readers.local(str(repeated)):
            read += 1
    assert 0 < read <= 4, "10 GB of rows; no more are in memory than may be read"


def test_a_line_has_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "short"}\n' + json.dumps({"text": "long " * 1000}) + "\n")
    assert len(documents(str(tmp_path / "t.jsonl"))) == 2
    monkeypatch.setattr(readers, "_LONGEST_LINE", 4000)
    with pytest.raises(UsageError, match=r"line 2, has more than 4,000 characters, which is the limit; divide its text"):
        documents(str(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"text": ' * 50_000])
def test_json_that_is_deep_or_long_is_no_text(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match="line 1, is not JSON"):
        documents(str(tmp_path / "t.jsonl"))


def test_a_text_is_not_repeated_without_end(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="times; at most 10,000 are allowed, so give more text or lower training.tokens"):
        training_rows(byte_tokenizer(), str(text_file), length=64, tokens=10**13, seed=0, warn=print, cache=tmp_path)


def test_options_have_bounds(ask: Any, tiny_folder: Path) -> None:
    for option, most in (("--prompt", 131072), ("--generate", 131072), ("--rounds", 1000)):
        status, _, err = ask("bench", tiny_folder, "--against", tiny_folder, option, 10**9)
        assert (status, f"less than or equal to {most}" in one_sentence(err)) == (2, True), err
    status, _, err = ask("bench", tiny_folder, "--against", tiny_folder, "--batch", "1,1000000000")
    assert (status, "batch sizes from 1 to 65,536" in one_sentence(err)) == (2, True), err


@pytest.mark.parametrize("name", ["~nosuchuser", "~nosuchuser/x.txt"])
def test_a_user_who_is_not_there(name: str, ask: Any, tiny_folder: Path) -> None:
    for words in (
        ["inspect", name],
        ["eval", tiny_folder, "--text", name],
        ["prune", tiny_folder, "-o", "x", "--params", "80%", "--calibration-ids", name],
    ):
        status, _, err = ask(*words)
        assert (status, "names the home folder of an unknown user" in one_sentence(err)) == (2, True), err


def test_the_device_meta_holds_nothing(ask: Any, tiny_folder: Path) -> None:
    status, _, err = ask("chat", tiny_folder, "hi", "--device", "meta")
    assert (status, "device 'meta' is not available here" in one_sentence(err)) == (2, True), err


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_settings_that_a_model_cannot_write_by(ask: Any, folder: Path) -> None:
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"num_beams": 4, "num_return_sequences": 4}))
    status, _, err = ask("chat", folder, "hi", "--max-new-tokens", 3)
    assert status == 0, err
    assert "3 tokens" in err, "an answer is what is likeliest token by token"
    path.write_text(json.dumps(own | {"stop_strings": ["a"]}))
    status, _, err = ask("chat", folder, "hi", "--max-new-tokens", 3)
    assert (status, "correct or remove generation_config.json" in one_sentence(err)) == (1, True), err


def test_a_template_that_writes_nothing(folder: Path) -> None:
    loaded = load(str(folder))
    loaded.tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(UsageError, match="chat template writes nothing for this prompt"):
        answer(loaded.model, loaded.tokenizer, "hi", max_new_tokens=2)
    with pytest.raises(UsageError, match=r"temperature .* is below 0.001; give 0"):
        answer(loaded.model, byte_tokenizer(), "hi", max_new_tokens=2, temperature=1e-320)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        "[" * 100_000,
        '{"model_type": "llama", "hidden_size": [1]}',
        '{"model_type": []}',
        '{"model_type": "llama", "num_hidden_layers": -1}',
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["export", "--to", "padded", "-o", "x"], ["card"]])
def test_a_config_that_is_none(content: str, command: list[str], ask: Any, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    if command == ["card"]:
        (folder / "pruning.json").write_text('{"recipe": {}, "figures": {"params_after": 1}}')
    status, _, err = ask(command[0], folder, *command[1:])
    assert (status in (1, 2), "unexpected" in one_sentence(err)) == (True, False), err
    if command == ["card"] or content in ("[]", "5"):
        assert "config.json" in err, "not the pruning.json, nor a word of Python"


def test_a_small_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch, ask: Any, folder: Path) -> None:
    """What Python, torch and a file that cannot be mapped say of it."""
    errors = [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        OSError(12, "Cannot allocate memory"),
    ]
    for error in errors:

        def fails(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(loading, "model_class", lambda *_, fails=fails: (type("M", (), {"from_pretrained": fails}), {}))
        status, _, err = ask("inspect", folder)
        assert (status, "error: out of memory;" in one_sentence(err)) == (1, True), err


def test_what_may_not_be_read_is_there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "model.safetensors")
    with pytest.raises(UsageError, match=r"you have no permission to read model.safetensors; ask for it"):
        load(str(folder))
    monkeypatch.undo()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"model.safetensors points to a file that does not exist"):
        load(str(folder))


def test_a_damaged_comparison(ask: Any, tmp_path: Path) -> None:
    for content in (
        '{"rows": [1], "arguments": {}}',
        '{"rows": [{}], "arguments": {"model": 5}}',
        '{"rows": 5, "arguments": 5}',
        "[" * 100_000,
    ):
        (tmp_path / "compare.json").write_text(content)
        status, _, err = ask("report", tmp_path)
        assert (status, "compare.json" in one_sentence(err)) == (2, True), err
        assert not (tmp_path / "compare.html").exists()


def test_a_sentence_ends(ask: Any) -> None:
    status, _, err = ask("run", "a" * 5000)
    assert (status, len(one_sentence(err)) < 1100) == (2, True)


def test_errors_of_the_system_name_the_file(monkeypatch: pytest.MonkeyPatch, ask: Any, tiny_folder: Path) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("adapt_pruner.report.card.card_of", fails)
    status, _, err = ask("card", tiny_folder, "--show")
    assert (status, one_sentence(err)) == (
        1,
        "error: /some/file cannot be used: permission denied; correct that, or name another file or folder",
    )


def test_out_of_memory_is_not_what_a_model_did(folder: Path) -> None:
    loaded = load(str(folder))

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loaded.model.generate = fails
    with pytest.raises(torch.OutOfMemoryError):
        answer(loaded.model, loaded.tokenizer, "hi", max_new_tokens=2)
