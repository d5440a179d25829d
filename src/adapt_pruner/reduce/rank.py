"""Rank the units of all axes in one line and remove the lowest, until enough parameters are gone.

    worth[a][r]    what the r-th lowest unit of axis a is worth, in a measure that holds across axes
    line           the units of all axes, lowest worth first; of equals one layer's stand apart in depth

The choosers here differ in the worth. The line is cut where the budget is met, counted in parameters, so a KV head weighs
what it really costs. Of `Debt` they read the sizes at the start only.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_pruner.core.axes import Axis, Scores
from adapt_pruner.core.budget import Budget
from adapt_pruner.core.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.allocate import GOLDEN, Debt

__all__ = ["per_parameter", "standardised"]

_FRONT = 1e6  # beyond any standardised score
_STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")


@part("chooser")
def per_parameter(
    scores: Scores,
    axes: Sequence[Axis],
    budget: Budget,
    *,
    debt: Debt,
    step: float,
    floor: float = 0.0,
    level: float = 0.0,
    apart: bool = False,
) -> tuple[dict[str, int], Debt]:
    """Rank the units of all axes together by score per parameter and remove the lowest.

    worth[u] = score[u] / cost(axis of u) · (g(kind) / g(axis))^level

    score[u] is the sum over its entries where a unit has one in every block; g(axis) is the geometric mean of the scores of an
    axis, g(kind) that over the axes of its kind. With `level` 0 scores are taken at their word across layers and kinds, so
    it wants a metric whose scores are comparable there: Taylor's are all in nats, and so are losses; magnitudes and activations
    of different layers are not. What is measured of each layer alone says too little of layers that lose much side by side,
    though: `level` brings the layers closer together, and with 1 they differ by their spread only.

    Args:
        scores: of every axis, float32 [entries]; comparable across axes.
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of all prunable parameters at the start that goes in an iteration; 1 prunes in one shot.
        floor: share of its size at the start that every axis keeps at least, in [0, 1]; one unit in any case.
        apart: divide by the mean over all units of a kind, so that heads and neurons, whose scores may be of another order, stand in one
            line by how they compare with their own (GISP's normalisation of attention and MLP).
        level: how far the axes of a kind are levelled, in [0, 1]. Above 0 it is for scores that are not negative.

    Returns:
        Units each axis keeps, and the debt as it was. The model ends at the budget or below it by less than one unit of the
        cheapest kind, while there are any.

    Raises:
        UsageError: `floor` or `level` is no share, or a score is negative where axes are levelled.

    Source: ours; global ranking as in Taylor pruning (arXiv:1906.10771), with parameters as the price.
    """
    for option, share in (("floor", floor), ("level", level)):
        if not 0 <= share <= 1:
            raise UsageError(f"option {option}={share} of rank.per_parameter is not a share; write it between 0 and 1")
    factors = _levelling(scores, axes, level) if level > 0 else dict.fromkeys(scores, 1.0)
    least = {axis.name: min(axis.size, max(1, math.ceil(debt.start[axis.name] * floor - 1e-9))) for axis in axes}
    worth = {
        axis.name: _lowest_first(axis, scores[axis.name])[: axis.size - least[axis.name]]
        * (axis.blocks / axis.cost * factors[axis.name])
        for axis in axes
    }
    if apart:
        means = _means_of_kinds(scores, axes)
        worth = {axis.name: worth[axis.name] / means[axis.kind] for axis in axes}
    return _sizes(axes, worth, budget, debt=debt, step=step), debt


def _means_of_kinds(scores: Scores, axes: Sequence[Axis]) -> dict[str, float]:
    """Kind -> the mean worth per parameter of all its units; 1 where that is 0."""
    means = {}
    for kind in {axis.kind for axis in axes}:
        values = [scores[axis.name].double() * (axis.blocks / axis.cost) for axis in axes if axis.kind == kind]
        means[kind] = float(torch.cat(values).abs().mean()) or 1.0
    return means


def _levelling(scores: Scores, axes: Sequence[Axis], level: float) -> dict[str, float]:
    """(g(kind) / g(axis))^level for every axis; zeros count as the smallest positive number of float32."""
    logs = {}
    for axis in axes:
        if bool((scores[axis.name] < 0).any()):
            raise UsageError(
                f"option level={level} of rank.per_parameter is for scores that are not negative, and {axis.name} has one of "
                f"{float(scores[axis.name].min()):.3g}; leave it out, or take another metric"
            )
        logs[axis.name] = float(scores[axis.name].double().clamp_min(torch.finfo(torch.float32).tiny).log().mean())
    of_kind: dict[str, list[float]] = {}
    for axis in axes:
        of_kind.setdefault(axis.kind, []).append(logs[axis.name])
    return {axis.name: math.exp(level * (sum(of_kind[axis.kind]) / len(of_kind[axis.kind]) - logs[axis.name])) for axis in axes}


@part("chooser")
def standardised(
    scores: Scores,
    axes: Sequence[Axis],
    budget: Budget,
    *,
    debt: Debt,
    step: float,
    structure: str = "AL-AM",
    heads: float | None = None,
    by: str = "unit",
) -> tuple[dict[str, int], Debt]:
    """Bring the scores of each axis to mean 0 and deviation 1, then apply one threshold to all axes (FLAP).

    z[u] = (score[u] - mean of its axis) / (standard deviation of its axis, over n - 1); 0 where an axis's scores are alike.

        AL-AM    all units in one line by z
        AL-MM    a given share of the heads goes, the lowest z of all layers; neurons in one line by z pay the rest
        UL-MM    that share of the heads goes in every layer; neurons pay the rest, the same share in every layer
        UL-UM    every axis gives up the same share

    Args:
        scores: of every axis, float32 [entries].
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of all prunable parameters at the start that goes in an iteration; 1, as in FLAP, prunes in one shot.
        structure: AL-AM, AL-MM, UL-MM or UL-UM.
        heads: share of the heads there were at the start that goes under AL-MM and UL-MM, rounded down; as many of them as
            the budget pays for, and never more.
        by: `unit`: scores are standardised. `feature`: they are taken as they come, from a metric that has standardised the
            features of an axis and gives a unit their mean (`activations.fluctuation(standardised=true)`), as FLAP does.

    Returns:
        Units each axis keeps, and the debt as it was. The model ends at the budget or below it by less than one unit of the
        cheapest kind, while there are any.

    Raises:
        UsageError: another structure or `by`, or `heads` is missing, out of range or without use.

    Source: FLAP, arXiv:2312.11983. Differs: a head weighs its parameters on this model (theirs counts every head as 512/3
    neurons, right for a head size of 128 without grouped queries). By `unit`, heads spread as far as neurons do; by `feature`,
    as there, the mean over a head's features draws heads together toward 0. The threshold is met within one neuron.
    """
    _check_options(structure, heads, by)
    worth = {axis.name: _lowest_first(axis, scores[axis.name]) for axis in axes}
    worth = {name: (_standardised(values) if by == "unit" else values)[:-1] for name, values in worth.items()}
    if structure.startswith("UL"):
        worth = {axis.name: _share_gone(axis, debt.start[axis.name])[:-1] for axis in axes}
    if heads is not None:
        attention = [axis for axis in axes if axis.kind.endswith("heads")]
        if not attention:
            raise UsageError(
                f"option heads={heads} of rank.standardised is a share of heads, and axes names none; add kv_heads to axes"
            )
        due = _heads_due(attention, worth, debt, heads, together=structure == "AL-MM")
        # Heads that are due stand in front of all neurons, the others in no line at all.
        worth |= {axis.name: worth[axis.name][: due[axis.name]] - _FRONT for axis in attention}
    return _sizes(axes, worth, budget, debt=debt, step=step), debt


def _check_options(structure: str, heads: float | None, by: str) -> None:
    if by not in ("unit", "feature"):
        raise UsageError(f"option by={by} of rank.standardised is not known; known: unit, feature")
    if structure not in _STRUCTURES:
        raise UsageError(f"structure {structure!r} of rank.standardised is not known; known: {', '.join(_STRUCTURES)}")
    if structure.endswith("MM") and heads is None:
        raise UsageError(
            f"structure {structure} of rank.standardised needs the share of heads that goes; write it like heads=0.2"
        )
    if not structure.endswith("MM") and heads is not None:
        raise UsageError(f"option heads={heads} is for the structures UL-MM and AL-MM, not for {structure}; leave it out")
    if heads is not None and not 0 <= heads < 1:
        raise UsageError(f"option heads={heads} of rank.standardised is not a share that may go; write it from 0 to below 1")


def _heads_due(axes: Sequence[Axis], worth: Mapping[str, Tensor], debt: Debt, share: float, *, together: bool) -> dict[str, int]:
    """Heads still to go of each axis until `share` of those at the start is gone, from each axis or from all `together`."""
    starts = {axis.name: debt.start[axis.name] for axis in axes}
    if together:
        num = math.floor(sum(starts.values()) * share + 1e-9) - sum(starts[axis.name] - axis.size for axis in axes)
        return _count(axes, _line(axes, worth)[: max(0, num)])
    return {axis.name: max(0, axis.size - starts[axis.name] + math.floor(starts[axis.name] * share + 1e-9)) for axis in axes}


def _lowest_first(axis: Axis, score: Tensor) -> Tensor:
    """What an axis's units are worth in the order in which they go, float64 [size]; one of several blocks their mean."""
    return score.double().view(axis.blocks, axis.size).sort(dim=1).values.mean(dim=0)


def _standardised(values: Tensor) -> Tensor:
    centred = values - values.mean()
    deviation = (centred.square().sum() / max(1, values.numel() - 1)).sqrt()
    return torch.zeros_like(values) if deviation <= 1e-9 * values.abs().max() else centred / deviation


def _share_gone(axis: Axis, start: int) -> Tensor:
    """The share of an axis that is gone once each further unit is, so that one line takes the same share from all axes."""
    return torch.arange(start - axis.size + 1, start + 1, dtype=torch.float64) / start


def _line(axes: Sequence[Axis], worth: Mapping[str, Tensor]) -> list[Axis]:
    """The axis that loses a unit, for each unit in turn, lowest worth first; equals are spread over the depth of the model."""
    spread = sorted(axes, key=lambda axis: (axis.layer or 0) * GOLDEN % 1)
    values = torch.cat([worth[axis.name] for axis in spread])
    owners = torch.arange(len(spread)).repeat_interleave(torch.tensor([worth[axis.name].numel() for axis in spread]))
    return [spread[i] for i in owners[values.argsort(stable=True)].tolist()]


def _count(axes: Sequence[Axis], losing: Sequence[Axis]) -> dict[str, int]:
    """How often each axis stands in a line."""
    times = Counter(axis.name for axis in losing)
    return {axis.name: times[axis.name] for axis in axes}


def _sizes(axes: Sequence[Axis], worth: Mapping[str, Tensor], budget: Budget, *, debt: Debt, step: float) -> dict[str, int]:
    """Sizes after the units in front of the line have gone, until the budget is met or a step is done.

    A dear unit that would take more than the budget asks for is passed over. Only where the cheap ones are used up do such
    units go after all, and then the cheap ones last in line stay.
    """
    cheapest = min(axis.cost for axis in axes)
    goal = min(budget.excess, step * sum(debt.start[axis.name] * axis.cost for axis in axes))
    losing: list[Axis] = []
    passed_over: list[Axis] = []
    removed = 0
    for axis in _line(axes, worth):
        if removed >= goal:
            break
        if axis.cost > cheapest and removed + axis.cost > budget.excess:
            passed_over.append(axis)
        else:
            losing.append(axis)
            removed += axis.cost
    for axis in passed_over:
        if removed < goal:
            losing.append(axis)
            removed += axis.cost
    lost = _count(axes, losing)
    for axis in reversed(losing):
        if axis.cost == cheapest and removed - cheapest >= budget.excess:
            lost[axis.name] -= 1
            removed -= cheapest
    return {axis.name: axis.size - lost[axis.name] for axis in axes}
