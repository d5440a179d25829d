"""What `rotate: pca` does to a model: the width that a budget allows, and the sliced model in the place of the dense one."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adapt_pruner.checkpoint import modeling_sliced
from adapt_pruner.core.layerwise import decoder_layers
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.rotate import directions, rotate, sliced_parameters

__all__ = ["slice_to", "width_for"]

_MULTIPLE = 8  # of a width


def width_for(model: Any, keep: int) -> int:
    """The widest residual stream, a multiple of 8, at which the sliced model has at most `keep` parameters.

    Raises:
        UsageError: none does, there is no sliced class for this kind of model, or a layer lacks its attention or MLP.
    """
    _sliced_class(model)
    if lacking := [i for i, layer in enumerate(model.config.per_layer_config) if getattr(layer, "skip", ())]:
        raise UsageError(
            f"layer {lacking[0]} lacks its attention or MLP, and slicing changes the basis at both; set rotate to null, or slice the "
            "model that it came from"
        )
    dense = model.get_output_embeddings().weight.shape[1]
    fitting = [width for width in range(_MULTIPLE, dense, _MULTIPLE) if sliced_parameters(model, width) <= keep]
    if not fitting:
        least = sliced_parameters(model, _MULTIPLE)
        raise UsageError(
            f"budget {keep:,} is below the {least:,} parameters that slicing leaves with {_MULTIPLE} of {dense} dimensions, "
            f"whole head and shortcuts counted; the nearest that can be had is {least:,}"
        )
    return fitting[-1]


def slice_to(
    model: Any, width: int, batches: Sequence[Tensor], *, dtype: str, on_basis: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Turn `model`, in place, into the sliced model of that width: other class, config and parameters, the same object.

    Args:
        model: causal LM of the Llama layout, in eval mode; its layers may differ in heads and neurons.
        width: dimensions of the residual stream that stay.
        batches: calibration text, int64 [batch, length].
        dtype: precision of matrix products while signals are collected.
        on_basis: told (done, of) after each of two bases a layer.

    Raises:
        RunError: a signal is not finite; the model is as it was.
    """
    config = copy.deepcopy(model.config)
    config.sliced_hidden_size = width
    config.tie_word_embeddings = False
    config.head_dim = decoder_layers(model)[0].self_attn.head_dim  # stock code would derive it from the width
    weight = model.get_output_embeddings().weight
    sliced = _sliced_class(model)(config).to(weight.device, weight.dtype)
    rotate(model, sliced, directions(model, batches, width, dtype=dtype, on_basis=on_basis))
    sliced.generation_config = model.generation_config
    sliced.train(model.training)
    model.__class__, model.__dict__ = sliced.__class__, sliced.__dict__


def _sliced_class(model: Any) -> Any:
    stock = type(model).__name__.removeprefix("Pruned")
    found = getattr(modeling_sliced, f"Sliced{stock}", None)
    if found is None:
        known = ", ".join(
            name.removeprefix("Sliced")
            for name in vars(modeling_sliced)
            if name.endswith("ForCausalLM") and name.startswith("Sliced")
        )
        raise UsageError(f"{stock} cannot be sliced, since there is no sliced class for it; known: {known}")
    return found
