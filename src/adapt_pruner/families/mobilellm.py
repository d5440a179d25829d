"""MobileLLM: on the hub it brings its own code, but it is a Llama. Its config is translated, and stock Llama reads its weights.

As that code shows, `share_embedding` means tied embeddings, though `tie_word_embeddings` says false. `layer_sharing` (the -LS
models) runs every layer twice, which no stock class does. `pretraining_tp` only splits matrix products. A loaded model has type
`llama`, and is saved as `llama`.

Source: MobileLLM, arXiv:2402.14905; modeling_mobilellm.py as the Adapt-Pruner repository carries it.
"""

from typing import Any

from transformers import LlamaConfig

from adapt_pruner.errors import UsageError
from adapt_pruner.families.convention import axes

__all__ = ["MODEL_TYPES", "axes", "stock_config", "tiny"]

MODEL_TYPES = ("mobilellm",)

_ITS_OWN = ("architectures", "auto_map", "layer_sharing", "model_type", "share_embedding", "transformers_version")


def stock_config(raw: dict[str, Any]) -> LlamaConfig:
    """The Llama config under which stock code computes what MobileLLM's own code does.

    Raises:
        UsageError: there is no such config; the message says why.
    """
    if raw.get("layer_sharing"):
        raise UsageError(
            "this MobileLLM runs every layer twice with the same weights (layer_sharing: true), which cannot be pruned yet; use "
            "a MobileLLM without -LS in its name"
        )
    for key, value in raw.items():
        if isinstance(value, list) and key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            raise UsageError(
                f"{key} of this MobileLLM is a list, one size a layer, which only the code that pruned it reads; use the dense "
                "model"
            )
    tied = bool(raw.get("share_embedding") or raw.get("tie_word_embeddings"))
    config: LlamaConfig = LlamaConfig.from_dict(
        {key: value for key, value in raw.items() if key not in _ITS_OWN} | {"tie_word_embeddings": tied}
    )
    return config


def tiny() -> dict[str, Any]:
    """A translated config as on the hub: shared embedding, grouped heads."""
    raw = {
        "model_type": "mobilellm", "share_embedding": True, "layer_sharing": False, "tie_word_embeddings": False,
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {"mobilellm": stock_config(raw)}
