"""The Llama layout: gated MLP and grouped-query attention in pre-norm layers (Llama, SmolLM2, Mistral, Qwen2/2.5, Qwen3).

The axes are those of the convention; see `convention`.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from adapt_pruner.errors import UsageError
from adapt_pruner.families.convention import axes

__all__ = ["DECILM_MULTIPLE", "MODEL_TYPES", "axes", "decilm_width", "stock_config", "tiny"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
DECILM_MULTIPLE = 256
"""The neurons of each MLP of a DeciLM whose config has an `ffn_mult` are a multiple of this."""

_UNHELD = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "moe", "mamba", "llama4")  # of `block_configs`


def stock_config(raw: dict[str, Any], *, model_type: str | None = None) -> Any:
    """Translate a config with NVIDIA's `block_configs` into one with `per_layer_config`; None if it has no `block_configs`.

    For a block, DeciLM (Nemotron) states `attention.n_heads_in_group` and `ffn.ffn_mult`; the width of the MLP is then
    256 · ceil( floor(2 · ffn_mult · hidden / 3) / 256 ). Puzzletron states `num_key_value_heads` and `intermediate_size`. `no_op`
    marks a missing block.

    Args:
        raw: a config.json as plain data.
        model_type: the stock model type, if that of `raw` is not a stock one.

    Raises:
        UsageError: a block is of a kind that no stock class has.
    """
    blocks = raw.get("block_configs")
    if not blocks:
        return None
    per_layer = {index: _of_block(index, block, raw) for index, block in enumerate(blocks)}
    least = {
        field: min((layer[field] for layer in per_layer.values() if field in layer), default=1)
        for field in ("num_key_value_heads", "intermediate_size")
    }
    fields = {key: value for key, value in raw.items() if key not in ("architectures", "auto_map", "block_configs")}
    changes = {index: layer for index, layer in per_layer.items() if layer}
    return AutoConfig.for_model(**fields | least | {"model_type": model_type or raw["model_type"], "per_layer_config": changes})


def _of_block(index: int, block: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of one layer in `per_layer_config`."""
    layer: dict[str, Any] = {}
    attention, mlp = block.get("attention") or {}, block.get("ffn") or {}
    for name, part in (("attention", attention), ("MLP", mlp)):
        if odd := [key for key in _UNHELD if part.get(key)]:
            raise UsageError(
                f"the {name} of layer {index} has {odd[0]} in block_configs, which no stock class has; use a model without it"
            )
    if skip := [name for name, part in (("attention", attention), ("mlp", mlp)) if part.get("no_op")]:
        layer["skip"] = skip
    if (kv_heads := attention.get("num_key_value_heads")) is not None:
        layer["num_key_value_heads"] = kv_heads
    elif (group := attention.get("n_heads_in_group")) is not None:
        layer["num_key_value_heads"] = raw["num_attention_heads"] // group
    if (width := mlp.get("intermediate_size")) is not None:
        layer["intermediate_size"] = width
    elif (times := mlp.get("ffn_mult")) is not None:
        layer["intermediate_size"] = decilm_width(times, raw["hidden_size"])
    return layer


def decilm_width(ffn_mult: float, hidden_size: int) -> int:
    """The MLP width that readers of DeciLM compute from an `ffn_mult`; a multiple of `DECILM_MULTIPLE`."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // DECILM_MULTIPLE) * DECILM_MULTIPLE


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
