"""`greedy_gates` and `free_gates`: the formulas by hand, gradients, an exact budget, what is folded, and a killed run that goes on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce.free_gates import FreeGates, retained
from adapt_pruner.reduce.greedy_gates import GreedyGates
from adapt_pruner.reduce.learnt_units import add_gradients
from adapt_pruner.report.with_card import run
from adapt_pruner.work import RunData, Stage, Work
from conftest import LAYOUTS, as_dicts, assert_refused, assert_same_model, break_off, log_of, tiny_model

METHODS = ("grasprune", "ddp")


def work_of(model: Any, batches: list[torch.Tensor], method: str, **keys: Any) -> Work:
    recipe = {"model": "x", "budget": "80%", "method": method, "dtype": "float32", "calibration": {"samples": 6, "length": 12}}
    work = Work.of(model, read(recipe | keys))
    work.stages = [Stage(1, work.num_params * 8 // 10, 1, 0, 0, 0)]
    work.data = RunData(calibration=lambda iteration: [batch.roll(iteration, 0) for batch in batches])
    return work


def small(method: str) -> Any:
    return GreedyGates(updates=3, scale_updates=2, sequences=2) if method == "grasprune" else FreeGates(updates=5, sequences=2)


def inside(work: Work) -> list[Any]:
    return [axis for axis in work.axes if axis.kind in ("neurons", "kv_heads")]


@pytest.mark.parametrize("divergence", [0.0, 2.0])
def test_gradients_are_those_of_the_gated_loss_and_no_weight_has_one(divergence: float, batches: list[torch.Tensor]) -> None:
    """Against logits written out: cross-entropy, and 2 KL from the ungated model."""
    work = work_of(tiny_model(), batches, "ddp")
    gates = {axis.name: torch.linspace(0.4, 1.3, axis.entries).requires_grad_() for axis in inside(work)}
    loss = add_gradients(work, gates, batches[:2], divergence=divergence)
    assert all(weight.grad is None and weight.requires_grad for weight in work.model.parameters())
    other = {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}
    total = torch.zeros(())
    for ids in batches[:2]:
        with torch.no_grad():
            whole = work.model(ids).logits[:, :-1].log_softmax(-1)
        with gated(work.model, work.axes, other):
            ours = work.model(ids).logits[:, :-1].log_softmax(-1)
        total = (
            total - ours.gather(-1, ids[:, 1:, None]).sum() + divergence * F.kl_div(ours, whole, log_target=True, reduction="sum")
        )
    mean = total / sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches[:2])
    mean.backward()
    assert loss == pytest.approx(float(mean), rel=1e-5)
    for name, gate in gates.items():
        assert torch.allclose(gate.grad, other[name].grad, atol=1e-6), name


def test_hard_gates_meet_the_budget_in_every_update_and_learn_straight_through(
    batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates are 0 or 1 and within the budget; z moves by dL/dgate · p (1 - p); then only the scales of units that stay move."""
    work = work_of(tiny_model(), batches, "grasprune")
    seen: list[dict[str, torch.Tensor]] = []
    of_gates = {axis.name: torch.linspace(-1, 1, axis.entries) for axis in inside(work)}

    def pretend(work: Work, gates: dict[str, torch.Tensor], batches: Any) -> float:
        seen.append({name: gate.detach().clone() for name, gate in gates.items()})
        torch.autograd.backward(list(gates.values()), [of_gates[name] for name in gates])
        return 1.0

    monkeypatch.setattr("adapt_pruner.reduce.greedy_gates.add_gradients", pretend)
    one = GreedyGates(updates=2, scale_updates=2, lr=0.1, scale_lr=0.01)
    one._begin(work, inside(work), 0.8, stage=1, iteration=1)
    before = {name: z.detach().clone() for name, z in one._values.items()}
    one._update(work, inside(work), 0.8, batches)
    for name, z in one._values.items():
        p = before[name].sigmoid()
        slope = of_gates[name] * p * (1 - p)
        assert torch.allclose(z.detach(), before[name] - 0.1 * slope.sign(), atol=1e-3), "Adam's first step"
        assert one._scales[name].detach().tolist() == [1.0] * len(z)
    one._update(work, inside(work), 0.8, batches)
    fixed = {name: z.detach().clone() for name, z in one._values.items()}
    one._update(work, inside(work), 0.8, batches)
    one._update(work, inside(work), 0.8, batches)
    for gates in seen[:3]:
        assert all(set(gate.tolist()) <= {0.0, 1.0} for gate in gates.values())
        kept = Mask({name: gate > 0 for name, gate in gates.items()})
        left = count_parameters(cut_copy(kept))
        assert work.stages[0].params - 3 * min(axis.cost for axis in inside(work)) < left <= work.stages[0].params
    assert all(torch.equal(z.detach(), fixed[name]) for name, z in one._values.items())
    for name, scale in one._scales.items():
        stays = seen[2][name] > 0
        assert bool((scale.detach()[stays & (of_gates[name] != 0)] != 1).all())
        assert bool((scale.detach()[~stays] == 1).all())
        assert torch.equal(seen[3][name] > 0, stays), "the units stay as they are"


def cut_copy(mask: Mask) -> Any:
    model = tiny_model()
    work = Work.of(model, read({"model": "x", "budget": "80%"}))
    cut(model, work.axes, mask)
    return model


def test_retention_follows_the_amplitude() -> None:
    z = torch.tensor([0.0, 0.25, 0.5, 1.0, 7.0])
    assert retained(z, 0.5).tolist() == pytest.approx([0.0, 1.2 / (1 + math.exp(1.2)) - 0.1, 0.5, 1.0, 1.0], abs=1e-3)
    assert retained(torch.tensor([0.05, 0.1]), 0.05).tolist() == pytest.approx([0.5, 1.0], abs=1e-3), "as the threshold falls"


def test_multipliers_ascend_until_the_share_that_stays_is_due(
    batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the first update has s = 1, so the first multiplier rises by 0.02 (1 - ρ), the second by 0.4 (1 - ρ)², the third not."""
    work = work_of(tiny_model(), batches, "ddp", axes=["neurons"])
    axes = [axis for axis in work.axes if axis.kind == "neurons"]
    monkeypatch.setattr("adapt_pruner.reduce.free_gates.add_gradients", lambda *_, **__: 3.0)
    one = FreeGates(updates=400, ascent=4.0)
    one._begin(work, axes, 0.6, stage=1, iteration=1)
    assert one._update(work, axes, 0.6, batches) == [3.0]
    assert one._multipliers == pytest.approx([4 * 0.02 * 0.4, 4 * 0.4 * 0.16, 0.0], abs=1e-3)
    for _ in range(399):
        one._update(work, axes, 0.6, batches)
    shares = torch.cat(list(one._shares().values()))
    assert 0.3 < float(shares.mean()) < 0.9, "without a loss nothing else holds them"
    assert float((shares * (1 - shares)).mean()) < 0.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_the_cut_model_is_the_gated_one_within_the_budget(
    method: str, layout: tuple[str, str], batches: list[torch.Tensor]
) -> None:
    """What is learnt beside the choice is in the weights: the logits after the cut are those under the last gates."""
    work = work_of(tiny_model(layout), batches, method)
    dense, dense_axes = {name: w.clone() for name, w in work.model.state_dict().items()}, work.axes
    target, reduction = work.stages[0].params, small(method)
    for step in reduction.steps(work, target):
        if hasattr(step, "mask"):
            learnt = reduction._scales if method == "grasprune" else reduction._values
            gates = {name: step.mask[name].float() * learnt[name].detach().relu() for name in learnt}
            work.apply(step)
    assert target - min(axis.cost for axis in dense_axes if axis.kind == "neurons") < work.num_params <= target
    assert any(bool((gate[gate > 0] != 1).any()) for gate in gates.values()), "amplitudes were learnt"
    model = tiny_model(layout)
    model.load_state_dict(dense)
    with torch.no_grad(), gated(model, dense_axes, gates):
        expected = model(batches[0]).logits
    with torch.no_grad():
        assert torch.allclose(work.model(batches[0]).logits, expected, atol=1e-4)


def recipe_of(folder: Path, text: Path, method: str, **changes: Any) -> Recipe:
    reduce = (
        "greedy_gates(updates=6, scale_updates=4, sequences=2)"
        if method == "grasprune"
        else "free_gates(updates=10, sequences=2)"
    )
    keys = {
        "model": str(folder), "budget": "85%", "method": method, "dtype": "float32", "device": "cpu", "checkpoint_minutes": 0,
        "reduce": reduce, "calibration": {"source": str(text), "samples": 4, "length": 16},
    }  # fmt: skip
    return read(keys | changes)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_search_goes_on_bit_equal(method: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file, method)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="searched", nth=4)
    told: list[dict[str, Any]] = []
    run(recipe, tmp_path / "broken", listen=as_dicts(told.append))
    assert next(event["done"] for event in told if event["event"] == "searched") > 2, "what was done is not done again"
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    assert [line["done"] for line in log_of(tmp_path / "broken", "searched")] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("changes", "said"), [
    ({"axes": ["neurons", "residual"]}, "draws neurons and kv_heads, and axes names residual"),
    ({"chooser": "allocate.uniform(last=2)"}, "so last=2 of chooser 'allocate.uniform(last=2)' would not hold; leave that out"),
    ({"minutes": 5}, "takes the time that it needs; leave minutes out"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    method: str, changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, method, **changes), tmp_path / "run", said)
