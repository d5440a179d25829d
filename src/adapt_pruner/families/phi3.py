"""Phi-3, Phi-3.5 and Phi-4: a Llama's axes, with queries, keys and values in one matrix, and gate and up in another.

    qkv_proj        rows of all query heads, then the keys of all KV heads, then their values
    gate_up_proj    rows of gate, then of up

The attention reads its number of query heads from its config at run time, so each layer gets a config that states its own
(`Axis.readers`). A rope may rotate only a part of each head; no cut changes that part. If the rope is scaled (`longrope`, in the
128k models), the stock config computes the head size as width / heads. That is wrong for a narrower stream, so those models have
no `residual`.

Source: arXiv:2404.14219; the stock code of transformers.
"""

from dataclasses import replace
from typing import Any

from transformers import Phi3Config

from adapt_pruner.core.model.axes import Axis, Slice
from adapt_pruner.families.convention import grouped_heads, is_there, neurons, residual, vocabulary, whole_blocks, whole_layers

MODEL_TYPES = ("phi3",)


def axes(model: Any) -> tuple[Axis, ...]:
    """Every axis of a Phi-3 causal LM, in the order of its layers; `layers` last."""
    all_axes: list[Axis] = []
    for i, layer in enumerate(model.model.layers):
        if is_there(layer.self_attn):
            all_axes += _heads(model, i, layer.self_attn)
        all_axes += neurons(model, i, layer)
    all_axes += whole_blocks(model)
    if model.config.rope_parameters["rope_type"] == "default":
        all_axes += residual(model)
    return (*all_axes, vocabulary(model), whole_layers(model))


def _heads(model: Any, layer: int, attention: Any) -> list[Axis]:
    at, head_dim = f"model.layers.{layer}.self_attn", attention.head_dim
    fused = f"{at}.qkv_proj.weight"
    queries = attention.o_proj.weight.shape[1]  # rows of all query heads
    keys = (attention.qkv_proj.weight.shape[0] - queries) // 2
    num_kv_heads, group = keys // head_dim, queries // keys
    of_group = [Slice(fused, 0, group * head_dim)]
    of_kv_head = [Slice(fused, 0, head_dim, start=start) for start in (queries, queries + keys)]
    pins = (("head_dim", head_dim),)
    kv_heads, query_heads = grouped_heads(model, layer, at, num_kv_heads, group, of_group, of_kv_head, pins)
    return [kv_heads, replace(query_heads, readers=(at,))]


def tiny() -> dict[str, Any]:
    """Configs of tiny random models: grouped and multi-head attention, a short window, partly rotated heads, tied."""
    common: dict[str, Any] = dict(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        max_position_embeddings=128, original_max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    turned = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {
        "phi3": Phi3Config(**common, resid_pdrop=0.1),
        "phi3-mha": Phi3Config(**common | {"num_key_value_heads": 6}, sliding_window=8),
        "phi3-partial": Phi3Config(**common, rope_parameters=turned, tie_word_embeddings=True),
    }
