"""Several processes make the run that one makes, step by step, whole or in shares; nothing is said or written twice.

Two processes on this machine's CPU. What is compared with them runs alone, in the process of the tests. The file is long, since all
launches stand on one ground that is made once.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapt_pruner.core.model import moments
from adapt_pruner.core.system import world
from adapt_pruner.errors import RunError, UsageError, is_of_all
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.with_card import run
from adapt_pruner.train.loop import Step, TrainState, make_optimizer
from adapt_pruner.train.objectives import lm
from adapt_pruner.train.spread import spread
from conftest import HANGS, read_json, tiny_model, train
from forks import Forks, Said, command

NUM = 2
EVERY_STEP = {"checkpoint_minutes": 0, "keep_checkpoints": 99}
CLOSE = 1e-4
WIDE = {"ddp": ("float32", False), "fsdp": ("float32", True), "fsdp-bfloat16": ("bfloat16", True)}


# --- what a launch does, and what one process does to compare


def recipe_for(folder: Path, text: Path, **changes: Any) -> Recipe:
    """Two stages in which neurons and KV heads go, with training after each."""
    training = {"source": str(text), "tokens": 4_600, "batch_tokens": 512, "length": 64, "lr": 3e-3, "micro_batch_tokens": 128}
    training |= changes.pop("training", {})
    calibration = {"source": str(text), "samples": 24, "length": 32} | changes.pop("calibration", {})
    return read({
        "method": "adapt-pruner",
        "model": str(folder), "budget": "70%", "stages": 2, "step": 0.1, "amplitude": 0.05, "dtype": "float32", "device": "cpu",
        "calibration": calibration, "training": training, "moments": "carry",
        "evaluation": {"source": str(text), "window": 64, "max_windows": 3}, **changes,
    })  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"stages": 2, "training": {"tokens": 2_000, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}},
    "distil": {"stages": 1, "training": {"tokens": 2_000, "objective": "objectives.distil(alpha=0.5, hidden=0.5)"}},
    "best": {"method": "best", "stages": 1, "training": {"tokens": 2_000}, "calibration": {"self_generated": 16}},
}


class Chats:
    """Rows of several lengths with few predicted tokens, padded to the widest of those asked for."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = [9, 12, 12, 9] + [6, 7, 16, 15] + [16] * 4 + [11]
        self.rows = [torch.randint(3, 97, (length,), generator=generator) for length in lengths]
        self.masks = [torch.rand(length, generator=generator) < 0.3 for length in lengths]
        for number in (2, 3):  # all that the second process sees of the first batch
            self.masks[number][:] = False

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        chosen = range(start, stop)
        shape = len(chosen), max(len(self.rows[number]) for number in chosen)
        ids, predicted = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for row, number in enumerate(chosen):
            ids[row, : len(self.rows[number])] = self.rows[number]
            predicted[row, : len(self.rows[number])] = self.masks[number]
        return ids, predicted

    def num_tokens(self, start: int, stop: int) -> int:
        return sum(len(row) for row in self.rows[start:stop])


def trained_on_chats(dtype: str, sharded: bool) -> tuple[list[Step], dict[str, Tensor]]:
    """A model whose head is a matrix of its own, so that a process that predicts nothing has nothing for it."""
    model, steps, rows = tiny_model(("llama", "qwen3-untied")), [], Chats()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1)
    settings = partial(
        train, rows=rows, until=len(rows.rows), objective=lm, schedule=lambda done: 1.0, lr=1e-3, total_tokens=1000,
        batch_rows=4, micro_tokens=16, clip=0.5, dtype=dtype, progress=TrainState(), on_step=steps.append,
    )  # fmt: skip
    if sharded:
        with spread(model, optimizer, dtype=dtype) as (twin, its_optimizer):
            settings(twin, optimizer=its_optimizer)
    else:
        settings(model, optimizer=optimizer)
    return steps, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses_under_dropout() -> list[float]:
    """The loss that this process sees in two steps, of which every row is the same."""
    seen: list[float] = []

    def noting(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        total = lm(model, ids, predicted)
        seen.append(float(total.detach()))
        return total

    model, rows = tiny_model(attention_dropout=0.5), Chats()
    rows.rows, rows.masks = [torch.arange(3, 19)] * 4, [torch.ones(16, dtype=torch.bool)] * 4
    train(
        model, rows, until=4, optimizer=make_optimizer(model, lr=0.0, weight_decay=0.0), objective=noting, lr=0.0,
        schedule=lambda done: 1.0, total_tokens=64, batch_rows=2, progress=TrainState(), dtype="float32",
    )  # fmt: skip
    return seen


def work(base: Path) -> None:
    """What each of the processes of the launch `work` does; the first writes what came of it."""
    asked = read_json(base / "recipes.json")
    os.environ["ADAPT_PRUNER_CACHE"] = str(base / "cache")  # one for all
    with world.joined(lost=pytest.fail):
        assert world.size() == NUM
        found: dict[str, Any] = {}
        for name, (dtype, sharded) in WIDE.items():
            steps, weights = trained_on_chats(dtype, sharded)
            found[name] = [(step.loss, step.gradient_norm, step.tokens) for step in steps]
            if world.is_main():
                save_file(weights, base / f"{name}.safetensors")
        losses: list[Any] = [None] * NUM
        torch.distributed.all_gather_object(losses, losses_under_dropout())
        found["dropout"] = losses
        found |= {"again": [], "there": []}
        for name, recipe in asked.items():
            run(read(recipe), base / name)
            there = [None] * NUM
            torch.distributed.all_gather_object(there, (base / name / "model").is_dir())
            found["there"] += there
            world.agreed(None)  # the first process has written by now
            found["again"].append(run(read(recipe), base / name) is None)
        (base / "occupied").mkdir(exist_ok=True)
        (base / "occupied" / "theirs.txt").write_text("x")
        refusal = ""
        try:
            run(read(next(iter(asked.values()))), base / "occupied")
        except UsageError as error:
            refusal = str(error)
        refusals: list[Any] = [None] * NUM
        torch.distributed.all_gather_object(refusals, refusal)
        found["refusals"] = refusals
        textless = read(next(iter(asked.values())), overrides=[f"training.source={base / 'none.txt'}"])
        with pytest.raises(UsageError, match="none.txt' does not exist") as refused:
            run(textless, base / "textless")
        marked = [None] * NUM
        torch.distributed.all_gather_object(marked, is_of_all(refused.value))
        found["textless"] = marked
        if world.is_main():
            (base / "found.json").write_text(json.dumps(found))


# --- launching


class Torchrun:
    """Processes that torchrun starts."""

    def __init__(self, folder: Path, words: Sequence[Any]) -> None:
        folder.mkdir()
        self._folder = folder
        options = ["--standalone", "--nproc-per-node", str(NUM), "--log-dir", str(folder), "--redirects", "3"]
        self._running = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, "-m", "adapt_pruner", *map(str, words)],
            text=True, cwd=Path(__file__).parent, stdout=(folder / "out").open("w"), stderr=(folder / "err").open("w"),
        )  # fmt: skip

    def said(self) -> list[Said]:
        """What each process said in the end, and last what the launcher said."""
        try:
            status = self._running.wait(timeout=HANGS)
        except subprocess.TimeoutExpired:
            status = self._running.kill() or self._running.wait()
        logs = [next(self._folder.glob(f"*/attempt_0/{rank}")) for rank in range(NUM)]
        each = [Said(status, *((log / f"{end}.log").read_text() for end in ("stdout", "stderr"))) for log in logs]
        return [*each, Said(status, *((self._folder / end).read_text() for end in ("out", "err")))]

    def end(self) -> None:
        """End what is left of it."""
        self._running.kill()
        self._running.wait()


@dataclass
class Ground:
    """Where the launches work, and the run that they are compared with."""

    base: Path
    recipe: Recipe
    one: Path
    launches: dict[str, Torchrun | Forks]

    def alone(self, name: str) -> Path:
        """The run that one process makes of a variant."""
        run(read(read_json(self.base / "recipes.json")[name] | {"parallel": "ddp"}), self.base / f"{name}-alone")
        return self.base / f"{name}-alone"

    def work(self) -> dict[str, Any]:
        """What came of the launch `work`."""
        said = self.launches["work"].said()
        assert [one.status for one in said] == [0] * NUM, said[0].err[-2000:] + said[1].err[-2000:]
        found: dict[str, Any] = read_json(self.base / "found.json")
        return found


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text_file: Path) -> Iterator[Ground]:
    """All launches are started at once: most of their time is waiting."""
    base = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPT_PRUNER_CACHE", str(base / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        recipe = recipe_for(tiny_folder, text_file)
        run(read(recipe.model_dump() | EVERY_STEP), base / "one")
        left_at(base / "one", base / "to-two", "stage-1-step-2")
        recipes = {"to-two": recipe} | {name: recipe_for(tiny_folder, text_file, **more) for name, more in VARIANTS.items()}
        shared = {name: one.model_dump(mode="json") | {"parallel": "fsdp"} for name, one in recipes.items()}
        (base / "recipes.json").write_text(json.dumps(shared))
        (base / "recipe.yaml").write_text(recipe.to_yaml())

        def words(name: str, **settings: Any) -> list[str]:
            given = [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
            return ["run", str(base / "recipe.yaml"), "-o", str(base / name), *given]

        fsdp, misfit = words("fsdp", parallel="fsdp", **EVERY_STEP), words("misfit", training__batch_tokens=448)
        launches: dict[str, Torchrun | Forks] = {
            "ddp": Torchrun(base / "launch-ddp", words("ddp")),
            "fsdp": Forks(NUM, base / "launch-fsdp", command, *fsdp),
            "misfit": Forks(NUM, base / "launch-misfit", command, *misfit),
            "work": Forks(NUM, base / "launch-work", work, base),
        }
        try:
            yield Ground(base, recipe, base / "one", launches)
        finally:
            for launch in launches.values():
                launch.end()


def left_at(whole: Path, copy: Path, checkpoint: str) -> None:
    """A copy of a finished run, as if it had been stopped after a checkpoint."""
    shutil.copytree(whole, copy, ignore=lambda folder, names: {"model"} & set(names) if Path(folder) == whole else set())
    for path in (copy / "checkpoints").iterdir():
        if path.name != checkpoint:
            shutil.rmtree(path)


def log(folder: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def assert_same_run(one: Path, other: Path) -> None:
    """The same units left, the same loss at every step, and the same weights but for rounding."""
    assert (one / "model" / "mask.json").read_text() == (other / "model" / "mask.json").read_text()
    steps = [log(folder, "step") for folder in (one, other)]
    assert [step["step"] for step in steps[0]] == list(range(1, len(steps[0]) + 1))
    for left, right in zip(*steps, strict=True):
        for exact in ("stage", "step", "tokens", "lr"):
            assert left[exact] == right[exact]
        assert right["loss"] == pytest.approx(left["loss"], rel=CLOSE), f"step {left['step']}"
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-3), f"step {left['step']}"
    for left, right in zip(*(log(folder, "cut") for folder in (one, other)), strict=True):
        assert [right[exact] for exact in ("stage", "iteration", "params", "sizes")] == [
            left[exact] for exact in ("stage", "iteration", "params", "sizes")
        ]
        assert right["loss"] == pytest.approx(left["loss"], rel=CLOSE)
        assert right["distances"] == pytest.approx(left["distances"], rel=CLOSE)
    measured = [[event["perplexity"] for event in log(folder, "evaluation")] for folder in (one, other)]
    assert measured[1] == pytest.approx(measured[0], rel=CLOSE)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=1e-3, atol=1e-4), name


def test_the_run_compared_with_is_worth_it(ground: Ground) -> None:
    """Neurons and heads go in both stages, from layers that no longer divide evenly; training does something."""
    mask = read_json(ground.one / "model" / "mask.json")["axes"]
    assert any(len(axis["kept"]) < axis["size"] for name, axis in mask.items() if "kv_heads" in name)
    trained = {event["stage"]: event["sizes"] for event in log(ground.one, "cut")}  # the last cut of a stage is what it trains
    assert set(trained) == {1, 2}
    assert any(size % NUM for sizes in trained.values() for name, size in sizes.items() if "neurons" in name)
    steps = log(ground.one, "step")
    assert {step["stage"] for step in steps} == {1, 2}
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_run_of_one(parallel: str, ground: Ground) -> None:
    said = ground.launches[parallel].said()
    assert said[-1].status == 0, said[0].err[-3000:]
    assert_same_run(ground.one, ground.base / parallel)
    (start,) = log(ground.base / parallel, "start")
    assert (start["processes"], start["parallel"]) == (NUM, parallel)


def test_a_fault_in_the_moments_would_show(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of other units than those that stay, or none, give other losses than a run is compared by."""
    whole = [step["loss"] for step in log(ground.one, "step") if step["stage"] == 2]

    def amiss(optimizer: Any, old: Any, new: Any, take: Callable[[Tensor], Tensor]) -> None:
        follow(optimizer, old, new, lambda moment: take(moment.roll((1,) * moment.dim(), dims=tuple(range(moment.dim())))))

    follow = moments.follow
    for name, change in (("none", {"moments": "reset"}), ("amiss", {})):
        if name == "amiss":
            monkeypatch.setattr(moments, "follow", amiss)
        run(read(ground.recipe.model_dump() | change), ground.base / f"moments-{name}")
        losses = [step["loss"] for step in log(ground.base / f"moments-{name}", "step") if step["stage"] == 2]
        assert losses[0] == pytest.approx(whole[0], rel=CLOSE), "of the cut model, before a step"
        assert any(loss != pytest.approx(usual, rel=5 * CLOSE) for loss, usual in zip(losses, whole, strict=True)), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_only_the_first_process_speaks_and_writes(parallel: str, ground: Ground) -> None:
    first, second, *launcher = ground.launches[parallel].said()
    assert first.out.count("saved ") == 1
    assert f"on 2 processes ({parallel})" in first.err
    assert (second.out, second.err) == ("", "")
    assert not any(said.out for said in launcher)
    folder = ground.base / parallel
    assert {path.name for path in folder.iterdir()} == {
        ".adapt-pruner",
        ".lock",
        "recipe.yaml",
        "log.jsonl",
        "checkpoints",
        "model",
        "report.html",
    }
    assert [len(log(folder, kind)) for kind in ("start", "evaluation")] == [1, 5], "at the start, and twice a stage"


def test_a_checkpoint_of_shares_is_whole(ground: Ground) -> None:
    ground.launches["fsdp"].said()
    names = {path.name for path in (ground.one / "checkpoints").iterdir()}
    assert "stage-2-pruned" in names
    assert {path.name for path in (ground.base / "fsdp" / "checkpoints").iterdir()} == names
    for name in ("stage-1-step-2", "stage-1", "stage-2-pruned"):
        for file in ("model", "optimizer"):
            one, other = (
                load_file(folder / "checkpoints" / name / f"{file}.safetensors") for folder in (ground.one, ground.base / "fsdp")
            )
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                assert torch.allclose(tensor, other[key], rtol=1e-3, atol=1e-5), f"{key} in {name}"


def test_one_process_goes_on_with_what_two_began(ground: Ground) -> None:
    ground.launches["fsdp"].said()
    folder = ground.base / "to-one"
    left_at(ground.base / "fsdp", folder, "stage-1-step-2")
    run(ground.recipe, folder)
    assert [event["step"] for event in log(folder, "resumed")] == [2]
    assert_same_run(ground.one, folder)


def test_two_processes_go_on_with_what_one_began(ground: Ground) -> None:
    ground.work()
    assert [event["step"] for event in log(ground.base / "to-two", "resumed")] == [2]
    assert_same_run(ground.one, ground.base / "to-two")


def test_distillation_in_shares_is_distillation(ground: Ground) -> None:
    ground.work()
    assert_same_run(ground.alone("distil"), ground.base / "distil")


def test_what_best_repairs_in_shares_is_what_it_repairs(ground: Ground) -> None:
    """Least squares, a factor for each block, heads shut one by one, and text that each process writes for itself."""
    ground.work()
    assert_same_run(ground.alone("best"), ground.base / "best")
    assert len(read_json(ground.base / "best" / "repair_self.json")["input_ids"]) == 16


def test_additions_in_shares_are_additions(ground: Ground) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    ground.work()
    assert_same_run(ground.alone("lora"), ground.base / "lora")


def test_a_finished_run_is_left_alone_by_all(ground: Ground) -> None:
    assert ground.work()["again"] == [True] * (1 + len(VARIANTS))


def test_the_result_is_there_when_the_run_is_over_for_any_process(ground: Ground) -> None:
    assert ground.work()["there"] == [True] * NUM * (1 + len(VARIANTS))


def test_what_the_first_process_is_refused_all_are(ground: Ground) -> None:
    """Only the first looks at the folder; the sentence is everybody's, and nobody waits for the others."""
    first, second = ground.work()["refusals"]
    assert first == second == f"{ground.base / 'occupied'} exists and is not empty; name another folder or empty it first"


@pytest.mark.parametrize("name", WIDE)
def test_rows_of_several_lengths_of_which_few_tokens_count(name: str, ground: Ground) -> None:
    """One process has nothing to predict in the first batch, other widths in the second, and no row at all in the last."""
    found = ground.work()[name]
    dtype, _ = WIDE[name]
    steps, weights = trained_on_chats(dtype, False)
    close = CLOSE if dtype == "float32" else 0.03
    assert len(found) == len(steps) == 4
    for (loss, norm, tokens), step in zip(found, steps, strict=True):
        assert loss == pytest.approx(step.loss, rel=close)
        assert norm == pytest.approx(step.gradient_norm, rel=10 * close)
        assert tokens == step.tokens
    before = dict(tiny_model(("llama", "qwen3-untied")).named_parameters())
    for key, tensor in load_file(ground.base / f"{name}.safetensors").items():
        moved, differs = (float((other - weights[key]).detach().norm()) for other in (before[key], tensor))
        assert differs <= (1e-2 if dtype == "float32" else 0.5) * moved, key


def test_every_process_and_every_step_draws_its_own_dropout(ground: Ground) -> None:
    losses = ground.work()["dropout"]
    assert len({loss for process in losses for loss in process}) == 2 * NUM


def test_a_batch_that_does_not_fit_the_processes_is_refused_once(ground: Ground) -> None:
    first, second = ground.launches["misfit"].said()
    assert (first.status, second.status) == (2, 2)
    sentence = (
        "error: a batch of 448 tokens is 7 rows of 64, which 2 processes cannot share evenly; "
        "set training.batch_tokens to a multiple of 128"
    )
    assert (first.out + first.err).splitlines()[-1] == sentence
    assert (first.err + second.err).count("error") == 1
    assert (second.out, second.err) == ("", "")


def test_a_text_that_is_not_there_is_said_once(ground: Ground) -> None:
    """One process reads it; the others learn that it is not there, and do not wait. What is marked as of all, the first says."""
    assert ground.work()["textless"] == [True] * NUM
    assert not (ground.base / "textless").exists()


@pytest.mark.parametrize("kind", [UsageError, RunError])
def test_an_error_of_the_first_process_is_marked_as_one_of_all(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the error that the caller makes of it. An error that a process raises by itself is not marked."""
    monkeypatch.setattr(world, "size", lambda: 2)
    monkeypatch.setattr(world, "agreed", lambda told: pickle.loads(pickle.dumps(told)))

    def refuse() -> None:
        raise kind("no")

    with pytest.raises(kind, match="^no$") as refused:
        world.on_main(refuse)
    made = RunError("no; the last complete checkpoint is none")
    made.__cause__ = refused.value
    assert is_of_all(refused.value)
    assert is_of_all(made)
    assert not is_of_all(kind("no"))


def test_a_refused_run_leaves_its_folder_free(ground: Ground) -> None:
    ground.launches["misfit"].said()
    assert not (ground.base / "misfit").exists()


def test_alone_there_is_nobody_to_agree_with() -> None:
    tensor = torch.arange(3.0)
    with world.joined(lost=pytest.fail):
        assert (world.size(), world.rank(), world.is_main()) == (1, 0, True)
        assert world.agreed("anything") == "anything"
        assert world.share([1, 2, 3]) == [1, 2, 3]
        world.sum_in_place(tensor)
    assert torch.equal(tensor, torch.arange(3.0))


def test_a_number_without_other_processes_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters set RANK for their own ends; who is alone still writes."""
    monkeypatch.setenv("RANK", "3")
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert (world.rank(), world.is_main()) == (0, True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (world.rank(), world.is_main()) == (3, False)
