"""How many whole layers, attentions and MLPs go: as many as the budget asks for, those that change their input least first.

Where other axes may shrink too they pay for what is less than a whole unit; otherwise the model ends up to one such unit below the
budget.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from adapt_pruner.core.axes import Axis, Scores
from adapt_pruner.core.budget import Budget
from adapt_pruner.core.parts import part
from adapt_pruner.reduce.allocate import Debt, uniform

__all__ = ["drop_layers"]


@part("chooser", needs={"distance", "whole"})
def drop_layers(scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt, step: float) -> tuple[dict[str, int], Debt]:
    """Remove whole layers, attentions and MLPs, the lowest scores first, until the budget is met.

    Those of the kinds that `axes` names stand in one line by their score. The lowest goes while it fits into what must still
    go, but the last of a kind stays; a layer takes its blocks along. Then, with such axes alone, one more goes; with other
    axes beside them, those in what stays pay the rest, all the same share (`allocate.uniform` in one shot), unless they are too
    small for it.

    The score counts as it is, not per parameter: a cosine and a loss have no zero that a quotient could be taken from, and both
    sources rank by the score alone. So attention, which mostly changes its input less, tends to go before an MLP that costs more.

    Args:
        scores: of `layers`, float32 [num_layers], and of each block, float32 [1]: a distance between what enters and what leaves.
        axes: the axes that may shrink, `layers` or those of blocks among them.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of the layers and blocks at the start that goes before they are measured again, at least one of them; blocks
            that went with their layer do not count. 1 is one shot.

    Returns:
        Units each axis keeps (those in layers and blocks that go are whole), and the debt after it.

    Source: with `blocks.block_influence` and in one shot, of layers ShortGPT, arXiv:2403.03853, and of attentions, MLPs or both in
    one line What Matters in Transformers?, arXiv:2406.15786. Differs: it goes by parameters, not by a number of units, and counts
    each unit's own.
    """
    line = _lowest_first(scores, axes)
    kinds = {axis.kind for axis, _ in line.values()}
    at_once = max(1, round(step * sum(size for name, size in debt.start.items() if name.rpartition(".")[2] in kinds)))

    def removed(gone: AbstractSet[str]) -> int:
        return sum(cost for unit, (_, cost) in line.items() if unit in gone and _owner(unit) not in gone)

    def left(gone: AbstractSet[str]) -> set[str]:
        return {axis.kind for unit, (axis, _) in line.items() if not gone & {unit, _owner(unit)}}

    def others(gone: AbstractSet[str]) -> list[Axis]:
        inner = [axis for axis in axes if not axis.gate.is_whole]
        return [axis for axis in inner if not gone & {f"layers.{axis.layer}", *axis.enclosing}]

    gone: frozenset[str] = frozenset()
    staying: set[str] = set()
    for unit, (axis, _) in line.items():
        if removed(gone) >= budget.excess or len(gone) >= at_once:
            others_pay = False
            break
        with_it = gone | {unit}
        if left(with_it) != kinds:
            staying.add(axis.kind)  # the ones behind it too: which layers go is their scores' to say
        if axis.kind in staying or _owner(unit) in gone:
            continue
        room = sum((axis.size - 1) * axis.cost for axis in others(gone))
        others_pay = removed(with_it) > budget.excess and removed(gone) + room >= budget.excess
        if others_pay:
            break
        gone = with_it
    else:
        others_pay = removed(gone) < budget.excess
    sizes = {axis.name: 0 if axis.name in gone else axis.size for axis in axes}
    if "layers" in sizes:
        sizes["layers"] -= sum(_owner(unit) == "layers" for unit in gone)
    if others_pay:
        rest = Budget(keep=budget.keep, total=budget.total - removed(gone))
        paid, debt = uniform(scores, others(gone), rest, debt=debt, step=1.0)
        sizes |= paid
    return sizes, debt


def _lowest_first(scores: Scores, axes: Sequence[Axis]) -> dict[str, tuple[Axis, int]]:
    """The units that go whole, by name (`layers.3`, `layers.3.mlps`) with their axis and cost; of equals the first stays, as in Mask."""
    units: list[tuple[float, str, Axis, int]] = []
    for axis in axes:
        if axis.modules:
            units.append((float(scores[axis.name]), axis.name, axis, axis.cost))
        elif axis.gate.is_whole:
            worth = scores[axis.name].tolist()
            units += [(worth[i], f"{axis.name}.{i}", axis, cost) for i, cost in enumerate(axis.costs)]
    units.reverse()
    return {unit: (axis, cost) for _, unit, axis, cost in sorted(units, key=lambda one: one[0])}


def _owner(unit: str) -> str:
    """The layer that a block lies in; of a layer, `layers`."""
    return unit.rpartition(".")[0]
