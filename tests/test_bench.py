"""Bench: what could be gained is counted right, models take turns in processes of their own, and bad input gets a sentence."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapt_pruner.api.benching import bench
from adapt_pruner.compare import turns
from adapt_pruner.compare.ideal import Weights, ideal_speed_up, of_gguf
from adapt_pruner.core.system import memory
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.speed import reading_and_writing
from adapt_pruner.run.estimate import Shapes, bytes_moved, multiply_adds, shapes
from adapt_pruner.work import RunState
from conftest import LAYOUTS, tiny_model
from test_cli import call
from test_export import as_loaded, unequal

SHAPES = Shapes(
    params=1400, decoder=1000, largest=500, layers=2, vocabulary=40, width=10, queries=20, keys=10, neurons=60, widest=30
)  # fmt: skip


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


# What could be gained.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_multiply_adds_are_those_of_the_layers_the_head_and_attention(layout: tuple[str, str]) -> None:
    model = tiny_model(layout)
    made = 0

    def count(module: nn.Linear, given: tuple[torch.Tensor, ...], _: Any) -> None:
        nonlocal made
        made += given[0].numel() // given[0].shape[-1] * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(torch.randint(3, 97, (1, 12)), logits_to_keep=2)
    found = shapes(model)
    attention = found.queries * 12 * 12
    vectors = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.dim() == 1)  # norms and biases
    assert multiply_adds(found, length=12, logits=2) == made + attention + 12 * vectors


def test_bytes_moved_are_weights_once_and_a_cache_for_every_row() -> None:
    cache = 2 * 10 * 100 * 3  # keys and values of 100 tokens in 3 rows
    assert SHAPES.tied
    assert bytes_moved(SHAPES, context=100, batch=3, weight=2, cached=4) == 2 * 1400 + 4 * cache
    untied = Shapes(**{**vars(SHAPES), "params": 1800})
    assert not untied.tied, "an input embedding of its own is looked up, not read"
    assert bytes_moved(untied, context=100, batch=3, weight=2, cached=4) == 2 * 1400 + 4 * cache


def test_the_ideal_goes_by_work_for_a_prompt_and_by_bytes_for_what_is_written() -> None:
    half = Shapes(**{**vars(SHAPES), "params": 900, "decoder": 500, "queries": 10, "keys": 5, "neurons": 30})
    dense, pruned = Weights(SHAPES, 2, 2), Weights(half, 2, 2)
    how = {"batch": 2, "prompt": 8, "generate": 4}
    work = (8 * (1000 + 20 * 8) + 400) / (8 * (500 + 10 * 8) + 400)
    assert ideal_speed_up(dense, pruned, phase="prefill", **how) == pytest.approx(work)
    read = (2 * 1400 + 2 * 2 * 10 * 10 * 2) / (2 * 900 + 2 * 2 * 5 * 10 * 2)
    assert ideal_speed_up(dense, pruned, phase="decode", **how) == pytest.approx(read)
    assert ideal_speed_up(dense, Weights(SHAPES, 1, 2), phase="decode", **how) > 1.5, "half the bytes, nearly twice the speed"


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_has_the_shapes_of_its_checkpoint(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf library is not installed")
    from adapt_pruner.export import export

    model = unequal(tie_word_embeddings=tied)
    if tied:
        model.tie_weights()
    export(as_loaded(model), tmp_path / "a.gguf", to="gguf", quant="f32")
    found = of_gguf(tmp_path / "a.gguf")
    assert found.shapes == shapes(model)
    assert (found.weight, found.cached) == (4, 2)
    joined = unequal(("llama", "qwen3"))  # its file has queries, keys and values in one matrix
    export(as_loaded(joined), tmp_path / "q.gguf", to="gguf", quant="f32")
    assert of_gguf(tmp_path / "q.gguf").shapes == shapes(joined)
    export(as_loaded(model), tmp_path / "b.gguf", to="gguf", quant="bf16")
    assert 2 < of_gguf(tmp_path / "b.gguf").weight < 2.2, "norms stay in 32 bits"
    (tmp_path / "c.gguf").write_bytes(b"GGUF and then nothing of the kind")
    with pytest.raises(RunError, match="cannot be read"):
        of_gguf(tmp_path / "c.gguf")


# Measuring.


def test_what_is_written_is_what_generate_writes() -> None:
    model, ids = tiny_model().requires_grad_(False), torch.randint(3, 97, (2, 9))
    read: list[list[int]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    prefill, decode = reading_and_writing(model, ids, 5)
    assert min(prefill, decode) > 0
    assert read[0] == ids.tolist()
    ours = [[step[row][0] for step in read[1:]] for row in range(2)]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert ours == whole[:, 9:].tolist()


class Pretended:
    """A worker whose seconds are told beforehand, on a machine that gets slower all the time."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log, self.slow = name, seconds, log, 1.0
        self.facts = {
            "load_seconds": seconds, "stored": "float32", "peak_bytes": 5, "disk_bytes": 7, "engine": "none", "device": "cpu", "weight": 4,
            "shapes": vars(SHAPES),
        }  # fmt: skip

    def ask(self, question: dict[str, Any]) -> dict[str, float]:
        self.log.append(f"{self.name}{question['batch']}")
        self.slow *= 2
        return {"prefill": self.seconds * self.slow, "decode": 2 * self.seconds * self.slow}


def test_models_take_turns_and_a_speed_up_is_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextmanager
    def opened(asked: dict[str, Any]) -> Iterator[Pretended]:
        log.append(f"+{asked['model']}")
        yield Pretended(asked["model"], {"P": 0.5, "D": 1.0}[asked["model"]], log)
        log.append(f"-{asked['model']}")

    monkeypatch.setattr(turns, "_opened", opened)
    found = bench("P", against="D", batch="1,3", prompt=10, generate=4, rounds=3)
    assert log[:12] == ["+P", "-P", "+D", "-D"] * 2 + ["+P", "+D", "P1", "D1"], "the last of each to load is measured"
    assert log[10:-2] == ["P1", "D1"] * 4 + ["P3", "D3"] * 4, "one round to warm up, three that count"
    assert [(row["phase"], row["batch"]) for row in found["speeds"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 3),
        ("decode", 3),
    ]
    first = found["speeds"][0]
    assert first["speed_up"] == {"median": 2.0, "low": 2.0, "high": 2.0}, "although both got slower eightfold"
    assert first["pruned"] == pytest.approx({"median": 10 / 4, "low": 10 / 4 * 3 / 4, "high": 10 / 4 * 3 / 2})
    assert first["ideal"] == 1.0
    assert first["share"] == 2.0
    assert found["speeds"][3]["dense"]["median"] == pytest.approx(3 * 4 / (2 * 2**7))
    assert [row["model"] for row in found["models"]] == ["P", "D"]
    assert found["models"][1]["load_seconds"]["median"] == 1.0


def test_a_process_has_its_own_memory_and_not_that_of_its_parent() -> None:
    code = (
        "import subprocess, sys; held = bytearray(b'x') * 400_000_000; ask = 'from adapt_pruner.core.system import memory; "
        "print(memory.peak_rss_bytes())'; print(subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True).stdout)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1_000_000 < int(told) < 300_000_000


HEAP = """
import torch
from adapt_pruner.work import RunState

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

del (first := [torch.ones(2**22)])[:]  # from now on glibc keeps smaller ones in its heap
before = held()
with RunState().clock("score"):
    kept, gone = zip(*[(torch.ones(2**14), torch.ones(2**18)) for _ in range(200)])
    full = held()
    del gone
    still = held()
print(full - before, still - before, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_phase_leaves_free_is_given_back() -> None:
    told = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True).stdout
    full, still, after = (int(number) for number in told.split())
    if still < 0.5 * full:
        pytest.skip("this C library gives it back by itself")
    assert after < 0.5 * full, "what stays takes 6 %; pages larger than those of 4 kB hold some of what is free with it"


def test_a_phase_gives_back_what_it_leaves_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it asks for it; what the C library then does is measured above."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_call_glibc", lambda *words: asked.append(words))
    with pytest.raises(RunError), RunState().clock("score"):
        assert asked == []
        raise RunError("out of memory")
    assert asked == [("malloc_trim", 0)]


def test_bench_from_end_to_end(ask: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LOADS", 1)
    words = ["--prompt", 16, "--generate", 3, "--rounds", 2, "--dtype", "float32"]
    status, out, said = ask("bench", tiny_folder, "--against", tiny_folder, "--batch", "1,2", *words, "--json")
    assert status == 0, said
    found = json.loads(out)
    assert found["prompt"] == 16
    assert found["engine"].startswith("torch")
    for model in found["models"]:
        assert model["params"] == sum(p.numel() for p in tiny_model(vocab_size=259).parameters())
        assert model["disk_bytes"] == (tiny_folder / "model.safetensors").stat().st_size
        assert model["stored"] == "float32"
        assert model["load_seconds"]["median"] > 0
        assert model["peak_bytes"] > 10**8, "of a process with torch in it"
    for row in found["speeds"]:
        assert row["ideal"] == 1.0
        assert row["share"] == row["speed_up"]["median"]
        assert row["speed_up"]["low"] <= row["speed_up"]["median"] <= row["speed_up"]["high"]
    monkeypatch.setattr("adapt_pruner.api.benching.bench", lambda *_, **__: found)
    status, out, said = ask("bench", tiny_folder, "--against", tiny_folder, "--batch", "1,2", *words)
    assert status == 0, said
    assert "of the ideal" in out
    assert "median (quartiles) of 2 rounds" in out


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_bench_in_llama_cpp(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed", exc_type=ImportError)
    from adapt_pruner.checkpoint.save import save

    monkeypatch.setattr(turns, "LOADS", 1)
    loaded, dense = as_loaded(unequal()), as_loaded(tiny_model(vocab_size=290))
    for name, one in (("small", loaded), ("dense", dense)):
        save(one.model, one.tokenizer, tmp_path / name, mask=None, pruning={}, dtype=torch.float32)
    how = {"engine": "llama.cpp", "batch": "1,2", "prompt": 8, "generate": 3, "rounds": 2, "quant": quant}
    found = bench(str(tmp_path / "small"), against=str(tmp_path / "dense"), **how)
    assert [model["stored"] for model in found["models"]] == [quant, quant]
    assert found["models"][0]["peak_bytes"] < 2 * 10**8, "the process holds no torch"
    assert found["speeds"][0]["ideal"] > 1
    assert all(row["pruned"]["median"] > 0 for row in found["speeds"])


# What cannot be done.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "lama.cpp"], "did you mean 'llama.cpp'"),
        (["--batch", "1,x"], "not a list of batch sizes"),
        (["--batch", "0"], "not a list of batch sizes"),
        (["--quant", "q8_0"], "applies only to --engine llama.cpp"),
        (["--engine", "llama.cpp", "--device", "cuda"], "on the CPU"),
        (["--engine", "llama.cpp", "--dtype", "float32"], "applies only to --engine torch"),
        (["--dtype", "int3"], "dtype 'int3' is not known"),
        (["--rounds", "0"], "greater than or equal to 1"),
        ([], "model 'nowhere' does not exist"),
    ],
)
def test_bad_input_gets_a_sentence(ask: Any, words: list[str], said: str) -> None:
    status, out, err = ask("bench", "nowhere", "--against", "nowhere", *words)
    assert (status, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


@contextmanager
def pretending(code: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker whose process runs some other code."""
    monkeypatch.setattr(turns, "module", lambda *words: [sys.executable, "-c", code])
    with turns._opened({"model": "small"}) as worker:
        yield worker


@pytest.mark.parametrize(
    "code", ["pass", "import os, signal; print({}, flush=True); input(); os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_process_that_dies_is_an_error_and_no_wait(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = r"process with small ended with status (0|-9) and without a message; there may be too little memory"
    with pytest.raises(RunError, match=wanted), pretending(code, monkeypatch) as worker:
        worker.ask({"batch": 1})


def test_what_a_worker_cannot_do_is_said_as_it_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"error": "no such thing", "usage": True}, UsageError),
        ({"error": "it broke", "usage": False}, RunError),
    ]
    for answer, kind in answers:
        code = f"print({json.dumps(json.dumps(answer))})"
        with pytest.raises(kind, match=str(answer["error"])), pretending(code, monkeypatch):
            pass


def test_a_type_of_what_needs_no_export_is_refused(ask: Any, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    words = ["--engine", "llama.cpp", "--quant", "q8_0"]
    status, _, err = ask("bench", tmp_path / "a.gguf", "--against", tmp_path / "b.gguf", *words)
    assert status == 2
    assert "--quant q8_0 applies only to models that bench exports" in err
