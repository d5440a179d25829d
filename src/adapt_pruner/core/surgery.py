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
from torch.utils.hooks import RemovableHandle

from adapt_pruner.core.axes import Axis, Mask
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.core.hooks import attached

__all__ = ["cut", "first", "gated", "multiply", "num_left", "with_first", "write_sizes"]

_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}  # of the gradient, in torch's optimisers


def _checked(axes: Sequence[Axis], mask: Mask) -> dict[str, Axis]:
    """The axes that `mask` shrinks, by name."""
    mask.check(axes)
    by_name = {axis.name: axis for axis in axes}
    return {name: by_name[name] for name in mask if not bool(mask[name].all())}


def _check_slices(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Refuse axes whose slices do not cover whole each dimension that they cut.

    Raises:
        ValueError: a slice goes beyond its dimension, or the slices of all axes together leave out a part of it.
    """
    runs: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for axis in axes:
        for piece in axis.slices:
            length, end = model.get_parameter(piece.parameter).shape[piece.dim], piece.start + axis.entries * piece.width
            if piece.start < 0 or end > length:
                raise ValueError(
                    f"{axis.name} owns {piece.start:,} to {end:,} along dimension {piece.dim} of {piece.parameter}, which has {length:,}; "
                    "the family's slice has a wrong start or width"
                )
            runs.setdefault((piece.parameter, piece.dim), []).append((piece.start, end))
    for (name, dim), owned in runs.items():
        length, covered, reached = model.get_parameter(name).shape[dim], 0, 0
        for start, end in sorted(owned):
            covered += max(0, end - max(start, reached))
            reached = max(reached, end)
        if covered != length:
            raise ValueError(
                f"the slices of all axes together own {covered:,} of {length:,} along dimension {dim} of {name}; the family must "
                "declare the others, and all axes of a model must be given"
            )


def _check_gate(model: nn.Module, axis: Axis) -> None:
    """Refuse a gate that has another number of features than the entries of its axis own.

    Raises:
        ValueError: it has.
    """
    gate = axis.gate
    for name in () if gate.is_whole else (gate.module, *gate.also):
        weight: Any = getattr(model.get_submodule(name), "weight", None)
        if weight is None:
            continue
        features, owned = weight.shape[gate.dim if gate.is_linear else 0], axis.entries * gate.width
        if features != owned:
            raise ValueError(f"the gate of {axis.name} has {features:,} features at {name}, of which its entries own {owned:,}")


@contextmanager
def gated(model: nn.Module, axes: Sequence[Axis], gates: Mask | Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, the units that a mask removes are shut: a dry run of `cut` that touches no weight. Gates may be open in part, too.

    With a number g for each entry, 0 for shut and 1 for open, what it shuts is multiplied:

        inputs      g · x for the features x that an entry owns
        channels    g · x for a channel x as the norms read it, so their mean runs over what is left of it
        whole       of a block g · y for what it adds to the stream; of a layer x + g · (f(x) - x)
        logits      z + log g; -inf where g is 0 or less, and then without a gradient by g

    Args:
        model: left as found.
        axes: its axes.
        gates: a mask; or axis name -> float tensor [entries], any real numbers. Outputs can be differentiated by them.

    Raises:
        ValueError: a mask does not fit the axes (`Mask.check`), gates are not a float for each entry of an axis, or a gate does not
            fit its axis.
    """
    if isinstance(gates, Mask):
        shut = _checked(axes, gates)
        with attached(hook for name, axis in shut.items() for hook in _shut(model, axis, gates[name])):
            yield
        return
    by_name = {axis.name: axis for axis in axes}
    for name, gate in gates.items():
        if name not in by_name:
            raise ValueError(f"gates name {name!r}, which is not an axis of this model")
        if gate.shape != (by_name[name].entries,) or not gate.is_floating_point():
            raise ValueError(
                f"gates of {name!r} must be {by_name[name].entries} floats, not {gate.dtype} of shape {tuple(gate.shape)}"
            )
    with attached(hook for name, gate in gates.items() for hook in _open(model, by_name[name], gate)):
        yield


def _open(model: nn.Module, axis: Axis, gate: Tensor) -> Iterator[RemovableHandle]:
    """The hooks that open the entries of an axis as far as `gate` says, [entries], attached one by one."""
    _check_gate(model, axis)
    if axis.gate.kind == "logits":
        yield model.register_forward_hook(partial(_add_log, gate))
    elif axis.gate.is_whole:
        whole: Any = model.get_submodule(axis.gate.module)
        if axis.modules:
            yield whole.register_forward_hook(partial(_multiply_output, gate[0]))
            return
        for index, layer in enumerate(whole):
            yield layer.register_forward_hook(partial(_multiply_change, gate[index]), with_kwargs=True)
    else:
        for module in (axis.gate.module, *axis.gate.also):
            features = gate.repeat_interleave(axis.gate.width)
            yield model.get_submodule(module).register_forward_pre_hook(partial(_multiply_input, features))


def _multiply_input(features: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * features.to(args[0]), *args[1:])


def _multiply_output(gate: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return with_first(output, first(output) * gate.to(first(output)))


def _multiply_change(gate: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    entered = args[0] if args else kwargs["hidden_states"]
    return with_first(output, entered + gate.to(entered) * (first(output) - entered))


def _add_log(gate: Tensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    opened = gate > 0
    log = torch.where(opened, gate, 1.0).log().masked_fill(~opened, -torch.inf)  # no 0 · inf in its gradient
    output.logits = output.logits + log.to(output.logits)
    return output


def _shut(model: nn.Module, axis: Axis, keep: Tensor) -> Iterator[RemovableHandle]:
    """The hooks that shut the entries of an axis which are not kept, attached one by one."""
    _check_gate(model, axis)
    if axis.gate.kind == "logits":
        yield model.register_forward_hook(_Unsaid(keep))  # once logits are capped, where they are
    elif axis.gate.is_whole:
        whole: Any = model.get_submodule(axis.gate.module)
        if axis.modules:
            yield whole.register_forward_hook(_silence)
            return
        for index in (~keep).nonzero().flatten().tolist():
            yield whole[index].register_forward_hook(_skip, with_kwargs=True)
    else:
        shut = _Shut(keep.repeat_interleave(axis.gate.width))
        for module in (axis.gate.module, *axis.gate.also):
            yield model.get_submodule(module).register_forward_pre_hook(shut)


class _Shut:
    """A forward pre-hook that zeroes the features whose `keep` is False."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * self.keep.to(args[0].device), *args[1:])


class _Unsaid:
    """A forward hook on the model that makes the logits whose `keep` is False -inf."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output.logits = output.logits.masked_fill(~self.keep.to(output.logits.device), -torch.inf)
        return output


def first(output: Any) -> Tensor:
    """What a layer or block gives the stream, of all that it returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_first(output: Any, tensor: Tensor) -> Any:
    """What a layer or block returns, with another tensor for the stream."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    entered = args[0] if args else kwargs["hidden_states"]
    return with_first(output, entered)


def _silence(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return with_first(output, torch.zeros_like(first(output)))


class _Nothing(nn.Module):
    """In the place of attention, where a layer number is given, or of an MLP that is gone: adds nothing to the stream.

    modeling_pruned.py has its like. Attention that is gone still counts tokens in its layer of the cache, one number each, since
    transformers asks one layer for all how many there are.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        if self.layer_idx is None:
            return nothing
        cache = others.get("cache", others.get("past_key_values"))  # as transformers calls it, and called it
        if cache is not None:
            cache.update(nothing[:, None, :, :1], nothing[:, None, :, :1], self.layer_idx)
        return nothing, None


class _OwnConfig:
    """The config of a model with some fields of one layer's own, for a module that reads them there; modeling_pruned.py has its like."""

    def __init__(self, whole: Any, own: Mapping[str, int]) -> None:
        self.__dict__.update(own, whole=whole)

    def __getattr__(self, name: str) -> Any:
        if name == "whole" or name.startswith("__"):  # of one that is being copied
            raise AttributeError(name)
        return getattr(self.whole, name)


@torch.no_grad()
def cut(
    model: nn.Module,
    axes: Sequence[Axis],
    mask: Mask,
    *,
    optimizer: Optimizer | None = None,
    beside: dict[nn.Parameter, Tensor] | None = None,
) -> None:
    """Remove, in place, the units that `mask` does not keep; the optimiser's state shrinks along.

    Weights, biases, module sizes, layer numbers, norms whose mean runs over an axis and `model.config` follow. Every shortened parameter is a new
    `nn.Parameter` (tied uses stay tied); the optimiser's groups point to it, and each of its state tensors that
    had the parameter's shape is sliced alike. Gradients of shortened parameters are dropped. Where a block goes, modules
    without parameters stand in for it and its norms, so that the layer's own forward runs on.

    Args:
        model: changed in place; may lie on the meta device.
        axes: the model's axes, all of them: sizes of untouched axes are written to the config too.
        mask: against the model as it is now. Names inside layers count the layers before the cut.
        optimizer: any torch optimiser over the model's parameters.
        beside: a tensor of its shape for some parameters, a mask over its weights; changed in place to have the new parameters, and tensors
            cut alike. Parameters that go are left out.

    Raises:
        ValueError: the mask does not fit the axes (`Mask.check`), or keeps more in one block of an axis than in another; the slices
            of the axes do not fit a parameter, or leave a part of it out. Nothing is changed.
    """
    shrinking = _checked(axes, mask)
    _check_slices(model, axes)
    sizes = {axis.name: _size(axis, mask) for axis in axes}
    owners: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))

    for old, index in _kept(model, axes, mask):
        new = _shortened(old, index)
        for module, leaf in owners[id(old)]:
            setattr(module, leaf, new)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            elif type(module).__name__ == "Conv1D":  # of transformers
                module.nx, module.nf = module.weight.shape
            elif isinstance(module, nn.Embedding):
                module.num_embeddings, module.embedding_dim = module.weight.shape
        if optimizer is not None:
            _follow(optimizer, old, new, index)
        if beside is not None and old in beside:
            beside[new] = _at(beside.pop(old), index)
    for axis in axes:
        for name in axis.attributes:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, sizes[axis.name])
        if sizes[axis.name] < axis.size:
            for name, power in axis.scaled:
                offset = 1.0 if name in axis.one_more else 0.0
                multiply(model, name, (axis.size / sizes[axis.name]) ** power, offset, optimizer)
        if axis.indices and axis.name in shrinking:
            _renumber(model, axis.indices, mask[axis.name])
        for name in axis.readers:
            its = {field: int(mask.of(axis).sum()) * units for field, units in axis.fields}
            setattr(model.get_submodule(name), "config", _OwnConfig(model.config, its))  # noqa: B010 (its type is not a module's)
    if optimizer is not None:
        _forget(optimizer, _gone(model, axes, mask))
    for axis in shrinking.values():
        if axis.modules:
            _drop_block(model, axis)
    if "layers" in shrinking:
        _drop_layers(model, shrinking["layers"], mask["layers"].nonzero().flatten().tolist())
    write_sizes(model.config, axes, mask)


def num_left(model: nn.Module, axes: Sequence[Axis], mask: Mask) -> int:
    """Parameters that a model will have after `cut` by a mask.

    Raises:
        ValueError: the slices of the axes do not fit a parameter, or leave a part of it out.
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


def _gone(model: nn.Module, axes: Sequence[Axis], mask: Mask) -> set[nn.Parameter]:
    """The parameters of the layers and blocks that go whole."""
    modules: list[nn.Module] = []
    for axis in axes:
        if axis.name == "layers" and axis.name in mask:
            stack: Any = model.get_submodule(axis.gate.module)
            modules += [layer for layer, stays in zip(stack, mask["layers"], strict=True) if not stays]
        elif axis.modules and not mask.of(axis).any():
            modules += [model.get_submodule(name) for name in axis.modules]
    return {parameter for module in modules for parameter in module.parameters()}


def _size(axis: Axis, mask: Mask) -> int:
    """Units that stay of an axis; the same number in every block of which anything stays.

    Raises:
        ValueError: it is not.
    """
    left = {int(block) for block in mask.of(axis).view(axis.blocks, -1).sum(dim=1)} - {0}
    if not left:  # its block goes
        return 0
    if len(left) != 1:
        raise ValueError(f"mask of {axis.name!r} keeps {sorted(left)} units of its blocks; every block must keep the same number")
    return left.pop()


def _kept(model: nn.Module, axes: Sequence[Axis], mask: Mask) -> Iterator[tuple[nn.Parameter, dict[int, Tensor]]]:
    """Each parameter that shrinks, with the indices that stay along each of its dimensions."""
    parameters: dict[int, tuple[nn.Parameter, dict[int, Tensor]]] = {}
    for axis in axes:
        keep = mask.of(axis)
        if not keep.all():
            for piece in axis.slices:
                parameter = model.get_parameter(piece.parameter)
                _, dims = parameters.setdefault(id(parameter), (parameter, {}))
                stays = dims.setdefault(piece.dim, torch.ones(parameter.shape[piece.dim], dtype=torch.bool))
                stays[piece.start : piece.start + axis.entries * piece.width] &= keep.repeat_interleave(piece.width)
    for key in list(parameters):
        parameter, dims = parameters.pop(key)  # so that what was cut is not held while the rest is
        yield parameter, {dim: entries.nonzero().flatten() for dim, entries in dims.items()}


def _at(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    for dim, stays in index.items():
        tensor = tensor.index_select(dim, stays.to(tensor.device))
    return tensor.contiguous()


def _shortened(parameter: nn.Parameter, index: Mapping[int, Tensor]) -> nn.Parameter:
    return nn.Parameter(_at(parameter.data, index), requires_grad=parameter.requires_grad)


def _renumber(model: nn.Module, fields: Sequence[str], keep: Tensor) -> None:
    """Let the configs and the padding of `model`, in place, name units by their numbers after the cut; None for one that is gone."""
    new = {old: index for index, old in enumerate(keep.nonzero().flatten().tolist())}
    for config in (model.config, getattr(model, "generation_config", None)):
        for field in fields:
            old = getattr(config, field, None)
            if old is not None:
                setattr(config, field, [new[i] for i in old if i in new] if isinstance(old, list) else new.get(old))
    for module in model.modules():
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = new.get(module.padding_idx)  # type: ignore[assignment]


def _follow(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, index: Mapping[int, Tensor]) -> None:
    """Point the optimiser, in place, from `old` to `new`, its state sliced alike."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {
            key: _at(value, index) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


@torch.no_grad()
def multiply(model: nn.Module, name: str, factor: float, offset: float = 0.0, optimizer: Optimizer | None = None) -> None:
    """Multiply, in place, a parameter, module attribute or config field; moments of its gradient g, now g / factor, follow.

    Of a parameter w, offset + w is what is multiplied. A buffer that its module has as a number too, `scalar_…`, is made of that,
    multiplied before, as it is when the model is loaded; a product of its own would be rounded otherwise (not in float64).
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
    wide = value.data.to(torch.promote_types(value.dtype, torch.float32))
    value.data = ((wide + offset) * factor - offset).to(value.dtype)
    value.grad = None
    for key, moment in (optimizer.state.get(value, {}) if optimizer is not None else {}).items():
        if key in _POWERS:
            moment.mul_(factor ** -_POWERS[key])


def _forget(optimizer: Optimizer, gone: set[nn.Parameter]) -> None:
    """Let the optimiser, in place, go on without the parameters that are `gone`."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def _drop_block(model: nn.Module, axis: Axis) -> None:
    """Put, in place, a module that adds nothing where the attention or MLP of a layer is, and one that does nothing for each norm."""
    _, block, *_ = axis.modules
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
    """State, in place, the sizes that `axes` have under `mask` in a transformers config.

    A field on which all layers agree that have it is set for the whole model, the others in `per_layer_config`, which holds only
    what differs. Where the config refuses the common value (Llama wants hidden_size to be a multiple of the number
    of heads) the field goes to `per_layer_config` as well. `skip` in it names the blocks that a layer lacks, as transformers'
    schema has it: those that lack already, and those that go.
    """
    depth = next((axis for axis in axes if axis.name == "layers"), None)
    skipped = [list(getattr(layer, "skip", ())) for layer in config.per_layer_config] if depth else []
    config.per_layer_config = None
    stayed = list(range(depth.size if depth else 0))
    if depth is not None and "layers" in mask:
        stayed = mask["layers"].nonzero().flatten().tolist()
    if depth is not None:
        for field, _ in depth.fields:
            setattr(config, field, len(stayed))
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
        if len(common) == 1 and _accepts(config, field, next(iter(common))):
            setattr(config, field, common.pop())
        else:
            for i, size in by_layer.items():
                per_layer[i][field] = size
            if not _accepts(config, field, getattr(config, field)):
                setattr(config, field, 1)  # no layer's, but it has to pass; all layers say their own
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
    """Whether stock code reads of the whole model a size that differs between layers: in validating (Llama, Phi-3, Gemma 3), or for
    positions that are scaled (YaRN, dynamic), where transformers reads the number of heads even if it knows their size.
    """
    positions = getattr(config, "rope_parameters", None) or {}
    kinds = [of.get("rope_type") for of in (positions, *positions.values()) if isinstance(of, dict)]
    if any(kind not in (None, "default") for kind in kinds):
        return True
    config.allow_global_per_layer_attribute_access = False
    try:
        config.validate_architecture()
        config.validate_rope()
    except RuntimeError:
        return True
    return False
