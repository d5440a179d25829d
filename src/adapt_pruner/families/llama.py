"""The Llama layout: gated MLP and grouped-query attention in pre-norm layers (Llama, SmolLM2, Mistral, Qwen2/2.5, Qwen3).

Axes:

    layers.I.neurons                        a channel of the MLP
    layers.I.kv_heads                       a KV head with all its query heads. Query head h reads KV head h // group, so a whole
                                            group goes as one block and the ratio of heads stays
    layers.I.query_heads                    one query head of every group
    residual                                a channel of the stream that all layers read and write
    vocabulary                              a token: its row of the input embedding, and of the head if that is another matrix
    layers                                  a whole layer
    layers.I.attentions, layers.I.mlps      the whole block with its norm

If a block was removed, it has no axes inside it and the other axes cut nothing of it. Biases of q, k, v (Qwen2) and of gate and
up are cut with their rows. q_norm and k_norm (Qwen3) act inside a head and stay.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from adapt_pruner.core.model.axes import Axis, Gate, Slice
from adapt_pruner.core.model.budget import count_parameters, unit_cost
from adapt_pruner.errors import UsageError
from adapt_pruner.families import is_sliced

__all__ = [
    "DECILM_MULTIPLE",
    "MODEL_TYPES",
    "axes",
    "decilm_width",
    "is_there",
    "residual",
    "stock_config",
    "tiny",
    "vocabulary",
    "whole_blocks",
    "whole_layers",
    "within_layers",
]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
DECILM_MULTIPLE = 256
"""The neurons of each MLP of a DeciLM whose config has an `ffn_mult` are a multiple of this."""

_BLOCKS = {"attentions": ("input_layernorm", "self_attn"), "mlps": ("post_attention_layernorm", "mlp")}
_UNHELD = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "moe", "mamba", "llama4")  # of `block_configs`
_READ_BY = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def axes(model: Any) -> tuple[Axis, ...]:
    """Every axis of a Llama-layout causal LM, in the order of its layers; `layers` last.

    A sliced model has no `residual` axis and no removable blocks, because its stream is in another basis at every block.
    """
    whole = () if is_sliced(model.config) else (*whole_blocks(model), residual(model))
    return (*within_layers(model), *whole, vocabulary(model), whole_layers(model))


def within_layers(model: Any) -> list[Axis]:
    """The axes that lie inside a single layer."""
    layer_axes: list[Axis] = []
    stack = model.model.layers
    for i, layer in enumerate(stack):
        if is_there(layer.self_attn):
            layer_axes += _heads(model, i, layer.self_attn)
        if is_there(layer.mlp):
            at = f"model.layers.{i}.mlp"
            layer_axes.append(
                _axis(
                    f"layers.{i}.neurons",
                    layer.mlp.gate_proj.weight.shape[0],
                    model,
                    gate=Gate(f"{at}.down_proj"),
                    rows=((f"{at}.gate_proj", 1), (f"{at}.up_proj", 1)),
                    fields=(("intermediate_size", 1),),
                    attributes=(f"{at}.intermediate_size",),
                    enclosing=(f"layers.{i}.mlps",),
                )
            )
    return layer_axes


def _heads(model: Any, layer: int, attention: Any) -> list[Axis]:
    head_dim = attention.head_dim
    num_kv_heads = attention.k_proj.weight.shape[0] // head_dim
    group = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]
    at = f"model.layers.{layer}.self_attn"
    return [
        _axis(
            f"layers.{layer}.kv_heads",
            num_kv_heads,
            model,
            gate=Gate(f"{at}.o_proj", group * head_dim),
            rows=((f"{at}.q_proj", group * head_dim), (f"{at}.k_proj", head_dim), (f"{at}.v_proj", head_dim)),
            fields=(("num_key_value_heads", 1),),
            pins=(("head_dim", head_dim),),
            enclosing=(f"layers.{layer}.attentions",),
        ),
        _axis(
            f"layers.{layer}.query_heads",
            group,
            model,
            gate=Gate(f"{at}.o_proj", head_dim),
            rows=((f"{at}.q_proj", head_dim),),
            fields=(("num_attention_heads", 1),),
            attributes=(f"{at}.num_key_value_groups",),
            pins=(("head_dim", head_dim),),
            groups=num_kv_heads,
            enclosing=(f"layers.{layer}.kv_heads", f"layers.{layer}.attentions"),
        ),
    ]


def whole_blocks(model: Any, *, blocks: Mapping[str, tuple[str, ...]] = _BLOCKS) -> list[Axis]:
    """The axes whose one unit is the attention or the MLP of a layer.

    Args:
        model: causal LM of this layout.
        blocks: kind -> the modules of a layer that are removed, see `Axis.modules`.
    """
    block_axes = []
    for i, layer in enumerate(model.model.layers):
        for kind, modules in blocks.items():
            cost = sum(count_parameters(getattr(layer, module)) for module in modules)
            if cost:
                names = tuple(f"model.layers.{i}.{module}" for module in modules)
                block_axes.append(
                    Axis(f"layers.{i}.{kind}", 1, cost, Gate(names[-1], kind="whole"), modules=names, may_be_empty=True)
                )
    return block_axes


def is_there(module: Any) -> bool:
    """Whether a block or a norm exists; the stand-in for a removed one has no parameters."""
    return next(module.parameters(), None) is not None


def whole_layers(model: Any) -> Axis:
    """The axis whose units are layers."""
    stack = model.model.layers
    costs = tuple(count_parameters(layer) for layer in stack)
    return Axis(
        name="layers",
        size=len(stack),
        cost=sum(costs) // len(stack),
        costs=costs,
        gate=Gate("model.layers", kind="whole"),
        fields=(("num_hidden_layers", 1),),
        lists=("layer_types",),
    )


def vocabulary(model: Any) -> Axis:
    """The axis of tokens of a causal LM with `model.embed_tokens` and `lm_head`, tied or not."""
    slices = [Slice("model.embed_tokens.weight", 0)]
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        slices.append(Slice("lm_head.weight", 0))
    return Axis(
        name="vocabulary",
        size=model.lm_head.weight.shape[0],
        cost=unit_cost(model, slices),
        gate=Gate("lm_head", kind="logits"),
        slices=tuple(slices),
        fields=(("vocab_size", 1),),
        attributes=("vocab_size", "model.vocab_size"),
        indices=("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    )


def _axis(
    name: str,
    size: int,
    model: Any,
    *,
    gate: Gate,
    rows: tuple[tuple[str, int], ...],
    groups: int = 1,
    **stated: Any,
) -> Axis:
    """An axis that owns rows of some linear layers (with their biases) and columns of the one at the gate."""
    slices = [Slice(name, 0, width) for module, width in rows for name in _parameters(model, module)]
    slices.append(Slice(f"{gate.module}.weight", 1, gate.width))
    cost = groups * unit_cost(model, slices)
    return Axis(name=name, size=size, cost=cost, gate=gate, slices=tuple(slices), groups=groups, **stated)


def _parameters(model: Any, linear: str) -> list[str]:
    """Weight, and bias if there is one, of a linear layer."""
    return [f"{linear}.weight"] + ([f"{linear}.bias"] if model.get_submodule(linear).bias is not None else [])


def residual(
    model: Any,
    *,
    norms_of_layer: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    read_by: Mapping[str, tuple[str, ...]] = _READ_BY,
    eps: str = "variance_epsilon",
) -> Axis:
    """The width of the stream: every norm over it, the weights that read it (by columns) or write it (by rows), the embeddings.

    A norm w · x / √(mean(x²) + ε) over d channels, of which d' are not zero, equals a norm over those d' channels with w √(d/d')
    and ε d/d'. The config has one ε for all norms, so norms inside heads (Qwen3), whose width stays, get the new ε too. To make
    up for it, their input is multiplied by √(d/d'), which cancels in the norm.

    Args:
        model: causal LM of this layout.
        norms_of_layer: the norms in each layer over the stream or over what is added to it.
        read_by: block -> the linear layers in it that read the stream.
        eps: the name of a norm's ε.
    """
    norms, rows, columns, inner, of_layers = ["model.norm"], [], ["model.embed_tokens.weight"], [], []
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        columns.append("lm_head.weight")
    for i, layer in enumerate(model.model.layers):
        at = f"model.layers.{i}"
        norms += [f"{at}.{norm}" for norm in norms_of_layer if is_there(getattr(layer, norm))]
        of_layers.append(f"{at}.hidden_size")
        if is_there(layer.self_attn):
            columns += [f"{at}.self_attn.{linear}.weight" for linear in read_by["self_attn"]]
            rows += _parameters(model, f"{at}.self_attn.o_proj")
        if is_there(layer.mlp):
            columns += [f"{at}.mlp.{linear}.weight" for linear in read_by["mlp"]]
            rows += _parameters(model, f"{at}.mlp.down_proj")
            of_layers += [f"{at}.mlp.hidden_size"] if hasattr(layer.mlp, "hidden_size") else []
        if hasattr(layer.self_attn, "q_norm"):
            inner += [(f"{at}.self_attn.{side}_norm.{eps}", 1.0) for side in "qk"]
            inner += [(name, 0.5) for side in "qk" for name in _parameters(model, f"{at}.self_attn.{side}_proj")]
    slices = (
        [Slice(f"{norm}.weight", 0) for norm in norms] + [Slice(name, 0) for name in rows] + [Slice(name, 1) for name in columns]
    )
    return Axis(
        name="residual",
        size=model.model.norm.weight.shape[0],
        cost=unit_cost(model, slices),
        gate=Gate(norms[0], kind="channels", also=tuple(norms[1:])),  # only norms read the stream
        slices=tuple(slices),
        fields=(("hidden_size", 1),),
        attributes=("model.embed_tokens.embedding_dim", *of_layers),
        scaled=(
            *((f"{norm}.weight", 0.5) for norm in norms),
            *((f"{norm}.{eps}", 1.0) for norm in norms),
            *inner,
            ("config.rms_norm_eps", 1.0),
        ),
    )


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
