"""Rank the units of all axes together and remove the lowest, until enough parameters are gone.

    worth[a][r]    what the r-th lowest unit of axis a is worth, comparable across axes
    line           the units of all axes, lowest worth first; equal ones are spread over the depth of the model

The choosers here differ in how they compute the worth. Units go from the front of the line until the budget is met. It is counted
in parameters, so a KV head weighs what it really costs. Of `Debt` these choosers read only the sizes at the start.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.kinds import HEADS
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.choose.allocate import GOLDEN, Debt

_FRONT = 1e6  # beyond any standardised score


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
) -> tuple[dict[str, int], Debt]:
    """Rank the units of all axes together by score per parameter and remove the lowest.

    worth[u] = score[u] / cost(axis of u) · (g(kind) / g(axis))^level

    If a unit has an entry in every group, score[u] is the sum over its entries. g(axis) is the geometric mean of the scores of an
    axis, g(kind) that over all axes of its kind. With `level` 0, scores are compared as they are across layers and kinds. That
    needs a metric whose scores are comparable: Taylor scores and losses are all in nats, but magnitudes and activations of
    different layers do not compare. Scores that are measured on each layer alone do not show how much is lost when many layers
    lose units together. `level` therefore brings the layers closer together; with 1 they differ only in their spread.

    Args:
        scores: of every axis, float32 [entries]; comparable across axes.
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of all prunable parameters at the start that goes in an iteration; 1 prunes in one shot.
        floor: share of its size at the start that every axis keeps at least, in [0, 1]; one unit in any case.
        level: how far the axes of a kind are levelled, in [0, 1]. Values above 0 need scores that are not negative.

    Returns:
        Units each axis keeps, and the debt as it was. The model ends at the budget, or below it by less than one unit of the
        cheapest kind as long as there are such units.

    Raises:
        UsageError: `floor` or `level` is not in [0, 1], or a score is negative and `level` is above 0.

    Source: ours; global ranking as in Taylor pruning (arXiv:1906.10771), with parameters as the cost.
    """
    for option, share in (("floor", floor), ("level", level)):
        if not 0 <= share <= 1:
            raise UsageError(f"option {option}={share} of rank.per_parameter is not a share; write it between 0 and 1")
    factors = _levelling(scores, axes, level) if level > 0 else dict.fromkeys(scores, 1.0)
    least = {axis.name: min(axis.size, max(axis.least, math.ceil(debt.start[axis.name] * floor - 1e-9))) for axis in axes}
    worth = {
        axis.name: _lowest_first(axis, scores[axis.name])[: axis.size - least[axis.name]]
        * (axis.groups / axis.cost * factors[axis.name])
        for axis in axes
    }
    return _sizes(axes, worth, budget, debt=debt, step=step), debt


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


@part("chooser", needs={"layers", "structures"})
def per_structure(
    scores: Scores,
    axes: Sequence[Axis],
    budget: Budget,
    *,
    debt: Debt,
    step: float,
    first: Annotated[float, "0 to 1"] = 0.1,
    last: Annotated[int, "0 or more"] = 1,
) -> tuple[dict[str, int], Debt]:
    """Rank heads and channels of all layers together by score over the size that GISP gives them, and remove the lowest.

        worth[head] = score / (4 · head_dim · hidden)         worth[channel] = score / (3 · channels of its layer at the start)

    With 2 in place of 3 in an MLP without a gate. The size of a head is that of one with its own keys and values, whatever its
    group shares; the size of a channel is not the number of its weights, which would be 3 · hidden.

    Args:
        scores: of every axis, float32 [entries]; comparable across axes.
        axes: the axes that may shrink, all in layers.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of all structures at the start that goes in an iteration; a query head counts as one, and so does a channel.
        first: share of the layers that stays whole at the input, rounded down to whole layers.
        last: number of layers that stay whole at the output.

    Returns:
        Units each axis keeps, and the debt as it was. The model ends at the budget, or below it by less than one channel as long
        as there are such.

    Source: GISP, arXiv:2510.18030, and its released code. Differs: theirs masks single query heads; here a unit of `query_heads`
    is one head of every KV group, worth the mean of its heads, since attention kernels want groups of equal size. The last step
    ends at the budget.
    """
    depth = max((axis.layer + 1 for axis in axes if axis.layer is not None), default=0)
    middle = range(int(depth * first + 1e-9), depth - last)
    worth = {}
    for axis in axes:
        may_go = axis.size - axis.least if axis.layer in middle else 0
        ranked = _lowest_first(axis, scores[axis.name])[:may_go]
        worth[axis.name] = ranked / _structure_size(axis, debt.start[axis.name])
    return _sizes(axes, worth, budget, debt=debt, step=step, structures=True), debt


def _structure_size(axis: Axis, start: int) -> float:
    """What GISP divides the score of a head or a channel by; the weights of a head are counted without biases."""
    matrices = [piece for piece in axis.slices if not piece.parameter.endswith(".bias")]
    if axis.kind not in HEADS:
        return len(matrices) * start
    biases = sum(piece.width for piece in axis.slices) - sum(piece.width for piece in matrices)
    return 4 * (axis.cost / axis.groups - biases) / len(matrices)


@part("chooser")
def standardised(
    scores: Scores,
    axes: Sequence[Axis],
    budget: Budget,
    *,
    debt: Debt,
    step: float,
    structure: Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"] = "AL-AM",
    heads: float | None = None,
    by: Literal["unit", "kind", "feature"] = "unit",
) -> tuple[dict[str, int], Debt]:
    """Bring the scores of each axis, or kind, to mean 0 and deviation 1, then apply one threshold to all axes (FLAP).

    z[u] = (score[u] - mean of its axis) / (standard deviation of its axis, over n - 1); 0 where an axis's scores are alike.

        AL-AM    all units ranked together by z
        AL-MM    a given share of the heads goes, lowest z of all layers first; neurons, ranked together by z, pay the rest
        UL-MM    that share of the heads goes in every layer; neurons pay the rest, the same share in every layer
        UL-UM    every axis gives up the same share

    Args:
        scores: of every axis, float32 [entries].
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of all prunable parameters at the start that goes in an iteration; 1, as in FLAP, prunes in one shot.
        structure: AL-AM, AL-MM, UL-MM or UL-UM.
        heads: share of the heads at the start that goes under AL-MM and UL-MM, rounded down; fewer if the budget does not pay
            for all of them.
        by: `unit` standardises the scores of each axis. `kind` standardises those of all axes of a kind together; that needs scores
            that compare across layers, and suits axes of a few heads, whose lowest z is far below 0 whatever they are worth.
            `feature` takes them as they are, from a metric that has standardised the features of
            an axis and gives a unit their mean (`activations.fluctuation(standardised=true)`), as FLAP does.

    Returns:
        Units each axis keeps, and the debt as it was. The model ends at the budget, or below it by less than one unit of the
        cheapest kind as long as there are such units.

    Raises:
        UsageError: `heads` is missing, out of range or without use.

    Source: FLAP, arXiv:2312.11983. Differs: a head counts with its parameters in this model (FLAP counts every head as 512/3
    neurons, right for a head size of 128 without grouped queries). By `unit`, the scores of heads spread as far as those of
    neurons. By `feature`, as in FLAP, the mean over a head's features draws the scores of heads towards 0. The budget is met
    within one neuron.
    """
    _check_heads(structure, heads)
    worth = {axis.name: _lowest_first(axis, scores[axis.name]) for axis in axes}
    if by == "unit":
        worth = {name: _standardised(values) for name, values in worth.items()}
    elif by == "kind":
        worth = _standardised_by_kind(axes, worth)
    worth = {axis.name: worth[axis.name][: axis.size - axis.least] for axis in axes}
    if structure.startswith("UL"):
        starts = {axis.name: debt.start[axis.name] for axis in axes}  # by the share that is gone, all axes lose the same share
        gone = {axis.name: torch.arange(starts[axis.name] - axis.size + 1, starts[axis.name] - axis.least + 1) for axis in axes}
        worth = {name: numbers.double() / starts[name] for name, numbers in gone.items()}
    if heads is not None:
        attention = [axis for axis in axes if axis.kind in HEADS]
        if not attention:
            raise UsageError(
                f"option heads={heads} of rank.standardised is a share of heads, and axes names none; add kv_heads to axes"
            )
        starts = {axis.name: debt.start[axis.name] for axis in attention}
        if structure == "AL-MM":
            num = math.floor(sum(starts.values()) * heads + 1e-9) - sum(starts[axis.name] - axis.size for axis in attention)
            due = _count(attention, _line(attention, worth)[: max(0, num)])
        else:
            due = {
                axis.name: max(0, axis.size - starts[axis.name] + math.floor(starts[axis.name] * heads + 1e-9))
                for axis in attention
            }
        # Heads that are due go before all neurons; the others are not in the line at all.
        worth |= {axis.name: worth[axis.name][: due[axis.name]] - _FRONT for axis in attention}
    return _sizes(axes, worth, budget, debt=debt, step=step), debt


def _check_heads(structure: str, heads: float | None) -> None:
    if structure.endswith("MM") and heads is None:
        raise UsageError(
            f"structure {structure} of rank.standardised needs the share of heads that goes; write it like heads=0.2"
        )
    if not structure.endswith("MM") and heads is not None:
        raise UsageError(f"option heads={heads} is for the structures UL-MM and AL-MM, not for {structure}; leave it out")
    if heads is not None and not 0 <= heads < 1:
        raise UsageError(f"option heads={heads} of rank.standardised is not a share that may go; write it from 0 to below 1")


def _lowest_first(axis: Axis, score: Tensor) -> Tensor:
    """The scores of an axis in the order in which units go, float64 [size]; with several groups, the mean over the groups."""
    return score.double().view(axis.groups, axis.size).sort(dim=1).values.mean(dim=0)


def _standardised(values: Tensor) -> Tensor:
    centred = values - values.mean()
    deviation = (centred.square().sum() / max(1, values.numel() - 1)).sqrt()
    return torch.zeros_like(values) if deviation <= 1e-9 * values.abs().max() else centred / deviation


def _standardised_by_kind(axes: Sequence[Axis], worth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind in {axis.kind: None for axis in axes}:
        alike = [axis for axis in axes if axis.kind == kind]
        together = _standardised(torch.cat([worth[axis.name] for axis in alike]))
        found |= dict(zip([axis.name for axis in alike], together.split([axis.size for axis in alike]), strict=True))
    return found


def _line(axes: Sequence[Axis], worth: Mapping[str, Tensor]) -> list[Axis]:
    """The axis of each unit, lowest worth first; units of equal worth are spread over the depth of the model."""
    spread = sorted(axes, key=lambda axis: (axis.layer or 0) * GOLDEN % 1)
    values = torch.cat([worth[axis.name] for axis in spread])
    owners = torch.arange(len(spread)).repeat_interleave(torch.tensor([worth[axis.name].numel() for axis in spread]))
    return [spread[i] for i in owners[values.argsort(stable=True)].tolist()]


def _count(axes: Sequence[Axis], losing: Sequence[Axis]) -> dict[str, int]:
    """Axis name -> how many units it loses."""
    times = Counter(axis.name for axis in losing)
    return {axis.name: times[axis.name] for axis in axes}


def _sizes(
    axes: Sequence[Axis], worth: Mapping[str, Tensor], budget: Budget, *, debt: Debt, step: float, structures: bool = False
) -> dict[str, int]:
    """Sizes after units are removed from the front of the line, until the budget is met or a step is done.

    A step is a share of the parameters at the start, or of the entries if `structures`.

    An expensive unit that would remove more than the budget asks for is passed over. If the cheap units do not suffice, such
    units go after all, and the cheap units of highest worth are given back.
    """
    cheapest = min(axis.cost for axis in axes)
    counts = {axis.name: axis.groups if structures else axis.cost for axis in axes}
    goal = step * sum(debt.start[axis.name] * counts[axis.name] for axis in axes)
    losing: list[Axis] = []
    passed_over: list[Axis] = []
    removed = done = 0
    for axis in _line(axes, worth):
        if removed >= budget.excess or done >= goal:
            break
        if axis.cost > cheapest and removed + axis.cost > budget.excess:
            passed_over.append(axis)
        else:
            losing.append(axis)
            removed, done = removed + axis.cost, done + counts[axis.name]
    for axis in passed_over:
        if removed < budget.excess and done < goal:
            losing.append(axis)
            removed, done = removed + axis.cost, done + counts[axis.name]
    lost = _count(axes, losing)
    for axis in reversed(losing):
        if axis.cost == cheapest and removed - cheapest >= budget.excess:
            lost[axis.name] -= 1
            removed -= cheapest
    return {axis.name: axis.size - lost[axis.name] for axis in axes}
