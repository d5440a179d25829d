"""Gemma 3, text only: a Llama's axes, but with four norms a layer, each x̂ · (1 + w), and with scaled embeddings.

Two of the norms follow the attention and the MLP. Their input lacks the output of a shut unit just as it lacks that of a removed
one. Both norms are removed with a whole block. Local and global layers alternate, each kind with its own rope; `layer_types`
follows a cut of layers. q_norm and k_norm act inside a head. Attention scores are scaled by `query_pre_attn_scalar`, which no cut
changes. Logits are capped if `final_logit_softcapping` is set (`core.model.loss.logit_map`). The 270M and 1B models have one KV head,
which cannot be removed.

Source: arXiv:2503.19786; the stock code of transformers, which reads `attn_logit_softcapping` but does not apply it.
"""

from typing import Any

from transformers import Gemma3TextConfig

from adapt_pruner.families.convention import axes

__all__ = ["MODEL_TYPES", "axes", "tiny"]

MODEL_TYPES = ("gemma3_text",)


def tiny() -> dict[str, Any]:
    """Configs of tiny random models: one KV head as in small models, or more; capped logits; a window shorter than the text."""
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
