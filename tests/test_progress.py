"""How long a run will take, told by its events: on runs that were recorded, and on small ones that were thought up."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from adapt_pruner.core.events import Cut, Evaluation, Event, Progress, Saved, Start, Step, Tasks, parse
from adapt_pruner.core.events.progress import ProgressTracker, RunProgress
from adapt_pruner.core.events.run import Masked, Planned, Searched
from adapt_pruner.recipe import read
from adapt_pruner.run.plan import phases, setup_of
from adapt_pruner.run.start import plan as run_plan
from adapt_pruner.work import Work
from conftest import tiny_model

RECORDED = Path(__file__).parent / "recorded"
FLOPS = 1e9


def followed(events: list[tuple[float, Event]], *, at: float | None = None) -> RunProgress:
    """Where a run stands after events, each with its second, at the last of them or later."""
    tracker = ProgressTracker()
    for second, event in events:
        tracker.hear(event.model_copy(update={"time": 1000.0 + second}))
    return tracker.at(1000.0 + (events[-1][0] if at is None else at))


def item(phase: str, stage: int = 1, times: int = 1, flops: float | None = FLOPS, *, repeats: bool = False) -> Any:
    return {"phase": phase, "stage": stage, "times": times, "flops": flops, "repeats": repeats}


def plan(*items: Any, targets: tuple[int, ...] = (500,), tokens: tuple[int, ...] = (0,)) -> Planned:
    return Planned(targets=list(targets), tokens=list(tokens), items=list(items))


def phase(name: str, done: int = 0, of: int = 0, stage: int = 1, iteration: int = 1) -> Progress:
    return Progress(phase=name, done=done, of=of, stage=stage, iteration=iteration)


START = Start(params=1000, target=500)
ITERATION = (item("score", times=5, repeats=True), item("repair", times=5, repeats=True))


def recorded(name: str) -> list[Event]:
    with gzip.open(RECORDED / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        events = [parse(told) for told in json.load(file)]
    assert all(event is not None for event in events)
    return [event for event in events if event is not None]


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".json.gz") for path in RECORDED.glob("*.json.gz")))
def test_the_estimate_of_a_recorded_run_is_near_the_truth(name: str) -> None:
    """Within 30 % from a tenth of the time on, within 15 % from a third on; tests/recorded/README.md says what was recorded."""
    events = recorded(name)
    began = float(events[0].time or 0)
    whole = float(next(event.time or 0 for event in events if isinstance(event, Saved) and event.is_result)) - began
    tracker, coming = ProgressTracker(), iter([*events, None])
    event, estimates = next(coming), {}
    for step in range(1, 200):
        now = began + whole * step / 200
        while event is not None and float(event.time or 0) <= now:
            tracker.hear(event)
            event = next(coming)
        stands = tracker.at(now)
        estimates[step / 200] = None if stands.left is None else (stands.seconds + stands.left) / whole
    for share, error in ((0.1, 0.3), (1 / 3, 0.15)):
        far = {when: found for when, found in estimates.items() if when >= share and abs((found or 0) - 1) > error}
        assert not far, f"from {share:.0%} of {whole:.0f} s on: {far}"
    assert tracker.at(began + whole).left is not None


def test_a_repeated_iteration_costs_what_the_one_before_did() -> None:
    """Whatever its tokens say: repair takes nine times as long as scoring, with the same operations."""
    first = [
        (0, plan(*ITERATION)), (0, START), (0, phase("score")), (10, phase("score", 8, 8)), (10, phase("repair")), (100, phase("cut")),
        (100, Cut(stage=1, iteration=1, params=900, target=500)),
    ]  # fmt: skip
    assert followed(first).left == pytest.approx(400), "400 parameters are to go, and 100 went"
    assert followed(first, at=110).left == pytest.approx(400), "nothing has begun"
    second = [*first, (100, phase("score", iteration=2)), (106, phase("score", 4, 8, iteration=2))]
    assert followed(second).left == pytest.approx(16 / 3 + 90 + 3 * (32 / 3 + 90)), "a time that has begun counts by its share"
    assert followed(second, at=108).left == pytest.approx(16 / 3 - 2 + 90 + 3 * (32 / 3 + 90)), (
        "it counts down between two events"
    )
    assert followed(second, at=200).left == pytest.approx(90 + 3 * (32 / 3 + 90)), (
        "a phase that is late takes nothing off the others"
    )
    half = [*second, (110, phase("repair", iteration=2)), (155, phase("repair", 30, 60, iteration=2))]
    assert followed(half).left == pytest.approx(45 + 300)
    assert followed(half).share == pytest.approx(155 / 500)
    last = [*half, (200, Cut(stage=1, iteration=2, params=505, target=500))]
    assert followed(last).left == pytest.approx(100), "one more, however little is to go"
    assert followed([*last, (300, Cut(stage=1, iteration=3, params=500, target=500))]).left == 0


def test_a_phase_that_the_last_iteration_left_out_is_not_expected() -> None:
    heads = item("heads", times=5, repeats=True)
    first = [
        (0, plan(ITERATION[0], heads)), (0, START), (0, phase("score")), (10, Cut(stage=1, iteration=1, params=900, target=500)),
    ]  # fmt: skip
    assert followed(first).left == pytest.approx(40)
    second = [*first, (10, phase("score")), (20, phase("heads")), (50, Cut(stage=1, iteration=2, params=800, target=500))]
    assert followed(second).left == pytest.approx(120), "and what came last is"


def test_what_was_not_measured_is_guessed_and_the_guess_is_a_range() -> None:
    assert followed([(0, plan(*ITERATION)), (1, START)]).said_left == "estimating"
    assert followed([(1, START)]).said_left == "", "there is no plan"
    events = [(0, plan(*ITERATION)), (0, START), (0, phase("score")), (9, phase("score", 9, 10))]
    guess = followed(events)
    assert guess.left == pytest.approx(9 * 5 + 5 * 10 / 0.9 + 1 * 1, rel=0.15), (
        "as much time for as many operations, and a slower repair"
    )
    assert guess.low < 0.8 * float(guess.left or 0) < 1.3 * float(guess.left or 0) < guess.high
    assert " to " in guess.said_left
    unknown = plan(ITERATION[0], item("task", flops=None))
    assert followed([(0, unknown), *events[1:]]).left is None, "nobody knows what tasks take that were never scored"


def test_training_counts_by_its_tokens_and_goes_over_to_the_next_stage() -> None:
    trains = plan(
        item("train", 1),
        item("evaluate", 1, flops=0.0),
        item("train", 2, flops=2 * FLOPS),
        targets=(800, 600),
        tokens=(1000, 2000),
    )
    begun: list[tuple[float, Event]] = [(0, trains), (0, START), (0, phase("train"))]
    steps = [(10.0 * n, Step(stage=1, step=n, tokens=100 * n)) for n in range(1, 4)]
    assert followed([*begun, *steps]).left == pytest.approx(70 + 200)
    stands = followed([*begun, *steps, (35, phase("save"))])
    assert stands.left == pytest.approx(70 + 200), "a checkpoint on the way"
    assert stands.doing == "writing a checkpoint"
    assert (
        followed([*begun, *steps, (35, phase("save")), (35, Saved(path="p-step-3", stage=1)), (40, phase("train"))]).left
        is not None
    )
    done = [(10.0 * n, Step(stage=1, step=n, tokens=100 * n)) for n in range(1, 11)]
    measured = [*begun, *done, (100, phase("evaluate")), (107, Evaluation(stage=1))]
    assert followed(measured).left == pytest.approx(200)
    assert followed([*begun, *steps, (30, Start(params=1000, target=500, seconds_left=50.0))]).left == 50, "a deadline is the end"
    timed = trains.model_copy(update={"seconds_left": 60.0})
    written = [(0, timed), (0, phase("train")), (10.0, Step(stage=1, step=1, tokens=100))]
    assert followed(written).high == 50, "already while texts are written, before the run starts"


def test_a_search_and_layers_count_by_their_rounds() -> None:
    searches = plan(item("score", repeats=True), item("search", times=5, flops=None, repeats=True), item("repair", repeats=True))
    begun: list[tuple[float, Event]] = [(0, searches), (0, START), (0, phase("score")), (10, phase("search"))]
    assert followed(begun).left is None, "what a round takes the first tells"
    rounds = [*begun, (30, Searched(stage=1, done=1, of=5)), (30, phase("search")), (50, Searched(stage=1, done=2, of=5))]
    assert followed(rounds).left == pytest.approx(3 * 20 + 10 / 0.9)
    layers = [(0, plan(item("layers", flops=None, repeats=True))), (0, phase("layers"))]
    layers += [(8, Masked(stage=1, done=1, of=30, zeros=5)), (14, Masked(stage=1, done=2, of=30, zeros=9))]
    stands = followed(layers)
    assert stands.left == pytest.approx(28 * 7)
    assert stands.doing == "making zeros 2/30"


def test_tasks_that_were_scored_are_expected_again() -> None:
    tasks = plan(item("task", 0, flops=None), ITERATION[0], item("task", 1, flops=None))
    begun: list[tuple[float, Event]] = [(0, tasks), (0, START), (0, Progress(phase="task", task="arc", done=1, of=9))]
    assert followed([*begun, (5, Progress(phase="task", task="arc", done=9, of=9))]).left is None
    scored = [
        *begun,
        (60, Tasks(stage=0, scores=[])),
        (60, phase("score")),
        (70, Cut(stage=1, iteration=1, params=500, target=500)),
    ]
    assert followed(scored).left == pytest.approx(60)


def test_a_run_that_goes_on_is_estimated_by_what_is_left_of_it() -> None:
    """A session that was stopped counts for nothing: the next one plans anew."""
    before = [(0, plan(*ITERATION)), (0, START), (0, phase("score")), (100, Cut(stage=1, iteration=1, params=750, target=500))]
    again = plan(*ITERATION[:1])
    resumed = [*before, (1000, again), (1000, Start(params=1000, now=750, target=500)), (1000, phase("score"))]
    assert followed([*resumed, (1010, Cut(stage=1, iteration=2, params=725, target=500))]).left == pytest.approx(90)


def test_a_run_that_goes_on_plans_what_is_left() -> None:
    recipe = read({
        "method": "adapt-pruner", "model": "m", "budget": "70%", "stages": 3, "step": 0.05, "dtype": "float32",
        "calibration": {"source": "self", "samples": 8}, "training": {"source": "a.txt", "tokens": 6_144, "batch_tokens": 512, "length": 64},
        "evaluation": {"source": "b.txt", "window": 64, "max_windows": 4},
    })  # fmt: skip
    work = Work.of(tiny_model(), recipe)
    work.stages, work.budget = run_plan(work)
    whole = phases(work, setup_of(work))
    assert [item["phase"] for item in whole.items][:3] == ["write", "evaluate", "score"]
    assert sum(whole.tokens) == sum(stage.tokens for stage in work.stages)
    first = work.stages[0]
    work.state.stage, work.state.pruned, work.state.progress.tokens = 2, True, first.tokens + 512
    work.state.figures["params_before"] = work.dense_params
    rest = phases(work, setup_of(work))
    assert ("score", 2) not in {(item["phase"], item["stage"]) for item in rest.items}, "its cuts are done"
    assert {item["stage"] for item in rest.items} == {0, 2, 3}
    assert rest.tokens == [0, work.stages[1].tokens - 512, work.stages[2].tokens]
    before, now = (
        {(item["phase"], item["stage"]): float(item["flops"] or 0) for item in planned.items} for planned in (whole, rest)
    )
    assert 0 < now["train", 2] < before["train", 2], "512 tokens are done"
    assert now["train", 3] == before["train", 3]


def test_progress_is_plain_data_and_back() -> None:
    stands = followed([(0, plan(*ITERATION)), (0, START), (0, phase("score")), (9, phase("score", 9, 10))])
    assert RunProgress(**json.loads(json.dumps(asdict(stands)))) == stands
    assert stands.later(5.0).left == pytest.approx(float(stands.left or 0) - 5)
    for broken in ({}, {**asdict(stands), "seconds": "soon"}, {**asdict(stands), "left": []}):
        with pytest.raises((TypeError, ValueError)):
            RunProgress(**broken)
