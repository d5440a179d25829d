"""DeciLM (Nemotron-51B and its like, `export --to decilm`): it brings its own code but is a Llama with `block_configs`.

Its config is translated, and our own classes read its weights. A loaded model has type `llama`, and is saved as `llama`.

Source: modeling of nvidia/Llama-3_1-Nemotron-51B, as vLLM's nemotron_nas.py reads it.
"""

from typing import Any

from adapt_pruner.families import llama
from adapt_pruner.families.convention import axes

__all__ = ["MODEL_TYPES", "axes", "stock_config", "tiny"]

MODEL_TYPES = ("nemotron-nas",)


def stock_config(raw: dict[str, Any]) -> Any:
    """The Llama config under which our classes compute what DeciLM's own code does; see `llama.stock_config`."""
    return llama.stock_config(raw, model_type="llama")


def tiny() -> dict[str, Any]:
    """A translated config as an export writes it. All layers are alike, because stock classes build no others."""
    block = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"intermediate_size": 40, "no_op": False}}
    raw = {
        "model_type": "nemotron-nas", "block_configs": [block] * 3, "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {"decilm": stock_config(raw)}
