"""Gemma 3, text only: a Llama's axes, with four norms a layer, x̂ · (1 + w) each, and embeddings that are scaled.

Two of the norms come after attention and MLP, where what a shut unit gave is missing as it is when it is cut; both go with a whole
block. Local and global
layers take turns, each kind with its own rope (`layer_types` follows a cut of layers); q_norm and k_norm act inside a head; scores
are scaled by `query_pre_attn_scalar`, which no cut changes; logits are capped where `final_logit_softcapping` says so
(`core.loss.logit_cap`). With one KV head, as in the 270M and 1B models, no KV head can go.

Source: arXiv:2503.19786; the stock code of transformers, which reads `attn_logit_softcapping` and does not apply it.
"""

from dataclasses import replace
from typing import Any

from transformers import Gemma3TextConfig

from adapt_pruner.core.axes import Axis
from adapt_pruner.families.llama import residual, vocabulary, whole_blocks, whole_layers, within_layers

__all__ = ["MODEL_TYPES", "axes", "tiny"]

MODEL_TYPES = ("gemma3_text",)

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_BLOCKS = {
    "attentions": ("input_layernorm", "self_attn", "post_attention_layernorm"),
    "mlps": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
}


def axes(model: Any) -> tuple[Axis, ...]:
    """Every axis of a Gemma 3 causal LM, in the order of its layers; `layers` last."""
    blocks = whole_blocks(model, blocks=_BLOCKS)
    return (*within_layers(model), *blocks, _residual(model), vocabulary(model), whole_layers(model))


def _residual(model: Any) -> Axis:
    """The width d of the stream, as a Llama's, but norms scale 1 + w, and an embedding is multiplied by √d when it is read.

    With d' left the embedding is multiplied by √d', so it grows by √(d/d'). Where the head is tied to it the logits would grow
    as much, so the last norm, which would grow by √(d/d') as all others do, stays as it is.
    """
    axis = residual(model, norms_of_layer=_NORMS, eps="eps")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    embedding = (
        ("model.embed_tokens.weight", 0.5),
        ("model.embed_tokens.scalar_embed_scale", -0.5),
        ("model.embed_tokens.embed_scale", -0.5),
    )
    kept = tuple(entry for entry in axis.scaled if not (tied and entry[0] == "model.norm.weight"))
    norms = tuple(f"{norm}.weight" for norm in (axis.gate.module, *axis.gate.also))
    return replace(axis, scaled=(*embedding, *kept), one_more=norms)


def tiny() -> dict[str, Any]:
    """Configs of tiny random models: one KV head as in the small ones, or several; capped logits; a window shorter than the text."""
    common: dict[str, Any] = dict(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, query_pre_attn_scalar=24, sliding_window=8, max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    several = common | {"num_attention_heads": 6, "num_key_value_heads": 3}
    return {
        "gemma3": Gemma3TextConfig(**common),
        "gemma3-grouped": Gemma3TextConfig(**several),
        "gemma3-capped": Gemma3TextConfig(
            **several, final_logit_softcapping=2.0, attn_logit_softcapping=5.0, attention_bias=True
        ),
        "gemma3-untied": Gemma3TextConfig(**several, tie_word_embeddings=False),
    }
