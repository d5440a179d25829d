"""How other tools load a checkpoint, in words and commands for its model card."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapt_pruner.checkpoint.compatible_names import stock_type

GGUF_TYPES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip
"""The model types that `export --to gguf` can write -> llama.cpp's architecture."""
LLAMAS = ("llama", "mistral", "qwen2")  # those that can be written as a Llama, whose graph scales positions as Llama 3 does


def layers_of(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The config of each layer."""
    differing = {int(index): changes for index, changes in (config.get("per_layer_config") or {}).items()}
    for index in range(config["num_hidden_layers"]):
        yield {**config, **differing.get(index, {})}


def towers_of(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The configs of the two towers of a model, by name; none of a model that has only one."""
    towers = {name: config.get(f"{name}_config") or {} for name in ("text", "vision")}
    return towers if all(towers.values()) else {}


def loading(config: Mapping[str, Any]) -> Iterator[str]:
    """Commands that load this very folder, and a sentence for each tool that cannot."""
    own_code = bool(config.get("auto_map"))
    if towers_of(config):
        yield in_transformers(own_code, _OF_PAIRS)
        return
    yield in_transformers(own_code)
    if any("attention" in layer.get("skip", ()) for layer in layers_of(config)):
        yield "**vLLM** refuses a model with a layer that has no attention."
    elif config.get("block_sums"):
        yield "**vLLM** has no place for SLoRB matrices."
    elif own_code:
        yield "**vLLM**, 0.32 or newer:\n\n```sh\nvllm serve . --trust-remote-code --model-impl transformers\n```"
    else:
        yield in_vllm(config)
    yield from not_in_mlx(config)
    if (trouble := no_gguf(config)) is not None:
        yield (
            f"**llama.cpp** cannot hold it: {trouble}. For ONNX Runtime:\n\n"
            f"```sh\n{_from_anywhere('onnx')}\nadapt-pruner export . --to onnx -o ../model-onnx\n```"
        )
        return
    yield (
        "**llama.cpp**, and what is built on it:\n\n"
        f"```sh\n{_from_anywhere('gguf')}\nadapt-pruner export . --to gguf -o ../model.gguf\nllama-cli -m ../model.gguf\n```"
    )


def _from_anywhere(extra: str) -> str:
    """How a reader of the card, who has no clone of adapt-pruner, installs it with an extra."""
    return f"pip install 'adapt-pruner[{extra}] @ git+https://github.com/adapt-pruner/adapt-pruner'"


_OF_TEXT = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'folder = "."  # where this file lies, or the name of this repository on the hub\n'
    "tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
    "model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
    'ids = tokenizer("The capital of France is", return_tensors="pt").input_ids\n'
    "print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))\n"
)
_OF_PAIRS = (
    "from PIL import Image\nfrom transformers import AutoModel, AutoProcessor\n\n"
    'folder = "."  # where this file lies, or the name of this repository on the hub\n'
    "processor = AutoProcessor.from_pretrained(folder)\n"
    "model = AutoModel.from_pretrained(folder{trust})\n"
    'inputs = processor(text=["a cat", "a dog"], images=Image.open("picture.jpg"), padding="max_length", return_tensors="pt")\n'
    "print(model(**inputs).logits_per_image.softmax(dim=1))\n"
)


def in_transformers(own_code: bool, commands: str = _OF_TEXT) -> str:
    """Commands for a folder in transformers; `own_code` says whether Python code in the folder builds the model."""
    trust, oldest, kind = "", "4.57", "It is a folder of the stock class; it needs nothing else"
    if own_code:
        trust, oldest = ", trust_remote_code=True", "5.14"
        kind = "The code in this folder builds its layers out of the stock classes, and runs only with `trust_remote_code=True`"
    return f"**transformers**, {oldest} or newer. {kind}.\n\n```python\n{commands.format(trust=trust)}```"


def in_vllm(config: Mapping[str, Any]) -> str:
    """Commands for a folder of the stock class in vLLM."""
    head_dim = config.get("head_dim")
    if stock_type(config) == "qwen2" and head_dim and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        why = "Its own Qwen2 (of 0.32) takes the size of a head from the width of the model, which is another here; transformers' does not"
        return f"**vLLM**. {why}:\n\n```sh\nvllm serve . --model-impl transformers\n```"
    return "**vLLM**:\n\n```sh\nvllm serve .\n```"


def not_in_mlx(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence about what MLX gets wrong with a folder of this config, if it does."""
    if (trouble := misread(stock_type(config), config.get("layer_types") or ())) is not None:
        yield f"**MLX** cannot run it. {trouble}."


def misread(model_type: str, layer_types: Sequence[str]) -> str | None:
    """What MLX gets wrong with layers of these kinds in a model of this type; None if nothing, as in the dense models.

    Source: `mlx_lm/models/gemma3_text.py`, which reads `sliding_window_pattern` (6) and no `layer_types`.
    """
    if model_type != "gemma3_text" or all(
        (kind == "full_attention") == (index % 6 == 5) for index, kind in enumerate(layer_types)
    ):
        return None
    return "MLX computes something else with this model: it makes every sixth layer of a Gemma 3 global, and `layer_types`, which it ignores, says others"


def no_gguf(config: Mapping[str, Any]) -> str | None:
    """Why `export --to gguf` would refuse the model, as far as its config shows; None if it would not."""
    if towers_of(config):
        return "the export knows no form for models of two towers"
    if "sliced_hidden_size" in config:
        return "it has no place for the maps beside the layers of a sliced model"
    if config.get("block_sums"):
        return "it has no place for SLoRB matrices"
    if any(layer.get("skip") for layer in layers_of(config)):
        return "the export knows no layers that lack their attention or MLP"
    kind = stock_type(config)
    if kind not in GGUF_TYPES:
        return f"the export knows no form for models of type {kind}"
    if config.get("output_bias") and kind not in LLAMAS:
        return "it has no place for the biases that a repair added"
    return not_computed(config, kind)


def not_computed(config: Mapping[str, Any], kind: str) -> str | None:
    """What of a model llama.cpp's graph for its type does not compute; None if it computes all."""
    if kind == "gemma3_text":
        head_dim, scalar = config["head_dim"], config["query_pre_attn_scalar"]
        if scalar != head_dim:
            return f"it scales attention by the head size {head_dim}, and this model by query_pre_attn_scalar {scalar}"
        if config.get("attention_bias") or config.get("use_bidirectional_attention"):
            return "its gemma3 has no attention biases and looks backwards only"
    elif config["hidden_act"] != "silu":
        return f"it computes silu, and this model has {config['hidden_act']}"
    if kind == "qwen3_moe" and not config.get("norm_topk_prob"):
        return "its qwen3moe makes the weights of the chosen experts sum to 1, and this model does not (norm_topk_prob)"
    for rope in ropes_of(config.get("rope_parameters") or {}):
        scaling = rope.get("rope_type", "default")
        if scaling not in ("default", "linear", *(["llama3"] if kind in LLAMAS else [])):
            return f"rope scaling {scaling!r} of a model of type {kind} is not written to GGUF"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "a rope over a part of a head is not written to GGUF"
    return None


def ropes_of(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config's rope parameters: one set for the whole model, or one each for full and sliding attention."""
    return [rope["full_attention"], rope["sliding_attention"]] if "full_attention" in rope else [rope]
