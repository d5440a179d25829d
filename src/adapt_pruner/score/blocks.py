"""What a whole layer or block is worth, by the distance between its input and output; what any unit is worth, by shutting it.

X is the residual stream before a layer and Y the stream after it. For a block (the attention or the MLP of a layer), X is the
residual stream before it and Y = X + the block's output. All distances grow with the change from X to Y, so a layer that hardly
changes its input scores lowest. Every distance returns {"layers": float32 [num_layers]}, and float32 [1] for each axis of a block
that it is asked for.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.cut import first, gated
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.layers import decoder_layers, loss_above, streams
from adapt_pruner.core.model.precision import casting_once, computed_in
from adapt_pruner.core.model.shelf import at_hand, fetched, is_shelved
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.score.calibrate import Evidence, as_found, mean_loss

TOGETHER = 64  # units of a model on a shelf whose losses are found in one pass over the layers


@part("distance")
def cosine(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Layer importance by angle: -mean over tokens of cos(X, Y), X the input and Y the output of the whole layer.

    Returns:
        {"layers": float32 [num_layers]} in [-1, 1]; higher means the layer turns its input further.

    Source: Adapt-Pruner, arXiv:2502.03460, "mapping distortion", the default. The mean is taken over all tokens;
    the authors sum over mini-batches, which their normalisation undoes.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: -F.cosine_similarity(x, y, dim=-1)))


@part("distance")
def block_influence(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Block influence: 1 - mean over tokens of cos(X, Y), X the input and Y the output of the whole layer; ranks like `cosine`.

    Returns:
        {"layers": float32 [num_layers]} in [0, 2]; a layer at 0 leaves the direction of its input as it is.

    Source: ShortGPT, arXiv:2403.03853; for blocks What Matters in Transformers?, arXiv:2406.15786, equations 1 to 4, which also
    include the norm and the residual branch. Differs: Y of the last layer is that layer's own output. ShortGPT's released code
    reads the `hidden_states` that transformers returns, the last of which has been through the final norm.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1)))


@part("distance")
def euclidean(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Layer importance by Euclidean distance: mean over tokens of ‖Y - X‖₂.

    Returns:
        {"layers": float32 [num_layers]}, non-negative.

    Source: Adapt-Pruner, arXiv:2502.03460. Differs: the released code returns the distance with a minus sign. That makes the
    layers that change most look least important, contrary to its own cosine.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: (y - x).norm(p=2, dim=-1)))


@part("distance")
def manhattan(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """Layer importance by Manhattan distance: mean over tokens of ‖Y - X‖₁.

    Returns:
        {"layers": float32 [num_layers]}, non-negative.

    Source: Adapt-Pruner, arXiv:2502.03460. Differs: the sign, as for `euclidean`.
    """
    return (yield from _mean_over_tokens(model, axes, lambda x, y: (y - x).norm(p=1, dim=-1)))


@part("distance", "head_metric")
@torch.no_grad()
def loss_drop(
    model: nn.Module,
    axes: Sequence[Axis],
    batches: Sequence[Tensor],
    *,
    task: Task = CAUSAL_LM,
    dtype: str,
    on_axis: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """The loss with only this unit switched off: each unit is shut alone and the loss is measured.

    score[u] = L(u shut), the mean loss (of a causal LM in nats per token); within an axis that ranks like L(u shut) - L. Layers
    below the unit's own do not run again. Each unit costs one forward pass, so this is for few and expensive units: the KV heads
    of a layer, or whole layers and blocks, which add nothing to their input when shut. First-order scores can be far off for
    heads: in SmolLM2-135M the KV head of layer 1 that Taylor ranks last costs 2.5 nats.

    Args:
        model: causal LM; left as found.
        axes: the axes whose units to shut, one after the other. In an axis with groups one entry is shut at a time, since each
            group ranks its own. An axis of one unit that must stay scores 0.
        batches: token ids, int64 [batch, length].
        task: what the model learns.
        dtype: precision of the matrix products.
        on_axis: told (done, of) after each axis.

    Returns:
        axis name -> float32 [axis.entries] on the CPU.

    Source: ours; MoPE-CLIP (arXiv:2403.07839) and work on dropping layers also measure by removal.
    """
    losses, done = {axis.name: torch.zeros(axis.entries) for axis in axes}, 0
    may_go = [axis for axis in axes if axis.size > axis.least]
    outside = [axis for axis in may_go if len(task.towers) > 1 or (axis.layer is None and axis.name != "layers")]
    for axis in outside:
        for entry in range(axis.entries):
            with _shut(model, axes, axis, entry):
                losses[axis.name][entry] = mean_loss(model, batches, task=task, dtype=dtype)
    mine, predicted = world.share(batches), task.num_predicted(batches)
    if len(task.towers) > 1:  # it has several stacks of layers
        return losses
    stack = list(decoder_layers(model))
    units = [
        (index, axis, entry)
        for index in range(len(stack))
        for axis in may_go
        for entry in (range(axis.entries) if axis.layer == index else [index] if axis.name == "layers" else [])
    ]
    shelved, narrow = is_shelved(model), computed_in(next(model.parameters()).device, dtype)
    together, due = (TOGETHER, at_hand) if shelved else (1, fetched)
    with as_found(model, set()), nullcontext() if shelved else casting_once(model):
        flows, reached = streams(model, mine, task=task, dtype=dtype), 0
        for first_unit in range(0, len(units), together):
            group = units[first_unit : first_unit + together]
            shut: list[tuple[Axis, int, list[Tensor]]] = []
            for index in range(reached, len(stack)):
                here = [(axis, entry) for where, axis, entry in group if where == index]
                if not (here or shut or index < group[-1][0]):
                    break
                with due(stack[index]):
                    for number, (axis, entry, hidden) in enumerate(shut):
                        shut[number] = (
                            axis,
                            entry,
                            [flow.run(stack[index], index, h) for flow, h in zip(flows, hidden, strict=True)],
                        )
                    for axis, entry in here:
                        with _shut(model, axes, axis, entry):
                            shut.append((axis, entry, [flow.through(stack[index], index) for flow in flows]))
                    if index < group[-1][0]:
                        for flow in flows:
                            flow.hidden = flow.through(stack[index], index)
                        reached = index + 1
            with fetched(task.head(model), narrow=narrow):
                for axis, entry, hidden in shut:
                    total = torch.zeros((), dtype=torch.float64)
                    for batch, leaving in zip(mine, hidden, strict=True):
                        total += loss_above(model, batch, leaving, task=task, dtype=dtype).double().cpu()
                    world.sum_in_place(total)
                    losses[axis.name][entry] = float(total) / predicted
            while done < len(axes) and (layer := axes[done].layer) is not None and layer < group[-1][0]:
                done += 1
                on_axis(done, len(axes))
    for rest in range(done + 1, len(axes) + 1):
        on_axis(rest, len(axes))
    return losses


def _shut(model: nn.Module, axes: Sequence[Axis], axis: Axis, entry: int) -> AbstractContextManager[None]:
    return gated(model, axes, Mask({axis.name: torch.arange(axis.entries) != entry}))


def _mean_over_tokens(
    model: nn.Module, axes: Sequence[Axis], distance: Callable[[Tensor, Tensor], Tensor]
) -> Generator[Evidence, None, Scores]:
    whole = [axis for axis in axes if axis.gate.is_whole]
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in whole}
    counts = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in whole}
    entering: dict[str, Tensor] = {}

    def add(name: str, index: int, entered: Tensor, left: Tensor) -> None:
        with torch.no_grad():
            per_token = distance(entered.detach().float(), left.detach().float())
            totals[name][index] += per_token.sum(dtype=torch.float64).cpu()
            counts[name][index] += per_token.numel()

    def of_layer(name: str, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        add(name, index, args[0] if args else kwargs["hidden_states"], first(output))

    def before_block(name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        entering[name] = args[0].detach()

    def after_block(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        entered = entering.pop(name)
        add(name, 0, entered, entered + first(output).detach())

    def hooks(axis: Axis) -> Iterator[RemovableHandle]:
        if axis.modules:
            yield model.get_submodule(axis.modules[0]).register_forward_pre_hook(partial(before_block, axis.name))
            yield model.get_submodule(axis.modules[-1]).register_forward_hook(partial(after_block, axis.name))
        else:
            layers: Any = model.get_submodule(axis.gate.module)
            for index, layer in enumerate(layers):
                yield layer.register_forward_hook(partial(of_layer, axis.name, index), with_kwargs=True)

    with attached(hook for axis in whole for hook in hooks(axis)):
        yield Evidence.FORWARD
    world.sum_in_place(*totals.values(), *counts.values())
    return {name: (total / counts[name]).float() for name, total in totals.items()}
