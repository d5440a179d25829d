"""The axes of every decoder whose modules follow the naming of Llama, whichever variant of it a model is.

What a layer holds is read from the names of its modules and the shapes of their weights:

    attention   `self_attn` with q_proj, k_proj, v_proj and an output
    MLP         `mlp` (or `feed_forward`), gated, ungated, or with gate and up in one matrix (rows of gate, then of up)
    norms       before a block, after it, both, or one norm for both blocks (`modeling_pruned.NORMS`); x̂ · w or x̂ · (1 + w)

Axes:

    layers.I.neurons                        a channel of the MLP
    layers.I.kv_heads                       a KV head with all its query heads. Query head h reads KV head h // group, so a whole
                                            group goes as one block and the ratio of heads stays
    layers.I.query_heads                    one query head of every group
    layers.I.experts                        see `families.experts`
    residual                                a channel of the stream that all layers read and write
    vocabulary                              a token: its row of the input embedding, and of the head if that is another matrix
    layers                                  a whole layer
    layers.I.attentions, layers.I.mlps      the whole block with its norms

If a block was removed, it has no axes inside it and the other axes cut nothing of it. Biases are cut with their rows. q_norm and
k_norm act inside a head and stay. A layer without such an attention or such an MLP (linear attention, experts) has no axes in that
block. Whether the axes of a model are right is not for this file to say: the law does, in `admission` for the types that no family
file names, and in the contract tests for those that one names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adapt_pruner.core.model.axes import Axis, Gate, Slice
from adapt_pruner.core.model.budget import count_parameters, unit_cost
from adapt_pruner.core.model.modeling_pruned import MLPS, OUTPUTS, norms_of
from adapt_pruner.families.experts import experts

_ATTENTIONS = ("self_attn", "linear_attn")
_FUSED = "gate_up_proj"
_SUMS = "block_sums"  # of AST, which stand beside the linear layers of a block (`modeling_pruned.BlockSums`)
_LAST_NORMS = ("norm", "final_layernorm", "embedding_norm")
_EPS = ("variance_epsilon", "eps")
_EPS_OF_CONFIG = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")


def axes(model: Any) -> tuple[Axis, ...]:
    """Every axis of a causal LM of this naming, in the order of its layers; `layers` last.

    A sliced model has no `residual` axis and no removable blocks, because its stream is in another basis at every block.
    """
    inside = [
        axis
        for index, layer in enumerate(model.model.layers)
        for axis in (*heads(model, index, layer), *neurons(model, index, layer), *experts(model, index, layer))
    ]
    whole = () if is_sliced(model.config) else (*whole_blocks(model), *residual(model))
    return (*inside, *whole, vocabulary(model), whole_layers(model))


def is_sliced(config: Any) -> bool:
    """Whether a model with this config is sliced (`reduce.slice`): its stream changes its basis at every block."""
    return getattr(config, "sliced_hidden_size", None) is not None


def heads(model: Any, index: int, layer: nn.Module) -> list[Axis]:
    """The axes of KV heads and query heads of a layer; none if it has no such attention."""
    attention = _attention(layer)
    if attention is None:
        return []
    at, head_dim, output = f"model.layers.{index}.self_attn", attention.head_dim, _output(attention)
    queries, keys = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
    num_kv_heads, group = keys // head_dim, getattr(attention, "num_key_value_groups", queries // keys)
    of_group = {name: tensor.shape[0] // num_kv_heads for name, tensor in _of_query_heads(attention).items()}
    of_kv_head = {name: tensor.shape[0] // num_kv_heads for name, tensor in _linear(attention, "k_proj", "v_proj").items()}
    written = attention.get_submodule(output).weight.shape[1] // num_kv_heads
    kv_heads = [
        *(Slice(f"{at}.{name}", 0, width) for name, width in (of_group | of_kv_head).items()),
        Slice(f"{at}.{output}.weight", 1, written),
    ]
    query_heads = [
        *(Slice(f"{at}.{name}", 0, width // group) for name, width in of_group.items()),
        Slice(f"{at}.{output}.weight", 1, written // group),
    ]
    attentions = f"layers.{index}.attentions"
    return [
        Axis(
            f"layers.{index}.kv_heads",
            num_kv_heads,
            unit_cost(model, kv_heads),
            Gate(f"{at}.{output}", written),
            tuple(kv_heads),
            fields=(("num_key_value_heads", 1),),
            attributes=_those_of(attention, at, "num_key_value_heads"),
            pins=(("head_dim", head_dim),),
            enclosing=(attentions,),
        ),
        Axis(
            f"layers.{index}.query_heads",
            group,
            num_kv_heads * unit_cost(model, query_heads),
            Gate(f"{at}.{output}", written // group),
            tuple(query_heads),
            fields=(("num_attention_heads", 1),),
            attributes=_those_of(attention, at, "num_key_value_groups"),
            pins=(("head_dim", head_dim),),
            groups=num_kv_heads,
            enclosing=(f"layers.{index}.kv_heads", attentions),
        ),
    ]


def _of_query_heads(attention: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of an attention whose rows belong to query heads: q_proj, gates of its output, a sink for each head."""
    sinks = {name: parameter for name, parameter in attention.named_parameters(recurse=False) if name == "sinks"}
    return _linear(attention, "q_proj", "gate_proj", "g_proj") | sinks


def _linear(block: nn.Module, *names: str) -> dict[str, nn.Parameter]:
    """The weights and biases of those of the linear layers that a block has, by their names in it."""
    children = [(name, block.get_submodule(name)) for name in names if hasattr(block, name)]
    return {f"{name}.{leaf}": parameter for name, child in children for leaf, parameter in child.named_parameters()}


def neurons(model: Any, index: int, layer: nn.Module) -> list[Axis]:
    """The axis of the neurons of a layer; none if it has no such MLP."""
    name, mlp = _mlp(layer)
    if mlp is None:
        return []
    at, output = f"model.layers.{index}.{name}", _output(mlp)
    size = mlp.get_submodule(output).weight.shape[1]
    rows = [(f"{at}.{linear}", start) for linear in _inputs(mlp) for start in ((0, size) if linear == _FUSED else (0,))]
    slices = [Slice(parameter, 0, start=start) for linear, start in rows for parameter in _parameters(model, linear)]
    slices.append(Slice(f"{at}.{output}.weight", 1))
    return [
        Axis(
            f"layers.{index}.neurons",
            size,
            unit_cost(model, slices),
            Gate(f"{at}.{output}"),
            tuple(slices),
            fields=(("intermediate_size", 1),),
            attributes=_those_of(mlp, at, "intermediate_size"),
            enclosing=(f"layers.{index}.mlps",),
        )
    ]


def whole_blocks(model: Any) -> list[Axis]:
    """The axes whose one unit is the attention or the MLP of a layer, with its norms."""
    block_axes = []
    for index, layer in enumerate(model.model.layers):
        for kind, modules in blocks(layer).items():
            cost = sum(count_parameters(getattr(layer, module)) for module in modules)
            if cost:
                names = tuple(f"model.layers.{index}.{module}" for module in modules)
                block_axes.append(
                    Axis(f"layers.{index}.{kind}", 1, cost, Gate(names[-1], kind="whole"), modules=names, may_be_empty=True)
                )
    return block_axes


def blocks(layer: nn.Module) -> dict[str, tuple[str, ...]]:
    """`attentions` and `mlps` of a layer -> the modules removed with it, in the order in which the stream passes them.

    A norm that both blocks read (Cohere) belongs to neither.
    """
    before, after, before_mlp, after_mlp = norms_of(layer)
    block_modules = {}
    if hasattr(layer, "self_attn"):
        block_modules["attentions"] = (*before, "self_attn", *after)
    if name := next((name for name in MLPS if hasattr(layer, name)), ""):
        block_modules["mlps"] = (*before_mlp, name, *after_mlp)
    return block_modules


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
        lists=_lists(model.config, len(stack)),
    )


def _lists(config: Any, depth: int) -> tuple[str, ...]:
    """The fields of a config with one entry per layer; `layer_types` first."""
    fields = [name for name, value in vars(config).items() if isinstance(value, list) and len(value) == depth]
    return ("layer_types", *(name for name in fields if "layer" in name and not name.startswith("_") and name != "layer_types"))


def vocabulary(model: Any) -> Axis:
    """The axis of tokens of a causal LM with `model.embed_tokens` and `lm_head`, tied or not."""
    slices = [Slice("model.embed_tokens.weight", 0)]
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        slices += [Slice(name, 0) for name in _parameters(model, "lm_head")]
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


def _parameters(model: Any, linear: str) -> list[str]:
    """Weight, and bias if there is one, of a linear layer."""
    return [f"{linear}.weight"] + ([f"{linear}.bias"] if model.get_submodule(linear).bias is not None else [])


def _attention(layer: nn.Module) -> Any:
    """The attention of a layer, if it has queries, keys, values and an output of its own; else None."""
    attention: Any = getattr(layer, "self_attn", None)
    linear = dict(attention.named_children()) if attention is not None else {}
    usual = all(isinstance(linear.get(f"{which}_proj"), nn.Linear) for which in "qkv")
    return attention if usual and hasattr(attention, "head_dim") and _output(attention) else None


def _mlp(layer: nn.Module) -> tuple[str, Any]:
    """The name and the MLP of a layer, if linear layers read the stream and one writes to it; else "", None."""
    for name in MLPS:
        mlp = getattr(layer, name, None)
        if mlp is not None and _output(mlp) and _inputs(mlp) and not _others(mlp):
            return name, mlp
    return "", None


def _others(block: nn.Module) -> list[str]:
    """The modules with vectors or matrices in a block that are no linear layers: experts, norms over neurons."""
    children = [(name, child) for name, child in block.named_children() if not isinstance(child, nn.Linear) and name != _SUMS]
    return [name for name, child in children if any(parameter.numel() > 1 for parameter in child.parameters())]


def _inputs(block: nn.Module) -> list[str]:
    """The linear layers of a block that read the stream."""
    return [name for name, child in block.named_children() if isinstance(child, nn.Linear) and name not in OUTPUTS]


def _output(block: nn.Module) -> str:
    """The linear layer of a block that writes to the stream; empty if there is none."""
    linear = [name for name, child in block.named_children() if isinstance(child, nn.Linear)]
    return next((name for name in OUTPUTS if name in linear), "")


def _those_of(module: nn.Module, at: str, *names: str) -> tuple[str, ...]:
    """The attributes of these names that a module has, as dotted names."""
    return tuple(f"{at}.{name}" for name in names if hasattr(module, name))


def residual(model: Any) -> list[Axis]:
    """The width d of the stream: every norm over it, what reads it (by columns) or writes it (by rows), the embeddings.

    A norm w · x / √(mean(x²) + ε) over d channels, of which d' are not zero, equals a norm over those d' channels with w √(d/d')
    and ε d/d'. The config has one ε for all norms, so norms inside heads (Qwen3), whose width stays, get the new ε too. To make
    up for it, their input is multiplied by √(d/d'), which cancels in the norm.

    Gemma multiplies an embedding by √d when it is read. With d' channels left the code multiplies by √d' instead, so the embedding
    is scaled by √(d/d') to make up for it. If the head is tied to the embedding, it grows by the same factor. Then the last norm
    stays as it is, instead of growing by √(d/d') like all others.

    Returns:
        The axis; nothing where a block of the model has parameters of which this file does not know how they meet the stream.
    """
    last = next((f"model.{name}" for name in _LAST_NORMS if hasattr(model.model, name)), "")
    eps_of_config = next((name for name in _EPS_OF_CONFIG if hasattr(model.config, name)), "")
    embedding = model.model.embed_tokens
    if not (last and eps_of_config):
        return []
    of_layers: list[str] = []
    norms, rows, columns, inner = [last], [], ["model.embed_tokens.weight"], []
    tied = model.lm_head.weight is embedding.weight
    if not tied:
        columns.append("lm_head.weight")
    for index, layer in enumerate(model.model.layers):
        at = f"model.layers.{index}"
        names = [norm for norms_of_block in norms_of(layer) for norm in norms_of_block]
        norms += [f"{at}.{norm}" for norm in names if is_there(getattr(layer, norm))]
        of_layers += _those_of(layer, at, "hidden_size")
        if any(is_there(child) for name, child in layer.named_children() if name not in (*names, *_ATTENTIONS, *MLPS)):
            return []
        for name in (*_ATTENTIONS, *MLPS):
            block = getattr(layer, name, None)
            if block is None or not is_there(block):
                continue
            if not _output(block):
                return []
            columns += [f"{at}.{name}.{linear}.weight" for linear in _inputs(block)]
            rows += _parameters(model, f"{at}.{name}.{_output(block)}")
            of_layers += _those_of(block, f"{at}.{name}", "hidden_size") if name in MLPS else ()
            if hasattr(block, "q_norm"):
                inner += [(f"{at}.{name}.{side}_norm.{_eps(block.get_submodule(f'{side}_norm'))}", 1.0) for side in "qk"]
                inner += [(parameter, 0.5) for side in "qk" for parameter in _parameters(model, f"{at}.{name}.{side}_proj")]
    if not all(is_there(model.get_submodule(norm)) and _eps(model.get_submodule(norm)) for norm in norms):
        return []
    slices = (
        [Slice(f"{norm}.weight", 0) for norm in norms] + [Slice(name, 0) for name in rows] + [Slice(name, 1) for name in columns]
    )
    grown = [f"{norm}.weight" for norm in norms]
    read: list[tuple[str, float]] = []
    if hasattr(embedding, "embed_scale"):
        read = [
            ("model.embed_tokens.weight", 0.5),
            *((f"model.embed_tokens.{name}", -0.5) for name in ("scalar_embed_scale", "embed_scale")),
        ]
        grown = grown[1:] if tied else grown
    axis = Axis(
        name="residual",
        size=model.get_submodule(last).weight.shape[0],
        cost=unit_cost(model, slices),
        gate=Gate(norms[0], kind="channels", also=tuple(norms[1:])),  # only norms read the stream
        slices=tuple(slices),
        fields=(("hidden_size", 1),),
        attributes=("model.embed_tokens.embedding_dim", *of_layers),
        scaled=(
            *read,
            *((name, 0.5) for name in grown),
            *((f"{norm}.{_eps(model.get_submodule(norm))}", 1.0) for norm in norms),
            *inner,
            (f"config.{eps_of_config}", 1.0),
        ),
    )
    if _adds_one(type(model.get_submodule(last))):
        axis = replace(axis, one_more=tuple(f"{norm}.weight" for norm in norms))
    return [axis]


def _eps(norm: nn.Module) -> str:
    """The name of a norm's ε; empty if it has none."""
    return next((name for name in _EPS if hasattr(norm, name)), "")


def _adds_one(norm: Any) -> bool:
    """Whether norms of a class scale by 1 + w instead of w."""
    try:
        with torch.device("cpu"):  # a caller may be at work on the meta device
            made: Any = norm(4)
            made.weight = nn.Parameter(torch.zeros(4))
            return bool(made(torch.ones(1, 4)).any())
    except (TypeError, AttributeError):
        return False
