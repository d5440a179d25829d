"""Choose how many units each axis loses in one pruning iteration: adaptive by layer, or the same share everywhere.

A chooser is called once per iteration. It takes one step towards the budget and says how many units each axis keeps; the units'
scores decide which ones (`Mask.of_sizes`):

    sizes, debt = chooser(scores, axes, budget, debt=debt, step=0.02, …)

Every axis a has a sparsity s_a: the share of its start size that should be removed by now. A step raises all sparsities; axis a
then keeps start_a - floor(start_a · s_a) units. The floor leaves a fraction of a unit (a third of a KV head cannot go), which is
a debt that later steps pay. `Debt` carries it, by default through the whole run. A step that would go past the budget is
shortened, so that the model ends less than one unit below the budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.kinds import HEADS, tower_of
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError

_MAX_SPARSITY = 0.99
_NEAREST = 1e-3  # a smaller share of the farthest distance counts as this much on a log scale, where 0 would be infinite
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, lie evenly spread in [0, 1)


@dataclass(frozen=True)
class Debt:
    """How far each axis should be pruned by now; choosers carry this from one iteration to the next.

    Attributes:
        start: axis name -> units of the axis when counting began.
        sparsity: axis name -> share of `start` that should be removed by now, in [0, 0.99].
    """

    start: Mapping[str, int]
    sparsity: Mapping[str, float]

    @classmethod
    def none(cls, axes: Sequence[Axis]) -> "Debt":
        """No debt, counted from the present sizes of the axes."""
        return cls(start={axis.name: axis.size for axis in axes}, sparsity={axis.name: 0.0 for axis in axes})

    def after(self, mask: Mask) -> "Debt":
        """The same debt under the axis names after a cut by `mask`. Removed layers owe nothing."""
        names = {name: mask.renamed(name) for name in self.start}
        return Debt(
            start={new: self.start[old] for old, new in names.items() if new is not None},
            sparsity={new: self.sparsity[old] for old, new in names.items() if new is not None},
        )


def layer_importance(distances: torch.Tensor, *, scale: Literal["distance", "log"] = "distance") -> list[float]:
    """Block distances, shifted to mean 0 and scaled to a largest absolute value of 1; all zero if they do not differ.

    With `scale` "log", log(max(d, max_j d_j / 1000)) takes the place of a distance d. So layers count by how many times as far
    they move their input, and one layer that moves it 20 times as far as the others does not hide how these differ.

    Source: Adapt-Pruner, arXiv:2502.03460. Differs: the authors' code divides by zero when all layers are alike; `log` is ours.
    """
    if scale == "log":
        farthest = float(distances.max())
        distances = distances.double().clamp(min=farthest * _NEAREST).log() if farthest > 0 else torch.zeros_like(distances)
    centred = distances.double() - distances.double().mean()
    greatest = float(centred.abs().max())
    # Differences below the rounding error of a float32 mean count as none.
    if greatest <= 1e-6 * max(1.0, float(distances.abs().max())):
        return [0.0] * distances.numel()
    return [float(value) for value in centred / greatest]


@part("chooser", needs={"distance", "layers"})
def adaptive(
    scores: Scores,
    axes: Sequence[Axis],
    budget: Budget,
    *,
    debt: Debt,
    step: float,
    amplitude: float,
    heads_after: float = 0.0,
    scale: Literal["distance", "log"] = "distance",
) -> tuple[dict[str, int], Debt]:
    """Layers that change their input less give up more: s += step - amplitude · I, with I the layer's importance.

    I is `layer_importance` of scores["layers"], measured again in each iteration on the model as pruned so far. s is clipped
    to [0, 0.99]. The last step is shortened by the same factor for all axes.

    Args:
        scores: of `layers`; others are not read.
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: where every axis stands; `Debt.none(axes)` at first.
        step: share of an axis's start size removed per iteration, on average over the layers (the authors' r / T_p: 0.02).
        amplitude: how much importance shifts that share (0.02 in the authors' scripts; 0 makes it uniform).
        heads_after: share of a layer's neurons that is removed before its first head, in [0, 1). At sparsity s its heads keep
            start - floor(start · max(0, (s - heads_after) / (1 - heads_after))). 0 is the paper's rule: both lose the same share.
        scale: of scores["layers"]: the `distance` as it is, which is the paper's rule, or its `log`; see `layer_importance`.

    Returns:
        Units each axis keeps, and the debt after it.

    Raises:
        ValueError: an axis lies in no layer.
        UsageError: `heads_after` is not in [0, 1), or `scale` is `log` and a distance is below 0.

    Source: Adapt-Pruner, arXiv:2502.03460, `adaptive_update_prune_distribution`. Differs: the model ends within one unit
    of the budget instead of one iteration past it; a negative increment never restores units; `heads_after` and `log` are ours.
    """
    _check_heads_after(heads_after, "adaptive")
    if scale == "log" and (lowest := float(scores["layers"].min())) < 0:
        raise UsageError(
            f"option scale=log of allocate.adaptive needs distances of 0 or more, and the lowest is {lowest:.2g}; set "
            "distance=blocks.block_influence, which is blocks.cosine + 1"
        )
    importance = layer_importance(scores["layers"], scale=scale)
    increments = {axis.name: step - amplitude * importance[_layer(axis)] for axis in axes}
    return advance(axes, budget, debt, increments, heads_after=heads_after)


@part("chooser")
def uniform(
    scores: Scores,
    axes: Sequence[Axis],
    budget: Budget,
    *,
    debt: Debt,
    step: float,
    first: Annotated[int, "0 or more"] = 0,
    last: Annotated[int, "0 or more"] = 0,
    heads_after: float = 0.0,
) -> tuple[dict[str, int], Debt]:
    """Every axis gives up the same share: s += step; the control that adaptive has to beat.

    `first` and `last` leave layers at either end whole; the other layers then lose more.

    Args:
        scores: not read.
        axes: the axes that may shrink.
        budget: parameters to keep.
        debt: where every axis stands; `Debt.none(axes)` at first.
        step: share of an axis's start size removed per iteration; 1 prunes in one shot.
        first: number of layers left whole at the input (4 of 32 in LLM-Pruner's scripts).
        last: number of layers left whole at the output (2 of 32).
        heads_after: share of the neurons that is removed before the first head, as in `adaptive`.

    Returns:
        Units each axis keeps, and the debt after it.

    Raises:
        UsageError: `heads_after` is not in [0, 1).

    Source: the uniform baseline of Adapt-Pruner (amplitude 0) and the local ratio of LLM-Pruner, arXiv:2305.11627.
    """
    _check_heads_after(heads_after, "uniform")
    ends: dict[str, int] = {}  # of each tower, if the model has several
    for axis in axes:
        ends[tower_of(axis.name)] = max(ends.get(tower_of(axis.name), 0), 1 + (-1 if axis.layer is None else axis.layer))
    paying = [axis for axis in axes if axis.layer is None or first <= axis.layer < ends[tower_of(axis.name)] - last]
    paid, debt = advance(paying, budget, debt, {axis.name: step for axis in paying}, heads_after=heads_after)
    return {axis.name: axis.size for axis in axes} | paid, debt


def _check_heads_after(share: float, chooser: str) -> None:
    if not 0 <= share < 1:
        raise UsageError(f"option heads_after={share} of allocate.{chooser} is not a share; write 0 or more, and less than 1")


def _layer(axis: Axis) -> int:
    if axis.layer is None:
        raise ValueError(f"axis {axis.name!r} lies in no layer, so no layer's importance applies to it")
    return axis.layer


def advance(
    axes: Sequence[Axis], budget: Budget, debt: Debt, increments: Mapping[str, float], *, heads_after: float = 0.0
) -> tuple[dict[str, int], Debt]:
    """Raise the sparsities by `increments`, but not past the budget.

    A step may remove next to nothing, because no axis owes a whole unit yet or most axes are at their limit. The step is then
    repeated until it removes something, since scoring again would see the same model.

    Raises:
        ValueError: an increment is not finite.
    """
    for name, increment in increments.items():
        if not math.isfinite(increment):
            raise ValueError(f"the increment of {name} is {increment}, not a finite number; in a plan all scores are zero")
    if not axes:
        return {}, debt

    def sparsity_after(times: float) -> dict[str, float]:
        return {
            axis.name: min(_MAX_SPARSITY, max(0.0, debt.sparsity[axis.name] + times * increments[axis.name])) for axis in axes
        }

    late = {axis.name: heads_after if axis.kind in HEADS else 0.0 for axis in axes}

    def due(sparsity: Mapping[str, float]) -> dict[str, float]:
        """The share of each axis that should be removed; heads lose nothing until the share passes `heads_after`."""
        return {name: max(0.0, (share - late[name]) / (1 - late[name])) for name, share in sparsity.items()}

    def sizes_after(times: float) -> dict[str, int]:
        shares = due(sparsity_after(times))
        sizes = {}
        for axis in axes:
            start = debt.start[axis.name]
            owed = start - math.floor(start * shares[axis.name] + 1e-9)
            sizes[axis.name] = min(axis.size, max(axis.least, owed))
        return sizes

    def removed(times: float) -> int:
        return _removed(axes, sizes_after(times))

    average = sum(abs(increments[axis.name]) * axis.size * axis.cost for axis in axes)
    goal = min(average / 10, budget.excess)
    times = 1.0
    while removed(times) < goal and sparsity_after(times) != sparsity_after(2 * times):
        times *= 2  # an increment may be tiny, so the number of steps is doubled, then found by bisection
    before = times // 2
    while times - before > 1:
        middle = (before + times) // 2
        before, times = (before, middle) if removed(middle) >= goal else (middle, times)
    if removed(times) >= budget.excess:
        under, over = max(0.0, times - 1), times
        for _ in range(60):
            middle = (under + over) / 2
            under, over = (under, middle) if removed(middle) >= budget.excess else (middle, over)
        times = over
    sizes, sparsity = sizes_after(times), sparsity_after(times)
    # If nothing was removed, every axis is at its limit and the rule cannot go further.
    if _removed(axes, sizes) >= budget.excess or _removed(axes, sizes) == 0:
        sizes = _settle(axes, budget.excess, sizes, due(sparsity), debt)
    return sizes, Debt(start=debt.start, sparsity={**debt.sparsity, **sparsity})


def _removed(axes: Sequence[Axis], sizes: Mapping[str, int]) -> int:
    return sum((axis.size - sizes[axis.name]) * axis.cost for axis in axes)


def _settle(
    axes: Sequence[Axis], excess: int, wanted: Mapping[str, int], shares: Mapping[str, float], debt: Debt
) -> dict[str, int]:
    """Sizes near `wanted` that remove `excess` parameters, or more by less than one unit of the cheapest kind (a neuron).

    First, the cheap units that `wanted` removes count as gone. The rest of the excess pays for expensive units (KV heads) that
    `wanted` removes. Axes that owe most lose theirs first; equal axes are spread over the depth of the model. Expensive units
    that stay are still owed. So if the budget is missed by little, a few more neurons go, and not a whole head in place of many
    neurons. Cheap units make up the difference: they are taken from all their axes evenly, or given back evenly. Expensive
    units that are not owed go only if the cheap units do not suffice.
    """
    cheapest = min(axis.cost for axis in axes)
    cheap = [axis for axis in axes if axis.cost == cheapest]
    dear = [axis for axis in axes if axis.cost != cheapest]
    sizes = {axis.name: axis.size for axis in axes}

    def owed(axis: Axis) -> tuple[float, float]:
        """Sort key of an expensive axis: units that it owes, with fractions, then its place in an even spread over depth."""
        start = debt.start[axis.name]
        return round(start * shares[axis.name] - (start - sizes[axis.name]), 9), -((axis.layer or 0) * GOLDEN % 1)

    left_over = excess - sum((axis.size - wanted[axis.name]) * cheapest for axis in cheap)
    gone = 0  # parameters of expensive units
    while payable := [axis for axis in dear if sizes[axis.name] > wanted[axis.name] and gone + axis.cost <= left_over]:
        axis = max(payable, key=owed)
        sizes[axis.name] -= 1
        gone += axis.cost
    room = sum((axis.size - axis.least) * cheapest for axis in cheap)
    while excess - gone > room and (left := [axis for axis in dear if sizes[axis.name] > axis.least]):
        axis = max(left, key=owed)
        sizes[axis.name] -= 1
        gone += axis.cost

    taken = {axis.name: axis.size - wanted[axis.name] for axis in cheap}
    due = min(room // cheapest, max(0, math.ceil((excess - gone) / cheapest)))
    while (difference := due - sum(taken.values())) != 0:
        if difference > 0:
            movable = [axis for axis in cheap if taken[axis.name] < axis.size - axis.least]
        else:
            movable = [axis for axis in cheap if taken[axis.name] > 0]
        for axis in movable[: abs(difference)]:
            taken[axis.name] += 1 if difference > 0 else -1
    return sizes | {axis.name: axis.size - taken[axis.name] for axis in cheap}
