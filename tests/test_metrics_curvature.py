"""The cost of a unit by curvature, against constrained least squares worked out one unit at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.score import curvature
from adapt_pruner.score.calibrate import Evidence, evidence_needed, score
from conftest import LAYOUTS, tiny_model

RIDGE = 0.3


def statistics(model: Any, name: str, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """x xᵀ and g gᵀ at a linear layer, per token and per predicted token, in float64, by transformers' own forward."""
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        entered.append(args[0].detach().flatten(0, 1).double())
        left.append(output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    for ids in batches:
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    x = torch.cat(entered)
    g = torch.cat([one.grad.flatten(0, 1).double() for one in left])  # type: ignore[union-attr]
    return x.t() @ x / len(x), g.t() @ g / sum(ids.numel() - len(ids) for ids in batches)


def slow_costs(weight: Tensor, a: Tensor, g: Tensor, *, width: int, blocks: int) -> Tensor:
    """Greedy removal; each unit costed by solving for the best change of all columns that are left."""
    a = a + RIDGE * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)
    units = len(a) // width
    each = units // blocks
    weight, alive = weight.double().clone(), set(range(units))
    costs, highest = torch.zeros(units, dtype=torch.float64), [0.0] * blocks

    def change(unit: int) -> Tensor:
        gone = list(range(unit * width, (unit + 1) * width))
        stays = [j for other in sorted(alive - {unit}) for j in range(other * width, (other + 1) * width)]
        delta = torch.zeros_like(weight)
        delta[:, gone] = -weight[:, gone]
        if stays:
            delta[:, stays] = torch.linalg.solve(a[stays][:, stays], a[stays][:, gone] @ weight[:, gone].t()).t()
        return delta

    def cost(unit: int) -> float:
        delta = change(unit)
        return float(torch.trace(delta @ a @ delta.t() @ g)) / 2

    for turn in range(each):
        chosen = []
        for block in range(blocks):
            members = [unit for unit in alive if unit // each == block]
            unit = min(members, key=cost)
            if turn == each - 1:  # the last is costed, not removed
                for one in members:
                    costs[one] = max(highest[block], cost(one))
                continue
            highest[block] = max(highest[block], cost(unit))
            costs[unit] = highest[block]
            chosen.append(unit)
        together = [j for unit in chosen for j in range(unit * width, (unit + 1) * width)]
        alive -= set(chosen)
        stays = [j for unit in sorted(alive) for j in range(unit * width, (unit + 1) * width)]
        if together:
            weight[:, stays] += torch.linalg.solve(a[stays][:, stays], a[stays][:, together] @ weight[:, together].t()).t()
            weight[:, together] = 0
    return costs


@pytest.mark.parametrize(
    "layout", [one for one in LAYOUTS if one[1] in ("llama", "qwen2", "llama-mha-biased")], ids=lambda one: one[1]
)
def test_costs_are_those_of_removal_with_the_best_repair(layout: tuple[str, str], batches: list[Tensor]) -> None:
    model = tiny_model(layout)
    axes = families.axes(model)
    found, _ = score(model, axes, batches, metrics=[curvature.kfac], dtype="float32")
    for axis in axes:
        if axis.layer == 1 and axis.gate.is_linear:
            weight = model.get_parameter(f"{axis.gate.module}.weight").detach()
            a, g = statistics(model, axis.gate.module, batches)
            expected = slow_costs(weight, a, g, width=axis.gate.width, blocks=axis.groups)
            assert torch.allclose(found[axis.name].double(), expected, rtol=2e-3), axis.name


def test_of_two_neurons_that_do_the_same_one_costs_nothing(batches: list[Tensor]) -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[7] = projection.weight[3]
    found, _ = score(
        model, families.axes(model), batches, metrics=[lambda m, a: curvature.kfac(m, a, ridge=1e-6)], dtype="float32"
    )
    scores = found["layers.1.neurons"]
    assert min(scores[3], scores[7]) < 1e-3 * scores.median()
    assert max(scores[3], scores[7]) > 0.1 * scores.median()


def test_many_units_are_ordered_in_rounds(batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """With more neurons than rounds several go at once: scores are within a few per cent of one by one, where all at once is a third off."""
    monkeypatch.setattr(curvature, "_ROUNDS", 24)
    model = tiny_model(intermediate_size=64)
    found, _ = score(model, families.axes(model), batches, metrics=[curvature.kfac], dtype="float32")
    scores = found["layers.0.neurons"]
    assert torch.isfinite(scores).all()
    a, g = statistics(model, "model.layers.0.mlp.down_proj", batches)
    expected = slow_costs(model.model.layers[0].mlp.down_proj.weight.detach(), a, g, width=1, blocks=1)
    assert (scores.double().log() - expected.log()).abs().mean() < 0.1
    first, as_expected = set(scores.argsort()[:16].tolist()), set(expected.argsort()[:16].tolist())
    assert len(first & as_expected) >= 15


def test_no_weight_gets_a_gradient(batches: list[Tensor]) -> None:
    """Only what flows is differentiated: a third of the work and the memory of the gradients are saved."""
    model = tiny_model()
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    seen: list[bool] = []

    def nosy(model: Any, axes: Any) -> Any:
        handle = model.model.layers[2].register_forward_hook(
            lambda module, args, output: seen.append(any(p.requires_grad for p in model.parameters()) or not output.requires_grad)
        )
        yield Evidence.FORWARD
        handle.remove()
        return {}

    axes = families.axes(model)
    assert evidence_needed(model, axes, [curvature.kfac]) is Evidence.STREAM_GRADIENTS
    _, loss = score(model, axes, batches, metrics=[curvature.kfac, nosy], dtype="float32")
    assert seen == [False] * len(batches)
    assert loss == pytest.approx(
        float(sum(CAUSAL_LM.loss(model, ids).detach() for ids in batches)) / sum(ids.numel() - len(ids) for ids in batches)
    )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
