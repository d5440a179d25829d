"""How many whole layers go: as many as the budget asks for, those that change their input least first.

Where other axes may shrink too they pay for what is less than a layer; otherwise the model ends up to one layer below the budget.
"""

from collections.abc import Sequence

from adapt_pruner.choose.allocate import Debt, uniform
from adapt_pruner.core.axes import Axis, Scores
from adapt_pruner.core.budget import Budget

__all__ = ["drop_layers"]


def drop_layers(scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt, step: float) -> tuple[dict[str, int], Debt]:
    """The layers with the lowest score go, whole, until the budget is met.

    The lowest-scored layer goes while it fits into what must still go. Then, with `layers` alone, one more goes; with other
    axes beside it, those in the layers that stay pay the rest, all the same share (`allocate.uniform` in one shot), unless
    they are too small for it.

    Args:
        scores: of `layers`, float32 [num_layers]: a distance between what enters a layer and what leaves it.
        axes: the axes that may shrink, `layers` among them.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of the layers at the start that goes before they are measured again, at least one layer; 1 is one shot.

    Returns:
        Units each axis keeps (those in layers that go are whole), and the debt after it.

    Source: ShortGPT, arXiv:2403.03853, with `blocks.block_influence` and in one shot. Differs: it goes by parameters, not by
    a number of layers, and counts each layer's own.
    """
    depth = next(axis for axis in axes if axis.name == "layers")
    line = scores["layers"].argsort(descending=True, stable=True).flip(0).tolist()  # of equals the first stays, as in Mask

    def others(layers: Sequence[int]) -> list[Axis]:
        return [axis for axis in axes if axis is not depth and (axis.layer is None or axis.layer in layers)]

    def room(layers: Sequence[int]) -> int:
        return sum((axis.size - 1) * axis.cost for axis in others(layers))

    at_once = max(1, round(step * debt.start["layers"]))
    gone = removed = 0
    others_pay = False
    for layer in line[:-1][:at_once]:
        if removed >= budget.excess:
            break
        others_pay = removed + depth.costs[layer] > budget.excess and removed + room(line[gone:]) >= budget.excess
        if others_pay:
            break
        gone, removed = gone + 1, removed + depth.costs[layer]
    sizes = {axis.name: axis.size for axis in axes} | {"layers": depth.size - gone}
    if others_pay or (gone == depth.size - 1 and removed < budget.excess):
        rest = Budget(keep=budget.keep, total=budget.total - removed)
        paid, debt = uniform(scores, others(line[gone:]), rest, debt=debt, step=1.0)
        sizes |= paid
    return sizes, debt
