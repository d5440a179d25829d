"""Stopped runs go on: killed at any moment, damaged, out of disk or started twice, a run ends as if nothing had happened.

A life is one `adapt-pruner run` in a process of its own, forked from one that has imported everything already (the forkserver
of multiprocessing), so that it begins within a moment. SIGKILL ends it at a random time, or at a point that `POINTS` names.
One file, though long, since all lives are held against one run that nothing stopped.
"""

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapt_pruner import cli
from adapt_pruner.checkpoint import save, state
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model import cut as surgery
from adapt_pruner.core.model.task import CausalLM
from adapt_pruner.core.system.files import mark
from adapt_pruner.recipe import read
from adapt_pruner.report import with_card
from adapt_pruner.run import folder as runs
from adapt_pruner.run import results, start
from adapt_pruner.run.training import Trainer
from conftest import HANGS, VOCAB, as_dicts, assert_same_model, byte_tokenizer, read_json, tiny_model
from test_cli import ask

__all__ = ["ask"]  # a fixture

Ask = Callable[..., tuple[int, str, str]]  # runs the command line in this process: exit status, stdout, stderr
Refused = Callable[..., str]

MODULES = [
    "test_resume",
    "adapt_pruner.run.trackers",
    "adapt_pruner.run.forecast",
    "peft",
    "transformers.models.llama.modeling_llama",
]


# Lives, and how they end.


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _last(
    owner: Any, name: str, nth: int, *, of: Callable[..., bool] = lambda *_: True, done: bool = False, then: Any = _die
) -> None:
    """Let the nth call of a function, of those that `of` picks, be the last: not begun, or `done`; `then` says how it ends."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if of(*args) and next(calls) == nth:
            if done:
                original(*args, **kwargs)
            then(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _half(path: Path) -> None:
    """Leave half of a file there, and die."""
    os.truncate(path, path.stat().st_size // 2)
    _die()


def _half_a_line(folder: Any, event: Any) -> None:
    with (folder.path / "log.jsonl").open("a") as log:
        log.write('{"event": "st')
    _die()


def _half_removed(path: Any, **_: Any) -> None:
    (Path(path) / "state.json").unlink(missing_ok=True)
    _die()


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_after_half(tensors: Any, path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    _full()


def _named(pattern: str) -> Callable[..., bool]:
    return lambda source, target: re.fullmatch(pattern, Path(target).name) is not None


POINTS: dict[str, Callable[[int], None]] = {
    "before the recipe is written": lambda n: _last(os, "rename", n, of=_named(r"recipe\.yaml")),
    "while scoring": lambda n: _last(CausalLM, "loss", n),
    "within a cut": lambda n: _last(surgery, "select", n),
    "between two cuts": lambda n: _last(Trainer, "save_if_due", n, of=lambda _, name: "-cut-" in name, done=True),
    "between the cuts and their checkpoint": lambda n: _last(Trainer, "begin_stage", n),
    "with half of the weights written": lambda n: _last(
        save, "_save_weights", n, done=True, then=lambda model, folder, *_: _half(folder / "model.safetensors")
    ),
    "with half of the moments written": lambda n: _last(
        state, "save_file", n, done=True, then=lambda tensors, path: _half(path)
    ),
    "between writing and fsync": lambda n: _last(save, "sync", n),
    "before damage is set aside": lambda n: _last(os, "rename", n, of=_named(r".*\.damaged")),
    "before a checkpoint has its name": lambda n: _last(os, "rename", n, of=_named(r"stage-[^.]+")),
    "when a checkpoint has its name": lambda n: _last(os, "rename", n, of=_named(r"stage-[^.]+"), done=True),
    "within a line of the log": lambda n: _last(runs.RunFolder, "log", n, then=_half_a_line),
    "while an old checkpoint is removed": lambda n: _last(
        shutil, "rmtree", n, of=lambda path, *_: Path(path).is_dir(), then=_half_removed
    ),
    "within a step": lambda n: _last(torch.optim.AdamW, "step", n, done=True),
    "before an evaluation": lambda n: _last(results, "perplexity", n),
    "before a checkpoint": lambda n: _last(Trainer, "save", n),
    "with half of the result written": lambda n: _last(
        save, "_save_weights", n, of=lambda model, folder, *_: ".model." in folder.name, done=True,
        then=lambda model, folder, *_: _half(folder / "model.safetensors"),
    ),
    "when the result has its name": lambda n: _last(os, "rename", n, of=_named("model"), done=True),
    "while the model writes its own text": lambda n: _last(start, "selfwritten_windows", n),
    "disk full at the weights": lambda n: _last(save, "_save_weights", n, done=True, then=_full),
    "disk full at the moments": lambda n: _last(state, "save_file", n, done=True, then=_full_after_half),
    "disk full at the log": lambda n: _last(runs.RunFolder, "_append", n, then=_full),
}  # fmt: skip


def _life(words: Sequence[str], said: str, point: str | None, nth: int) -> None:
    """What a forked process does."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, and no life would end by it
    torch.set_num_threads(1)
    if point is not None:
        POINTS[point](nth)
    sys.argv = ["adapt-pruner", *words]
    cli.program()


class Lives:
    """Starts lives in a folder."""

    def __init__(self, context: Any, folder: Path) -> None:
        self.context, self.said = context, folder / "said"

    def begin(self, *words: Any, point: str | None = None, nth: int = 1) -> Any:
        process = self.context.Process(target=_life, args=([str(word) for word in words], str(self.said), point, nth))
        process.start()
        return process

    def __call__(
        self, *words: Any, point: str | None = None, nth: int = 1, seconds: float | None = None, sent: int = signal.SIGKILL
    ) -> tuple[int, str]:
        """A whole life, or what of it fits in `seconds`: its exit status (-9 where it was killed), and all it said."""
        self.said.unlink(missing_ok=True)
        process = self.begin(*words, point=point, nth=nth)
        while sent != signal.SIGKILL and process.is_alive() and not (self.said.exists() and self.said.stat().st_size):
            time.sleep(0.005)  # before the command line is there, signals are Python's to handle
        process.join(HANGS if seconds is None else seconds)
        if process.exitcode is None and seconds is not None:
            os.kill(process.pid, sent)
            process.join(HANGS)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"a life hangs: {self.said.read_text()}")
        return process.exitcode, self.said.read_text() if self.said.exists() else ""


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the server looks there when it starts
        patch.setenv("OMP_NUM_THREADS", "1")
        from multiprocessing import forkserver

        forkserver.ensure_running()
    return found


@pytest.fixture
def live(context: Any, tmp_path: Path) -> Lives:
    return Lives(context, tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model that drops out, and two short texts."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_model(vocab_size=VOCAB, attention_dropout=0.1).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, what in (("foxes", "the quick brown fox jumps over {} lazy dogs"), ("sums", "{0} and {0} make two of them")):
        (folder / f"{name}.txt").write_text("".join(f"Line {i}: {what.format(i * i)}.\n" for i in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPT_PRUNER_CACHE", str(folder / "cache"))
        recipe(folder)
        yield folder


def recipe(place: Path, name: str = "main", **changes: Any) -> Path:
    """A recipe that uses everything with a state: debts, moments, several stages, a repeated mixture, dropout."""
    foxes, sums = str(place / "foxes.txt"), str(place / "sums.txt")
    data: dict[str, Any] = {
        "method": "adapt-pruner",
        "model": str(place / "model"), "budget": "60%", "stages": 3, "step": 0.1, "amplitude": 0.05, "dtype": "float32",
        "debt": "carry", "moments": "carry", "seed": 3, "checkpoint_minutes": 0,
        "calibration": {"source": foxes, "samples": 8, "length": 32},
        "training": {
            "source": {foxes: 2, sums: 1}, "tokens": 6_000, "batch_tokens": 512, "length": 64, "lr": 3e-3, "weight_decay": 0.01,
        },
        "evaluation": {"source": sums, "window": 64, "max_windows": 3},
    }  # fmt: skip
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) and isinstance(value, dict) else value
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def whole(context: Any, place: Path) -> tuple[Path, float]:
    """The run that nothing happened to, and its seconds."""
    took = []
    for _ in range(2):  # tokens are kept from the first
        shutil.rmtree(place / "whole", ignore_errors=True)
        began = time.perf_counter()
        status, said = Lives(context, place)("run", place / "main.yaml", "-o", place / "whole")
        assert status == 0, said
        took.append(time.perf_counter() - began)
    debts = [read_json(path / "state.json")["reduction"]["debt"] for path in (place / "whole" / "checkpoints").iterdir()]
    assert any(debt["start"][name] * share % 1 > 0.01 for debt in debts for name, share in debt["sparsity"].items())
    kept = read_json(place / "whole" / "model" / "mask.json")["axes"]
    for kind in ("kv_heads", "neurons"):
        assert any(len(axis["kept"]) < axis["size"] for name, axis in kept.items() if name.endswith(kind))
    return place / "whole", min(took)


@pytest.fixture(scope="module")
def stopped(context: Any, place: Path, whole: Any) -> Path:
    """A run killed in its third stage, with two checkpoints."""
    folder = place / "stopped"
    assert Lives(context, place)("run", place / "main.yaml", "-o", folder, point="within a step", nth=10)[0] == -9
    assert checkpoints(folder) == ["stage-3-step-8", "stage-3-step-9"]
    return folder


@pytest.fixture
def halfway(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


STEPS = ("stage", "step", "tokens", "loss", "lr", "gradient_norm")
NOTES = {"step": STEPS, "cut": ("stage", "iteration", "params", "loss", "sizes"), "evaluation": ("stage", "perplexity")}


def notes(run: Path) -> list[tuple[Any, ...]]:
    """What the log says of steps, cuts and evaluations."""
    return [(event["event"], *(event[key] for key in NOTES[event["event"]])) for event in log_of(run) if event["event"] in NOTES]


def _but_keep(path: Path) -> str:
    """A file's text without the one key of the recipe in its card that may differ."""
    return re.sub(r"^keep_checkpoints: .*\n", "", path.read_text(encoding="utf-8"), flags=re.M)


def assert_same(run: Path, other: Path) -> None:
    """The results are equal bit by bit, and so is how they came about; each step is in the log once."""
    one, two = run / "model", other / "model"
    weights, wanted = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name
    assert read_json(one / "mask.json") == read_json(two / "mask.json")
    made, asked = read_json(one / "pruning.json"), read_json(two / "pruning.json")
    assert made["history"] == asked["history"]
    assert made["dense_params"] == asked["dense_params"]
    measured = {key for key in asked["figures"] if "seconds" in key or key.startswith("peak")}
    assert {key: made["figures"][key] for key in made["figures"].keys() - measured} == {
        key: asked["figures"][key] for key in asked["figures"].keys() - measured
    }
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        if path.suffix != ".safetensors" and path.name != "pruning.json":
            assert _but_keep(path) == _but_keep(two / path.name), path.name
    assert notes(run) == notes(other)
    for name in set(checkpoints(run)) & set(checkpoints(other)):
        found, wanted = (read_json(folder / "checkpoints" / name / "state.json") for folder in (run, other))
        for key in ("stage", "pruned", "progress", "mask", "reduction", "feed", "history", "start"):
            assert found[key] == wanted[key], f"{key} of {name}"
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert found["files"].get(file) == wanted["files"].get(file), f"{file} of {name}"
    steps = [note[2] for note in notes(run) if note[0] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert not list(run.rglob("*.partial-*"))


def one_sentence(said: str) -> str:
    """The last line, which must be the only one about an error."""
    lines = said.strip().splitlines()
    assert "Traceback" not in said
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]], said
    return lines[-1]


# Killed.


def test_killed_at_random_moments(whole: tuple[Path, float], live: Lives, place: Path, tmp_path: Path) -> None:
    """SIGKILL after a time drawn evenly from a whole run's, again and again until the run is through; then another run.

    In every other run the weights lie on disk while it prunes: it makes the same model, in other checkpoints.
    """
    reference, seconds = whole
    draw = random.Random(20)
    kills, went_on, run_dirs = 0, 0, 0
    while kills < 10 or went_on < 4 or run_dirs < 2:
        offload = ("disk", "none")[run_dirs % 2]
        run, status = tmp_path / f"run-{run_dirs}", -9
        run_dirs += 1
        while status == -9:
            within = seconds * (1 + kills / 16)  # should this machine get slower meanwhile
            enough = kills >= 10 and went_on >= 4
            words = ["run", place / "main.yaml", "-o", run, *(["--set", "offload=disk"] if offload == "disk" else [])]
            status, said = live(*words, seconds=None if enough else draw.uniform(0, within))
            kills += status == -9
            went_on += "continuing from " in said
        assert status == 0, said
        if offload == "none":
            assert_same(run, reference)
        else:
            assert_same_model(run, reference)
            assert notes(run) == notes(reference)


IN_ORDER = [  # where the run stands when it is killed: nowhere,
    ("before the recipe is written", 1), ("while scoring", 3), ("between two cuts", 2), ("within a cut", 2),
    ("between the cuts and their checkpoint", 1),
    ("with half of the weights written", 1), ("when a checkpoint has its name", 1),
    # in its first stage, its second,
    ("before an evaluation", 1), ("with half of the moments written", 2), ("within a line of the log", 5),
    ("between writing and fsync", 5), ("before a checkpoint has its name", 2), ("while scoring", 1), ("within a cut", 1),
    # and its third
    ("while an old checkpoint is removed", 4), ("within a step", 2), ("before a checkpoint", 2), ("before an evaluation", 1),
    ("with half of the result written", 1), ("when the result has its name", 1),
]  # fmt: skip


def test_killed_at_every_kind_of_moment(whole: tuple[Path, float], live: Lives, place: Path, tmp_path: Path) -> None:
    """One run, killed again and again where it hurts."""
    run = tmp_path / "run"
    for point, nth in IN_ORDER:
        status, said = live("run", place / "main.yaml", "-o", run, point=point, nth=nth)
        assert status == -9, f"{point}: {said}"
    status, said = live("run", place / "main.yaml", "-o", run)
    assert status == 0
    assert "this run is finished" in said
    assert_same(run, whole[0])


def test_killed_while_damage_is_cleared_away(halfway: Path, whole: tuple[Path, float], live: Lives, place: Path) -> None:
    before = (halfway / "log.jsonl").read_text()
    for name in checkpoints(halfway):
        _truncate(halfway / "checkpoints" / name / "model.safetensors")
    for nth in (1, 2):
        assert live("run", place / "main.yaml", "-o", halfway, point="before damage is set aside", nth=nth)[0] == -9
    status, said = live("run", place / "main.yaml", "-o", halfway)
    assert status == 0, said
    assert (halfway / "log.damaged.jsonl").read_text() == before
    assert {"stage-3-step-8.damaged", "stage-3-step-9.damaged"} < set(checkpoints(halfway))
    assert_same(halfway, whole[0])


def test_killed_while_the_model_writes_its_calibration_text(live: Lives, place: Path, tmp_path: Path) -> None:
    """That text is written once, by the model at the start, also for a run whose model has been cut since."""
    path = recipe(place, "self", calibration={"source": "self"}, stages=2, training={"tokens": 1_500})
    assert live("run", path, "-o", tmp_path / "whole")[0] == 0
    run = tmp_path / "run"
    for point, nth in (("while the model writes its own text", 1), ("while scoring", 2), ("before an evaluation", 3)):
        assert live("run", path, "-o", run, point=point, nth=nth)[0] == -9
    (run / "calibration_self.json").unlink()
    status, said = live("run", path, "-o", run, point="within a cut")
    assert (status, "continuing from " in said) == (-9, True)
    assert live("run", path, "-o", run)[0] == 0
    assert_same(run, tmp_path / "whole")


@pytest.mark.parametrize("point", ["within a step", "with half of the weights written"])
def test_killed_with_low_rank_additions_and_a_teacher(point: str, live: Lives, place: Path, tmp_path: Path) -> None:
    """At every step of a run that trains additions with dropout towards the dense model, the last of each stage included."""
    path = recipe(
        place, "lora", stages=2, evaluation={"source": None, "window": 512, "max_windows": 40}, moments="reset", step=0.5,
        training={"tokens": 1_500, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}, "objective": "objectives.distil(hidden=0.1)"},
    )  # fmt: skip
    if not (place / "lora").exists():
        assert live("run", path, "-o", place / "lora")[0] == 0
    run, kills = tmp_path / "run", 0
    while (status := live("run", path, "-o", run, point=point, nth=2)[0]) == -9:
        kills += 1
    assert status == 0
    assert kills >= 2
    assert_same(run, place / "lora")


@pytest.mark.parametrize(("sent", "times"), [(signal.SIGTERM, 3), (signal.SIGINT, 1), (signal.SIGHUP, 1)])
def test_interrupted_at_random_moments(
    sent: signal.Signals, times: int, whole: tuple[Path, float], live: Lives, place: Path, tmp_path: Path
) -> None:
    """Exit status 1, one sentence, nothing half-written, and the same command goes on from what it names.

    What comes after a signal does not depend on which it was, so one is sent again and again.
    """
    reference, seconds = whole
    draw = random.Random(int(sent))
    interrupted = run_dirs = 0
    while interrupted < times:
        run, status, last = tmp_path / f"run-{run_dirs}", 1, None
        run_dirs += 1
        while status == 1:
            within = draw.uniform(0, 0.5) * seconds if interrupted < times else None
            status, said = live("run", place / "main.yaml", "-o", run, seconds=within, sent=sent)
            if "; the log is " in said or "the result is complete in " in said:  # it was through when the signal came
                break
            assert status == 1, said
            interrupted += 1
            assert "interrupted" in one_sentence(said)
            if last is not None and "saved " in said:  # a life may end before it has come so far
                assert f"continuing from {last} (stage " in said
            found = re.findall(
                r"^the last complete checkpoint is (\S+); the same command with -o \S+ continues from there$", said, re.MULTILINE
            )
            last = found[0] if found else None
            there = next(iter(newest_first(run)), None) if (run / "checkpoints").exists() else None
            assert last == (None if there is None else str(run / "checkpoints" / there)), said
            assert (last is None) == (f"no checkpoint was complete yet; the same command with -o {run} starts again" in said)
            assert not list(run.rglob("*.partial-*"))
        assert last is None or f"continuing from {last} (stage " in said
        assert_same(run, reference)


def test_interrupted_gone_on_with_and_finished(ask: Ask, place: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    """As on a cluster: SIGTERM, and the same command again, by real processes from their start; and again, when all is done."""
    words = ["run", str(place / "main.yaml"), "-o", str(tmp_path / "run")]
    command = [sys.executable, "-m", "adapt_pruner", *words]
    how: dict[str, Any] = {"text": True, "env": os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    deadline = time.monotonic() + HANGS
    while not list(tmp_path.glob("run/checkpoints/stage-[23]-*")):  # one that is named may come and go while nobody looks
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=HANGS)
    assert process.returncode == 1, said
    assert out == ""
    assert "interrupted" in one_sentence(said)
    (last,) = re.findall(
        r"^the last complete checkpoint is (\S+); the same command with -o \S+ continues from there$", said, re.MULTILINE
    )
    assert Path(last) == tmp_path / "run" / "checkpoints" / newest_first(tmp_path / "run")[0]
    done = subprocess.run(command, capture_output=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {last} (stage " in done.stderr
    assert_same(tmp_path / "run", whole[0])
    status, out, said = ask(*words)
    assert status == 0
    assert f"this run is finished: {tmp_path / 'run' / 'model'}" in said
    assert "loading" not in said
    assert out == done.stdout
    assert "parameters in" in out
    assert "perplexity on text that is not all held out" in out, "one text for all"


def newest_first(run: Path) -> list[str]:
    """Checkpoints in the order of their stages and steps: after cuts, `stage-K-pruned`, after steps, `stage-K`."""

    def place(name: str) -> tuple[int, int]:
        _, stage, *rest = name.split("-")
        within = 10**9 if not rest else 0 if rest == ["pruned"] else int(rest[1]) - 10**9 * (rest[0] == "cut")
        return int(stage), within

    return sorted(checkpoints(run), key=place, reverse=True)


# Damaged.


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    """Another digit where there is one: a file that still reads well."""
    content = bytearray(path.read_bytes())
    at = next((i for i in range(len(content) // 2, len(content)) if chr(content[i]).isdigit()), len(content) // 2)
    content[at] ^= 1
    path.write_bytes(content)


FILES, DAMAGES = ("model.safetensors", "optimizer.safetensors", "state.json"), (_truncate, _flip, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_makes_the_checkpoint_before_the_newest(file: str, damage: Callable[[Path], None], halfway: Path) -> None:
    newest = halfway / "checkpoints" / "stage-3-step-9"
    damage(newest / file)
    path, _, damaged = runs.RunFolder(halfway).newest()
    assert path == newest.with_name("stage-3-step-8")
    assert list(damaged) == [newest]
    assert str(newest / file) in damaged[newest]


@pytest.mark.parametrize(("file", "damage"), zip(FILES, DAMAGES, strict=True))
def test_a_damaged_checkpoint(
    file: str, damage: Callable[[Path], None], halfway: Path, whole: tuple[Path, float], live: Lives, place: Path
) -> None:
    """The one before is gone on from, which is said, with the file; what was damaged is set aside."""
    damage(halfway / "checkpoints" / "stage-3-step-9" / file)
    status, said = live("run", place / "main.yaml", "-o", halfway)
    assert status == 0, said
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ") and "damaged" in line]
    assert str(halfway / "checkpoints" / "stage-3-step-9" / file) in warning
    assert f"continuing from {halfway / 'checkpoints' / 'stage-3-step-8'}" in said
    assert any(event["event"] == "warning" and file in event["message"] for event in log_of(halfway)), "the log says so too"
    assert checkpoints(halfway) == ["stage-3-step-11", "stage-3-step-12", "stage-3-step-9.damaged"]
    assert_same(halfway, whole[0])


def test_a_damaged_checkpoint_does_not_stay_the_newest(
    halfway: Path, whole: tuple[Path, float], live: Lives, place: Path
) -> None:
    """With one checkpoint kept, what is written after it is what stays."""
    _truncate(halfway / "checkpoints" / "stage-3-step-9" / "model.safetensors")
    words = ["run", place / "main.yaml", "-o", halfway, "--set", "keep_checkpoints=1"]
    assert live(*words, point="before a checkpoint", nth=2)[0] == -9
    assert checkpoints(halfway) == ["stage-3-step-9", "stage-3-step-9.damaged"]
    status, said = live(*words)
    assert status == 0
    assert "continuing from" in said
    assert "warning: a checkpoint" not in said
    assert_same(halfway, whole[0])


def test_all_checkpoints_damaged(halfway: Path, whole: tuple[Path, float], live: Lives, place: Path) -> None:
    """The run begins anew, which is said; nothing of what was there is lost, the log of the work included."""
    before = (halfway / "log.jsonl").read_text()
    for name in checkpoints(halfway):
        _truncate(halfway / "checkpoints" / name / "model.safetensors")
    status, said = live("run", place / "main.yaml", "-o", halfway)
    assert status == 0, said
    assert "continuing from" not in said
    (warning,) = [line for line in said.splitlines() if "the run starts again" in line]
    assert warning.startswith("warning: every checkpoint is damaged")
    assert (halfway / "log.damaged.jsonl").read_text() == before
    assert {"stage-3-step-8.damaged", "stage-3-step-9.damaged"} < set(checkpoints(halfway))
    assert_same(halfway, whole[0])


# A full disk.


@pytest.mark.parametrize("point", ["disk full at the weights", "disk full at the moments", "disk full at the log"])
def test_a_full_disk(point: str, halfway: Path, whole: tuple[Path, float], live: Lives, place: Path) -> None:
    status, said = live("run", place / "main.yaml", "-o", halfway, point=point, nth=2 if point.endswith("log") else 1)
    assert status == 1
    sentence = one_sentence(said)
    assert "the disk is full" in sentence
    assert f"the last complete checkpoint is {halfway / 'checkpoints' / 'stage-3-step-9'}" in sentence
    assert checkpoints(halfway) == ["stage-3-step-8", "stage-3-step-9"]
    assert not list(halfway.rglob("*.partial-*"))
    status, said = live("run", place / "main.yaml", "-o", halfway)
    assert status == 0
    assert f"continuing from {halfway / 'checkpoints' / 'stage-3-step-9'}" in said
    assert_same(halfway, whole[0])


def test_a_disk_that_is_really_full(stopped: Path, whole: tuple[Path, float], live: Lives, place: Path, tmp_path: Path) -> None:
    """A file system with room for a checkpoint and a half more; then with room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(path.stat().st_size for path in stopped.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used + 600_000}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = Path(shutil.copytree(stopped, disk / "run"))
        (disk / "filler").write_bytes(b"x" * 300_000)
        status, said = live("run", place / "main.yaml", "-o", run)
        assert status == 1, said
        assert "the disk is full" in one_sentence(said)
        assert f"the last complete checkpoint is {run / 'checkpoints' / 'stage-3-step-9'}" in one_sentence(said)
        assert not list(run.rglob("*.partial-*"))
        (disk / "filler").unlink()
        status, said = live("run", place / "main.yaml", "-o", run)
        assert status == 0, said
        assert "continuing from " in said
        assert_same(run, whole[0])
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_were_asked_for(keep: int, place: Path, tmp_path: Path) -> None:
    """An older one goes when a newer is complete, not before, and none goes too many."""
    asked = read(str(recipe(place, f"keep-{keep}", keep_checkpoints=keep, training={"tokens": 3_000})))
    saved: list[str] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "saved" and "params_after" not in event:
            saved.append(Path(event["path"]).name)
            state.read_state(Path(event["path"]))
            assert set(checkpoints(tmp_path / "run")) == set(saved[-keep - 1 :]), "the older are still there"
        elif saved:
            assert set(checkpoints(tmp_path / "run")) == set(saved[-keep:])

    with_card.run(asked, tmp_path / "run", listen=as_dicts(watch))
    assert len(saved) > 8
    assert set(checkpoints(tmp_path / "run")) == set(saved[-keep:])


# Refused, in one sentence.


def test_a_folder_in_use(live: Lives, place: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    """Another process is refused, with the number of the first, which is not disturbed; a lock of the dead does not count."""
    run = tmp_path / "run"
    first = live.begin("run", place / "main.yaml", "-o", run)
    while not (run / "checkpoints" / "stage-1-pruned").exists():
        assert first.is_alive()
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGSTOP)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status, said = Lives(live.context, place)("run", place / "main.yaml", "-o", run)
    assert (status, one_sentence(said)) == (
        2, f"error: {run} is in use by process {first.pid}; wait for it, or name another folder",
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (run / ".lock").read_text() == str(first.pid)
    assert live("run", place / "main.yaml", "-o", run)[0] == 0
    assert_same(run, whole[0])


def test_a_lock_that_is_left_behind(live: Lives, place: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    """By a run that was killed while it prepared."""
    (tmp_path / "run").mkdir()
    mark(tmp_path / "run", "run")
    (tmp_path / "run" / ".lock").write_text("1")
    assert live("run", place / "main.yaml", "-o", tmp_path / "run")[0] == 0
    assert_same(tmp_path / "run", whole[0])


def contents(run: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in (".lock", "log.jsonl", "progress.json")
    }


@pytest.fixture
def refused(ask: Ask) -> Refused:
    """The sentence with which a run in this process is refused; it must leave the folder as it was."""

    def sentence(run: Path, *words: Any) -> str:
        before = contents(run)
        status, out, said = ask("run", *words, "-o", run)
        assert (status, out) == (2, ""), said
        assert contents(run) == before
        return one_sentence(said)

    return sentence


def test_a_changed_recipe(halfway: Path, live: Lives, refused: Refused, place: Path) -> None:
    changes = ["--set", "seed=4", "--set", "training.lr=1e-3", "--set", "calibration.samples=9"]
    sentence = refused(halfway, place / "main.yaml", *changes)
    assert re.search(r"differs in calibration\.samples, training\.lr, seed; .* --force-recipe", sentence)
    machine = ["--set", "device=cpu", "--set", "checkpoint_minutes=5", "--set", "keep_checkpoints=3", "--set", "about=mine"]
    assert live("run", place / "main.yaml", "-o", halfway, *machine, point="within a step", nth=1)[0] == -9, "these do not count"
    assert "checkpoint_minutes: 5" in (halfway / "recipe.yaml").read_text()


def test_forced_to_another_recipe(halfway: Path, live: Lives, place: Path) -> None:
    """It goes on with the new one, also after another stop, and says so."""
    forced = ["--set", "training.lr=1e-4", "--force-recipe"]
    status, said = live("run", place / "main.yaml", "-o", halfway, *forced, point="within a step", nth=1)
    assert status == -9
    assert "warning: continuing with another recipe, which differs in training.lr" in said
    assert read(str(halfway / "recipe.yaml")).training.lr == 1e-4
    status, said = live("run", place / "main.yaml", "-o", halfway, "--set", "training.lr=1e-4")
    assert status == 0, said
    assert "continuing from " in said
    assert max(event["lr"] for event in log_of(halfway) if event["event"] == "step" and event["step"] > 9) <= 1e-4


def test_forced_to_more_tokens_of_another_text(halfway: Path, live: Lives, refused: Refused, place: Path) -> None:
    """The run goes on at the place in the new text that as many tokens lead to."""
    changes = ["--set", "training.tokens=9000", "--set", f"training.source={place / 'foxes.txt'}", "--set", "training.length=32"]
    sentence = refused(halfway, place / "main.yaml", *changes)
    assert re.search(r"differs in training\.source, training\.tokens, training\.length;", sentence)
    status, said = live("run", place / "main.yaml", "-o", halfway, *changes, "--force-recipe")
    assert status == 0, said
    assert "warning: continuing with another training text from where the run stopped" in said
    steps = [event for event in log_of(halfway) if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["tokens"] == pytest.approx(9000, abs=64)
    assert max(after["tokens"] - before["tokens"] for before, after in itertools.pairwise(steps)) <= 512


def test_a_model_that_has_moved_is_the_same_model(
    halfway: Path, live: Lives, refused: Refused, place: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(read(str(place / "main.yaml")).model, moved)
    sentence = refused(halfway, place / "main.yaml", "--set", f"model={moved}")
    assert "differs in model;" in sentence
    status, said = live("run", place / "main.yaml", "-o", halfway, "--set", f"model={moved}", "--force-recipe")
    assert status == 0, said
    assert "continuing from " in said


def test_forced_to_what_cannot_be(halfway: Path, refused: Refused, place: Path) -> None:
    sentence = refused(halfway, place / "main.yaml", "--set", "stages=2", "--force-recipe")
    assert re.search(r"is in stage 3 and the recipe has only 2 stages; set stages to 3 or more", sentence)
    sentence = refused(halfway, place / "main.yaml", "--set", f"model={place / 'other'}", "--force-recipe")
    assert f"as it was when the run began, not of {place / 'other'} as it is now" in sentence


def test_forced_to_prune_more_kinds_and_less(live: Lives, place: Path, tmp_path: Path) -> None:
    path = recipe(place, "neurons", axes=["neurons"], budget="80%", training={"tokens": 3_000})
    run = tmp_path / "run"
    assert live("run", path, "-o", run, point="before an evaluation", nth=3)[0] == -9, "at the end of the stage"
    changes = ["--set", "axes=[neurons, kv_heads]", "--set", "budget=50%", "--force-recipe"]
    status, said = live("run", path, "-o", run, *changes)
    assert status == 0, said
    figures = read_json(run / "model" / "pruning.json")["figures"]
    assert figures["params_after"] <= 0.5 * figures["params_before"]
    kept = read_json(run / "model" / "mask.json")["axes"]
    assert any(len(axis["kept"]) < axis["size"] for name, axis in kept.items() if name.endswith("kv_heads"))


def test_an_unreadable_recipe_in_the_folder(
    halfway: Path, whole: tuple[Path, float], live: Lives, refused: Refused, place: Path
) -> None:
    """As another version may leave it."""
    with (halfway / "recipe.yaml").open("a") as file:
        file.write("forgotten_key: 1\n")
    sentence = refused(halfway, place / "main.yaml")
    assert f"{halfway / 'recipe.yaml'}" in sentence
    assert "--force-recipe" in sentence
    (halfway / "recipe.yaml").unlink()
    assert f"{halfway / 'recipe.yaml'}" in refused(halfway, place / "main.yaml", "--set", "seed=4")
    assert live("run", place / "main.yaml", "-o", halfway, "--force-recipe")[0] == 0
    assert_same(halfway, whole[0])


def test_low_rank_additions_are_not_forgotten(live: Lives, refused: Refused, place: Path, tmp_path: Path) -> None:
    """Under way they cannot be turned off or into others: what they learned would be lost."""
    path = recipe(place, "lora-forced", stages=1, training={"tokens": 1_500, "lora": {"rank": 4}})
    run = tmp_path / "run"
    assert live("run", path, "-o", run, point="within a step", nth=2)[0] == -9
    for change in ("training.lora=null", "training.lora.rank=8"):
        sentence = refused(run, path, "--set", change, "--force-recipe")
        assert "LoRA adapters" in sentence
        assert "training.lora" in sentence


@pytest.fixture
def own_model(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "model", tmp_path / "model"))


def test_the_model_changed_underneath(own_model: Path, live: Lives, refused: Refused, place: Path, tmp_path: Path) -> None:
    path = recipe(place, "own-model", model=str(own_model), stages=1, training={"tokens": 1_500})
    run = tmp_path / "run"
    assert live("run", path, "-o", run, point="within a step", nth=2)[0] == -9
    for change in ("config", "size", "values", "gone"):
        if change == "config":
            config = own_model / "config.json"
            config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        else:
            shutil.rmtree(own_model)
        if change in ("size", "values"):
            changes = {"hidden_size": 96} if change == "size" else {}
            tiny_model(vocab_size=VOCAB, attention_dropout=0.1, seed=1, **changes).save_pretrained(own_model)
            byte_tokenizer().save_pretrained(own_model)
        sentence = refused(run, path)
        newest = run / "checkpoints" / "stage-1-step-1"
        assert f"{newest} is a checkpoint of the model {own_model} as it was when the run began" in sentence, change
        assert "name another folder, or restore that model" in sentence
    shutil.copytree(place / "model", own_model)
    assert live("run", path, "-o", run)[0] == 0


def test_a_text_changed_underneath(live: Lives, refused: Refused, place: Path, tmp_path: Path) -> None:
    texts = {text: tmp_path / f"{text}.txt" for text in ("training", "calibration", "held-out")}
    for own in texts.values():
        own.write_text((place / "foxes.txt").read_text())
    training, calibration, evaluation = ({"source": str(own)} for own in texts.values())
    path = recipe(
        place, "own-texts", stages=1, training=training | {"tokens": 1_500}, calibration=calibration, evaluation=evaluation
    )
    assert live("run", path, "-o", tmp_path / "run", point="within a step", nth=2)[0] == -9
    for text, own in texts.items():
        said = own.read_text()
        own.write_text(said.replace("lazy", "busy"))
        assert f"the {text} text changed after" in refused(tmp_path / "run", path)
        own.write_text(said)
    assert live("run", path, "-o", tmp_path / "run")[0] == 0


def test_a_teacher_changed_underneath(own_model: Path, live: Lives, refused: Refused, place: Path, tmp_path: Path) -> None:
    taught = {"tokens": 1_500, "objective": "objectives.distil", "teacher": str(own_model)}
    path = recipe(place, "own-teacher", stages=1, training=taught)
    assert live("run", path, "-o", tmp_path / "run", point="within a step", nth=2)[0] == -9
    tiny_model(vocab_size=VOCAB, attention_dropout=0.1, seed=1).save_pretrained(own_model)
    assert "the teacher changed after" in refused(tmp_path / "run", path)
    status, said = live("run", path, "-o", tmp_path / "run", "--force-recipe")
    assert (status, "continuing with another teacher from where the run stopped" in said) == (0, True)


def test_weights_lie_in_memory_of_their_own(halfway: Path, place: Path) -> None:
    """Aligned, whichever process they are in, since a product may round differently where they are not; and off the file."""
    path, found, _ = runs.RunFolder(halfway).newest()
    assert path is not None
    for loaded in (load(str(place / "model")), state.load_state(path, found, device=torch.device("cpu"))[0]):
        assert {parameter.data_ptr() % 64 for parameter in loaded.model.parameters()} == {0}
        assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_the_model_as_it_is(
    own_model: Path, live: Lives, place: Path, tmp_path: Path
) -> None:
    """What the model wrote for calibration is the new model's then, not the old one's."""
    path = recipe(place, "own-self", model=str(own_model), stages=1, training={"tokens": 500}, calibration={"source": "self"})
    assert live("run", path, "-o", tmp_path / "run", point="while scoring", nth=1)[0] == -9
    tiny_model(vocab_size=VOCAB, attention_dropout=0.1, seed=1).save_pretrained(own_model)
    for run in ("run", "fresh"):
        assert live("run", path, "-o", tmp_path / run)[0] == 0
    assert_same(tmp_path / "run", tmp_path / "fresh")


def _other_tokenizer(folder: Path) -> None:
    tiny_model(vocab_size=VOCAB).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(folder)


BAD = {
    "stages that cannot reach the budget": (
        ["budget=1000", "stages=4"], r"budget 1,000 is too small: [\d,]+ parameters remain .*; the smallest possible budget is",
    ),
    "heads alone that cannot": (
        ["axes=[kv_heads]", "budget=50%"], r"budget [\d,]+ is too small: [\d,]+ parameters remain .*\(kv_heads\)",
    ),
    "more tokens than the text has": (
        ["training.repeat=false"], r"'.*foxes.txt' has [\d,]+ tokens .* but 4,000 are asked for; .* allow training.repeat",
    ),
    "a teacher with another tokenizer": (
        ["training.objective=objectives.distil", "training.teacher=TEACHER"],
        r"teacher .*teacher \(260 tokens\) and .* \(259\) have different tokenizers; .* name a teacher of the same vocabulary",
    ),
    "no such evaluation text": (
        ["calibration.source=self", "calibration.samples=1", "evaluation.source=no.txt"], "text 'no.txt' does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_begun_leaves_nothing(case: str, refused: Refused, place: Path, tmp_path: Path) -> None:
    """One sentence, exit status 2, and the folder is as free as it was."""
    settings, expected = BAD[case]
    if "TEACHER" in " ".join(settings):
        _other_tokenizer(place / "teacher")
    words = [word for text in settings for word in ("--set", text.replace("TEACHER", str(place / "teacher")))]
    (tmp_path / "empty").mkdir()
    for run in (tmp_path / "run", tmp_path / "empty"):
        sentence = refused(run, place / "main.yaml", *words)
        assert re.search(expected, sentence), sentence
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_page_of_a_run_that_never_began_goes_with_it(tmp_path: Path) -> None:
    """`report` may be asked of a run that prepares."""
    with runs.open_run_folder(tmp_path / "run") as folder:
        (folder.path / "report.html").write_text("<!doctype html><footer>Written by adapt-pruner on …")
    assert not (tmp_path / "run").exists()
    with runs.open_run_folder(tmp_path / "run") as folder:
        (folder.path / "report.html").write_text("<!doctype html><p>a page of somebody else")
        (folder.path / "notes.txt").write_text("mine")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["notes.txt", "report.html"]


def test_a_text_that_is_too_short_is_repeated_with_a_warning(whole: tuple[Path, float], live: Lives, place: Path) -> None:
    status, said = live("run", place / "main.yaml", "-o", place / "repeats", point="before an evaluation")
    assert status == -9
    (warning,) = [line for line in said.splitlines() if "is repeated" in line and "foxes" in line]
    assert re.fullmatch(r"warning: .* has ([\d,]+) tokens in rows of 64, but 4,000 are asked for, .* read \d\.\d times", warning)
    logged = [event["message"] for event in log_of(place / "repeats") if event["event"] == "warning"]
    assert warning.removeprefix("warning: ") in logged, "the log and the report have what was said before the run began"


def test_a_folder_of_something_else(refused: Refused, place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("…")
    assert "exists and is not empty" in refused(tmp_path / "run", place / "main.yaml")
    with suppress(FileNotFoundError):
        (place / "file").unlink()
    (place / "file").write_text("…")
    assert "exists and is not a folder" in refused(place / "file", place / "main.yaml")
    assert (place / "file").read_text() == "…"


# Figures.


def test_seconds_are_of_all_lives(live: Lives, place: Path, tmp_path: Path) -> None:
    """What a killed process did up to its last checkpoint counts; phases do not overlap."""
    run = tmp_path / "run"
    assert live("run", place / "main.yaml", "-o", run, point="within a step", nth=10)[0] == -9
    first = read_json(run / "checkpoints" / "stage-3-step-9" / "state.json")["spent"]
    assert first["train"] > 0
    assert first["save"] > 0
    assert live("run", place / "main.yaml", "-o", run)[0] == 0
    figures = read_json(run / "model" / "pruning.json")["figures"]
    for phase, seconds in first.items():
        assert figures[f"seconds_{phase}"] >= seconds
    assert sum(figures[key] for key in figures if key.startswith("seconds_")) == pytest.approx(figures["seconds"])
