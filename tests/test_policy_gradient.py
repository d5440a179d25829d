"""`reduce: policy_gradient`: the formulas by hand, an exact budget on every layout, and a killed search that goes on bit-equal."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import RunError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce.policy_gradient import PolicyGradient, projected, start_of
from adapt_pruner.report.with_card import run
from adapt_pruner.work import RunData, Stage, Work
from conftest import LAYOUTS, as_dicts, assert_refused, assert_same_model, break_off, log_of, tiny_model


def work_of(model: Any, batches: list[torch.Tensor], **keys: Any) -> Work:
    recipe = {"model": "x", "budget": "80%", "method": "bypass", "dtype": "float32", "calibration": {"samples": 6, "length": 12}}
    work = Work.of(model, read(recipe | keys))
    target = work.num_params * 8 // 10
    work.stages = [Stage(1, target, 1, 0, 0, 0)]
    work.data = RunData(calibration=lambda iteration: [batch.roll(iteration, 0) for batch in batches])
    return work


def test_probabilities_begin_by_score_at_the_share() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 9.0])
    share = start_of(scores, 0.6)
    assert float(share.mean()) == pytest.approx(0.6)
    assert share.tolist() == sorted(share.tolist())
    z = (scores - 3) / scores.std()
    assert torch.allclose(share, torch.sigmoid(z) - torch.sigmoid(z).mean() + 0.6)
    assert start_of(torch.ones(3), 0.7).tolist() == pytest.approx([0.7] * 3), "scores that are alike"
    assert start_of(torch.ones(1), 0.7).tolist() == pytest.approx([0.7]), "one unit has no deviation"


def test_a_projection_is_the_nearest_shift() -> None:
    stay = torch.tensor([1.4, 0.9, 0.5, 0.2, -0.3])
    found = projected(stay, 0.4)
    assert float(found.mean()) == pytest.approx(0.4, abs=1e-6)
    inside = (found > 0) & (found < 1)
    shift = (stay - found)[inside]
    assert torch.allclose(shift, shift[0].expand_as(shift), atol=1e-6)
    assert projected(stay, 0.9).tolist() == pytest.approx([1.0, 0.9, 0.5, 0.2, 0.0]), "below its share nothing is shifted"


def test_a_head_that_cannot_go_is_not_drawn(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons alone meet the budget, so their share is smaller; heads that stay in any case are never shut."""
    work = work_of(tiny_model(num_key_value_heads=1), batches)
    shut: list[set[str]] = []
    loss = Work.loss
    monkeypatch.setattr(Work, "loss", lambda self, gates, text: shut.append(set(gates)) or loss(self, gates, text))
    change = list(PolicyGradient(updates=2, sequences=2).steps(work, work.stages[0].params))[-1]
    assert shut
    assert all(name.endswith("neurons") for gates in shut[:-1] for name in gates)
    work.apply(change)
    assert work.num_params <= work.stages[0].params


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_is_the_formula(exact: bool, batches: list[torch.Tensor]) -> None:
    """One update against the score function written out for one unit at a time."""
    work = work_of(tiny_model(), batches)
    axes = [axis for axis in work.axes if axis.kind in ("neurons", "kv_heads")]
    one = PolicyGradient(updates=4, masks=3, sequences=2, lr=0.05, exact=exact)
    start = {axis.name: torch.linspace(0.3, 0.9, axis.entries) for axis in axes}
    one._values, one._stage, one._baseline, one._done = dict(start), 1, 5.0, 1
    losses = one._update(work, axes, 0.99, batches[:1])
    generator = torch.Generator().manual_seed(0 * 1_000_003 * 100_003 + 1 * 100_003 + 1)
    drawn = [{name: torch.bernoulli(share, generator=generator) for name, share in start.items()} for _ in range(3)]
    assert losses == [work.loss(gates, batches[:1]) for gates in drawn]
    baseline = 5.0 * 0.8 + 0.2 * sum(losses) / 3
    rate = 0.05 * (1 + math.cos(math.pi / 4)) / 2
    for name, share in start.items():
        for unit, s in enumerate(share.tolist()):
            scale = (s + 1e-7) * (1 - s + 1e-7)
            g = sum((loss - baseline) * (float(gates[name][unit]) - s) for loss, gates in zip(losses, drawn, strict=True)) / 2
            expected = s - rate * g / (scale if exact else math.sqrt(scale))
            assert float(one._values[name][unit]) == pytest.approx(min(1.0, max(0.0, expected)), abs=1e-5)


def test_a_mask_without_a_finite_loss_counts_nothing(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(tiny_model(), batches)
    axes = [axis for axis in work.axes if axis.kind == "neurons"]
    losses = iter([math.nan, 3.0, math.nan, math.nan])
    monkeypatch.setattr(Work, "loss", lambda self, gates, batches: next(losses))
    one = PolicyGradient(masks=2, lr=0.05)
    one._values = {axis.name: torch.full((axis.entries,), 0.5) for axis in axes}
    one._update(work, axes, 0.9, batches)
    assert one._baseline == 3.0
    before = {name: share.clone() for name, share in one._values.items()}
    one._update(work, axes, 0.9, batches)
    assert all(torch.equal(share, before[name]) for name, share in one._values.items())
    monkeypatch.setattr(Work, "loss", lambda self, gates, batches: math.nan)
    with pytest.raises(RunError, match=r"no mask of \d+ has a finite loss on the calibration text; set dtype=float32"):
        list(PolicyGradient(updates=2, sequences=2).steps(work, work.stages[0].params))


def test_it_finds_the_units_that_matter(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that grows with every second neuron that is shut: from a start by lots, those gain and the others lose."""
    work = work_of(tiny_model(), batches, axes=["neurons"], metric="weights.random", sequential_scoring=False)
    monkeypatch.setattr(Work, "loss", lambda self, gates, batches: sum(float((1 - gate)[1::2].sum()) for gate in gates.values()))
    axes = [axis for axis in work.axes if axis.kind == "neurons"]
    one = PolicyGradient(updates=300, masks=4, lr=0.02)
    one._values = {axis.name: torch.full((axis.entries,), 0.7) for axis in axes}
    losses = [one._update(work, axes, 0.7, batches) for _ in range(300)]
    used, unused = (torch.cat([share[start::2] for share in one._values.values()]).mean() for start in (1, 0))
    assert used > unused + 0.3
    assert sum(losses[-1]) < sum(losses[0]) / 2, "masks that are drawn lose less in the end"


def test_sequences_of_the_users_own_may_differ_in_length(batches: list[torch.Tensor]) -> None:
    """`calibration.ids` has rows as they come: a step reads them in as many passes as there are lengths side by side."""
    work = work_of(tiny_model(), [batches[0], batches[1][:, :7], batches[2]])
    *_, change = PolicyGradient(updates=4, sequences=3).steps(work, work.stages[0].params)
    assert math.isfinite(change.loss)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_the_budget_is_met_to_the_unit(layout: tuple[str, str], batches: list[torch.Tensor]) -> None:
    work = work_of(tiny_model(layout), batches)
    target = work.stages[0].params
    for step in PolicyGradient(updates=3, sequences=2).steps(work, target):
        if hasattr(step, "mask"):
            work.apply(step)
    cheapest = min(axis.cost for axis in work.axes if axis.kind == "neurons")
    assert target - cheapest < count_parameters(work.model) <= target
    assert math.isfinite(work.state.history[-1]["loss"])


def recipe_of(folder: Path, text: Path, **changes: Any) -> Recipe:
    keys = {
        "model": str(folder), "budget": "85%", "method": "bypass", "dtype": "float32", "device": "cpu", "checkpoint_minutes": 0,
        "reduce": "policy_gradient(updates=12, sequences=2)", "repair": "closed_form.least_squares",
        "calibration": {"source": str(text), "samples": 4, "length": 16},
    }  # fmt: skip
    return read(keys | changes)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe, and its run that nothing stopped."""
    recipe = recipe_of(tiny_folder, text_file, stages=2)
    folder = tmp_path_factory.mktemp("policy-gradient") / "whole"
    run(recipe, folder)
    return recipe, folder


@pytest.mark.parametrize("nth", [1, 4])
def test_a_killed_search_goes_on_bit_equal(nth: int, whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, reference = whole
    broken = tmp_path / "broken"
    break_off(recipe, broken, kind="searched", nth=nth + 1)
    names = sorted(path.name for path in (broken / "checkpoints").iterdir())
    assert any("search" in name for name in names)
    told: list[dict[str, Any]] = []
    run(recipe, broken, listen=as_dicts(told.append))
    searched = [event["done"] for event in told if event["event"] == "searched" and event["stage"] == 1]
    assert searched[0] > 2, "what was done is not done again"
    assert_same_model(reference, broken)
    rounds = [(line["stage"], line["done"]) for line in log_of(broken, "searched")]
    assert rounds == [(stage, done) for stage in (1, 2) for done in range(2, 13, 2)], "each round once in the log"


@pytest.mark.parametrize(("changes", "said"), [
    ({"axes": ["neurons", "residual"]}, "reduce policy_gradient draws neurons and kv_heads, and axes names residual"),
    ({"reduce": "policy_gradient(masks=1)"}, "option 'masks' of reduce 'policy_gradient' is 1; give a whole number (2 or more)"),
    ({"reduce": "policy_gradient(updates=0)"}, "option 'updates' of reduce 'policy_gradient' is 0; give a whole number (1 or "
    "more)"),
    ({"chooser": "allocate.uniform(last=2)"}, "so last=2 of chooser 'allocate.uniform(last=2)' would not hold; leave that out"),
    ({"budget": "1000"}, "budget 1,000 is too small: "),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, **changes), tmp_path / "run", said)
