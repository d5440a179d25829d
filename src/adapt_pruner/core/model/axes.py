"""Which parts of a model can shrink, and which of them stay: Axis, Scores and Mask.

An axis is one dimension of a model from which units can be removed, with every place that must shrink along. Its name is a
format, which mask.json and log.jsonl use too:

    layers          whole decoder layers
    layers.I.KIND   something in layer I, such as `layers.3.neurons` or `layers.3.kv_heads`
    KIND            something that the whole model has once: `residual`, `vocabulary`

A model of two towers has `text.layers`, `text.layers.I.KIND`, `vision.layers` and `vision.layers.I.KIND`. Each tower counts its own
layers, and a cut of one tower leaves the other as it is (`of_tower`).

The axis declares everything else, such as the axes it lies inside and whether it may lose every unit. `layers.I.attentions` and
`layers.I.mlps` have one unit, the whole block of that layer. Removing it removes the axis and all axes inside the block.

Units may stand in groups. `query_heads` lie inside KV heads, and every group must lose the same number, so a unit is one query
head of each group. Scores and masks have an entry for every head, group by group; sizes and costs count units.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from adapt_pruner.core.model.kinds import kind_of, layer_of, tower_of

_MOST_UNITS = 2**24  # in a description of a mask; no vocabulary has as many tokens

Scores = dict[str, Tensor]
"""Axis name -> float32 tensor [axis.entries] on the CPU; higher means keep; comparable within a group of an axis only."""


GateKind = Literal["inputs", "outputs", "channels", "logits", "routed", "whole"]


@dataclass(frozen=True)
class Slice:
    """A run of a parameter that shrinks with an axis: entry e owns `width` indices of dimension `dim`, from `start` + e · `width` on.

    An axis may have several slices of one parameter: in a fused matrix of queries, keys and values, a KV head owns rows in three
    places. Several axes may slice one parameter, too. Together the slices of all axes must cover a dimension whole or not at all;
    otherwise `cut` refuses them.
    """

    parameter: str
    dim: int
    width: int = 1
    start: int = 0


@dataclass(frozen=True)
class Gate:
    """Where an entry of an axis can be shut without being cut. The kind says what shutting means:

        inputs      each entry owns `width` consecutive input features of the linear layer `module`; shutting sets them to zero
        outputs     each entry is an output feature of the linear layers `module` and `also`; shutting sets it to zero
        channels    each entry is a channel that `module` and `also` read, norms or linear layers; shutting sets it to zero there
        logits      each entry is a logit of the model, computed by `module`; shutting sets it to -inf: a token never said
        routed      each entry is an expert, which the router `module` may choose for a token; shutting sets its logit and its term in
                    each tensor of `also` to -inf: an expert that no token goes to
        whole       each unit is a module of the list `module`; shutting makes it return its input. If the axis has `modules`, its
                    one unit is a block and `module` is the last of these; shutting adds zeros to the stream

    Attributes:
        module: the dotted name; for channels, that of the last norm, before the head.
        width: features of an entry, for inputs.
        kind: see above. Metrics never get an axis of kind `logits`.
        also: for outputs, further linear layers; for channels, the norms inside the layers, and the linear layers that read the stream without one; for routed, the
            parameters and buffers that the router adds to its scores when it chooses.
        dim: for inputs, the dimension of the layer's weight that holds them: 1 for `nn.Linear`, 0 for GPT-2's `Conv1D`.
    """

    module: str
    width: int = 1
    kind: GateKind = "inputs"
    also: tuple[str, ...] = ()
    dim: int = 1

    @property
    def is_linear(self) -> bool:
        """Whether the entries are input features of one linear layer."""
        return self.kind == "inputs"

    @property
    def is_whole(self) -> bool:
        """Whether a unit is a whole layer, or the whole attention or MLP of one."""
        return self.kind == "whole"

    def oriented(self, weight: Tensor) -> Tensor:
        """A view of the weight of the linear layer at a gate of inputs, as [outputs, features]."""
        return weight if self.dim == 1 else weight.t()


@dataclass(frozen=True)
class Axis:
    """One dimension that can shrink, with everything that must shrink with it.

    Attributes:
        name: `layers`, `layers.I.KIND`, or KIND for an axis of the whole model.
        size: units there are now.
        cost: parameters one unit owns; the mean where units differ.
        gate: where a unit can be shut without being cut.
        slices: the parts of parameters that shrink with the axis.
        fields: config fields that state the number of entries, each with the factor by which it counts an entry.
        attributes: dotted names of module attributes that state the number of units.
        counts: dotted names of module attributes that state the number of entries, each with the factor by which it counts an entry.
        buffers: the parts of buffers that shrink with the axis; they are no parameters and cost nothing.
        readers: modules that read `fields` from their `config` as they run; each gets a config that states its own layer's
            values.
        pins: config fields to write out, because stock code would otherwise derive them from a field that changes.
        lists: config fields that hold one entry per unit and lose entries with it.
        scaled: dotted names of parameters, module attributes and config fields, each with a power. Each is multiplied by
            (size before / size after) ** power, because something takes a mean over the axis.
        one_more: weights that stand for 1 + w; whoever scales one multiplies 1 + w.
        groups: entries a unit has, one in every group. Each group keeps the same number and ranks its own entries.
        indices: config fields that hold unit numbers; they are renumbered after a cut.
        costs: the parameters of each unit where units differ (`layers`); else empty.
        enclosing: names of the axes whose units contain the entries, the same number in each unit, from the inside out. Query
            heads name KV heads and attention.
        may_be_empty: whether all units may go, as the one unit of a block may.
        fewest: units that must stay in any case, if not all may go.
        per_token: entries that a token goes through, if it does not go through all: the experts that a router chooses for it.
        modules: for a block, the modules removed with it, in the order in which the stream passes them: the norm that reads the
            stream, the attention or MLP, and a norm after it if there is one. The output of the last is added to the stream.
        pattern: the kind of each unit, if the units that stay must be of the same kinds as the first units, in the same order;
            empty if any may stay.
        stays: units that may not go.
        firsts: config fields that state how many of the first units are of a kind; after a cut, how many of these have stayed.
    """

    name: str
    size: int
    cost: int
    gate: Gate
    slices: tuple[Slice, ...] = ()
    fields: tuple[tuple[str, int], ...] = ()
    attributes: tuple[str, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    buffers: tuple[Slice, ...] = ()
    readers: tuple[str, ...] = ()
    pins: tuple[tuple[str, Any], ...] = ()
    lists: tuple[str, ...] = ()
    scaled: tuple[tuple[str, float], ...] = ()
    one_more: tuple[str, ...] = ()
    groups: int = 1
    indices: tuple[str, ...] = ()
    costs: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    enclosing: tuple[str, ...] = ()
    may_be_empty: bool = False
    fewest: int = 1
    per_token: int = 0
    pattern: tuple[str, ...] = ()
    stays: tuple[int, ...] = ()
    firsts: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """The number of entries in scores and masks: units of all groups together."""
        return self.size * self.groups

    @property
    def kind(self) -> str:
        """The last part of the name: `neurons`, `kv_heads`, `attentions`, `residual`, `vocabulary`, `layers`."""
        return kind_of(self.name)

    @property
    def least(self) -> int:
        """Units that must stay: 0 where the axis may be empty, mostly 1; of experts, those that a token needs."""
        return 0 if self.may_be_empty else self.fewest

    @property
    def layer(self) -> int | None:
        """The index of the decoder layer the axis lies in; None for an axis of the whole model."""
        return layer_of(self.name)


def towers_of(axes: Iterable[Axis]) -> list[str]:
    """The towers of a model: `[""]` of a model that has only one."""
    return sorted({tower_of(axis.name) for axis in axes})


def of_tower(axes: Iterable[Axis], tower: str) -> list[Axis]:
    """The axes of a tower, named as those of a model that has only this one."""
    return [
        replace(
            axis,
            name=axis.name.removeprefix(tower),
            enclosing=tuple(outer.removeprefix(tower) for outer in axis.enclosing),
        )
        for axis in axes
        if tower_of(axis.name) == tower
    ]


def in_layer(name: str, numbers: Sequence[int] | None) -> str:
    """The name with `numbers[I]` for its layer I; unchanged if it names no layer or there are no numbers."""
    layer = layer_of(name)
    return name if layer is None or numbers is None else f"layers.{numbers[layer]}.{name.rpartition('.')[2]}"


def _inside(kept: Mapping[str, Tensor], name: str, enclosing: Sequence[str], entries: int) -> Tensor:
    """Which of the `entries` of axis `name` lie inside units of the enclosing axes that stay, bool [entries].

    Raises:
        ValueError: the entries cannot be shared equally among the units of an enclosing axis.
    """
    stays = torch.ones(entries, dtype=torch.bool)
    for outer in (around for around in enclosing if around in kept):
        units = kept[outer].numel()
        if entries % units:
            raise ValueError(f"mask of {name!r} has {entries} units, not as many in each of {units} {outer}")
        stays &= kept[outer].repeat_interleave(entries // units)
    return stays


@dataclass(frozen=True)
class Mask:
    """Which entries stay: axis name -> bool tensor [entries]. True stays; an axis that is not named stays whole.

    A mask knows names only. The axes of a model say what lies inside what, and which axes may be empty (`check`). Whatever lies
    inside a removed unit is removed with it, whatever its own mask says: query heads with their KV head, neurons with their MLP.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, keep in self.kept.items():
            if keep.dtype != torch.bool or keep.dim() != 1:
                raise ValueError(f"mask of {name!r} must be a 1-D bool tensor, not {keep.dtype} with {keep.dim()} dimensions")

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

    def check(self, axes: Iterable[Axis]) -> None:
        """Refuse a mask that does not fit a model.

        Raises:
            ValueError: the mask names an axis that is not among `axes`, has another size along one, or keeps nothing of an axis
                that may not be empty.
        """
        by_name = {axis.name: axis for axis in axes}
        for name, keep in self.kept.items():
            if name not in by_name:
                raise ValueError(f"mask names {name!r}, which is not an axis of this model")
            if keep.numel() != by_name[name].entries:
                raise ValueError(f"mask of {name!r} has {keep.numel()} units, the model has {by_name[name].entries}")
            _check_something_stays(by_name[name], keep)

    def of(self, axis: Axis) -> Tensor:
        """What stays of an axis, bool [axis.entries]: the entries that its own mask keeps and that lie inside units that stay."""
        keep = self.kept.get(axis.name)
        keep = torch.ones(axis.entries, dtype=torch.bool) if keep is None else keep
        return keep & _inside(self.kept, axis.name, axis.enclosing, axis.entries)

    def renamed(self, name: str) -> str | None:
        """The axis's name after a cut by this mask: layers above a removed one move down; None if its own layer is removed."""
        tower, layer = tower_of(name), layer_of(name)
        stays = self.kept.get(f"{tower}layers")
        if stays is None or layer is None:
            return name
        return f"{tower}layers.{int(stays[:layer].sum())}.{name.rpartition('.')[2]}" if stays[layer] else None

    def of_tower(self, tower: str) -> "Mask":
        """What the mask says of a tower, by the names of a model that has only this one."""
        return Mask({name.removeprefix(tower): keep for name, keep in self.kept.items() if tower_of(name) == tower})

    def then(self, later: "Mask", axes: Iterable[Axis]) -> "Mask":
        """This mask followed by `later`, which was chosen on the model this one left behind.

        Args:
            later: a mask for the model that is left once this mask has been cut.
            axes: the axes of the model that is left once both have been cut. They say what lies inside what. If a layer lost a
                block, axes of that layer that are no longer there lay inside that block.

        Returns:
            One mask for the model before both: cut(a) then cut(b) equals cut(a.then(b, axes)).

        Raises:
            ValueError: `later` has another size along an axis than this mask leaves, or `axes` belong to a model with more
                layers.
        """
        axes = tuple(axes)
        if len(towers := towers_of(axes)) > 1:
            parts = {tower: self.of_tower(tower).then(later.of_tower(tower), of_tower(axes, tower)) for tower in towers}
            return Mask({f"{tower}{name}": keep for tower, part in parts.items() for name, keep in part.kept.items()})
        stayed = self.layers_left
        result = dict(self.kept)
        if "layers" in later:
            result["layers"] = self._followed("layers", later["layers"], ())
        now = Mask(result).layers_left
        enclosing = {}
        for axis in axes:
            if now is not None and (axis.layer or 0) >= len(now):
                raise ValueError(f"the axes name {axis.name!r}, but the masks leave {len(now)} layers")
            enclosing[in_layer(axis.name, now)] = [in_layer(name, now) for name in axis.enclosing]
        for name, keep in later.kept.items():
            if name == "layers":
                continue
            layer = layer_of(name)
            if stayed is not None and layer is not None and layer >= len(stayed):
                raise ValueError(f"later mask names {name!r}, but only {len(stayed)} layers are left")
            dense = in_layer(name, stayed)
            if keep.any() and dense not in enclosing and layer is not None:
                if layer in _without_block(later.kept) or (now is not None and layer_of(dense) not in now):
                    continue
                if layer_of(dense) in _without_block(self.kept):
                    raise ValueError(f"later mask of {dense!r} has {keep.numel()} units, but 0 are left")
            result[dense] = self._followed(dense, keep, enclosing.get(dense, ()))
        lost, both = _without_block(result), {}
        for name, keep in result.items():
            layer = layer_of(name)
            if layer is not None and now is not None and layer not in now:
                continue
            if layer in lost and keep.any() and name not in enclosing:
                continue
            stays = _inside(result, name, enclosing.get(name, ()), keep.numel())
            if stays.any():
                both[name] = keep & stays
        return Mask(both)

    @property
    def layers_left(self) -> list[int] | None:
        """The numbers of the layers that stay; None where the mask does not say."""
        return self.kept["layers"].nonzero().flatten().tolist() if "layers" in self.kept else None

    def _followed(self, name: str, keep: Tensor, enclosing: Sequence[str]) -> Tensor:
        """The entries of an axis that stay after this mask and then `keep`, over all entries before both."""
        entries, outer = keep.numel(), self.kept.get(enclosing[0]) if enclosing else None
        if outer is not None and outer.any():
            entries = entries // int(outer.sum()) * outer.numel()
        after = self.kept.get(name, torch.ones(entries, dtype=torch.bool))
        after = after & _inside(self.kept, name, enclosing, after.numel())
        if int(after.sum()) != keep.numel():
            raise ValueError(f"later mask of {name!r} has {keep.numel()} units, but {int(after.sum())} are left")
        after[after.clone()] = keep
        return after

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
                size, indices = axis["size"], axis["kept"]
                if not 0 <= size <= _MOST_UNITS or any(not 0 <= index < size for index in indices):
                    raise ValueError(f"not a mask: {name!r} has {size} units and keeps others")
                keep = torch.zeros(size, dtype=torch.bool)
                keep[torch.tensor(indices, dtype=torch.long)] = True
                kept[name] = keep
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a mask: {error!r}") from error
        return cls(kept)

    @classmethod
    def of_sizes(cls, axes: Iterable[Axis], scores: Scores, sizes: Mapping[str, int]) -> "Mask":
        """The mask that keeps the `sizes[name]` best-scored units in each group of each axis; of equal scores the first stays.

        Of an axis with a pattern it keeps those of the highest sum that have the pattern.

        Raises:
            ValueError: scores of an axis are missing or have another length, or a size is 0 for an axis that may not be empty.
        """
        kept = {}
        for axis in axes:
            score = scores.get(axis.name)
            if score is None or score.shape != (axis.entries,):
                raise ValueError(
                    f"{axis.name} has {axis.entries} units but scores {None if score is None else tuple(score.shape)}"
                )
            keep = torch.zeros(axis.groups, axis.size, dtype=torch.bool)
            score = score.index_fill(0, torch.tensor(axis.stays, dtype=torch.long), math.inf)
            if axis.pattern:
                best = torch.tensor([in_pattern(axis.pattern, score.tolist(), sizes[axis.name])], dtype=torch.long)
            else:
                best = score.view(axis.groups, axis.size).argsort(dim=1, descending=True, stable=True)[:, : sizes[axis.name]]
            kept[axis.name] = keep.scatter_(1, best, True).flatten()
            _check_something_stays(axis, kept[axis.name])
        return cls(kept)


def in_pattern(pattern: Sequence[str], scores: Sequence[float], count: int) -> list[int]:
    """The `count` units of the highest sum of scores that are of the same kinds as the first `count` units, in the same order.

    Of equal sums the first units stay. A pattern that repeats, such as five sliding layers and a global one, so repeats in what
    stays.

    Args:
        pattern: the kind of each unit.
        scores: of each unit.
        count: units that stay.
    """
    # for each number of units, of those seen so far
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * count]
    for unit, (kind, score) in enumerate(zip(pattern, scores, strict=True)):
        for place in range(min(unit + 1, count) - 1, -1, -1):
            before, now = best[place], best[place + 1]
            if before is not None and kind == pattern[place] and (now is None or before[0] + score > now[0]):
                best[place + 1] = (before[0] + score, (*before[1], unit))
    chosen = best[count]
    assert chosen is not None, "the first units have the pattern"
    return list(chosen[1])


def _check_something_stays(axis: Axis, keep: Tensor) -> None:
    if not keep.any() and not axis.may_be_empty:
        raise ValueError(f"mask of {axis.name!r} keeps nothing; at least one of its {keep.numel()} units must stay")
    if gone := [unit for unit in axis.stays if not keep[unit]]:
        raise ValueError(f"mask of {axis.name!r} removes unit {gone[0]}, without which the model does not run")
    if axis.fewest > 1 and (left := int(keep.view(axis.groups, -1).sum(dim=1).min())) < axis.fewest:
        raise ValueError(
            f"mask of {axis.name!r} keeps {left} of {axis.size} units; at least {axis.fewest} must stay, since a token needs them"
        )


def _without_block(kept: Mapping[str, Tensor]) -> set[int | None]:
    """The layers that lost a block: one of their axes keeps nothing."""
    return {layer_of(name) for name, keep in kept.items() if not keep.any()}
