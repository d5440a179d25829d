"""`Work` and `Reduction`: what a run has done so far, in files of before too; axes once a change; a reduction's own state."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import gated
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import parts, read
from adapt_pruner.score.calibrate import mean_loss
from adapt_pruner.work import Change, Reduction, RunState, Stage, Work
from conftest import as_dicts, half, tiny_model


def work_of(**keys: Any) -> Work:
    work = Work.of(tiny_model(), read({"model": "x", "budget": "80%", "method": "uniform", "dtype": "float32", **keys}))
    work.stages = [Stage(1, 10**9, 1, 0, 0, 0), Stage(2, 10**9, 1, 0, 0, 0)]
    return work


def test_state_comes_back_as_it_was() -> None:
    state = RunState(stage=2, pruned=True, mask=Mask({"layers.0.neurons": torch.tensor([True, False])}))
    state.reduction, state.feed, state.figures = {"stage": 2, "debt": {}}, {"rows": 7}, {"params_before": 9}
    state.progress.rows, state.progress.lowest = 7, 1.5
    again = RunState.from_json(state.to_json())
    assert again.to_json() == state.to_json()
    assert (again.mask, again.progress) == (state.mask, state.progress)


def test_axes_are_worked_out_once_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapt_pruner import families

    calls, real = [], families.axes
    monkeypatch.setattr(families, "axes", lambda model: calls.append(model) or real(model))
    work = work_of()
    assert work.axes is work.axes
    assert len(calls) == 1
    mask = half(work.axes)
    before = {axis.name: axis.size for axis in work.axes if axis.kind == "neurons"}
    work.apply(Change(mask, 2.5))
    assert {axis.name: axis.size for axis in work.axes if axis.kind == "neurons"} == {n: s // 2 for n, s in before.items()}
    assert len(calls) == 3, "a repair may have added biases before the cut"
    assert work.state.mask == mask
    assert work.state.history == [
        {"stage": 1, "iteration": 1, "params": work.num_params, "target": 10**9, "loss": 2.5}
    ]  # fmt: skip
    assert work.iteration == 2
    work.apply(Change(None))
    assert work.state.mask == mask, "nothing was cut"
    assert work.iteration == 3


def test_any_search_may_ask_for_the_loss(batches: list[torch.Tensor]) -> None:
    work = work_of()
    mask = half(work.axes, kinds=("neurons", "kv_heads"))
    with gated(work.model, work.axes, mask):
        shut = mean_loss(work.model, batches, dtype="float32")
    assert work.loss(mask, batches) == shut != work.loss(Mask(), batches)
    gates = {name: keep.float() for name, keep in mask.kept.items()}
    assert work.loss(gates, batches) == pytest.approx(shut, abs=1e-6)


def test_a_warning_is_said_once_a_stage_whatever_its_figures() -> None:
    work, heard = work_of(), []
    work.listen = as_dicts(heard.append)
    work.warn_of_stage("3 tokens are few")
    work.warn_of_stage("2,000 tokens are few")
    work.warn_of_stage("another thing")
    work.state.stage = 2
    work.forget_warnings()
    work.warn_of_stage("5 tokens are few")
    said = ["stage 1: 3 tokens are few", "stage 1: another thing", "stage 2: 5 tokens are few"]
    assert [event["message"] for event in heard] == said


class Counting(Reduction):
    """Takes a neuron of each layer a step, and knows how many it took."""

    taken = 0

    def steps(self, work: Work, target: int) -> Iterator[Change]:
        while work.num_params > target:
            self.taken += 1
            neurons = [axis for axis in work.axes if axis.kind == "neurons"]
            yield Change(Mask({axis.name: torch.arange(axis.size) > 0 for axis in neurons}))

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = state.get("taken", 0)


def test_state_is_that_of_the_change_that_was_yielded() -> None:
    """What is saved after a change, and given back to a fresh object, goes on with the next one."""
    work = work_of()
    target = int(work.num_params * 0.9)
    one = Counting()
    for number, change in enumerate(one.steps(work, target), start=1):
        assert one.state() == {"taken": number}
        work.apply(change)
        if number == 2:
            break
    other = Counting()
    other.restore(one.state())
    for change in other.steps(work, target):
        work.apply(change)
    assert other.taken == len(work.state.history)
    assert work.num_params <= target


def test_parts_say_what_they_need() -> None:
    assert parts.needs("objective", "distil(temperature=1.0)") == {"teacher"}
    assert parts.needs("chooser", "depth.drop_layers") == {"distance", "whole"}
    assert parts.needs("repair", "mean_bias") == {"biases"}
    assert parts.needs_if_known("metric", "of.another_version") == frozenset()
    assert parts.takes("schedule", "wsd", "decay")
    assert not parts.takes("schedule", "schedules.cosine", "decay")
    assert parts.names("reduce") == [
        "between_steps",
        "free_gates",
        "greedy_gates",
        "hard_concrete",
        "masks",
        "nothing",
        "policy_gradient",
        "search",
        "slice",
        "sparse",
        "sparse_training",
        "towers",
        "units",
    ]
    assert parts.names("feed") == ["dynamic", "fixed"]


@pytest.mark.parametrize(("keys", "said"), [
    ({"reduce": "slices"}, "reduce 'slices' is not known; did you mean 'slice'"),
    ({"reduce": "units(fast=true)"}, "reduce 'units' has no option 'fast'; it takes no options"),
    ({"method": "slicegpt", "multiple_of": 8}, "multiple_of would be ignored, since reduce 'slice' does not read it; leave it out"),
    (
        {"method": "sheared", "chooser": "allocate.uniform", "metric": "weights.magnitude"},
        "chooser and metric would be ignored, since reduce 'hard_concrete' does not read them; leave them out",
    ),
    ({"method": "slicegpt", "stages": 2}, "reduce 'slice' can run only once, and stages is 2; set stages to 1"),
    ({"training": {"feed": "fixd"}}, "feed 'fixd' is not known; did you mean 'fixed'"),
])  # fmt: skip
def test_what_a_recipe_asks_of_a_reduction_or_a_feed_is_checked(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match="^" + said.replace("(", r"\(").replace(")", r"\)")):
        read({"method": "uniform", **keys})


def test_an_axis_that_the_model_does_not_have_is_refused() -> None:
    """A 128k Phi-3 has no width that may change; what a run has lost on its way is another thing."""
    work = work_of(axes=["neurons", "residual"])
    work._axes = tuple(axis for axis in work.axes if axis.kind != "residual")
    with pytest.raises(UsageError, match=r"axes names residual, which this model does not have; leave that out of axes"):
        work.reduction.check(work)
    work.state.began = {"residual": 48}
    work.reduction.check(work)
