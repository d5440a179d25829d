"""What a model is made of: parameters in all, in its layers, and layer by layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner import families
from adapt_pruner.core.model.axes import Axis, Mask, of_tower, towers_of
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import num_active
from adapt_pruner.core.model.shelf import fetched
from adapt_pruner.core.model.weight_mask import count_nonzero
from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.errors import UsageError
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.experts import usage, used

_WINDOW, _WINDOWS = 256, 64  # tokens of a window, and the most windows on which use is counted


def decoder_parameters(model: nn.Module) -> int:
    """Parameters of all decoder layers together, without embeddings, head and final norm.

    Args:
        model: a model of a known family.
    """
    return sum(map(count_parameters, _stacks(model)))


@torch.no_grad()
def weight_size(model: nn.Module) -> float:
    """How large a weight is: the root mean square of each matrix of the middle decoder layer without zeros, and of these the median.

    Args:
        model: a model of a known family.
    """
    layers = list(_stacks(model)[0].children())
    middle = layers[len(layers) // 2]
    with fetched(middle):
        matrices = [weight for weight in middle.parameters() if weight.ndim > 1]
        return median(
            float(torch.linalg.vector_norm(weight)) / math.sqrt(max(1, int(weight.count_nonzero()))) for weight in matrices
        )


def _stacks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the decoder layers: one, or one for each tower."""
    return [model.get_submodule(axis.gate.module) for axis in families.axes(model) if axis.kind == "layers"]


def expert_parameters(axes: Iterable[Axis], sizes: Mapping[str, int] = MappingProxyType({})) -> int:
    """Parameters of all experts that a router chooses, with their rows of it; `sizes` are those of the axes, if not those of now."""
    return sum(sizes.get(axis.name, axis.size) * axis.cost for axis in axes if axis.per_token)


def expert_use(model: nn.Module, tokenizer: Any, text: str) -> dict[int, list[float]]:
    """For each layer with experts, the share of the tokens of a text that its router sends to each of them.

    Raises:
        UsageError: the model has no experts, or the text does not exist or is too short.
    """
    if not any(axis.per_token for axis in families.declared(model)):
        raise UsageError("the model has no experts whose use could be counted; leave --text out")
    return use_on(model, held_out_windows(tokenizer, source=text, window=_WINDOW, max_windows=_WINDOWS))


def use_on(model: nn.Module, windows: Sequence[Tensor], *, dtype: str = "auto") -> dict[int, list[float]]:
    """For each layer with experts, the share of the tokens of these windows that its router sends to each of them."""
    axes = [axis for axis in families.declared(model) if axis.per_token]
    shares = score(model, families.declared(model), windows, metrics=[usage], dtype=dtype)[0] if axes else {}
    return {axis.layer: shares[used(axis)].tolist() for axis in axes if axis.layer is not None}


def anatomy(model: nn.Module, *, mask: Mask | None = None, dense_params: int | None = None) -> dict[str, Any]:
    """For each layer its sizes, its parameters, and its share of the dense model if the mask tells it.

    Args:
        model: a model of a known family.
        mask: against the dense model, if known.
        dense_params: parameters of the dense model, if known.

    Returns:
        `params`, `active_params` (those that one token goes through), `decoder_params`, `share_of_dense` (None if not known) and
        `layers`, one dict per layer with `layer` (its number now), `dense_layer` (its number in the dense model), `heads`, `kv_heads`,
        `neurons`, `experts`, `expert_neurons` (of each), `params`, `nonzero`, `share_of_dense`. `nonzero` counts parameters that are not zero, for each layer and for the model. If a layer lost its
        attention or MLP, those sizes are 0 and its share is None, because the mask does not tell how large the block was. Of a model of
        two towers each has its `tower`.
    """
    axes = families.declared(model)
    towers = towers_of(axes)
    layers = [
        {**row, **({"tower": tower.removesuffix(".")} if len(towers) > 1 else {})}
        for tower in towers
        for row in _layers(model, of_tower(axes, tower), None if mask is None else mask.of_tower(tower))
    ]
    params, decoder = count_parameters(model), sum(row["params"] for row in layers)
    return {
        "params": params,
        "active_params": num_active(model, axes),
        "decoder_params": decoder,
        "nonzero": count_nonzero(model),
        "share_of_dense": dense_params and params / dense_params,
        "layers": layers,
    }


def _layers(model: nn.Module, axes: Sequence[Axis], mask: Mask | None) -> list[dict[str, Any]]:
    """The rows of `anatomy`, of a model or of one of its towers."""
    depth = next((axis for axis in axes if axis.name == "layers"), None)
    if depth is None:
        return []
    stack: Any = model.get_submodule(depth.gate.module)
    stayed = (mask.layers_left if mask is not None else None) or list(range(depth.size))
    layers = []
    for i in range(depth.size):
        sizes = {axis.kind: axis.entries for axis in axes if axis.layer == i}
        params = count_parameters(stack[i])
        kv_heads, neurons = sizes.get("kv_heads", 0), sizes.get("neurons", 0)
        heads = sizes.get("query_heads", kv_heads)  # where all heads have keys of their own, there is no axis of query heads
        experts, expert_neurons = _experts(model, [axis for axis in axes if axis.layer == i and axis.per_token])
        layers.append({
            "layer": i, "dense_layer": stayed[i], "heads": heads, "kv_heads": kv_heads, "neurons": neurons,
            "experts": experts, "expert_neurons": expert_neurons, "params": params,
            "nonzero": count_nonzero(stack[i]),
            "share_of_dense": None
            if mask is None or families.is_sliced(model.config) or not (heads and neurons)
            else params / _dense_parameters(stack[i], f"{depth.gate.module}.{i}.", axes, mask, stayed[i]),
        })  # fmt: skip
    return layers


def _experts(model: nn.Module, axes: Sequence[Axis]) -> tuple[int, int]:
    """The number of experts of a layer and the neurons of each, from its axes of experts; zeros if it has none."""
    for axis in axes:
        tensors = [model.get_parameter(piece.parameter) for piece in axis.slices]
        read = model.get_parameter(f"{axis.gate.module}.weight").shape[-1]  # by the router
        return axis.entries, min(tensor[0].numel() for tensor in tensors if tensor.ndim == 3) // read
    return 0, 0


def _dense_parameters(layer: nn.Module, prefix: str, axes: Sequence[Axis], mask: Mask, dense_layer: int) -> int:
    """Parameters of a layer before `mask`: each dimension regains the units that masks of axes with slices in it removed."""
    more: dict[tuple[str, int], dict[int, int]] = {}  # start of a run -> indices it lost; of axes sharing a run, the largest loss
    for axis in axes:
        name = axis.name if axis.layer is None else f"layers.{dense_layer}.{axis.kind}"
        for piece in axis.slices if name in mask else ():
            runs = more.setdefault((piece.parameter, piece.dim), {})
            runs[piece.start] = max(runs.get(piece.start, 0), (mask[name].numel() - axis.entries) * piece.width)
    return sum(
        math.prod(length + sum(more.get((prefix + name, dim), {}).values()) for dim, length in enumerate(parameter.shape))
        for name, parameter in layer.named_parameters()
    )
