"""A folder in NVIDIA's DeciLM form (`block_configs`, model type nemotron-nas), which vLLM, SGLang and TensorRT-LLM read.

The folder also brings a config class and a modelling file, with which transformers loads it (trust_remote_code).

For each layer it states how many query heads read a KV head, and the width of the MLP as a multiple of the stream's width. Every
reader rounds that width up to a multiple of 256:

    width = 256 · ceil( floor(2 · ffn_mult · hidden / 3) / 256 )

So MLPs are zero-padded to the next multiple. The number of query heads is the same for all layers.

Source: modeling of nvidia/Llama-3_1-Nemotron-51B as vLLM's nemotron_nas.py and llama.cpp's conversion/deci.py read it.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import check_target, save
from adapt_pruner.core.model import modeling_pruned
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import read_json, to_json
from adapt_pruner.errors import UsageError, settings
from adapt_pruner.export.padding import LayerSizes, accepted, check_layers, layer_sizes, padded_weights, still_fitting, widest
from adapt_pruner.export.plain import holds, opened
from adapt_pruner.export.plain import loading_padded as loading
from adapt_pruner.families.llama import DECILM_MULTIPLE, decilm_width

__all__ = ["ABOUT", "holds", "loading", "opened", "write"]

ABOUT = "NVIDIA's DeciLM, every MLP zero-padded to a multiple of 256"


def write(loaded: Loaded, path: Path, *, quant: str | None = None) -> list[str]:
    """Write `loaded` with `block_configs` instead of `per_layer_config`.

    Raises:
        UsageError: the form cannot hold the model; the message says why.
        RunError: the folder could not be written.
    """
    check_target(path)
    model = loaded.model
    check_layers(model.config, "DeciLM")
    sizes = layer_sizes(model)
    _refuse_unheld(model, sizes)
    wide = [replace(size, neurons=-(-size.neurons // DECILM_MULTIPLE) * DECILM_MULTIPLE) for size in sizes]
    blocks, most = [_block(size, model.config.hidden_size) for size in wide], widest(wide)

    def as_decilm(folder: Path) -> None:
        """Turn, in place, the written config into one of DeciLM."""
        config: dict[str, Any] = read_json(folder / filenames.CONFIG)
        for key in ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map", "layer_types", "sliding_window"):
            config.pop(key, None)
        config |= {
            "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "block_configs": blocks,
            "auto_map": {
                "AutoConfig": "configuration_decilm.DeciLMConfig",
                "AutoModel": "modeling_decilm.DeciLMModel",
                "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
            },
            "num_attention_heads": sizes[0].heads, "num_key_value_heads": most.kv_heads, "intermediate_size": most.neurons,
        }  # fmt: skip
        (folder / filenames.CONFIG).write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
        for name in ("configuration_decilm.py", "modeling_decilm.py"):
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
        shutil.copyfile(str(modeling_pruned.__file__), folder / "modeling_pruned.py")

    weights = padded_weights(model, wide)
    mask, notes = still_fitting(loaded.weight_mask, weights)
    save(model, loaded.tokenizer, path, dtype=loaded.dtype, weights=weights, weight_mask=mask, write_more=as_decilm)
    grown = sum(new.neurons - old.neurons for new, old in zip(wide, sizes, strict=True))
    if not grown:
        return notes
    return [
        *notes,
        f"MLPs are zero-padded by {grown:,} neurons to multiples of {DECILM_MULTIPLE}, which the form rounds to; prune with "
        f"{settings({'multiple_of': DECILM_MULTIPLE})} to avoid that",
    ]


def _block(size: LayerSizes, hidden_size: int) -> dict[str, Any]:
    """The entry of one layer in `block_configs`."""
    ffn_mult = 1.5 * size.neurons / hidden_size
    assert decilm_width(ffn_mult, hidden_size) == size.neurons
    absent = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    attention = {
        "n_heads_in_group": size.query_heads, "num_sink_tokens": None, "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False, "window_length": None,
    }  # fmt: skip
    return {"attention": attention | absent, "ffn": {"ffn_mult": ffn_mult} | absent}


def _refuse_unheld(model: Any, sizes: list[LayerSizes]) -> None:
    config, kind = model.config, model.config.model_type
    sliding = kind == "mistral" and config.sliding_window is not None
    if kind not in ("llama", "mistral") or sliding:
        raise UsageError(
            f"DeciLM is a Llama, and this model is of type {kind!r}{' with a sliding window' if sliding else ''}; use the form padded, gguf or onnx"
        )
    if any(getattr(config, key, False) for key in ("attention_bias", "mlp_bias", "output_bias")):
        raise UsageError("DeciLM has no biases, and this model has some; use the form gguf")
    heads = sorted({size.heads for size in sizes})
    if len(heads) > 1:
        raise UsageError(
            f"DeciLM has one number of query heads for all layers, and those of this model have between {heads[0]} and "
            f"{heads[-1]}; prune with {settings({'axes': '[neurons]'})} or {settings({'equal_widths': True})}, or use the form padded or gguf"
        )
    if not accepted(model, sizes[0]):
        raise UsageError(
            f"DeciLM's config wants the number of query heads, {heads[0]}, to divide the width, {model.config.hidden_size}; use "
            "the form padded or gguf"
        )
