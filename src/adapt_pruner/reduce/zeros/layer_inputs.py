"""Collect the inputs of a model's linear layers, decoder layer by decoder layer, and solve the layers with them.

    onward       the input of a decoder layer comes from the already sparse layers before it (Wanda, SparseGPT)
    from_dense   the input of a decoder layer comes from the dense model, so the order does not matter (FISTAPruner)

`walked` picks one of the two by what a solver reads.

Both are generators: they solve a decoder layer, change its weights in place, and yield. When a run is resumed they need only the
number of decoder layers that are solved. `onward` goes from the first layer to the last. `from_dense` goes from the last to the
first, so that the layers below are still dense.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.gram import add_gram, complete
from adapt_pruner.core.model.hooks import watching_inputs
from adapt_pruner.core.model.layers import Stream, decoder_layers, streams
from adapt_pruner.core.model.precision import casting_once
from adapt_pruner.core.model.task import Task
from adapt_pruner.core.model.weight_mask import linear_layers, oriented
from adapt_pruner.core.system import world
from adapt_pruner.reduce.zeros.solvers import Inputs

Solve = Callable[[Tensor, Inputs | None], tuple[Tensor, Tensor]]
"""(weight float32 [outputs, inputs], its inputs; None without text) -> the new weight, and which entries stay."""


@dataclass(frozen=True)
class Solved:
    """The result for one or several decoder layers.

    Attributes:
        kept: the masks of their linear layers, by name.
        errors: ‖W' Z - W X‖² / ‖W X‖² of each linear layer for which it was computed; `from_dense` gives one mean.
        layers: number of decoder layers.
    """

    kept: dict[str, Tensor]
    errors: list[float]
    layers: int = 1


@dataclass
class Walk:
    """Everything that a walk over the decoder layers needs.

    Attributes:
        model: causal LM; its weights change.
        batches: calibration text, int64 [batch, length]; empty if the solver reads none.
        solve: solves one linear layer.
        gram: whether `solve` needs Z Zᵀ.
        done: number of decoder layers that are solved already.
        task: what the model learns.
        dtype: precision of the matrix products.
    """

    model: nn.Module
    batches: Sequence[Tensor]
    solve: Solve
    gram: bool
    done: int
    task: Task
    dtype: str
    layers: Any = field(init=False)

    def __post_init__(self) -> None:
        self.layers = decoder_layers(self.model)

    def flows(self, batches: Sequence[Tensor]) -> list[Stream]:
        """The hidden states of the batches before the first layer."""
        return streams(self.model, batches, task=self.task, dtype=self.dtype)

    def through(self, flows: Sequence[Stream], index: int) -> None:
        """Run the text through a layer, in place."""
        with casting_once(self.layers[index]):
            for flow in flows:
                flow.hidden = flow.through(self.layers[index], index)

    def solved(self, name: str, module: Any, inputs: Inputs | None, kept: dict[str, Tensor], errors: list[float]) -> None:
        """Solve a linear layer and change its weight, in place; `kept` and `errors` are added to."""
        weight = oriented(module)
        wide = weight.float()
        after, keep = self.solve(wide, inputs)
        if inputs is not None and (error := inputs.error(wide, after)) is not None:
            errors.append(error)
        weight.copy_(after.to(weight.dtype))
        kept[name] = keep.cpu()


def walked(walk: Walk, *, reads: str) -> Iterator[Solved]:
    """Solve the decoder layers, whose linear layers read `sparse`, `dense` or `corrected` inputs (see `fista.fista`)."""
    return onward(walk) if reads == "sparse" else from_dense(walk, correction=reads == "corrected")


@torch.no_grad()
def onward(walk: Walk) -> Iterator[Solved]:
    """Solve the decoder layers from first to last, each on the output of the sparse layers before it.

    The inputs of a decoder layer's linear layers are collected before any of them changes. Several processes share the text.
    """
    flows = walk.flows(world.share(walk.batches))
    for index in range(len(walk.layers)):
        if index >= walk.done:
            linear, kept, errors = linear_layers(walk.model, layer=index), dict[str, Tensor](), list[float]()
            sums, owner = _Sums(linear, gram=walk.gram), {}
            if walk.batches:
                with casting_once(walk.layers[index]):
                    for flow in flows:
                        with _watching(linear, sums.add) as owner_now:
                            flow.through(walk.layers[index], index)
                        owner = owner_now
                owner = world.agreed(owner)
                sums.gather(sorted(set(owner.values())))
            for name, module in linear.items():
                walk.solved(name, module, sums.of(owner[name]) if walk.batches else None, kept, errors)
            del sums
        if walk.batches:
            walk.through(flows, index)
        if index >= walk.done:
            yield Solved(kept, errors)


@torch.no_grad()
def from_dense(walk: Walk, *, correction: bool) -> Iterator[Solved]:
    """Solve the decoder layers from last to first, each on the output of the dense layers before it.

    With `correction`, the linear layers of a decoder layer are solved in call order, and Z comes from the solved ones before.
    Linear layers with the same input count as one. Each process solves a decoder layer of its own, on the whole text.
    """
    flows, todo = walk.flows(walk.batches), len(walk.layers) - walk.done
    every = max(
        world.size(), round(math.sqrt(todo))
    )  # the hidden states before every such layer are kept, those between are computed again
    entered: dict[int, list[Tensor]] = {}
    for index in range(todo):
        if index % every == 0:
            entered[index] = [flow.hidden for flow in flows]
        if index < (todo - 1) // every * every:
            walk.through(flows, index)
    for start in reversed(list(entered)):
        entering: dict[int, list[Tensor]] = {}
        group = range(start, min(todo, start + every))
        _put(flows, entered.pop(start))
        for index in group:
            entering[index] = [flow.hidden for flow in flows]
            if index < group[-1]:
                walk.through(flows, index)
        down = list(reversed(group))
        for first in range(0, len(down), world.size()):
            chunk = down[first : first + world.size()]
            kept, errors = dict[str, Tensor](), list[float]()
            if world.rank() < len(chunk):
                mine = chunk[world.rank()]
                _put(flows, entering[mine])
                _solve_layer(walk, mine, flows, kept, errors, correction=correction)
            kept = _exchanged(walk, chunk, kept)
            total = torch.tensor([sum(errors), float(len(errors))], dtype=torch.float64)
            world.sum_in_place(total)
            yield Solved(kept, [float(total[0] / total[1])] if total[1] else [], layers=len(chunk))


def _put(flows: Sequence[Stream], hidden: Sequence[Tensor]) -> None:
    for flow, entering in zip(flows, hidden, strict=True):
        flow.hidden = entering


def _solve_layer(
    walk: Walk, index: int, flows: Sequence[Stream], kept: dict[str, Tensor], errors: list[float], *, correction: bool
) -> None:
    """Solve the linear layers of a decoder layer, in place, group by group; the layers of a group have the same input."""
    layer, linear = walk.layers[index], linear_layers(walk.model, layer=index)
    dense = copy.deepcopy(layer)
    by_path = dict(dense.named_modules())
    paths = {id(module): path for path, module in layer.named_modules()}
    twins = {name: by_path[paths[id(module)]] for name, module in linear.items()}
    with _watching(linear, lambda name, values: None) as owner:
        flows[0].through(layer, index)
    for number, leader in enumerate(dict.fromkeys(owner.values())):
        changed = correction and number > 0
        sums = _Sums({leader: linear[leader]}, gram=walk.gram, cross=changed)
        with casting_once(layer), casting_once(dense):
            for flow in flows:
                seen: dict[str, Tensor] = {}
                with _watching({leader: twins[leader]}, seen.__setitem__):
                    flow.through(dense, index)
                before = seen[leader]
                if changed:
                    with _watching({leader: linear[leader]}, seen.__setitem__):
                        flow.through(layer, index)
                sums.add(leader, seen[leader], before)
        for name in [name for name, first in owner.items() if first == leader]:
            walk.solved(name, linear[name], sums.of(leader), kept, errors)


def _exchanged(walk: Walk, chunk: Sequence[int], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of the layers that all processes have solved; their weights are copied to every process, in place."""
    if world.size() == 1:
        return dict(kept)
    every: dict[str, Tensor] = {}
    for number, index in enumerate(chunk):
        for name, module in linear_layers(walk.model, layer=index).items():
            weight = oriented(module)
            keep = (
                kept[name].to(weight.device, torch.int32)
                if number == world.rank()
                else torch.zeros_like(weight, dtype=torch.int32)
            )
            solved = weight.contiguous() if number == world.rank() else torch.zeros_like(weight)
            world.sum_in_place(keep, solved)
            weight.copy_(solved)
            every[name] = keep.bool().cpu()
    return every


class _Sums:
    """Sums over tokens of linear layers' inputs; layers with the same input have their sums under the first one's name."""

    def __init__(self, linear: Mapping[str, Any], *, gram: bool, cross: bool = False) -> None:
        self._linear, self._gram, self._cross = linear, gram, cross
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, before: Tensor | None = None) -> None:
        """Add the input of a layer, float32 [tokens, inputs]; `before` is that of the dense layer."""
        squares, *grams = self._of(name)
        squares += values.square().sum(dim=0, dtype=torch.float64)
        if grams:
            add_gram(grams[0], values)
        if before is not None and grams[1:]:
            cross, dense = grams[1:]
            cross.addmm_(before.t(), values)
            add_gram(dense, before)

    def gather(self, names: Sequence[str]) -> None:
        """Add up the sums of the named layers over all processes, in place."""
        world.sum_in_place(*(sums for name in names for sums in self._of(name)))

    def of(self, name: str) -> Inputs:
        """The sums in the form that a solver takes."""
        squares, *grams = self._of(name)
        for gram in grams[::2]:  # not the one of two different inputs
            complete(gram)
        return Inputs(squares, *grams)

    def _of(self, name: str) -> list[Tensor]:
        if name not in self._sums:
            weight = oriented(self._linear[name])
            inputs = weight.shape[1]
            grams = (self._gram or self._cross) + 2 * self._cross
            self._sums[name] = [
                torch.zeros(inputs, dtype=torch.float64, device=weight.device),
                *(torch.zeros(inputs, inputs, device=weight.device) for _ in range(grams)),
            ]
        return self._sums[name]


@contextmanager
def _watching(linear: Mapping[str, Any], add: Callable[[str, Tensor], None]) -> Iterator[dict[str, str]]:
    """While the context lasts, call `add` with the input of each linear layer, float32 [tokens, inputs].

    Layers that are called with the same tensor, one after the other, share one call of `add`.

    Yields:
        A dict that fills as layers are called: name of a layer -> the first layer that was called with its input.
    """
    owner: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def look(name: str, given: Tensor) -> None:
        if given is not last[0]:
            last[:] = [given, name]
            add(name, given.detach().float().flatten(0, -2))
        owner[name] = last[1]

    with watching_inputs(linear, look):
        yield owner
