"""A model whose weights lie on disk, or in memory as stored, is pruned like one in memory, to the last bit."""

import importlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapt_pruner as ap
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.shelved import Shelving
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.shelf import InFile, Shelf, Source, fetched, on_shelf
from adapt_pruner.core.system import memory
from adapt_pruner.data.windows import MICRO_TOKENS
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.run.loop import prune, run
from conftest import LAYOUTS, VOCAB, assert_same_model, printed, saved, tiny_model

load_module = importlib.import_module("adapt_pruner.checkpoint.load")

ROWS = {
    "adapt-pruner": {}, "llm-pruner": {"chooser": "allocate.uniform(first=1)"}, "flap": {}, "wanda-sp": {}, "magnitude": {"chooser": "allocate.uniform"}, "shortgpt": {}, "minitron": {},
    "self-pruner": {"reduce": "search(population=3, offspring=3, rounds=2, tokens=32, finalists=2)", "step": None},
    "evopress": {"reduce": "search(proposals=mutation, starts=6, population=1, rounds=2, offspring=4, fitness=kl, tokens=32, finalists=2, final_tokens=64, redraw=true)", "step": None},
    "first-layer-whole-ls": {"calibration.self_generated": 0}, "adaptive-ls-v1": {"calibration.self_generated": 0},
}  # fmt: skip


def recipe_of(folder: Path, text: Path, method: str, **keys: Any) -> Recipe:
    values = {
        "model": str(folder),
        "method": method,
        "budget": "70%",
        "device": "cpu",
        "dtype": "float32",
        "multiple_of": 1,
        "step": 0.5,
    }
    if method != "magnitude":
        values |= {"calibration.source": str(text), "calibration.samples": 8, "calibration.length": 16}
    values = {**values, **ROWS.get(method, {}), **keys}
    return read({}, values={key: value for key, value in values.items() if value is not None})


def pruned(folder: Path, text: Path, out: Path, method: str, **keys: Any) -> dict[str, torch.Tensor]:
    prune(recipe_of(folder, text, method, **keys), out)
    return load_file(out / "model.safetensors")


def assert_same(one: Path, other: Path, weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    for name in ("mask.json", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("method", ROWS)
def test_every_row_that_can(method: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    whole = pruned(tiny_folder, text_file, tmp_path / "none", method, offload="none")
    for place in ("disk", "cpu"):
        away = pruned(tiny_folder, text_file, tmp_path / place, method, offload=place)
        assert_same(tmp_path / "none", tmp_path / place, whole, away)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family(layout: tuple[str, str], tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny_model(layout, vocab_size=VOCAB), tokenizer)
    whole = pruned(folder, text_file, tmp_path / "none", "adaptive-ls-v1", offload="none")
    away = pruned(folder, text_file, tmp_path / "disk", "adaptive-ls-v1", offload="disk")
    assert_same(tmp_path / "none", tmp_path / "disk", whole, away)


def test_text_of_the_model_itself_is_the_same_from_disk(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    keys = {"calibration.source": "self", "calibration.self_generated": 3}
    for place in ("none", "disk"):
        run(recipe_of(tiny_folder, text_file, "adaptive-ls-v1", offload=place, **keys), tmp_path / place)
    assert_same_model(tmp_path / "none", tmp_path / "disk")
    for name in ("calibration_self.json", "repair_self.json"):
        assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()


def test_a_run_goes_on_from_what_changed(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    keys = {"stages": 2, "checkpoint_minutes": 0, "keep_checkpoints": 9}
    recipe = recipe_of(tiny_folder, text_file, "flap", offload="disk", **keys)
    whole = tmp_path / "whole"
    run(recipe, whole)
    for number, checkpoint in enumerate(sorted((whole / "checkpoints").iterdir())):
        copied = shutil.copytree(whole, tmp_path / str(number))
        shutil.rmtree(copied / "model")
        for other in (copied / "checkpoints").iterdir():
            if other.stat().st_mtime > (copied / "checkpoints" / checkpoint.name).stat().st_mtime:
                shutil.rmtree(other)
        run(recipe, copied)
        assert_same_model(whole, copied)
    assert number


TRAINED: dict[str, dict[str, Any]] = {
    "adamw": {}, "bfloat16": {"dtype": "bfloat16", "training.weights": "bfloat16", "training.optimizer": "adamw8bit"},
    "lora": {"dtype": "bfloat16", "training.weights": "bfloat16", "training.lora": {"rank": 2}},
}  # fmt: skip


@pytest.mark.parametrize(("training", "place"), zip(TRAINED, ("cpu", "disk", "disk"), strict=True))
def test_a_run_trains_in_memory_and_prunes_from_the_shelf(
    training: str, place: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The weights leave the shelf for each training; a killed run goes on to the same bytes."""
    keys = {
        **TRAINED[training], "stages": 2, "training.source": str(text_file), "training.tokens": 256, "training.length": 32,
        "training.batch_tokens": 64, "training.lr": 1e-2, "checkpoint_minutes": 0, "keep_checkpoints": 99,
    }  # fmt: skip
    for where in ("none", place):
        run(recipe_of(tiny_folder, text_file, "flap", offload=where, **keys), tmp_path / where)
    assert_same_model(tmp_path / "none", tmp_path / place)
    checkpoints = sorted((tmp_path / place / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(checkpoints) >= 8
    for number in (1, len(checkpoints) - 2):
        copied = shutil.copytree(tmp_path / place, tmp_path / str(number))
        shutil.rmtree(copied / "model")
        for later in checkpoints[number + 1 :]:
            shutil.rmtree(copied / "checkpoints" / later.name)
        run(recipe_of(tiny_folder, text_file, "flap", offload=place, **keys), copied)
        assert_same_model(tmp_path / place, copied)


def test_scratch_is_gone_and_the_source_is_as_it_was(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("ADAPT_PRUNER_SCRATCH", str(scratch))
    before = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    written: list[Path | None] = []
    keep = Shelf.laid
    monkeypatch.setattr(Shelf, "laid", lambda self, numbers: written.append(self._scratch) or keep(self, numbers))
    pruned(tiny_folder, text_file, tmp_path / "out", "adaptive-ls-v1", offload="disk")
    assert set(written) == {scratch}
    assert list(scratch.iterdir()) == []
    assert {path.name: path.read_bytes() for path in tiny_folder.iterdir()} == before
    monkeypatch.setenv("ADAPT_PRUNER_SCRATCH", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"missing is no folder.*ADAPT_PRUNER_SCRATCH"):
        pruned(tiny_folder, text_file, tmp_path / "other", "adaptive-ls-v1", offload="disk")
    monkeypatch.setenv("ADAPT_PRUNER_SCRATCH", str(scratch))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, used=0, free=1000))
    with pytest.raises(
        UsageError,
        match=r"has 0.0 GiB left, and pruning writes up to 0.0 GiB of changed weights and hidden states there; make room, .*ADAPT_PRUNER_SCRATCH",
    ):
        pruned(tiny_folder, text_file, tmp_path / "other", "adaptive-ls-v1", offload="disk")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("wanda", {"sparsity": "50%", "budget": None, "step": None, "multiple_of": None}, "cannot work; set offload=none"),
        ("adapt-pruner", {"budget": None, "latency": "0.95x"}, "a latency budget"),
        (
            "self-pruner",
            {"reduce": "search(repaired=true)", "repair": "closed_form.least_squares", "step": None},
            r"reduce 'search\(repaired",
        ),
        ("saap", {}, "needs the whole model in memory"),
    ],
)
def test_rows_that_cannot_say_so(
    method: str, keys: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        pruned(tiny_folder, text_file, tmp_path / "out", method, offload="disk", **keys)


def test_a_device_smaller_than_a_layer_is_refused_before_anything_is_read(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "usable_bytes", lambda: 10**5)
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("it was read"))
    for place in ("disk", "auto"):
        with pytest.raises(
            UsageError, match="GiB of memory to prune, but only 0.0 GiB are free; nothing that makes it smaller fits"
        ):
            pruned(tiny_folder, text_file, tmp_path / "out", "adaptive-ls-v1", offload=place)
    assert not (tmp_path / "out").exists()


def broken(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def lying(content: bytes) -> bytes:
    """A header that gives the first tensor more numbers than its bytes hold."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["model.embed_tokens.weight"]["shape"][0] += 1
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-10], "is damaged .* ends at byte"),
        (lambda content: content[:4], "is damaged"),
        (lambda content: b"\xff" * 8 + content[8:], "is damaged .its header has"),
        (lying, "is damaged .* bytes for"),
    ],
)
def test_a_damaged_source(change: Any, said: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    broken(folder, change)
    with pytest.raises(RunError, match=said):
        pruned(folder, text_file, tmp_path / "out", "llm-pruner", offload="disk")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "nth"), [("llm-pruner", 40), ("magnitude", 12)], ids=["a layer", "a single weight"])
def test_a_source_that_changes_meanwhile(
    method: str, nth: int, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    reads, read_one = [], Source.read

    def touch(self: Source, offset: int, size: int) -> torch.Tensor:
        reads.append(offset)
        if len(reads) == nth:
            os.utime(folder / "model.safetensors")
        return read_one(self, offset, size)

    monkeypatch.setattr(Source, "read", touch)
    with pytest.raises(RunError, match="changed while it was read"):
        pruned(folder, text_file, tmp_path / "out", method, offload="disk")


def test_the_next_layer_is_read_while_one_is_worked_on(tiny_folder: Path) -> None:
    """Never are more than two layers at hand, and layer i + 1 is asked for before layer i ends, upwards and downwards."""
    model = load(str(tiny_folder), shelving=Shelving.at("disk", tiny_folder)).model
    layers = list(decoder_layers(model))
    shelf = on_shelf(layers[0])[0].shelf
    for order in ([0, 1, 2], [2, 1, 0]):
        for place, index in enumerate(order):
            with fetched(layers[index]):
                assert [all(weight.here for weight in on_shelf(layer)) for layer in layers] == [i == index for i in range(3)]
                following = order[place + 1 :][:1]
                ahead = [] if shelf._next is None else shelf._next[0]
                if following and place:
                    assert ahead == [weight.stored for weight in on_shelf(layers[following[0]])]
    assert all(torch.isnan(weight).all() for layer in layers for weight in on_shelf(layer))
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        on_shelf(layers[0])[0].mul_(2)


def test_other_commands_read_from_disk(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A model that memory has no room for is evaluated, inspected, exported and verified all the same."""
    small = tmp_path / "small"
    pruned(tiny_folder, text_file, small, "adapt-pruner", offload="none")
    spoken, loaded, on_disk = {}, list[bool](), load_module.shelved_model
    monkeypatch.setattr(load_module, "shelved_model", lambda *args, **how: loaded.append(True) or on_disk(*args, **how))
    for place in ("memory", "disk"):
        if place == "disk":
            monkeypatch.setattr(load_module, "free_bytes", lambda device: 1)
        figures = ap.evaluate(small, text=str(text_file), max_windows=4, window=32, device="cpu", dtype="float32")
        ap.export(small, "padded", tmp_path / place / "model")
        spoken[place] = (figures.nll, figures.nonzero, printed("inspect", small))
        assert len(loaded) == 3 * (place == "disk")
    assert spoken["memory"] == spoken["disk"]
    assert_same_model(tmp_path / "memory", tmp_path / "disk")
    assert ap.verify(small, tmp_path / "disk" / "model", text=str(text_file), max_windows=2).passed
    assert len(loaded) == 4


def test_weights_are_read_a_few_times(tokenizer: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss before and after, forwards and backwards for the scores: each reads the weights once, however many batches there are."""
    folder = saved(tmp_path / "model", tiny_model(vocab_size=VOCAB, tie_word_embeddings=False), tokenizer)
    reads, read_one = Counter[tuple[int, ...]](), InFile.read
    monkeypatch.setattr(InFile, "read", lambda place: reads.update([place.shape]) or read_one(place))
    keys = {"calibration.samples": 64, "calibration.length": 64, "step": 1.0}
    recipe = recipe_of(folder, text_file, "llm-pruner", offload="disk", **keys)
    figures = prune(recipe, tmp_path / "out").figures
    assert (figures["iterations"], 64 * 64 // MICRO_TOKENS) == (1, 16)
    assert 3 <= figures["weights_read"] <= 5
    embeddings = sum(count for shape, count in reads.items() if shape[0] == VOCAB)
    assert embeddings == 8, "of tokens and logits: each once in each of three passes, and to be written"


def test_only_the_rows_that_are_left_are_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process does that holds a share of a weight; those in between are read, too."""
    weight = on_shelf(load(str(tiny_folder), shelving=Shelving.at("disk", tiny_folder)).model)[-1]
    whole, sizes, read_one = weight.stored.read(), list[int](), Source.read
    monkeypatch.setattr(Source, "read", lambda self, offset, size: sizes.append(size) or read_one(self, offset, size))
    row = whole[0].nbytes
    for rows in ([2, 5, 3], [], [0]):
        left = weight.stored.at({0: torch.tensor([9, 1, *range(2, 7)])}).at({0: torch.tensor(rows, dtype=torch.int64)})
        assert torch.equal(left.read(), whole[[9, 1, *range(2, 7)]][rows])
    assert sizes == [4 * row, 0, row]
