"""What of a model can shrink, and what of it stays: Axis, Scores and Mask.

An axis is one dimension of a model whose units can go, together with every place that must shrink when they do.
Names are `layers` (whole decoder layers), `layers.I.KIND` (`layers.3.neurons`, `layers.3.kv_heads`) and `vocabulary`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Axis", "Gate", "Mask", "Scores", "Slice"]

Scores = dict[str, Tensor]
"""Axis name -> float32 tensor [axis.size] on the CPU; higher means keep; comparable within an axis only."""


@dataclass(frozen=True)
class Slice:
    """A parameter that shrinks with an axis: each unit owns `width` consecutive entries of dimension `dim`."""

    parameter: str
    dim: int
    width: int = 1


@dataclass(frozen=True)
class Gate:
    """Where a unit can be shut without being cut.

    Each unit owns `width` consecutive features of the input of `module`, set to zero when it is shut. With
    `width` 0 the units are the entries of the module list `module`, and a shut one returns its input. With `output`
    the units are the features of the output of `module`, and a shut one is -inf: a token that is never said. No metric
    scores such an axis.
    """

    module: str
    width: int = 1
    output: bool = False


@dataclass(frozen=True)
class Axis:
    """One dimension that can shrink, with everything that must shrink with it.

    Attributes:
        name: `layers`, `layers.I.KIND` or `vocabulary`.
        size: units there are now.
        cost: parameters one unit owns (an axis whose units differ, such as `layers`, gives their mean).
        gate: where a unit can be shut without being cut.
        slices: the parameters that are cut along.
        fields: config fields that state the size, each with how many of it one unit stands for.
        pins: config fields to be spelled out because stock code would derive them from a field that changes.
        lists: config fields that hold one entry per unit and lose entries with it.
        indices: config fields that hold the number of a unit, or several, and follow its renumbering.
    """

    name: str
    size: int
    cost: int
    gate: Gate
    slices: tuple[Slice, ...] = ()
    fields: tuple[tuple[str, int], ...] = ()
    pins: tuple[tuple[str, Any], ...] = ()
    lists: tuple[str, ...] = ()
    indices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The last part of the name: `neurons`, `kv_heads`, `layers`, `vocabulary`."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The index of the decoder layer the axis lies in; None for one of the whole model."""
        return _layer_of(self.name)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if len(parts) == 3 else None


def _in_layer(name: str, layer: int) -> str:
    return f"layers.{layer}.{name.split('.')[2]}"


@dataclass(frozen=True)
class Mask:
    """Which units stay: axis name -> bool tensor [size]. True stays; an axis that is not named stays whole.

    A mask is never empty along an axis, and says nothing of axes inside layers that are gone.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, keep in self.kept.items():
            if keep.dtype != torch.bool or keep.dim() != 1:
                raise ValueError(f"mask of {name!r} must be a 1-D bool tensor, not {keep.dtype} with {keep.dim()} dimensions")
            if not keep.any():
                raise ValueError(f"mask of {name!r} keeps nothing; at least one of its {keep.numel()} units must stay")

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name]

    def __contains__(self, name: object) -> bool:
        return name in self.kept

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask) or self.kept.keys() != other.kept.keys():
            return NotImplemented if not isinstance(other, Mask) else False
        return all(torch.equal(keep, other.kept[name]) for name, keep in self.kept.items())

    def num_removed(self) -> int:
        """Units removed, of all kinds together."""
        return sum(int((~keep).sum()) for keep in self.kept.values())

    def then(self, later: "Mask") -> "Mask":
        """This mask followed by `later`, which was chosen on the model this one left behind.

        Returns:
            One mask against the model before both: cut(a) then cut(b) equals cut(a.then(b)).

        Raises:
            ValueError: `later` has another size along an axis than this mask leaves.
        """
        stayed = self.kept["layers"].nonzero().flatten().tolist() if "layers" in self.kept else None
        result = dict(self.kept)
        for name, keep in later.kept.items():
            layer = _layer_of(name)
            if stayed is not None and layer is not None:
                if layer >= len(stayed):
                    raise ValueError(f"later mask names {name!r}, but only {len(stayed)} layers are left")
                name = _in_layer(name, stayed[layer])
            before = result.get(name, torch.ones_like(keep))
            if int(before.sum()) != keep.numel():
                raise ValueError(f"later mask of {name!r} has {keep.numel()} units, but {int(before.sum())} are left")
            after = before.clone()
            after[before] = keep
            result[name] = after
        if "layers" in result:
            gone = {i for i, stays in enumerate(result["layers"].tolist()) if not stays}
            result = {name: keep for name, keep in result.items() if _layer_of(name) not in gone}
        return Mask(result)

    def to_json(self) -> dict[str, Any]:
        """As plain data: for each axis its size and the indices of the units that stay."""
        axes = {name: {"size": keep.numel(), "kept": keep.nonzero().flatten().tolist()} for name, keep in self.kept.items()}
        return {"format": 1, "axes": axes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Mask":
        """The inverse of `to_json`.

        Raises:
            ValueError: `data` is not such a description.
        """
        try:
            if data["format"] != 1:
                raise ValueError(f"mask format {data['format']!r} is not known to this version; known: 1")
            kept = {}
            for name, axis in data["axes"].items():
                keep = torch.zeros(axis["size"], dtype=torch.bool)
                keep[torch.tensor(axis["kept"], dtype=torch.long)] = True
                kept[name] = keep
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a mask: {error!r}") from error
        return cls(kept)

    @classmethod
    def of_sizes(cls, axes: Iterable[Axis], scores: Scores, sizes: Mapping[str, int]) -> "Mask":
        """The mask that keeps the `sizes[name]` best-scored units of each axis; of equals the first stays.

        Raises:
            ValueError: scores of an axis are missing, of another length, or not finite.
        """
        kept = {}
        for axis in axes:
            score = scores.get(axis.name)
            if score is None or score.shape != (axis.size,):
                raise ValueError(f"{axis.name} has {axis.size} units but scores {None if score is None else tuple(score.shape)}")
            if not torch.isfinite(score).all():
                raise ValueError(f"scores of {axis.name} are not finite; the model or its calibration text gives NaN or infinity")
            keep = torch.zeros(axis.size, dtype=torch.bool)
            keep[score.argsort(descending=True, stable=True)[: sizes[axis.name]]] = True
            kept[axis.name] = keep
        return cls(kept)
