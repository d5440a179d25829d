"""How much each axis gives up in one pruning iteration, and with which units: adaptive by layer, or the same everywhere.

A chooser is called once an iteration and takes one step towards the budget:

    mask, debt = chooser(scores, axes, budget, debt=debt, step=0.02, …)

Every axis a has a sparsity s_a, the share of its size at the start that is to be gone by now. A step raises all of them;
axis a then keeps start_a - floor(start_a · s_a) units, those with the best scores. What a floor leaves undone (a third of
a KV head cannot go) is a debt that later steps pay: it is carried in `Debt`, by default through the whole run.
The step that would pass the budget is shortened so that the model ends below it by less than one unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adapt_pruner.core.axes import Axis, Mask, Scores
from adapt_pruner.core.budget import Budget

__all__ = ["Debt", "adaptive", "layer_importance", "uniform"]

_MAX_SPARSITY = 0.99


@dataclass(frozen=True)
class Debt:
    """How far each axis is to be pruned: what adaptive and uniform carry from one iteration to the next.

    Attributes:
        start: axis name -> units it had when counting began.
        sparsity: axis name -> share of `start` that is to be gone by now, in [0, 0.99].
    """

    start: Mapping[str, int]
    sparsity: Mapping[str, float]

    @classmethod
    def none(cls, axes: Sequence[Axis]) -> "Debt":
        """Nothing owed, counted from the axes as they are."""
        return cls(start={axis.name: axis.size for axis in axes}, sparsity={axis.name: 0.0 for axis in axes})


def layer_importance(distances: torch.Tensor) -> list[float]:
    """Block distances brought to mean 0 and greatest absolute value 1; all zero when they do not differ.

    Source: Adapt-Pruner, arXiv:2502.03460. Differs: the authors' code divides by zero when all layers are alike.
    """
    centred = distances.double() - distances.double().mean()
    greatest = float(centred.abs().max())
    # Below the rounding of a float32 mean the layers are alike.
    if greatest <= 1e-6 * max(1.0, float(distances.abs().max())):
        return [0.0] * distances.numel()
    return [float(value) for value in centred / greatest]


def adaptive(
    scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt, step: float, amplitude: float
) -> tuple[Mask, Debt]:
    """Layers that change their input less give up more: s += step - amplitude · I, with I the layer's importance.

    I is `layer_importance` of scores["layers"], measured anew each iteration on the model as pruned so far; s is clipped
    to [0, 0.99]. Within an axis the units with the lowest scores go. The last step is scaled as a whole.

    Args:
        scores: of every axis in `axes`, and of `layers`.
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: where every axis stands; `Debt.none(axes)` at first.
        step: share of an axis's start size removed an iteration, on average over the layers (the authors' r / T_p: 0.02).
        amplitude: how much importance shifts that share (0.02 in the authors' scripts; 0 makes it uniform).

    Returns:
        The mask of this iteration and the debt after it.

    Raises:
        ValueError: scores are missing, misshapen or not finite.

    Source: Adapt-Pruner, arXiv:2502.03460, `adaptive_update_prune_distribution`. Differs: the model ends within one unit
    of the budget instead of one iteration beyond it; a negative increment never asks for units back.
    """
    importance = layer_importance(scores["layers"])
    increments = {axis.name: step - amplitude * importance[_layer(axis)] for axis in axes}
    return _advance(scores, axes, budget, debt, increments)


def uniform(scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt, step: float) -> tuple[Mask, Debt]:
    """Every axis gives up the same share: s += step; the control that adaptive has to beat.

    Args:
        scores: of every axis in `axes`.
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: where every axis stands; `Debt.none(axes)` at first.
        step: share of an axis's start size removed an iteration; 1 prunes in one shot.

    Returns:
        The mask of this iteration and the debt after it.

    Raises:
        ValueError: scores are missing, misshapen or not finite.

    Source: the uniform baseline of Adapt-Pruner (amplitude 0) and the local ratio of LLM-Pruner, arXiv:2305.11627.
    """
    return _advance(scores, axes, budget, debt, {axis.name: step for axis in axes})


def _layer(axis: Axis) -> int:
    if axis.layer is None:
        raise ValueError(f"axis {axis.name!r} lies in no layer, so no layer's importance applies to it")
    return axis.layer


def _advance(
    scores: Scores, axes: Sequence[Axis], budget: Budget, debt: Debt, increments: Mapping[str, float]
) -> tuple[Mask, Debt]:
    """Raise the sparsities by `increments`, as often as it takes for a unit to go, but not past the budget."""

    def sparsity_after(times: float) -> dict[str, float]:
        return {
            axis.name: min(_MAX_SPARSITY, max(0.0, debt.sparsity[axis.name] + times * increments[axis.name])) for axis in axes
        }

    def sizes_after(times: float) -> dict[str, int]:
        sparsity = sparsity_after(times)
        sizes = {}
        for axis in axes:
            start = debt.start[axis.name]
            owed = start - math.floor(start * sparsity[axis.name] + 1e-9)
            sizes[axis.name] = min(axis.size, max(1, owed))
        return sizes

    def removed(sizes: Mapping[str, int]) -> int:
        return sum((axis.size - sizes[axis.name]) * axis.cost for axis in axes)

    times = 1.0
    while removed(sizes_after(times)) == 0 and sparsity_after(times) != sparsity_after(times + 1):
        times += 1.0
    sizes = sizes_after(times)
    if removed(sizes) > budget.excess:
        under, over = times - 1.0, times
        while removed(sizes_after(under)) > budget.excess:
            under -= 1.0
        for _ in range(60):
            middle = (under + over) / 2
            under, over = (under, middle) if removed(sizes_after(middle)) >= budget.excess else (middle, over)
        times = over
        sizes = _settle(axes, budget.excess, sizes_after(under), sizes_after(over))
    elif removed(sizes) == 0:  # every axis is at its greatest sparsity and the budget is still out of reach of the rule
        sizes = _settle(axes, budget.excess, sizes, {axis.name: 1 for axis in axes})
    return Mask.of_sizes(axes, scores, sizes), Debt(start=debt.start, sparsity=sparsity_after(times))


def _settle(axes: Sequence[Axis], excess: int, under: Mapping[str, int], over: Mapping[str, int]) -> dict[str, int]:
    """Sizes between `under` (removes too little) and `over` (enough) that remove `excess` parameters, less than a unit more.

    Units of the cheapest kind (neurons) are given back evenly. Where that is not enough, because a dear unit (a KV head)
    fell at the end of the step, the dear ones stay and cheap ones go instead.
    """
    cheapest = min(axis.cost for axis in axes)
    cheap = [axis for axis in axes if axis.cost == cheapest]

    def spare(sizes: Mapping[str, int]) -> int:
        return sum((axis.size - sizes[axis.name]) * axis.cost for axis in axes) - excess

    sizes = dict(over)
    # First to the axes that lost more at the end of the step than before, then to all that lost anything in it.
    for top in (under, {axis.name: axis.size for axis in axes}):
        while spare(sizes) >= cheapest:
            losers = [axis for axis in cheap if sizes[axis.name] < top[axis.name]]
            if not losers:
                break
            for axis in losers[: spare(sizes) // cheapest]:
                sizes[axis.name] += 1
    if spare(sizes) < cheapest:
        return sizes

    sizes = dict(under)
    while spare(sizes) < 0:
        losers = sorted((axis for axis in cheap if sizes[axis.name] > 1), key=lambda axis: -sizes[axis.name])
        if not losers:
            return dict(over)
        for axis in losers[: math.ceil(-spare(sizes) / cheapest)]:
            sizes[axis.name] -= 1
    return sizes
