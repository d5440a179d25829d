"""Remove whole layers, attentions and MLPs until the budget is met, those first that change their input least.

The budget rarely falls between two whole units. Other axes that may shrink make up the difference; without any, the model ends
up to one whole unit below the budget.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from adapt_pruner.core.model.axes import Axis, Scores, in_pattern
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.core.model.kinds import kind_of
from adapt_pruner.core.system.parts import part
from adapt_pruner.reduce.choose.allocate import Debt, uniform


@part("chooser", needs={"distance", "whole"})
def drop_layers(
    scores: Scores, axes: Sequence[Axis], budget: Budget, *, debt: Debt, step: float, periodic: bool = False
) -> tuple[dict[str, int], Debt]:
    """Remove whole layers, attentions and MLPs, the lowest scores first, until the budget is met.

    All units of the kinds in `axes` are ranked together by score. They are removed from the lowest on, while the next one has no
    more parameters than must still go. The last unit of a kind stays, and a removed layer takes its blocks along. The rest is
    then less than the next unit. If `axes` has other axes in the layers that stay, these lose the rest, all the same share
    (`allocate.uniform` in one shot). If there are none or they are too small, the next unit goes, too.

    Units are ranked by the score itself, not by score per parameter. A cosine or a loss has no natural zero, so dividing it by a
    size means nothing, and both sources rank by the score alone. Attention mostly changes its input less than an MLP does, so it
    tends to go first although the MLP has more parameters.

    Args:
        scores: of `layers`, float32 [num_layers], and of each block, float32 [1]: a distance between its input and its output.
        axes: the axes that may shrink, `layers` or those of blocks among them.
        budget: parameters to keep.
        debt: the sizes at the start; `Debt.none(axes)` at first.
        step: share of the layers and blocks at the start that is removed before the next measurement, at least one unit; blocks
            removed with their layer do not count. 1 is one shot.
        periodic: keep the pattern of a model with layers of several kinds, such as Gemma 3, of which every sixth layer is global.
            The layers that stay have the kinds of that many first layers, in their order, and of all such choices the highest sum
            of scores. There is most choice where whole periods go. It needs `axes` without attentions and MLPs.

    Returns:
        Units each axis keeps, and the debt after it. Axes inside removed layers and blocks keep their size.

    Source: with `blocks.block_influence` and in one shot, this is ShortGPT (arXiv:2403.03853) for layers, and What Matters in
    Transformers? (arXiv:2406.15786) for attentions, MLPs or both ranked together. Differs: the budget is a number of parameters,
    not of units, and each unit counts its own parameters.
    """
    line = _lowest_first(scores, axes)
    kinds = {axis.kind for axis, _ in line.values()}
    at_once = max(1, round(step * sum(size for name, size in debt.start.items() if kind_of(name) in kinds)))

    def removed(gone: AbstractSet[str]) -> int:
        return sum(cost for unit, (_, cost) in line.items() if unit in gone and _owner(unit) not in gone)

    def others(gone: AbstractSet[str]) -> list[Axis]:
        inner = [axis for axis in axes if not axis.gate.is_whole]
        return [axis for axis in inner if not gone & {f"layers.{axis.layer}", *axis.enclosing}]

    gone: frozenset[str] = frozenset()
    depth = next((axis for axis in axes if axis.pattern), None)
    for more in _in_line(line) if depth is None or not periodic else _in_pattern(depth, scores):
        if removed(gone) >= budget.excess or len(gone) >= at_once:
            break
        room = sum((axis.size - 1) * axis.cost for axis in others(gone))
        if removed(more) > budget.excess and removed(gone) + room >= budget.excess:
            break
        gone = more
    others_pay = removed(gone) < budget.excess and len(gone) < at_once
    sizes = {axis.name: 0 if axis.name in gone else axis.size for axis in axes}
    if "layers" in sizes:
        sizes["layers"] -= sum(_owner(unit) == "layers" for unit in gone)
    if others_pay:
        rest = Budget(keep=budget.keep, total=budget.total - removed(gone))
        paid, debt = uniform(scores, others(gone), rest, debt=debt, step=1.0)
        sizes |= paid
    return sizes, debt


def _in_line(line: Mapping[str, tuple[Axis, int]]) -> Iterator[frozenset[str]]:
    """Sets of units that may go, each with one more from the front of the line; the last unit of each kind stays."""
    kinds = {axis.kind for axis, _ in line.values()}
    gone: frozenset[str] = frozenset()
    staying: set[str] = set()
    for unit, (axis, _) in line.items():
        more = gone | {unit}
        if {other.kind for name, (other, _) in line.items() if not more & {name, _owner(name)}} != kinds:
            staying.add(axis.kind)  # the rest of the kind stays, too: a unit with a higher score must not go in its place
        if axis.kind not in staying and _owner(unit) not in gone:
            gone = more
            yield gone


def _in_pattern(depth: Axis, scores: Scores) -> Iterator[frozenset[str]]:
    """Sets of layers that may go, each of one more, such that those that stay have the pattern of the axis."""
    worth = scores[depth.name].tolist()
    for count in range(depth.size - 1, 0, -1):
        stay = in_pattern(depth.pattern, worth, count)
        yield frozenset(f"{depth.name}.{layer}" for layer in range(depth.size) if layer not in stay)


def _lowest_first(scores: Scores, axes: Sequence[Axis]) -> dict[str, tuple[Axis, int]]:
    """Whole units by name (`layers.3`, `layers.3.mlps`), with axis and cost, lowest score first; among equals the last first."""
    units: list[tuple[float, str, Axis, int]] = []
    for axis in axes:
        if axis.modules:
            units.append((float(scores[axis.name]), axis.name, axis, axis.cost))
        elif axis.gate.is_whole:
            worth = scores[axis.name].tolist()
            units += [(worth[i], f"{axis.name}.{i}", axis, cost) for i, cost in enumerate(axis.costs)]
    units.reverse()
    return {unit: (axis, cost) for _, unit, axis, cost in sorted(units, key=lambda scored: scored[0])}


def _owner(unit: str) -> str:
    """The layer that a block lies in; for a layer, `layers`."""
    return unit.rpartition(".")[0]
