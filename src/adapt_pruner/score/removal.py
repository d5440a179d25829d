"""What each unit is worth by the drop of the task's own measure when it is gone: the module-wise pruning error of MoPE-CLIP."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.kinds import tower_of
from adapt_pruner.core.model.precision import casting_once, precision
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system.parts import part
from adapt_pruner.score.calibrate import as_found, score
from adapt_pruner.score.weights import taylor

_TIE = 1e-6  # the most that Taylor importance adds to a drop; a recall of a thousand pairs moves by more


@part("metric", needs={"text"})
def drop(
    model: nn.Module,
    axes: Sequence[Axis],
    batches: Sequence[Tensor],
    *,
    groups: Annotated[int, "2 or more"] = 8,
    task: Task = CAUSAL_LM,
    dtype: str = "auto",
    on_axis: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """Drop of the task's own measure Z without a unit: Z[f] - Z[f without u], by forward passes only.

    Z is the mean of the recalls at 1, 5 and 10 in both directions for pictures and captions, and -L for a causal LM, of the loss L in
    nats per token. A unit is one head, one layer, or one of `groups` groups of neurons. The neurons of a layer are ordered by
    first-order Taylor importance and cut into groups of equal size; each neuron has the drop of its group. While one tower is
    measured, what the other makes of the text is kept. Taylor importance, scaled to at most 1e-6, orders units of equal drop,
    since a recall takes few values.

    Args:
        model: left as found.
        axes: those to score: heads, neurons and `layers`.
        batches: all batches together are the pairs among which is retrieved.
        groups: g, groups of neurons in a layer.
        task: what the model learns.
        dtype: precision of the matrix products.
        on_axis: told (done, of) after each axis.

    Returns:
        axis name -> float32 [axis.entries] on the CPU. Comparable between heads, layers and groups of neurons.

    Source: MoPE-CLIP, arXiv:2403.07839. How neurons are ordered is not in what we know of the paper; here by |Σ w · g| over each
    matrix, with the absolute value after the sum over the text, as in a re-implementation. Differs: each layer's group is measured
    alone, not a group of that number in all layers.
    """
    sliced = [axis for axis in axes if axis.gate.is_linear]
    ties: Scores = {}
    if sliced:
        ties, _ = score(model, sliced, batches, metrics=[partial(taylor, form="vector")], task=task, dtype=dtype)
    found: Scores = {}
    device = next(model.parameters()).device
    with torch.no_grad(), as_found(model, set()), casting_once(model), precision(device, dtype):
        whole = {tower: task.observed(model, batches, tower) for tower in task.towers}
        merit = task.merit(whole, batches)

        def without(axis: Axis, gone: Tensor) -> float:
            tower = tower_of(axis.name)
            with gated(model, axes, Mask({axis.name: ~gone})):
                return merit - task.merit({**whole, tower: task.observed(model, batches, tower)}, batches)

        for done, axis in enumerate(axes, start=1):
            drops = torch.zeros(axis.entries)
            tie = ties.get(axis.name, torch.zeros(axis.entries))
            units = _groups(tie, groups) if axis.kind == "neurons" else list(torch.arange(axis.entries).split(1))
            for unit in units if len(units) > 1 else ():
                gone = torch.zeros(axis.entries, dtype=torch.bool)
                gone[unit] = True
                drops[unit] = without(axis, gone)
            found[axis.name] = drops + _TIE * tie / tie.max().clamp_min(1e-30)
            on_axis(done, len(axes))
    return found


def _groups(order: Tensor, number: int) -> list[Tensor]:
    """The units in `number` groups of equal size, the most important together, int64."""
    return [group for group in order.argsort(descending=True, stable=True).tensor_split(number) if len(group)]
