"""A run that has to end in time: training ends early and its learning rate with it, and pruning takes what is left in one cut."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapt_pruner.core.events import Start
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, parts, read
from adapt_pruner.report.with_card import run
from adapt_pruner.run import loop
from adapt_pruner.run.training import Trainer
from adapt_pruner.train.loop import Pace, TrainState, make_optimizer
from adapt_pruner.train.objectives import lm
from adapt_pruner.work import RunData, Stage, Work
from conftest import as_dicts, assert_same_model, read_json, tiny_model, train


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, left: float) -> None:
        self.left = left

    def __call__(self) -> float:
        return self.left


@pytest.mark.parametrize(("seconds", "taken"), [(11.0, 5), (100.0, 10), (0.0, 0)])
def test_training_ends_in_time_and_its_rate_with_it(seconds: float, taken: int) -> None:
    clock, heard = Clock(seconds), []
    ids = (3 + (torch.arange(40)[:, None] + torch.arange(16)) % 90).int()

    class Text:
        def batch(self, start: int, stop: int) -> tuple[Any, None]:
            return ids[start:stop].long(), None

        def num_tokens(self, start: int, stop: int) -> int:
            return (stop - start) * 16

    def slow(*words: Any) -> Any:
        clock.left -= 2  # a step takes two seconds
        return lm(*words)

    model, progress = tiny_model(), TrainState()
    optimizer = make_optimizer(model, lr=1.0, weight_decay=0.0)
    how: dict[str, Any] = {"objective": slow, "schedule": lambda done: 1 - done, "lr": 1.0, "batch_rows": 4, "dtype": "float32"}
    how |= {"seconds_left": clock, "on_step": heard.append, "total_tokens": 640, "progress": progress}
    train(model, Text(), until=40, optimizer=optimizer, **how)
    assert (len(heard), progress.rows) == (taken, 4 * taken)
    if taken == 5:
        # no pace yet, then 5.5 steps fit: the curve of ten steps becomes one of five and a half
        assert [step.lr for step in heard] == pytest.approx([0.95, 0.85, 1 - 2.5 / 5.5, 1 - 3.5 / 5.5, 1 - 4.5 / 5.5])
        assert heard[-1].reach == pytest.approx(5.5 * 64)
    if taken == 10:
        assert [step.lr for step in heard] == pytest.approx([1 - (step + 0.5) / 10 for step in range(10)]), "time to spare"


def test_until_there_is_a_pace_the_rate_is_that_of_what_was_expected() -> None:
    pace = Pace(Clock(100.0), expected=640.0)
    assert pace.reach(0) == 640.0
    pace.taken(64)
    assert pace.reach(64) == 640.0


def test_a_run_that_goes_on_begins_at_its_pace_so_far(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps lie ready and far fewer fit; after half of these, the next step's rate has come down."""
    slowly(monkeypatch, each=1.0)
    timed = recipe.model_copy(update={"minutes": 0.5, "checkpoint_minutes": 0.0, "keep_checkpoints": 9})
    steps: list[dict[str, Any]] = []

    def stop(event: dict[str, Any]) -> None:
        steps.extend([event] * (event["event"] == "step"))
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(timed, tmp_path / "run", listen=as_dicts(stop))
    steps.clear()
    monkeypatch.setattr(Trainer, "_expected", lambda trainer, left: 4 * 512.0)
    run(timed, tmp_path / "run", listen=as_dicts(lambda event: steps.extend([event] * (event["event"] == "step"))))
    assert steps[0]["step"] == 3
    assert steps[0]["lr"] == pytest.approx(3e-3 * (1 - (2.5 / 4 - 0.5) / 0.5))


@pytest.mark.parametrize(("read", "took", "left", "expected", "foreseen"), [
    (0, 0.0, 100.0, 5_000, 5_000), (0, 0.0, 100.0, None, float("inf")), (1_000, 10.0, 50.0, 5_000, 6_000), (1_000, 10.0, -3.0, 5_000, 1_000),
])  # fmt: skip
def test_what_is_expected_follows_the_pace_so_far(
    read: int, took: float, left: float, expected: int | None, foreseen: float, recipe: Recipe
) -> None:
    training = recipe.training.model_copy(update={"expected": expected})
    work = Work.of(tiny_model(), recipe.model_copy(update={"minutes": 1.0, "training": training}))
    work.state.progress.tokens, work.state.spent["train"] = read, took
    assert Trainer(work)._expected(left) == foreseen


def test_a_run_that_goes_on_says_what_it_will_read_by_its_pace(recipe: Recipe) -> None:
    """Not what was expected of a slower machine: the run had read more than that."""
    training = recipe.training.model_copy(update={"expected": 1_000})
    work = Work.of(tiny_model(), recipe.model_copy(update={"minutes": 60.0, "training": training}))
    trainer = Trainer(work)
    work.data = RunData(feed=SimpleNamespace(num_tokens=6_144))
    assert trainer.expected_tokens == 1_000
    work.state.progress.tokens, work.state.spent["train"] = 2_000, 1.0
    assert trainer.expected_tokens == 6_144, "all there is"
    work.state.spent["train"] = 10_000.0
    assert 2_000 < trainer.expected_tokens < 6_144
    told = {"params": 9, "target": 8, "training_tokens": 2_700, "trained_tokens": 2_000}
    assert "training on about 2,700 tokens in all, of which 2,000 are done" in Start(**told, seconds_left=9.0).line()
    assert "training on 2,700 tokens in all, of which 2,000 are done" in Start(**told).line()


def test_time_is_kept_for_what_the_start_took_from_a_cache(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.results, "measure_tasks", lambda work, *, stage: 30.0 if stage == 0 else 0.0)
    outcome = run(recipe, tmp_path / "run")
    assert outcome is not None
    assert 30 < outcome.figures["measuring_seconds"] < 40


def test_training_beyond_the_end_of_a_stage_is_kept(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the result is measured, given more tokens, and stopped again: the newest checkpoint is the newest."""
    out, asked = tmp_path / "run", recipe.model_copy(update={"checkpoint_minutes": 0.0, "keep_checkpoints": 1})

    def stopped(recipe: Recipe, *, at: Callable[[dict[str, Any]], bool], **how: Any) -> str:
        def listen(event: dict[str, Any]) -> None:
            if at(event):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(recipe, out, listen=as_dicts(listen), **how)
        (left,) = (out / "checkpoints").iterdir()
        return left.name

    with monkeypatch.context() as patch:
        patch.setattr(loop.results, "measure_text", raising_after_training)
        assert stopped(asked, at=lambda _: False) == "stage-1"
    more = asked.model_copy(update={"training": asked.training.model_copy(update={"tokens": 9_000})})
    step = stopped(more, at=lambda event: event["event"] == "step" and event["step"] == 15, force_recipe=True)
    assert step == "stage-1-step-14"
    with monkeypatch.context() as patch:
        patch.setattr(loop.results, "measure_text", raising_after_training)
        assert stopped(more, at=lambda _: False) == "stage-1"
    assert read_json(out / "checkpoints" / "stage-1" / "state.json")["progress"]["steps"] == 18


def raising_after_training(work: Work, *, stage: int, after_cuts: bool = False) -> None:
    if stage and not after_cuts:
        raise KeyboardInterrupt


def test_the_pace_is_that_of_the_last_steps() -> None:
    clock = Clock(1000.0)
    pace = Pace(clock)
    for step in range(1, 101):
        pace.taken(10 * step)
        clock.left -= 1 if step < 60 else 5  # something else takes the machine
    assert clock.left == 1000 - 59 - 41 * 5
    assert pace.reach(1000) == pytest.approx(1000 + 2 * clock.left, rel=0.05)
    assert Pace(None).reach(5) == float("inf")
    assert not Pace(None).is_up()


@pytest.fixture
def recipe(tiny_folder: Path, text_file: Path) -> Recipe:
    return read({
        "method": "adapt-pruner", "model": str(tiny_folder), "budget": "70%", "step": 0.1, "amplitude": 0.05, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        "training": {"source": str(text_file), "tokens": 6_000, "batch_tokens": 512, "length": 64, "lr": 3e-3, "decay": 0.5},
    })  # fmt: skip


def slowly(monkeypatch: pytest.MonkeyPatch, *, each: float) -> None:
    """Let every look at the clock take so many seconds."""
    passed = iter(range(10**6))
    monkeypatch.setattr(Work, "elapsed", property(lambda work: each * next(passed)))


def ticking(monkeypatch: pytest.MonkeyPatch, *, each: float) -> None:
    """Let every look at the clock take so many seconds."""
    now = time.perf_counter()
    looks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: now + each * next(looks))


def test_with_time_to_spare_a_deadline_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "without")
    run(recipe.model_copy(update={"minutes": 60.0}), tmp_path / "with")
    assert_same_model(tmp_path / "without", tmp_path / "with")


def test_a_run_that_is_late_trains_less_and_says_so(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []
    slowly(monkeypatch, each=1.0)
    outcome = run(recipe.model_copy(update={"minutes": 0.5}), tmp_path / "run", listen=as_dicts(heard.append))
    assert outcome is not None
    steps = [event for event in heard if event["event"] == "step"]
    assert 3 <= len(steps) < 12
    assert outcome.figures["trained_tokens"] == steps[-1]["tokens"] < 6_016
    assert steps[-1]["lr"] < 0.5 * max(step["lr"] for step in steps), "it has come down"
    (said,) = [event["message"] for event in heard if event["event"] == "warning"]
    assert said.startswith("stage 1: at this machine's speed there is time for about ")
    assert "of the 6.0\u00a0k tokens; the learning rate comes down by then" in said


def test_fewer_tokens_than_lie_ready_are_no_news_if_no_more_were_expected(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expected, warned in ((2_048, 0), (6_000, 1)):
        slowly(monkeypatch, each=1.0)
        heard: list[dict[str, Any]] = []
        training = recipe.training.model_copy(update={"expected": expected})
        run(
            recipe.model_copy(update={"minutes": 0.5, "training": training}),
            tmp_path / str(expected),
            listen=as_dicts(heard.append),
        )
        assert sum(event["event"] == "warning" for event in heard) == warned
        (start,) = [event for event in heard if event["event"] == "start"]
        assert start["training_tokens"] == expected


def test_what_is_not_pruned_at_half_of_the_time_goes_in_one_cut(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[dict[str, Any]] = []
    asked: list[tuple[float, float]] = []
    bind = parts.bind

    def watched(key: str, name: str, **values: Any) -> Any:
        if key == "chooser" and values.get("amplitude"):
            asked.append((values["step"], values["amplitude"]))
        return bind(key, name, **values)

    monkeypatch.setattr(parts, "bind", watched)
    slowly(monkeypatch, each=10.0)
    outcome = run(recipe.model_copy(update={"minutes": 0.4}), tmp_path / "run", listen=as_dicts(heard.append))
    assert outcome is not None
    assert outcome.figures["params_after"] <= outcome.figures["budget"]
    assert asked[-1] == (1.0, pytest.approx(recipe.amplitude / recipe.step)), "layers keep their shares in the last cut"
    said = [event["message"] for event in heard if event["event"] == "warning"]
    assert "half of the 0.4 minutes are over" in said[0]
    assert "were over before training began" in said[1]
    late = outcome.figures["iterations"]
    monkeypatch.undo()
    whole = run(recipe, tmp_path / "whole")
    assert whole is not None
    assert late < whole.figures["iterations"]


@pytest.mark.parametrize("method", ["efficientllm", "sheared", "ast"])
def test_a_deadline_is_not_for_reductions_that_train(method: str, recipe: Recipe) -> None:
    asked = {"method": method, "model": recipe.model, "training": {"source": "x.txt", "tokens": 100}, "minutes": 5}
    with pytest.raises(UsageError, match="minutes 5 cannot end a run whose reduce .* trains while it removes") as refused:
        read(asked | ({"sparsity": "2:4"} if method == "ast" else {"budget": "70%"}))
    assert str(refused.value).endswith("leave minutes out and set training.tokens (with shrink: --tokens)")


@pytest.mark.parametrize("method", ["self-pruner", "evopress", "bypass", "grasprune", "ddp"])
def test_a_deadline_is_not_for_searches(method: str, recipe: Recipe) -> None:
    with pytest.raises(
        UsageError, match="minutes 5 cannot end a run whose reduce .* takes the time that it needs; leave minutes out"
    ):
        read({"method": method, "model": recipe.model, "minutes": 5, "budget": "70%"})


def test_stages_share_the_time_as_they_share_the_tokens(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more tokens lie ready than fit: each stage trains for its share of the time, and the last one ends in time."""
    ticking(monkeypatch, each=0.3)
    training = recipe.training.model_dump() | {"tokens": 30_000, "shards": [1, 1, 2]}
    timed = read(recipe.model_dump() | {"stages": 3, "minutes": 1.0, "training": training, "budget": "85%"})
    steps: list[dict[str, Any]] = []
    began = time.perf_counter()
    outcome = run(timed, tmp_path / "run", listen=as_dicts(lambda event: steps.extend([event] * (event["event"] == "step"))))
    assert time.perf_counter() - began < 63
    assert outcome is not None
    numbers = [sum(step["stage"] == stage for step in steps) for stage in (1, 2, 3)]
    assert 20 < sum(numbers) < 50, "of 59 steps that are prepared"
    assert [number / sum(numbers) for number in numbers] == pytest.approx([0.25, 0.25, 0.5], abs=0.09)
    # One curve spans all stages: it is flat until the last stage, and has come down at the end.
    rates = [step["lr"] for step in steps]
    assert rates[sum(numbers[:2]) // 2] == pytest.approx(3e-3)
    assert rates[-1] < 0.2 * 3e-3


def test_time_is_kept_for_the_cuts_to_come(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the parameters have taken 20 s to remove, so the last third takes 10 s, which no earlier stage may use up."""
    ticking(monkeypatch, each=0.0)
    timed = read(recipe.model_dump() | {"stages": 3, "minutes": 2.0, "budget": "70%"})
    work = Work.of(tiny_model(), timed)
    work.stages = [Stage(1, 900, 1, 0, 100, 1), Stage(2, 800, 1, 0, 100, 1), Stage(3, 700, 1, 0, 200, 1)]
    work.budget = Budget(keep=700, total=1_000)
    trainer = Trainer(work)
    work.state.spent |= {"score": 12.0, "repair": 6.0, "cut": 2.0, "train": 30.0}
    work._earlier, work.started = 50.0, time.perf_counter()
    left = {}
    for stage in (1, 2, 3):
        work.state.stage = stage
        left[stage] = trainer._seconds_left(), trainer._stage_seconds_left()
    after = 3.0  # to write the result
    assert [seconds for seconds, _ in left.values()] == pytest.approx(
        [120 - 50 - after - 2 * 20, 120 - 50 - after - 10, 120 - 50 - after], abs=0.1
    )
    # By the end of stage 2, half of the training is to be done: of 30 s and those that are left.
    assert left[2][1] == pytest.approx((30 + 57) / 2 - 30, abs=0.1)
    assert left[3] == pytest.approx((67, 67), abs=0.1)


def test_training_between_cuts_does_not_count_as_pruning(recipe: Recipe) -> None:
    """More than half of the minutes are over, but most of them went into training, so cuts stay small."""
    work = Work.of(tiny_model(), read(recipe.model_dump() | {"stages": 3, "minutes": 1.0}))
    work._earlier, work.started = 40.0, time.perf_counter()
    assert work.step == 1.0
    work.state.spent["train"] = 30.0
    assert work.step == 0.1
