"""Gemma 3, text only: the same axes as a Llama's, since everything else that differs acts inside a head or on the residual stream.

Four norms a layer, x · (1 + w) each, two of them after attention and MLP, where what a shut unit gave is missing as it is when
it is cut. Local and global layers in turn, each with its own rope (`layer_types` follows a cut of layers); q_norm and k_norm
inside a head; scores scaled by `query_pre_attn_scalar`, which no cut changes; logits capped where `final_logit_softcapping` says
so (`core.loss.logit_cap`). With one KV head, as in the 270M and 1B models, attention cannot shrink and the neurons give it all.

Source: arXiv:2503.19786; the stock code of transformers, which reads `attn_logit_softcapping` and does not apply it.
"""

from typing import Any

from transformers import Gemma3TextConfig

from adapt_pruner.families.llama import axes

__all__ = ["MODEL_TYPES", "axes", "tiny"]

MODEL_TYPES = ("gemma3_text",)


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
