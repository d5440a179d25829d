"""What of a model can shrink, and what of it stays: Axis, Scores and Mask.

An axis is one dimension of a model whose units can go, together with every place that must shrink when they do.
Names are `layers` (whole decoder layers), `layers.I.KIND` (`layers.3.neurons`, `layers.3.kv_heads`) and, where there is one
for the whole model, KIND (`residual`, `vocabulary`). `layers.I.attentions` and `layers.I.mlps` have one unit, the whole block of
that layer, and it may go: then the axis is gone, and so are those inside the block.

Units may stand in blocks: of `query_heads`, which lie inside KV heads, the same number leaves every group, so a unit is one
head of each. Scores and masks have an entry for every head, block by block; sizes and costs count units.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.errors import RunError

__all__ = ["Axis", "Gate", "Mask", "Scores", "Slice"]

Scores = dict[str, Tensor]
"""Axis name -> float32 tensor [axis.entries] on the CPU; higher means keep; comparable within a block of an axis only."""

_WITHIN = {  # kinds whose entries lie inside the units of another, an equal run in each
    "query_heads": "kv_heads",
    "kv_heads": "attentions",
    "neurons": "mlps",
}
_BLOCKS = ("attentions", "mlps")  # kinds whose one unit may go


@dataclass(frozen=True)
class Slice:
    """A run of a parameter that shrinks with an axis: entry e owns `width` indices of dimension `dim`, from `start` + e · `width` on.

    One axis may have several slices of a parameter, and several axes may slice it: of a fused matrix of queries, keys and values a
    KV head owns rows in three places. Together the slices of all axes cover a dimension whole, or not at all; `cut` refuses others.
    """

    parameter: str
    dim: int
    width: int = 1
    start: int = 0


@dataclass(frozen=True)
class Gate:
    """Where an entry of an axis can be shut without being cut.

    Each entry owns `width` consecutive features of the input of `module`, and of the modules `also`, set to zero when it is
    shut. With `width` 0 the units are the entries of the module list `module`, and a shut one returns its input; or the one unit is
    the block whose last module is `module`, and a shut one adds zeros to the stream. With `output` the units are the logits of the model, which the head `module` gives, and a shut one is -inf: a token that is never
    said. No metric scores such an axis.
    """

    module: str
    width: int = 1
    also: tuple[str, ...] = ()
    output: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether the entries are input features of one linear layer: not of `layers`, nor where many read a stream, nor of tokens."""
        return self.width > 0 and not self.also and not self.output

    @property
    def is_whole(self) -> bool:
        """Whether a unit is a whole layer, or the whole attention or MLP of one."""
        return self.width == 0


@dataclass(frozen=True)
class Axis:
    """One dimension that can shrink, with everything that must shrink with it.

    Attributes:
        name: `layers`, `layers.I.KIND`, or, of the whole model, KIND.
        size: units there are now.
        cost: parameters one unit owns; their mean where units differ.
        gate: where a unit can be shut without being cut.
        slices: the parameters that are cut along.
        fields: config fields that state the number of entries, each with how many of it one entry stands for.
        attributes: module attributes, by their dotted names, that state the size.
        pins: config fields to be spelled out because stock code would derive them from a field that changes.
        lists: config fields that hold one entry per unit and lose entries with it.
        scaled: what is multiplied by (size before / size after) ** power, since something takes a mean over the axis: dotted
            names of parameters, module attributes and config fields, each with its power.
        one_more: those of `scaled` that stand for 1 + w, which is then what is multiplied.
        blocks: entries a unit has, one in every block; each block keeps the same number, and ranks its own.
        indices: config fields that hold the number of a unit, or several, and follow its renumbering.
        costs: the parameters of each unit where units differ (`layers`); else empty.
        modules: of a block, what goes with it, in the order in which the stream runs through: the norm that reads the stream, the
            attention or MLP, and what norm may follow. What the last gives is added to the stream.
    """

    name: str
    size: int
    cost: int
    gate: Gate
    slices: tuple[Slice, ...] = ()
    fields: tuple[tuple[str, int], ...] = ()
    attributes: tuple[str, ...] = ()
    pins: tuple[tuple[str, Any], ...] = ()
    lists: tuple[str, ...] = ()
    scaled: tuple[tuple[str, float], ...] = ()
    one_more: tuple[str, ...] = ()
    blocks: int = 1
    indices: tuple[str, ...] = ()
    costs: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """Entries that scores and masks have: units in all blocks together."""
        return self.size * self.blocks

    @property
    def kind(self) -> str:
        """The last part of the name: `neurons`, `kv_heads`, `attentions`, `residual`, `vocabulary`, `layers`."""
        return _kind(self.name)

    @property
    def least(self) -> int:
        """Units that must stay: 1, or 0 of a block."""
        return 0 if self.kind in _BLOCKS else 1

    @property
    def layer(self) -> int | None:
        """The index of the decoder layer the axis lies in; None for one of the whole model."""
        return _layer(self.name)

    @property
    def enclosing(self) -> tuple[str, ...]:
        """The names of the axes inside whose units the entries lie, from the inside out: of query heads KV heads and attention."""
        names, outer = [], _within(self.name)
        while outer is not None:
            names.append(outer)
            outer = _within(outer)
        return tuple(names)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if len(parts) == 3 else None


def _within(name: str) -> str | None:
    outer = _WITHIN.get(_kind(name)) if "." in name else None
    return f"{name.rpartition('.')[0]}.{outer}" if outer else None


@dataclass(frozen=True)
class Mask:
    """Which entries stay: axis name -> bool tensor [entries]. True stays; an axis that is not named stays whole.

    A mask is never empty along an axis but that of a block, and says nothing of axes inside layers that are gone. What lies inside
    a unit that goes, goes with it, whatever its own axis says: query heads with their KV head, neurons with their MLP.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, keep in self.kept.items():
            if keep.dtype != torch.bool or keep.dim() != 1:
                raise ValueError(f"mask of {name!r} must be a 1-D bool tensor, not {keep.dtype} with {keep.dim()} dimensions")
            if not keep.any() and _kind(name) not in _BLOCKS:
                raise ValueError(f"mask of {name!r} keeps nothing; at least one of its {keep.numel()} units must stay")
            outer = self.kept.get(_within(name) or "")
            if outer is not None and keep.numel() % outer.numel():
                raise ValueError(
                    f"mask of {name!r} has {keep.numel()} units, not as many in each of {outer.numel()} {_within(name)}"
                )

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
        """Entries removed, of all kinds together."""
        return sum(int((~keep).sum()) for keep in self.kept.values())

    def of(self, axis: Axis) -> Tensor:
        """What stays of an axis, bool [axis.entries]: what its own mask keeps inside units that stay."""
        keep = self.kept.get(axis.name)
        keep = torch.ones(axis.entries, dtype=torch.bool) if keep is None else keep
        return keep & self._outer(axis.name, axis.entries)

    def _outer(self, name: str, entries: int) -> Tensor:
        """Which of so many entries lie inside units that stay."""
        around = _within(name)
        if around is None:
            return torch.ones(entries, dtype=torch.bool)
        outer = self.kept.get(around)
        if outer is None:
            return self._outer(around, entries)
        return (outer & self._outer(around, outer.numel())).repeat_interleave(entries // outer.numel())

    def renamed(self, name: str) -> str | None:
        """What an axis is called after a cut by this mask: layers above one that goes move down; None where its own layer goes."""
        stays, layer = self.kept.get("layers"), _layer(name)
        if stays is None or layer is None:
            return name
        return f"layers.{int(stays[:layer].sum())}.{name.split('.')[2]}" if stays[layer] else None

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
            if stayed is not None and (layer := _layer(name)) is not None:
                if layer >= len(stayed):
                    raise ValueError(f"later mask names {name!r}, but only {len(stayed)} layers are left")
                name = f"layers.{stayed[layer]}.{name.split('.')[2]}"
            after = self._left(name, keep.numel()).clone()
            if int(after.sum()) != keep.numel():
                raise ValueError(f"later mask of {name!r} has {keep.numel()} units, but {int(after.sum())} are left")
            after[after.clone()] = keep
            result[name] = after
        if "layers" in result:
            gone = {i for i, stays in enumerate(result["layers"].tolist()) if not stays}
            result = {name: keep for name, keep in result.items() if _layer(name) not in gone}
        both = Mask(result)
        outer = {name: both._outer(name, keep.numel()) for name, keep in result.items()}
        return Mask({name: keep & outer[name] for name, keep in result.items() if outer[name].any()})

    def _left(self, name: str, entries: int) -> Tensor:
        """Which entries of an axis stay, where `entries` do; their number before is that of the mask, or follows from it."""
        outer = self.kept.get(_within(name) or "")
        if name not in self.kept and outer is not None and outer.any():
            entries = entries // int(outer.sum()) * outer.numel()
        before = self.kept.get(name, torch.ones(entries, dtype=torch.bool))
        return before & self._outer(name, before.numel())

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
        """The mask that keeps the `sizes[name]` best-scored units of each axis, in each of its blocks; of equals the first stays.

        Raises:
            ValueError: scores of an axis are missing or of another length.
            RunError: they are not finite.
        """
        kept = {}
        for axis in axes:
            score = scores.get(axis.name)
            if score is None or score.shape != (axis.entries,):
                raise ValueError(
                    f"{axis.name} has {axis.entries} units but scores {None if score is None else tuple(score.shape)}"
                )
            if not torch.isfinite(score).all():
                raise RunError(
                    f"scores of {axis.name} are not finite; the model or its calibration text gives NaN or infinity: set dtype=float32, or mend the weights"
                )
            keep = torch.zeros(axis.blocks, axis.size, dtype=torch.bool)
            best = score.view(axis.blocks, axis.size).argsort(dim=1, descending=True, stable=True)
            kept[axis.name] = keep.scatter_(1, best[:, : sizes[axis.name]], True).flatten()
        return cls(kept)
