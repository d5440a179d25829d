"""`WeightMask`: which single weights of a model's linear layers stay. The others are zero, and shapes stay as they are.

A `Mask` names units to remove; this mask names weights that become zero. They can be combined: `WeightMask.cut` removes units
from a model and from its mask alike. So making zeros and then cutting gives the same as cutting and then making zeros by the cut
mask.

The mask covers the linear layers inside decoder layers, fused ones included. Embeddings, the head, norms and biases stay dense.
Tensors here are [outputs, inputs], whichever way round the module stores its weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapt_pruner.core.model import cut as surgery
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.shelf import numbers_of


def linear_layers(model: nn.Module, *, layer: int | None = None) -> dict[str, nn.Module]:
    """The linear layers inside all decoder layers, or inside number `layer`: dotted name -> module, in the model's order."""
    inside = {id(module) for module in decoder_layers(model)[slice(layer, None if layer is None else layer + 1)].modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def oriented(module: Any) -> Tensor:
    """The weight of a linear layer as [outputs, inputs]: a view without a gradient, which may be changed in place."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def stored(module: Any, tensor: Tensor) -> Tensor:
    """A tensor [outputs, inputs] in the layout and on the device of a linear layer's weight; the inverse of `oriented`."""
    return (tensor if isinstance(module, nn.Linear) else tensor.t()).to(module.weight.device)


def largest(scores: Tensor, pattern: Pattern, *, per_row: bool = False) -> Tensor:
    """The weights to keep: the highest scores, as many as the pattern says; among equal scores the first stays.

    Args:
        scores: [outputs, inputs].
        pattern: N:M takes the N highest of each group of M inputs.
        per_row: whether an unstructured pattern compares the weights of each output only with each other.

    Returns:
        bool [outputs, inputs].
    """
    outputs, inputs = scores.shape
    keep = inputs - pattern.zeros_of(inputs)
    if pattern.m:
        rows, keep = scores.reshape(-1, pattern.m), pattern.n
    elif per_row:
        rows = scores
    else:
        rows, keep = scores.reshape(1, -1), outputs * keep
    best = rows.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, True).view(outputs, inputs)


@dataclass(frozen=True)
class WeightMask:
    """Which weights stay: name of a linear layer -> bool [outputs, inputs]. False is a zero; unnamed layers are dense.

    Attributes:
        kept: the masks.
        pattern: the pattern that each mask holds exactly; None where a cut has broken it.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    pattern: Pattern | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        alike = self.kept.keys() == other.kept.keys() and self.pattern == other.pattern
        return alike and all(torch.equal(keep, other.kept[name]) for name, keep in self.kept.items())

    def to(self, device: torch.device) -> "WeightMask":
        """The same mask on a device."""
        return WeightMask({name: keep.to(device) for name, keep in self.kept.items()}, self.pattern)

    @property
    def num_zeros(self) -> int:
        """The number of masked weights."""
        return sum(keep.numel() - int(keep.sum()) for keep in self.kept.values())

    def check(self, model: nn.Module) -> None:
        """Refuse a mask of another model.

        Raises:
            ValueError: it names a linear layer that the model lacks, or one of another shape.
        """
        layers = linear_layers(model)
        for name, keep in self.kept.items():
            if name not in layers:
                raise ValueError(f"the mask over weights names {name!r}, which is not a linear layer of this model's decoder")
            if keep.shape != (shape := oriented(layers[name]).shape):
                raise ValueError(f"the mask over {name} is {tuple(keep.shape)}, the weight is {tuple(shape)}")

    @torch.no_grad()
    def apply(self, model: nn.Module, *, optimizer: Optimizer | None = None) -> None:
        """Set the masked weights of `model` to zero, in place, and also their moments, which would otherwise move them again."""
        for name, keep in self.kept.items():
            module: Any = model.get_submodule(name)
            gone = ~stored(module, keep)
            module.weight.masked_fill_(gone, 0)
            for value in optimizer.state.get(module.weight, {}).values() if optimizer is not None else ():
                if isinstance(value, Tensor) and value.shape == gone.shape:
                    value.masked_fill_(gone, 0)

    def unmasked(self, model: nn.Module) -> list[str]:
        """The layers in which a masked weight is not zero."""
        return [
            name for name, keep in self.kept.items()
            if bool((weight := oriented(model.get_submodule(name)))[~keep.to(weight.device)].any())
        ]  # fmt: skip

    def broken(self, model: nn.Module) -> list[str]:
        """A sentence for each linear layer, masked or not, that does not hold the pattern; none if the mask has no pattern.

        N:M holds if every group of M inputs has at most N weights that are not zero. A share holds if as many weights are zero as
        it asks for, rounded down for each output. Both are counted in the weights themselves, and the mask itself must keep
        exactly what the pattern says.
        """
        failures: list[str] = []
        pattern = self.pattern
        if pattern is None:
            return failures
        for name, module in linear_layers(model).items():
            weight = oriented(module)
            outputs, inputs = weight.shape
            if name not in self.kept:
                failures.append(f"{name} is dense")
            elif not holds(self.kept[name], pattern):
                failures.append(f"the mask over {name} does not keep what {pattern} says")
            elif pattern.m:
                most = int((weight != 0).view(outputs, -1, pattern.m).sum(dim=-1).max())
                if most > pattern.n:
                    failures.append(f"a group of {pattern.m} in {name} has {most} weights that are not zero")
            elif (zeros := int((weight == 0).sum())) < (wanted := outputs * pattern.zeros_of(inputs)):
                failures.append(f"{zeros:,} weights of {name} are zero, and {pattern} asks for {wanted:,}")
        return failures

    def cut(self, model: nn.Module, axes: Sequence[Axis], mask: Mask, *, optimizer: Optimizer | None = None) -> "WeightMask":
        """Cut `model`, in place (see `core.model.cut.cut`), and return the mask over the weights that are left.

        The new mask has no pattern if the rest does not hold it: removing single inputs changes the groups of M.
        """
        modules = {name: model.get_submodule(name) for name in self.kept}
        masks = {
            modules[name].weight: keep if isinstance(modules[name], nn.Linear) else keep.t() for name, keep in self.kept.items()
        }
        surgery.cut(model, axes, mask, optimizer=optimizer, tensors_too=masks)  # type: ignore[arg-type]
        kept = {}
        for name, module in linear_layers(model).items():
            if module.weight in masks:
                keep = masks[module.weight]
                kept[name] = keep if isinstance(module, nn.Linear) else keep.t().contiguous()
        pattern = self.pattern
        return WeightMask(kept, pattern if pattern and all(holds(keep, pattern) for keep in kept.values()) else None)

    @contextmanager
    def keeping_zeros(self, model: nn.Module) -> Iterator[None]:
        """Within this context masked weights get no gradient, so weights that are zero stay zero in training.

        AdamW moves a weight by its moments and by decay; both are zero where gradient and weight are zero.
        """
        modules: list[tuple[Any, Tensor]] = [(model.get_submodule(name), keep) for name, keep in self.kept.items()]
        with attached(
            module.weight.register_hook(partial(torch.mul, stored(module, keep)))
            for module, keep in modules
            if module.weight.requires_grad
        ):
            yield


def holds(keep: Tensor, pattern: Pattern) -> bool:
    """Whether a mask [outputs, inputs] keeps exactly what a pattern says."""
    outputs, inputs = keep.shape
    if pattern.m:
        return inputs % pattern.m == 0 and bool((keep.view(outputs, -1, pattern.m).sum(dim=-1) == pattern.n).all())
    return keep.numel() - int(keep.sum()) == outputs * pattern.zeros_of(inputs)


def count_nonzero(module: nn.Module) -> int:
    """Parameters of a module that are not zero; a shared one counts once. Those on the meta device count as zero."""
    total = 0
    for parameter in module.parameters():
        with numbers_of(parameter):
            total += 0 if parameter.is_meta else int(torch.count_nonzero(parameter))
    return total


def has_zeros(params: int, nonzero: int) -> bool:
    """Whether people should be told of a model's zeros: they are more than 1 % of its parameters. Padding alone causes fewer."""
    return nonzero < 0.99 * params


def packed(keep: Tensor) -> Tensor:
    """A mask as bits, uint8 [⌈entries / 8⌉]. The first entry is the highest bit of byte 0; the last byte ends in zeros."""
    return torch.from_numpy(np.packbits(keep.flatten().cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask with this shape from the bits that `packed` gave.

    Raises:
        ValueError: the bits are for another number of entries.
    """
    entries = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-entries // 8):
        raise ValueError(f"{bits.numel()} bytes of {bits.dtype} are no mask of {entries} entries")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=entries)).bool().view(*shape)
