"""Sizes that other tools can store or run fast: widths that are multiples of a number, and layers that are all alike.

This is a step after any chooser. It takes the sizes that the chooser wants and returns sizes near them that remove at least as
many parameters. If layers may differ, it removes less than one multiple of neurons more. An axis that keeps more than the chooser
wanted loses it later, since the chooser is asked again with the actual sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adapt_pruner.core.model.axes import Axis, Mask, Scores, towers_of
from adapt_pruner.core.model.kinds import HEADS, tower_of
from adapt_pruner.errors import UsageError


def check_multiple(axes: Sequence[Axis], multiple_of: int) -> None:
    """Refuse a `multiple_of` above the number of neurons of some layer.

    Raises:
        UsageError: a layer has fewer neurons.
    """
    least = min((axis.size for axis in axes if axis.kind == "neurons"), default=multiple_of)
    if multiple_of > least:
        raise UsageError(f"multiple_of {multiple_of} is above the {least:,} neurons that a layer has; lower it")


def fitting(
    sizes: Mapping[str, int], axes: Sequence[Axis], *, scores: Scores, multiple_of: int = 1, equal_widths: bool = False
) -> dict[str, int]:
    """Sizes near `sizes` that remove at least as many parameters, if the axes are large enough for it.

    With M = `multiple_of`, each layer's width is first rounded down to a multiple of M. Then widths go up by M, first those that
    lost most, as long as the whole still removes what was wanted. With `equal_widths` all layers get the same width, the largest
    multiple of M that removes what was wanted. They also get the same number of heads: the mean of what was wanted, rounded up.
    Neurons pay for these heads; fewer heads stay only if neurons cannot pay.

    Args:
        sizes: axis name -> units that the chooser wants to keep.
        axes: the axes that may shrink.
        scores: of `layers`, read only if some layers go.
        multiple_of: M; 1 allows any number of neurons.
        equal_widths: whether every layer that stays gets the same sizes.

    Returns:
        Axis name -> units to keep; none more than the axis has.
    """
    if len(towers := towers_of(axes)) > 1:
        options: dict[str, Any] = {"scores": scores, "multiple_of": multiple_of, "equal_widths": equal_widths}
        parts = [[axis for axis in axes if tower_of(axis.name) == tower] for tower in towers]
        of_parts = [fitting({axis.name: sizes[axis.name] for axis in part}, part, **options) for part in parts]
        return {name: size for part in of_parts for name, size in part.items()}
    staying = _staying(sizes, axes, scores)
    kept = dict(sizes)
    wanted = sum((axis.size - sizes[axis.name]) * axis.cost for axis in staying)  # parameters to remove

    def left() -> int:
        """Parameters that neurons still have to remove, once heads are as `kept` says."""
        return wanted - sum((axis.size - kept[axis.name]) * axis.cost for axis in staying if axis.kind != "neurons")

    neurons = [axis for axis in staying if axis.kind == "neurons"]
    heads = [[axis for axis in staying if axis.kind == kind] for kind in HEADS]
    if not equal_widths:
        return kept | _rounded(neurons, {axis.name: sizes[axis.name] for axis in neurons}, left(), multiple_of)
    for alike in heads:
        mean = -(-sum(sizes[axis.name] for axis in alike) // max(1, len(alike)))
        kept |= {axis.name: min([mean, *(other.size for other in alike)]) for axis in alike}
    room = sum((axis.size - min(axis.size, multiple_of)) * axis.cost for axis in neurons)
    for alike in heads:
        while left() > room and alike and kept[alike[0].name] > 1:
            kept |= {axis.name: kept[axis.name] - 1 for axis in alike}
    if neurons:
        least = min(axis.size for axis in neurons)
        cost = sum(axis.cost for axis in neurons)
        width = (sum(axis.size * axis.cost for axis in neurons) - left()) // cost
        width = max(min(least, multiple_of), min(least, width))
        kept |= {axis.name: width // multiple_of * multiple_of or width for axis in neurons}
    return kept


def alike_experts(sizes: Mapping[str, int], axes: Sequence[Axis], *, scores: Scores) -> dict[str, int]:
    """The same sizes, but as many experts in every layer, since engines read one number: the most that removes as many parameters."""
    experts = [axis for axis in _staying(sizes, axes, scores) if axis.kind == "experts"]
    if not experts:
        return dict(sizes)
    left = sum(sizes[axis.name] * axis.cost for axis in experts) // sum(axis.cost for axis in experts)
    number = max(min(left, *(axis.size for axis in experts)), *(axis.least for axis in experts))
    return {**sizes, **{axis.name: number for axis in experts}}


def levelled(sizes: Mapping[str, int], axes: Sequence[Axis]) -> dict[str, int]:
    """The same sizes; but if the widths of all layers differ by just one neuron, and heads by none, all get the lower width.

    The model is then a plain folder that any tool loads. It ends below the budget by less than one neuron for each layer.

    Args:
        sizes: axis name -> units to keep, of those that may shrink.
        axes: all axes of the model.
    """
    if any(axis.gate.is_whole and sizes.get(axis.name, axis.size) < axis.size for axis in axes):
        return dict(sizes)
    heads = {kind: {sizes.get(axis.name, axis.size) for axis in axes if axis.kind == kind} for kind in HEADS}
    neurons = {axis.name: sizes.get(axis.name, axis.size) for axis in axes if axis.kind == "neurons"}
    low, high = min(neurons.values(), default=0), max(neurons.values(), default=0)
    if high - low != 1 or low < 1 or not neurons.keys() <= sizes.keys() or any(len(alike) > 1 for alike in heads.values()):
        return dict(sizes)
    return {**sizes, **dict.fromkeys(neurons, low)}


def _staying(sizes: Mapping[str, int], axes: Sequence[Axis], scores: Scores) -> list[Axis]:
    """The axes in layers, attentions and MLPs that stay; those of the whole model are left to the chooser."""
    depth = next((axis for axis in axes if axis.kind == "layers"), None)
    stays = None if depth is None else Mask.of_sizes([depth], scores, sizes)[depth.name]
    inside = [axis for axis in axes if axis.layer is not None and (stays is None or bool(stays[axis.layer]))]
    return [axis for axis in inside if all(sizes.get(outer, 1) for outer in axis.enclosing)]


def _rounded(neurons: Sequence[Axis], wanted: Mapping[str, int], removed: int, multiple: int) -> dict[str, int]:
    """Multiples near `wanted` that remove `removed` parameters: all are rounded down, then those that lost most go up again."""
    rounded = {axis.name: max(wanted[axis.name] // multiple * multiple, min(axis.size, multiple)) for axis in neurons}
    room = sum((axis.size - rounded[axis.name]) * axis.cost for axis in neurons) - removed
    for axis in sorted(neurons, key=lambda axis: rounded[axis.name] - wanted[axis.name]):
        up = rounded[axis.name] + multiple
        if rounded[axis.name] < wanted[axis.name] and up <= axis.size and multiple * axis.cost <= room:
            rounded[axis.name], room = up, room - multiple * axis.cost
    for axis in sorted(neurons, key=lambda axis: wanted[axis.name] - rounded[axis.name]):
        while room < 0 and rounded[axis.name] >= 2 * multiple:  # when some layers could not go down to their multiple
            rounded[axis.name], room = rounded[axis.name] - multiple, room + multiple * axis.cost
    return rounded
