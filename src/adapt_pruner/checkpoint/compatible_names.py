"""Names in config.json and tokenizer_config.json that keep every version of transformers from loading a wrong model.

A plain folder also has the names that transformers 4 knows:

rope_theta, rope_scaling,     transformers 5 keeps these in `rope_parameters`, which transformers 4 ignores: it would use its own
rope_local_base_freq,         default for each
partial_rotary_factor
PreTrainedTokenizerFast       the name in transformers 4 of the class that transformers 5 calls TokenizersBackend
additional_special_tokens     the name in transformers 4 of the list `extra_special_tokens`

A folder that brings its own code has a model type of its own, `pruned_llama` for `llama`. Otherwise stock classes would load such
a folder wherever the weights happen to fit, and compute something else. For an unknown type transformers asks for
trust_remote_code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import read_json, to_json

_PREFIX = "pruned_"  # the same as in modeling_pruned.py
_OF_GEMMA = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def write_compatible_names(folder: Path) -> None:
    """Add these names, in place, to a folder that transformers 5 has written; see the top of this file."""
    for name, change in ((filenames.CONFIG, _older_config), ("tokenizer_config.json", _older_tokenizer)):
        path = folder / name
        if path.is_file():
            path.write_text(to_json(dict(sorted(change(read_json(path)).items())), indent=2) + "\n", encoding="utf-8")


def stock_name(name: str) -> str:
    """The name of the class of transformers that a class of ours stands on; any other name as it is."""
    return name.removeprefix("Pruned").removeprefix("Sliced")


def stock_type(config: Mapping[str, Any]) -> Any:
    """The model type by its name in transformers, from a config.json as plain data; None if it names no type."""
    named = config.get("model_type")
    return named.removeprefix(_PREFIX) if isinstance(named, str) else named


def with_common_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the names that most models use, beside those of its own type (`n_layer` of GPT-2)."""
    from transformers import CONFIG_MAPPING

    kind = stock_type(config)
    names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    return {**{common: config[name] for common, name in names.items() if name in config}, **config}


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json with transformers 4's keys for the rope added, which transformers 5 reads as before, and with its own type."""
    rope = config.get("rope_parameters") or {}
    added: dict[str, Any] = {}
    if rope.keys() >= _OF_GEMMA.keys():  # one rope for each type of layer; only that of full attention may be scaled
        added = {key: rope[kind]["rope_theta"] for kind, key in _OF_GEMMA.items()}
        rope = rope["full_attention"]
    elif "rope_theta" in rope:
        added = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        added["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        context = "original_max_position_embeddings"
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}
        if context in config:  # Phi-3 has it in the config itself, and in transformers 4 accepts exactly three keys
            scaling = {"type": scaling.pop("rope_type")} | {key: value for key, value in scaling.items() if key != context}
        added["rope_scaling"] = scaling
    prefix = _PREFIX if "auto_map" in config else ""
    return config | added | {"model_type": prefix + stock_type(config)}  # the class of the config may have added the prefix


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json with the names of transformers 4, which transformers 5 knows too."""
    older = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older
