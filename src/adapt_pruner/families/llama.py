"""The Llama layout: gated MLP and grouped-query attention in pre-norm layers (Llama, SmolLM2, Mistral, Qwen2/2.5, Qwen3).

Axes: `layers.I.neurons` (an MLP channel), `layers.I.kv_heads` (a KV head with all its query heads: head h of the
queries reads KV head h // group, so the group goes as one block and the ratio stays), `vocabulary` (a token: its row of the
input embedding, and of the head where that is another matrix), `layers` (a whole layer).
Biases of q, k, v (Qwen2) and of gate and up are cut with their rows; q_norm and k_norm (Qwen3) act inside a head and stay.
"""

from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from adapt_pruner.core.axes import Axis, Gate, Slice
from adapt_pruner.core.budget import count_parameters, unit_cost

__all__ = ["MODEL_TYPES", "axes", "tiny", "vocabulary"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def axes(model: Any) -> tuple[Axis, ...]:
    """Every axis of a Llama-layout causal LM, in the order of its layers; `layers` last."""
    found: list[Axis] = []
    stack = model.model.layers
    for i, layer in enumerate(stack):
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        num_kv_heads = attention.k_proj.weight.shape[0] // head_dim
        group = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]
        at = f"model.layers.{i}.self_attn"
        found.append(
            _axis(
                f"layers.{i}.kv_heads",
                num_kv_heads,
                model,
                gate=Gate(f"{at}.o_proj", group * head_dim),
                rows=((f"{at}.q_proj", group * head_dim), (f"{at}.k_proj", head_dim), (f"{at}.v_proj", head_dim)),
                fields=(("num_key_value_heads", 1), ("num_attention_heads", group)),
                pins=(("head_dim", head_dim),),
            )
        )
        at = f"model.layers.{i}.mlp"
        found.append(
            _axis(
                f"layers.{i}.neurons",
                mlp.gate_proj.weight.shape[0],
                model,
                gate=Gate(f"{at}.down_proj"),
                rows=((f"{at}.gate_proj", 1), (f"{at}.up_proj", 1)),
                fields=(("intermediate_size", 1),),
            )
        )
    found.append(vocabulary(model))
    found.append(
        Axis(
            name="layers",
            size=len(stack),
            cost=count_parameters(stack) // len(stack),
            gate=Gate("model.layers", width=0),
            fields=(("num_hidden_layers", 1),),
            lists=("layer_types",),
        )
    )
    return tuple(found)


def vocabulary(model: Any) -> Axis:
    """The axis of tokens of a causal LM with `model.embed_tokens` and `lm_head`, tied or not."""
    slices = [Slice("model.embed_tokens.weight", 0)]
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        slices.append(Slice("lm_head.weight", 0))
    return Axis(
        name="vocabulary",
        size=model.lm_head.weight.shape[0],
        cost=unit_cost(model, slices),
        gate=Gate("lm_head", output=True),
        slices=tuple(slices),
        fields=(("vocab_size", 1),),
        indices=("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    )


def _axis(
    name: str,
    size: int,
    model: Any,
    *,
    gate: Gate,
    rows: tuple[tuple[str, int], ...],
    fields: tuple[tuple[str, int], ...],
    pins: tuple[tuple[str, Any], ...] = (),
) -> Axis:
    """An axis that owns rows of some linear layers (with their biases) and columns of the one at the gate."""
    slices = [Slice(f"{module}.weight", 0, width) for module, width in rows]
    slices += [Slice(f"{module}.bias", 0, width) for module, width in rows if model.get_submodule(module).bias is not None]
    slices.append(Slice(f"{gate.module}.weight", 1, gate.width))
    return Axis(name=name, size=size, cost=unit_cost(model, slices), gate=gate, slices=tuple(slices), fields=fields, pins=pins)


def tiny() -> dict[str, Any]:
    """Configs of tiny random models: multi-head and grouped attention, tied and untied, biases, q/k norms, sliding windows."""
    common: dict[str, Any] = dict(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return {
        "llama": LlamaConfig(**common, tie_word_embeddings=True),
        "llama-mha-biased": LlamaConfig(**common | {"num_key_value_heads": 6}, attention_bias=True, mlp_bias=True),
        "mistral": MistralConfig(**common, sliding_window=16),
        "qwen2": Qwen2Config(**common, tie_word_embeddings=True, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        "qwen3": Qwen3Config(**common, head_dim=16, tie_word_embeddings=True),
        "qwen3-untied": Qwen3Config(**common, head_dim=16),
    }
