"""Shutting units for a dry run (`gated`) and removing them for good (`cut`).

The law: for every model and mask, the logits under `gated(model, axes, mask)` equal the logits after
`cut(model, axes, mask)`, to 1e-9 in float64. A contract test holds it over all families.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapt_pruner.core.model import moments
from adapt_pruner.core.model.axes import Axis, Mask, of_tower, towers_of
from adapt_pruner.core.model.budget import count_parameters, unit_cost
from adapt_pruner.core.model.hooks import Removable, attached
from adapt_pruner.core.model.modeling_pruned import _Nothing, _OwnConfig
from adapt_pruner.core.model.routed import routed
from adapt_pruner.core.model.shelf import Shelved, numbers_of, select

_MAY_GO = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
"""Fields of a generation config that name tokens which a cut may remove all the same."""


def _checked(axes: Sequence[Axis], mask: Mask) -> dict[str, Axis]:
    """The axes that `mask` shrinks, by name."""
    mask.check(axes)
    by_name = {axis.name: axis for axis in axes}
    return {name: by_name[name] for name in mask if not bool(mask[name].all())}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, a shared one by each; `get_parameter` would walk the modules for each name."""
    return dict(model.named_parameters(remove_duplicate=False))


def _check_slices(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Refuse axes whose slices cover only a part of a dimension.

    Raises:
        ValueError: a slice goes beyond its dimension, or the slices of all axes together leave out a part of it.
    """
    runs: dict[tuple[str, int], list[tuple[int, int]]] = {}
    parameters = _named(model)
    for axis in axes:
        for piece in axis.slices:
            length, end = parameters[piece.parameter].shape[piece.dim], piece.start + axis.entries * piece.width
            if piece.start < 0 or end > length:
                raise ValueError(
                    f"{axis.name} owns {piece.start:,} to {end:,} along dimension {piece.dim} of {piece.parameter}, which has {length:,}; "
                    "the family's slice has a wrong start or width"
                )
            runs.setdefault((piece.parameter, piece.dim), []).append((piece.start, end))
    for (name, dim), owned in runs.items():
        length, covered, reached = parameters[name].shape[dim], 0, 0
        for start, end in sorted(owned):
            covered += max(0, end - max(start, reached))
            reached = max(reached, end)
        if covered != length:
            raise ValueError(
                f"the slices of all axes together own {covered:,} of {length:,} along dimension {dim} of {name}; the family must "
                "declare the others, and all axes of a model must be given"
            )


def _check_gate(model: nn.Module, axis: Axis) -> None:
    """Refuse a gate whose number of features differs from the number that the entries of its axis own.

    Raises:
        ValueError: the numbers differ.
    """
    gate = axis.gate
    also = gate.also if gate.kind in ("channels", "outputs") else ()
    for name in () if gate.is_whole else (gate.module, *also):
        weight: Any = getattr(model.get_submodule(name), "weight", None)
        if weight is None:
            continue
        features, owned = weight.shape[{"inputs": gate.dim, "channels": -1}.get(gate.kind, 0)], axis.entries * gate.width
        if features != owned:
            raise ValueError(f"the gate of {axis.name} has {features:,} features at {name}, of which its entries own {owned:,}")


@contextmanager
def gated(model: nn.Module, axes: Sequence[Axis], gates: Mask | Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the units that a mask removes are shut: a dry run of `cut` without a change of weights.

    Gates may also be partly open.

    With a number g for each entry, 0 for shut and 1 for open, the gate changes:

        inputs      x, a feature that an entry owns, to g · x
        outputs     y, a feature that an entry owns, to g · y
        channels    x, a channel as the norms read it, to g · x; so the mean of a norm runs over what is left
        whole       a block's output y to g · y before it is added to the stream; a layer's output f(x) to x + g · (f(x) - x)
        logits      z to z + log g; to -inf where g is 0 or less, with no gradient to g
        routed      a router's logit z likewise, and a bias b with which a router chooses to b + log g

    Args:
        model: left as found.
        axes: its axes.
        gates: a mask; or axis name -> float tensor [entries], any real numbers. Outputs can be differentiated with respect to
            them.

    Raises:
        ValueError: a mask does not fit the axes (`Mask.check`), gates are not one float for each entry of an axis, or a gate does
            not fit its axis.
    """
    if isinstance(gates, Mask):
        gates = {name: gates[name].float() for name in _checked(axes, gates)}
    by_name = {axis.name: axis for axis in axes}
    for name, gate in gates.items():
        if name not in by_name:
            raise ValueError(f"gates name {name!r}, which is not an axis of this model")
        if gate.shape != (by_name[name].entries,) or not gate.is_floating_point():
            raise ValueError(
                f"gates of {name!r} must be {by_name[name].entries} floats, not {gate.dtype} of shape {tuple(gate.shape)}"
            )
    with attached(hook for name, gate in gates.items() for hook in _gate(model, by_name[name], gate)):
        yield


def _gate(model: nn.Module, axis: Axis, gate: Tensor) -> Iterator[Removable]:
    """The hooks that multiply the entries of an axis by `gate`, [entries]; each is attached as it is yielded."""
    _check_gate(model, axis)
    if axis.gate.kind == "logits":  # on the model's output, so after a cap on logits, if there is one
        yield model.register_forward_hook(partial(_add_log, gate))
    elif axis.gate.kind == "routed":
        yield from routed(model, axis.gate, _log(gate))
    elif axis.modules:
        yield model.get_submodule(axis.gate.module).register_forward_hook(partial(_multiply_output, gate[0]))
    elif axis.gate.is_whole:
        layers: Any = model.get_submodule(axis.gate.module)
        for layer, opening in zip(layers, gate, strict=True):
            if opening.requires_grad or opening != 1:  # x + (f(x) - x) would round
                yield layer.register_forward_hook(partial(_multiply_change, opening), with_kwargs=True)
    else:
        features = gate.repeat_interleave(axis.gate.width)
        for module in (axis.gate.module, *axis.gate.also):
            if axis.gate.kind == "outputs":
                yield model.get_submodule(module).register_forward_hook(partial(_multiply_output, features))
                continue
            yield model.get_submodule(module).register_forward_pre_hook(partial(_multiply_input, features))


def _multiply_input(features: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * features.to(args[0]), *args[1:])


def _multiply_output(gate: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return with_first(output, first(output) * gate.to(first(output)))


def _multiply_change(gate: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    entered = args[0] if args else kwargs["hidden_states"]
    return with_first(output, entered + gate.to(entered) * (first(output) - entered))


def _add_log(gate: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    output.logits = output.logits + _log(gate).to(output.logits)
    return output


def _log(gate: Tensor) -> Tensor:
    opened = gate > 0
    return torch.where(opened, gate, 1.0).log().masked_fill(~opened, -torch.inf)  # log 0 would put 0 · inf into the gradient


def first(output: Any) -> Tensor:
    """The tensor for the residual stream among all that a layer or block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_first(output: Any, tensor: Tensor) -> Any:
    """The output of a layer or block, with another tensor for the stream."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


@torch.no_grad()
def cut(
    model: nn.Module,
    axes: Sequence[Axis],
    mask: Mask,
    *,
    optimizer: Optimizer | None = None,
    tensors_too: dict[nn.Parameter, Tensor] | None = None,
) -> None:
    """Remove, in place, the units that `mask` does not keep, and shrink the optimiser's state with them.

    Weights, biases, module sizes, layer numbers, norms whose mean runs over an axis and `model.config` follow. Every shortened
    parameter is a new `nn.Parameter`; tied uses stay tied. The optimiser's groups point to the new parameters, and each of its
    state tensors that had the parameter's shape is sliced in the same way. Gradients of shortened parameters are dropped. Modules
    without parameters replace a removed block and its norms, so that the layer's own forward still runs.

    Args:
        model: changed in place; may lie on the meta device.
        axes: all axes of the model, because sizes of untouched axes are written to the config too.
        mask: for the model as it is now. Names inside layers count the layers before the cut.
        optimizer: over the model's parameters; any whose state `core.model.moments.check_state` understands.
        tensors_too: parameter -> a tensor of its shape, such as a mask over its weights. Changed in place: it gets the new parameters
            as keys and tensors cut in the same way. Entries of parameters that are removed whole mean nothing afterwards.

    Raises:
        ValueError: the mask does not fit the axes (`Mask.check`) or keeps more in one group of an axis than in another, or the
            slices of the axes do not fit a parameter or leave out a part of it, or the optimiser's state is of an unknown kind. Nothing is changed.
    """
    if optimizer is not None:
        moments.check_state(optimizer)
    shrinking = _checked(axes, mask)
    _check_slices(model, axes)
    sizes = {axis.name: _size(axis, mask) for axis in axes}
    owners: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))

    for old, index in _kept(model, axes, mask):
        new = (
            old.cut(index) if isinstance(old, Shelved) else nn.Parameter(select(old.data, index), requires_grad=old.requires_grad)
        )
        for module, leaf in owners[id(old)]:
            setattr(module, leaf, new)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            elif type(module).__name__ == "Conv1D":  # transformers' class, used by GPT-2
                module.nx, module.nf = module.weight.shape
            elif isinstance(module, nn.Embedding):
                module.num_embeddings, module.embedding_dim = module.weight.shape
        if optimizer is not None:
            moments.follow(optimizer, old, new, partial(select, index=index))
        if tensors_too is not None and old in tensors_too:
            tensors_too[new] = select(tensors_too.pop(old), index)
    for axis in axes:
        entries = int(mask.of(axis).sum())
        stated = dict.fromkeys(axis.attributes, sizes[axis.name]) | {name: entries * factor for name, factor in axis.counts}
        for name, number in stated.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, number)
        for piece in axis.buffers:
            owner, _, leaf = piece.parameter.rpartition(".")
            stays = mask.of(axis).nonzero().flatten()
            setattr(model.get_submodule(owner), leaf, select(model.get_buffer(piece.parameter), {piece.dim: stays}))
        if sizes[axis.name] < axis.size:
            for name, power in axis.scaled:
                offset = 1.0 if name in axis.one_more else 0.0
                multiply(model, name, (axis.size / sizes[axis.name]) ** power, offset, optimizer)
        if axis.indices and axis.name in shrinking:
            _renumber(model, axis.indices, mask[axis.name])
        for name in axis.readers:
            fields = {field: entries * units for field, units in axis.fields}
            setattr(model.get_submodule(name), "config", _OwnConfig(model.config, **fields))  # noqa: B010 (its type is not a module's)
    if optimizer is not None:
        moments.forget(optimizer, _gone(model, axes, mask))
    for axis in shrinking.values():
        if axis.modules:
            _drop_block(model, axis)
    for axis in shrinking.values():
        if axis.kind == "layers":
            _drop_layers(model, axis, mask[axis.name].nonzero().flatten().tolist())
    write_sizes(model.config, axes, mask)


def num_left(model: nn.Module, axes: Sequence[Axis], mask: Mask) -> int:
    """The number of parameters that a model will have after `cut` by a mask.

    Raises:
        ValueError: the slices of the axes do not fit a parameter, or leave out a part of it.
    """
    _check_slices(model, axes)
    gone = _gone(model, axes, mask)
    left = count_parameters(model) - sum(parameter.numel() for parameter in gone)
    for parameter, index in _kept(model, axes, mask):
        if parameter in gone:
            continue
        shape = [index[dim].numel() if dim in index else length for dim, length in enumerate(parameter.shape)]
        left += math.prod(shape) - parameter.numel()
    return left


def num_active(model: nn.Module, axes: Sequence[Axis], mask: Mask = Mask()) -> int:  # noqa: B008 (a Mask is immutable)
    """The number of parameters that one token will go through after `cut` by a mask: not those of experts that it is not sent to."""
    stayed, idle = mask.layers_left, 0
    for axis in axes:
        if axis.per_token and (stayed is None or axis.layer in stayed):
            of_expert = unit_cost(
                model, [piece for piece in axis.slices if not piece.parameter.startswith(f"{axis.gate.module}.")]
            )
            idle += max(0, int(mask.of(axis).sum()) - axis.per_token) * of_expert
    return (num_left(model, axes, mask) if mask.kept else count_parameters(model)) - idle


def _gone(model: nn.Module, axes: Sequence[Axis], mask: Mask) -> set[nn.Parameter]:
    """The parameters of the layers and blocks that are removed whole."""
    modules: list[nn.Module] = []
    for axis in axes:
        if axis.kind == "layers" and axis.name in mask:
            stack: Any = model.get_submodule(axis.gate.module)
            modules += [layer for layer, stays in zip(stack, mask[axis.name], strict=True) if not stays]
        elif axis.modules and not mask.of(axis).any():
            modules += [model.get_submodule(name) for name in axis.modules]
    return {parameter for module in modules for parameter in module.parameters()}


def _size(axis: Axis, mask: Mask) -> int:
    """Units that stay of an axis. Every group of which anything stays keeps this number.

    Raises:
        ValueError: the groups keep different numbers.
    """
    left = {int(group) for group in mask.of(axis).view(axis.groups, -1).sum(dim=1)} - {0}
    if not left:  # its block is removed
        return 0
    if len(left) != 1:
        raise ValueError(f"mask of {axis.name!r} keeps {sorted(left)} units of its groups; every group must keep the same number")
    return left.pop()


def _kept(model: nn.Module, axes: Sequence[Axis], mask: Mask) -> Iterator[tuple[nn.Parameter, dict[int, Tensor]]]:
    """Each parameter that shrinks, with the indices that stay along each of its dimensions."""
    named, shrinking = _named(model), dict[int, tuple[nn.Parameter, dict[int, Tensor]]]()
    for axis in axes:
        keep = mask.of(axis)
        if not keep.all():
            for piece in axis.slices:
                parameter = named[piece.parameter]
                _, dims = shrinking.setdefault(id(parameter), (parameter, {}))
                stays = dims.setdefault(piece.dim, torch.ones(parameter.shape[piece.dim], dtype=torch.bool))
                stays[piece.start : piece.start + axis.entries * piece.width] &= keep.repeat_interleave(piece.width)
    named.clear()
    for key in list(shrinking):
        parameter, dims = shrinking.pop(key)  # so that a parameter already cut is freed while the rest are cut
        yield parameter, {dim: entries.nonzero().flatten() for dim, entries in dims.items()}


def _renumber(model: nn.Module, fields: Sequence[str], keep: Tensor) -> None:
    """Renumber, in place, the unit numbers in the configs and paddings of `model`; the number of a removed unit becomes None."""
    new = {old: index for index, old in enumerate(keep.nonzero().flatten().tolist())}
    for config in (model.config, getattr(model, "generation_config", None)):
        for field in (*fields, *_MAY_GO):
            old = getattr(config, field, None)
            if old is not None:
                setattr(config, field, _renumbered(old, new))
    for module in model.modules():
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = new.get(module.padding_idx)  # type: ignore[assignment]


def _renumbered(old: Any, new: Mapping[int, int]) -> Any:
    """A number or a list of numbers, renumbered. Of a list of lists those stay that lose no number. None if nothing stays."""
    if not isinstance(old, list):
        return new.get(old)
    if any(isinstance(number, list) for number in old):
        return [[new[i] for i in word] for word in old if all(i in new for i in word)] or None
    return [new[i] for i in old if i in new] or None


@torch.no_grad()
def multiply(model: nn.Module, name: str, factor: float, offset: float = 0.0, optimizer: Optimizer | None = None) -> None:
    """Multiply, in place, a parameter, module attribute or config field. Moments of the gradient g, now g / factor, follow.

    For a parameter w, offset + w is multiplied. Some modules also hold a buffer's value as a number, `scalar_…`. The caller has
    already multiplied that number, and the buffer is filled from it, as happens when the model is loaded. Multiplying the buffer
    itself would round differently, except in float64.
    """
    owner, _, leaf = name.rpartition(".")
    module = attrgetter(owner)(model)
    value = getattr(module, leaf)
    if not isinstance(value, nn.Parameter):
        exact = getattr(module, f"scalar_{leaf}", None)
        if exact is None or value.dtype == torch.float64:
            setattr(module, leaf, value * factor)
        else:
            setattr(module, leaf, torch.full_like(value, exact))
        return
    with numbers_of(value):
        wide = value.data.to(torch.promote_types(value.dtype, torch.float32))
        value.copy_((wide + offset) * factor - offset)
    value.grad = None
    if optimizer is not None:
        moments.multiply(optimizer, value, factor)


def _drop_block(model: nn.Module, axis: Axis) -> None:
    """Replace, in place, the attention or MLP of a layer by a module that adds nothing, and each of its norms by the identity."""
    block = next(name for name in axis.modules if any(model.get_submodule(name).children()))  # a norm has no modules inside
    for name in axis.modules:
        stand_in = _Nothing(getattr(model.get_submodule(name), "layer_idx", None)) if name == block else nn.Identity()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, stand_in.train(model.training))


def _drop_layers(model: nn.Module, axis: Axis, stayed: list[int]) -> None:
    """Remove, in place, all decoder layers but those `stayed`; the rest are renumbered."""
    parent_name, _, leaf = axis.gate.module.rpartition(".")
    layers = model.get_submodule(axis.gate.module)
    remaining = nn.ModuleList([layers[i] for i in stayed])  # type: ignore[index]
    for index, layer in enumerate(remaining):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    setattr(model.get_submodule(parent_name), leaf, remaining)


def write_sizes(config: Any, axes: Sequence[Axis], mask: Mask = Mask()) -> None:  # noqa: B008 (a Mask is immutable)
    """Write, in place, the sizes that `axes` have under `mask` into a transformers config.

    A field is set for the whole model if all layers that have it agree. Otherwise it goes to `per_layer_config`, which holds only
    what differs. A field also goes there if the config refuses the common value: Llama wants hidden_size to be a multiple of the
    number of heads. `skip` in `per_layer_config` names the blocks that a layer lacks, as in transformers' schema: those missing
    already and those that go now. With `own_sizes` something beside the layers goes by the same fields, so these stay as they are and
    layers of another size state it. A model of two towers has a config for each, `text_config` and `vision_config`.
    """
    if len(towers := towers_of(axes)) > 1:
        for tower in towers:
            inner = getattr(config, f"{tower.removesuffix('.')}_config") if tower else config
            write_sizes(inner, of_tower(axes, tower), mask.of_tower(tower))
        return
    depth = next((axis for axis in axes if axis.name == "layers"), None)
    skipped = [list(getattr(layer, "skip", ())) for layer in config.per_layer_config] if depth else []
    config.per_layer_config = None
    stayed = mask.layers_left or list(range(depth.size if depth else 0))
    if depth is not None:
        for field, _ in depth.fields:
            setattr(config, field, len(stayed))
        for name in depth.firsts:
            setattr(config, name, sum(old < getattr(config, name) for old in stayed))
        for name in depth.lists:
            if getattr(config, name, None) is not None and len(getattr(config, name)) == depth.size:
                setattr(config, name, [getattr(config, name)[i] for i in stayed])

    sizes: dict[str, dict[int, int]] = {}
    for axis in axes:
        if axis.layer is None:
            for field, units in axis.fields:
                setattr(config, field, int(mask.of(axis).sum()) * units)
        elif axis.modules and axis.layer in stayed and not mask.of(axis).any():
            skipped[axis.layer].append(axis.kind.removesuffix("s"))
        elif axis.layer in stayed and mask.of(axis).any():
            for field, units in axis.fields:
                sizes.setdefault(field, {})[stayed.index(axis.layer)] = int(mask.of(axis).sum()) * units
            for field, value in axis.pins:
                setattr(config, field, value)

    per_layer: dict[int, dict[str, Any]] = {i: {"skip": skipped[old]} if skipped[old] else {} for i, old in enumerate(stayed)}
    for field, by_layer in sizes.items():
        common = set(by_layer.values())
        shared = len(common) == 1 and (common == {getattr(config, field)} or not getattr(config, "own_sizes", False))
        if shared and _accepts(config, field, next(iter(common))):
            setattr(config, field, common.pop())
        else:
            for i, size in by_layer.items():
                per_layer[i][field] = size
            if not _accepts(config, field, getattr(config, field)):
                setattr(config, field, 1)  # no layer has this value, but it passes validation; every layer states its own
    if any(per_layer.values()):
        config.per_layer_config = per_layer
        config.allow_global_per_layer_attribute_access = _reads_global_sizes(config)
    else:
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)


def _accepts(config: Any, field: str, value: int) -> bool:
    trial = copy.deepcopy(config)
    setattr(trial, field, value)
    try:
        trial.validate_architecture()
        trial.validate_rope()
    except ValueError:
        return False
    return True


def _reads_global_sizes(config: Any) -> bool:
    """Whether stock code reads a size for the whole model that differs between layers.

    It does so when validating (Llama, Phi-3, Gemma 3), and for scaled positions (YaRN, dynamic): there transformers reads the
    number of heads even if it knows their size.
    """
    positions = getattr(config, "rope_parameters", None) or {}
    kinds = [of.get("rope_type") for of in (positions, *positions.values()) if isinstance(of, dict)]
    if getattr(config, "own_sizes", False) or any(kind not in (None, "default") for kind in kinds):
        return True
    config.allow_global_per_layer_attribute_access = False
    try:
        config.validate_architecture()
        config.validate_rope()
    except RuntimeError:
        return True
    return False
