"""Widen layers with zeros, which does not change what they compute, and build the stock model with layers of equal size.

A neuron whose gate, up and down weights are zero gives silu(0) · 0 = 0. A head whose value and output weights are zero adds zero,
whatever it attends to. Query head (k, g) is number g of KV head k. It moves to place k · G + g if each KV head has G of them.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.core.model.kinds import LABELS, USUAL
from adapt_pruner.core.model.shelf import Shelved, Stored
from adapt_pruner.core.model.weight_mask import WeightMask
from adapt_pruner.errors import UsageError, settings

_NO_MASK = (
    "padding changes the shape of layers that have zeros, so this folder has no mask over weights, and training would fill the zeros; "
    "train the checkpoint itself"
)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer: KV heads, query heads per KV head, and MLP neurons."""

    kv_heads: int
    query_heads: int
    neurons: int

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.query_heads


def kinds_by_layer(model: Any) -> list[dict[str, int]]:
    """For each layer, kind of axis -> number of units."""
    by_layer: dict[int, dict[str, int]] = {}
    for axis in families.axes(model):
        if axis.layer is not None:
            by_layer.setdefault(axis.layer, {})[axis.kind] = axis.size
    return [sizes for _, sizes in sorted(by_layer.items())]


def layer_sizes(model: Any) -> list[LayerSizes]:
    """The sizes of each layer, read from the weights.

    Raises:
        UsageError: layers have no heads or no neurons whose number may change.
    """
    layers = kinds_by_layer(model)
    for kind in (*USUAL, "query_heads"):
        if any(kind not in sizes for sizes in layers):
            raise UsageError(
                f"this export sets the number of {LABELS[kind]} of each layer, which this model does not let change; use the checkpoint as "
                "it is, or export it --to onnx"
            )
    return [LayerSizes(sizes["kv_heads"], sizes["query_heads"], sizes["neurons"]) for sizes in layers]


def widest(sizes: Sequence[LayerSizes]) -> LayerSizes:
    """The smallest sizes that hold every layer."""
    return LayerSizes(
        max(size.kv_heads for size in sizes), max(size.query_heads for size in sizes), max(size.neurons for size in sizes)
    )


def check_layers(config: Any, form: str) -> None:
    """Refuse a model whose layers have no stock counterpart: sliced ones, with sums of blocks, or without attention or MLP.

    Raises:
        UsageError: the model is refused.
    """
    if families.is_sliced(config):
        raise UsageError(
            f"the model is sliced (reduce: slice), and {form} has no place for the maps beside its layers; "
            "export it to onnx, or prune heads and neurons instead"
        )
    if getattr(config, "block_sums", 0):
        raise UsageError(
            f"the model has SLoRB matrices beside its zeros, and {form} has no place for them; export it to onnx, or train with slorb=0"
        )
    lacking = [i for i, layer in enumerate(config.per_layer_config) if getattr(layer, "skip", ())]
    if lacking:
        raise UsageError(
            f"layer {lacking[0]} has no {' and no '.join(config.per_layer_config[lacking[0]].skip)}, which this export to "
            f"{form} does not support yet; export it to onnx, or prune heads and neurons instead"
        )


def still_fitting(mask: WeightMask | None, weights: Mapping[str, Tensor]) -> tuple[WeightMask | None, list[str]]:
    """The mask over weights, unless padding has changed the shape of a masked weight; then None, and a sentence about it."""
    if mask is not None and any(weights[f"{name}.weight"].shape != keep.shape for name, keep in mask.kept.items()):
        return None, [_NO_MASK]
    return mask, []


def padded_weights(model: Any, sizes: Sequence[LayerSizes]) -> dict[str, Tensor]:
    """The model's state with each layer widened to `sizes`; a tensor that is wide enough is the model's own.

    Raises:
        UsageError: several projections of the model share one matrix, or its MLPs have no gate.
        ValueError: a size is below the layer's own.
    """
    widened, parameters = widening(model, sizes), model.named_parameters(remove_duplicate=False)
    shelved = {name: weight for name, weight in parameters if isinstance(weight, Shelved)}
    return {name: widened(name, tensor) for name, tensor in {**model.state_dict(), **shelved}.items()}


def widening(model: Any, sizes: Sequence[LayerSizes]) -> Callable[[str, Tensor], Tensor]:
    """The function that takes the name and the value of a tensor of `model`, and returns it as wide as a model of `sizes` has it.

    Raises:
        UsageError: several projections of the model share one matrix, or its MLPs have no gate.
        ValueError: a size is below the layer's own.
    """
    if not hasattr(model.model.layers[0].self_attn, "q_proj"):
        raise UsageError(
            "queries, keys and values of this model are one matrix, qkv_proj, which zero-padding does not support yet; use the "
            "checkpoint as it is, or export it to onnx"
        )
    if not hasattr(model.model.layers[0].mlp, "gate_proj"):
        raise UsageError(
            "this export widens the gate_proj of MLPs, which those of this model do not have; use the checkpoint as it is, or export it "
            "--to onnx"
        )
    head_dim = model.model.layers[0].self_attn.head_dim
    wider: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
    for index, (now, new) in enumerate(zip(layer_sizes(model), sizes, strict=True)):
        if new.kv_heads < now.kv_heads or new.query_heads < now.query_heads or new.neurons < now.neurons:
            raise ValueError(f"layer {index} has {now}, more than {new}")
        query, query_new = (now.kv_heads, now.query_heads, head_dim), (new.kv_heads, new.query_heads, head_dim)
        key, key_new = (now.kv_heads, head_dim), (new.kv_heads, head_dim)
        neurons, neurons_new = (now.neurons,), (new.neurons,)
        for name, dim, blocks, blocks_new in (
            ("self_attn.q_proj", 0, query, query_new),
            ("self_attn.k_proj", 0, key, key_new),
            ("self_attn.v_proj", 0, key, key_new),
            ("self_attn.o_proj", 1, query, query_new),
            ("mlp.gate_proj", 0, neurons, neurons_new),
            ("mlp.up_proj", 0, neurons, neurons_new),
            ("mlp.down_proj", 1, neurons, neurons_new),
        ):
            for leaf in ("weight", "bias") if dim == 0 else ("weight",):
                wider[f"model.layers.{index}.{name}.{leaf}"] = dim, blocks, blocks_new

    def widened(name: str, tensor: Tensor) -> Tensor:
        return _widened(tensor, *wider[name]) if name in wider else tensor

    return widened


@dataclass(frozen=True)
class _Widened(Stored):
    """A weight on a shelf that is padded when it is read."""

    stored: Stored
    dim: int
    blocks: tuple[int, ...]
    blocks_new: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """See `Stored`."""
        return self.stored.dtype

    def read(self) -> Tensor:
        """See `Stored`."""
        return _widened(self.stored.read(), self.dim, self.blocks, self.blocks_new)


def _widened(tensor: Tensor, dim: int, blocks: tuple[int, ...], blocks_new: tuple[int, ...]) -> Tensor:
    """A tensor whose dimension `dim` consists of nested `blocks`, padded with zeros to `blocks_new`."""
    if blocks == blocks_new:
        return tensor
    if isinstance(tensor, Shelved):
        shape = list(tensor.shape)
        shape[dim] = math.prod(blocks_new)
        return tensor.kept_as(_Widened(tensor.stored, dim, blocks, blocks_new), shape)
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    wide = tensor.new_zeros((*before, *blocks_new, *after))
    wide[(slice(None),) * dim + tuple(slice(0, size) for size in blocks)] = tensor.reshape(*before, *blocks, *after)
    return wide.reshape(*before, -1, *after)


def stock_model(model: Any, size: LayerSizes, *, instead: str) -> Any:
    """A model of the stock class, with all layers of one size, that computes the same as `model`.

    It is made only to be saved: it has weights, shared with `model` where they need no padding, but no buffers.

    Args:
        model: the model.
        size: of all layers.
        instead: the forms to name if the stock class refuses that size.

    Raises:
        UsageError: the stock class has no place for a bias of the model, or refuses the number of heads.
    """
    from transformers import AutoModelForCausalLM

    config = _stock_config(model, size, instead)
    state = padded_weights(model, [size] * config.num_hidden_layers)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    expected = stock.state_dict()
    if surplus := sorted(state.keys() - expected.keys()):
        raise UsageError(
            f"{type(stock).__name__} has no place for {surplus[0]}, which a repair added; use the checkpoint as it is, export "
            f"it to onnx, or prune with {settings({'repair': None})}"
        )
    for name in expected.keys() - state.keys():
        assert name.endswith(".bias"), name
        state[name] = torch.zeros(expected[name].shape)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def accepted(model: Any, size: LayerSizes) -> bool:
    """Whether the stock config accepts this number of heads: Llama's wants it to divide the width of the stream."""
    try:
        _stock_config(model, size, "")
    except UsageError:
        return False
    return True


def _stock_config(model: Any, size: LayerSizes, instead: str) -> Any:
    config = copy.deepcopy(model.config)
    config.per_layer_config = None
    for key in ("allow_global_per_layer_attribute_access", "auto_map"):
        config.__dict__.pop(key, None)
    if config.__dict__.pop("output_bias", False) and config.model_type == "llama":
        config.attention_bias = config.mlp_bias = True  # missing biases are zero
    config.head_dim = model.model.layers[0].self_attn.head_dim
    config.num_key_value_heads = size.kv_heads
    config.num_attention_heads = size.heads
    config.intermediate_size = size.neurons
    try:
        config.validate_architecture()
    except ValueError as error:
        raise UsageError(
            f"the stock config does not allow {size.heads} heads: the width {config.hidden_size} is not a multiple of that; "
            f"use {instead}"
        ) from error
    return config
