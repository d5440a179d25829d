"""The axes of every decoder whose modules follow the naming of Llama, GPT-2 or GPT-NeoX, whichever variant of it a model is.

What a layer holds is read from the names of its modules and the shapes of their weights:

    attention   `self_attn` (or `attn`, …) with q_proj, k_proj, v_proj and an output; or with queries, keys and values in one matrix:
                rows of all queries, then of all keys, then of all values (GPT-2), or those of each head together (GPT-NeoX); or
                with keys and values that are made of a vector all heads share (MLA of DeepSeek), whose size stays
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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapt_pruner.core.model.axes import Axis, Gate, Slice
from adapt_pruner.core.model.budget import count_parameters, unit_cost
from adapt_pruner.core.model.modeling_pruned import (
    ATTENTIONS,
    MLPS,
    OUTPUTS,
    STACKS,
    _OwnConfig,
    ends_of,
    made,
    name_in,
    norms_of,
)
from adapt_pruner.families.experts import experts

_FUSED = "gate_up_proj"
_LINEAR_ATTENTION = "linear_attn"
_IN_TURN = ("c_attn",)  # one matrix: rows of all queries, then of all keys, then of all values
_HEAD_BY_HEAD = ("query_key_value",)  # one matrix: the rows of a head's query, key and value, head after head
LINEAR = (nn.Linear, Conv1D)
_DERIVES: dict[type, bool] = {}  # see `_derives`
_SUMS = "block_sums"  # of AST, which stand beside the linear layers of a block (`modeling_pruned.BlockSums`)
_LAST_NORMS = ("norm", "final_layernorm", "embedding_norm", "final_layer_norm", "ln_f", "norm_f")
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # what configs call the width of an MLP
_FIRSTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # layers without experts


def axes(model: Any) -> tuple[Axis, ...]:
    """Every axis of a causal LM of this naming, in the order of its layers; `layers` last.

    A sliced model has no `residual` axis and no removable blocks, because its stream is in another basis at every block.
    """
    inside = [
        axis
        for index, layer in enumerate(model.get_submodule(stack_of(model)))
        for axis in (*heads(model, index, layer), *neurons(model, index, layer), *experts(model, stack_of(model), index, layer))
    ]
    whole = () if is_sliced(model.config) else (*whole_blocks(model), *residual(model))
    return (*inside, *whole, vocabulary(model), whole_layers(model))


@dataclass(frozen=True)
class Tower:
    """A stack of layers in a model that has several, as the functions here take a model.

    Attributes:
        whole: the model.
        stack: the dotted name of the list of layers in it.
        config: that of the tower.
    """

    whole: nn.Module
    stack: str
    config: Any

    def get_submodule(self, name: str) -> nn.Module:
        """A module of the whole model."""
        return self.whole.get_submodule(name)

    def get_parameter(self, name: str) -> nn.Parameter:
        """A parameter of the whole model."""
        return self.whole.get_parameter(name)


def is_sliced(config: Any) -> bool:
    """Whether a model with this config is sliced (`reduce.slice`): its stream changes its basis at every block."""
    return getattr(config, "sliced_hidden_size", None) is not None


def stack_of(model: Any) -> str:
    """The dotted name of the list of decoder layers."""
    if isinstance(model, Tower):
        return model.stack
    decoder = model.base_model_prefix
    return f"{decoder}.{name_in(model.get_submodule(decoder), STACKS)}"


def heads(model: Any, index: int, layer: nn.Module) -> list[Axis]:
    """The axes of KV heads and query heads of a layer; none if it has no such attention.

    Where a class has as many KV heads as query heads, a KV head is a head, and there are no query heads to remove from it.
    """
    name, attention = _attention(layer)
    if attention is None:
        return []
    at, output = f"{stack_of(model)}.{index}.{name}", _output(attention)
    read = ends_of(attention.get_submodule(output))[0]
    if hasattr(attention, "kv_b_proj"):
        size = attention.num_heads
        of_heads = _linear(attention, "q_b_proj" if getattr(attention, "q_b_proj", None) is not None else "q_proj", "kv_b_proj")
        rows = [Slice(f"{at}.{name}", 0, tensor.shape[0] // size) for name, tensor in of_heads.items()]
        return [_heads(model, index, at, size, rows)]
    head_dim = getattr(attention, "head_dim", None) or attention.head_size
    pins = (("head_dim", head_dim), *((("keeps_head_dim", True),) if _derives(attention, model.config) else ()))
    if fused := name_in(attention, (*_IN_TURN, *_HEAD_BY_HEAD)):
        starts, width = (range(0, 3 * read, read), head_dim) if fused in _IN_TURN else (range(1), 3 * head_dim)
        rows = [piece for start in starts for piece in _rows(attention, at, fused, width, start)]
        return [_heads(model, index, at, read // head_dim, rows, pins)]
    queries, keys = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
    num_kv_heads, group = keys // head_dim, getattr(attention, "num_key_value_groups", queries // keys)
    of_group = [Slice(f"{at}.{name}", 0, tensor.shape[0] // num_kv_heads) for name, tensor in _of_query_heads(attention).items()]
    of_kv_head = [
        Slice(f"{at}.{name}", 0, tensor.shape[0] // num_kv_heads)
        for name, tensor in _linear(attention, "k_proj", "v_proj").items()
    ]
    return grouped_heads(model, index, at, num_kv_heads, group, of_group, of_kv_head, pins)


def grouped_heads(
    model: Any, index: int, at: str, num_kv_heads: int, group: int, of_group: list[Slice], of_kv_head: list[Slice],
    pins: tuple[tuple[str, Any], ...],
) -> list[Axis]:  # fmt: skip
    """The axes of KV heads and of query heads of the attention `at`: `of_group` are the rows of the `group` queries of a KV head,
    `of_kv_head` those of its key and its value."""
    attention = model.get_submodule(at)
    of_kv_heads = _heads(model, index, at, num_kv_heads, [*of_group, *of_kv_head], pins)
    if not _states(model.config, "num_key_value_heads"):
        return [of_kv_heads]
    of_query_heads = tuple(replace(piece, width=piece.width // group) for piece in (*of_group, of_kv_heads.slices[-1]))
    return [
        replace(
            of_kv_heads,
            fields=(("num_key_value_heads", 1),),
            attributes=_those_of(attention, at, "num_key_value_heads"),
            counts=(),
        ),
        Axis(
            f"layers.{index}.query_heads",
            group,
            num_kv_heads * unit_cost(model, of_query_heads),
            replace(of_kv_heads.gate, width=of_query_heads[-1].width),
            of_query_heads,
            fields=(("num_attention_heads", 1),),
            attributes=_those_of(attention, at, "num_key_value_groups"),
            counts=tuple((name, 1) for name in _those_of(attention, at, "num_heads")),
            pins=pins,
            groups=num_kv_heads,
            enclosing=(of_kv_heads.name, *of_kv_heads.enclosing),
        ),
    ]


def _states(config: Any, field: str) -> bool:
    """Whether a config has a field, which may differ between layers, so that the config itself may refuse to tell it."""
    return config.attribute_map.get(field, field) in vars(config)


def _heads(model: Any, index: int, at: str, size: int, rows: list[Slice], pins: tuple[tuple[str, Any], ...] = ()) -> Axis:
    """The axis of the `size` heads of a layer that own these rows of its attention, each as many as any other."""
    attention = model.get_submodule(at)
    output = _output(attention)
    written = _columns(attention, at, output, ends_of(attention.get_submodule(output))[0] // size)
    slices = (*rows, written)
    return Axis(
        f"layers.{index}.kv_heads",
        size,
        unit_cost(model, slices),
        Gate(f"{at}.{output}", written.width, dim=written.dim),
        slices,
        fields=tuple((field, 1) for field in ("num_attention_heads", "num_key_value_heads") if _states(model.config, field)),
        counts=(
            *((name, 1) for name in _those_of(attention, at, "num_heads", "num_attention_heads")),
            *((name, written.width) for name in _those_of(attention, at, "split_size", "embed_dim")),
        ),
        pins=pins,
        enclosing=(f"layers.{index}.attentions",),
    )


def _derives(attention: Any, config: Any) -> bool:
    """Whether the class of an attention makes its heads as wide as the stream together, whatever `head_dim` of its config says."""
    kind = type(attention)
    if kind not in _DERIVES:
        width = config.hidden_size + 2
        odd = _OwnConfig(config, head_dim=width, num_attention_heads=1, num_key_value_heads=1)
        try:
            with torch.device("meta"):
                attempt = made(kind, odd, 0)
            _DERIVES[kind] = ends_of(attempt.get_submodule(_output(attempt)))[0] == config.hidden_size
        except Exception:  # stock code of any type may fail in any way on such a config
            _DERIVES[kind] = False
    return _DERIVES[kind]


def _rows(block: nn.Module, at: str, linear: str, width: int = 1, start: int = 0) -> list[Slice]:
    """What an axis owns of the outputs of a linear layer of a block: of its weight, and of its bias if there is one."""
    module: Any = block.get_submodule(linear)
    weight = Slice(f"{at}.{linear}.weight", int(isinstance(module, Conv1D)), width, start)
    return [weight] + ([Slice(f"{at}.{linear}.bias", 0, width, start)] if module.bias is not None else [])


def _columns(block: nn.Module, at: str, linear: str, width: int = 1) -> Slice:
    """What an axis owns of the inputs of a linear layer of a block."""
    return Slice(f"{at}.{linear}.weight", int(not isinstance(block.get_submodule(linear), Conv1D)), width)


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
    at, output = f"{stack_of(model)}.{index}.{name}", _output(mlp)
    written = _columns(mlp, at, output)
    size = ends_of(mlp.get_submodule(output))[0]
    rows = [(linear, start) for linear in _inputs(mlp) for start in ((0, size) if linear == _FUSED else (0,))]
    slices = (*(piece for linear, start in rows for piece in _rows(mlp, at, linear, start=start)), written)
    return [
        Axis(
            f"layers.{index}.neurons",
            size,
            unit_cost(model, slices),
            Gate(f"{at}.{output}", dim=written.dim),
            slices,
            fields=((next((field for field in _WIDTHS if _states(model.config, field)), _WIDTHS[0]), 1),),
            attributes=_those_of(mlp, at, "intermediate_size"),
            enclosing=(f"layers.{index}.mlps",),
        )
    ]


def whole_blocks(model: Any) -> list[Axis]:
    """The axes whose one unit is the attention or the MLP of a layer, with its norms."""
    block_axes = []
    stack = stack_of(model)
    for index, layer in enumerate(model.get_submodule(stack)):
        for kind, modules in blocks(layer).items():
            cost = sum(count_parameters(getattr(layer, module)) for module in modules)
            if cost:
                names = tuple(f"{stack}.{index}.{module}" for module in modules)
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
    if name := name_in(layer, ATTENTIONS):
        block_modules["attentions"] = (*before, name, *after)
    if name := name_in(layer, MLPS):
        block_modules["mlps"] = (*before_mlp, name, *after_mlp)
    return block_modules


def is_there(module: Any) -> bool:
    """Whether a block or a norm exists; the stand-in for a removed one has no parameters."""
    return next(module.parameters(), None) is not None


def whole_layers(model: Any) -> Axis:
    """The axis whose units are layers. Of a model in which only some have attention, the last one with attention stays: stock code
    asks its cache how long a text is."""
    at = stack_of(model)
    stack = model.get_submodule(at)
    costs = tuple(count_parameters(layer) for layer in stack)
    attending = [index for index, layer in enumerate(stack) if name_in(layer, ATTENTIONS)]
    return Axis(
        name="layers",
        size=len(stack),
        cost=sum(costs) // len(stack),
        costs=costs,
        gate=Gate(at, kind="whole"),
        fields=(("num_hidden_layers", 1),),
        lists=tuple(name for name in per_layer(vars(model.config), len(stack)) if not name.startswith("_")),
        firsts=tuple(name for name in _FIRSTS if isinstance(getattr(model.config, name, None), int)),
        stays=tuple(attending[-1:]) if len(attending) < len(stack) else (),
    )


def per_layer(fields: Mapping[str, Any], depth: int | None) -> list[str]:
    """The fields of a config that are lists with one entry for each of `depth` layers, by their names and lengths."""
    lists = [name for name, value in fields.items() if isinstance(value, list) and len(value) == depth]
    return [name for name in lists if "layer" in name or "pattern" in name]


def vocabulary(model: Any) -> Axis:
    """The axis of tokens of a causal LM, whose head may be tied to its embedding."""
    (embedding, tokens), (head, logits) = embedding_of(model), head_of(model)
    slices = [Slice(f"{embedding}.weight", 0)]
    if logits.weight is not tokens.weight:
        slices += [Slice(f"{head}.{name}", 0) for name, _ in logits.named_parameters()]
    return Axis(
        name="vocabulary",
        size=logits.weight.shape[0],
        cost=unit_cost(model, slices),
        gate=Gate(head, kind="logits"),
        slices=tuple(slices),
        fields=(("vocab_size", 1),),
        attributes=("vocab_size", f"{model.base_model_prefix}.vocab_size"),
        indices=("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    )


def embedding_of(model: Any) -> tuple[str, Any]:
    """The dotted name of the token embedding, and the module."""
    tokens, decoder = model.get_input_embeddings(), model.base_model_prefix
    return f"{decoder}.{_called(model.get_submodule(decoder), tokens)}", tokens


def head_of(model: Any) -> tuple[str, Any]:
    """The name of the head, and the module."""
    head = model.get_output_embeddings()
    return _called(model, head), head


def _called(parent: nn.Module, module: nn.Module) -> str:
    """The name of a module in its parent.

    Raises:
        AttributeError: it is not there.
    """
    for name, child in parent.named_children():
        if child is module:
            return name
    raise AttributeError(f"{type(parent).__name__} has no such module")


def _attention(layer: nn.Module) -> tuple[str, Any]:
    """The name and the attention of a layer, if its queries, keys, values and output are of a known layout; else "", None."""
    name = name_in(layer, ATTENTIONS)
    attention: Any = getattr(layer, name, None)
    linear = {part for part, child in attention.named_children() if isinstance(child, LINEAR)} if name else set()
    usual = {"q_proj", "k_proj", "v_proj"} <= linear and hasattr(attention, "head_dim")
    output = _output(attention) if linear else ""
    if not output:
        return "", None
    written = 3 * ends_of(attention.get_submodule(output))[0]  # by one matrix of as many queries as keys and as values
    fused = any(ends_of(attention.get_submodule(part))[1] == written for part in linear & {*_IN_TURN, *_HEAD_BY_HEAD})
    fused = fused and name_in(attention, ("head_dim", "head_size")) != ""
    latent = "kv_b_proj" in linear and hasattr(attention, "num_heads")
    return (name, attention) if usual or fused or latent else ("", None)


def _mlp(layer: nn.Module) -> tuple[str, Any]:
    """The name and the MLP of a layer, if linear layers read the stream and one writes to it; else "", None."""
    for name in MLPS:
        mlp = getattr(layer, name, None)
        if mlp is not None and _output(mlp) and _inputs(mlp) and not _others(mlp):
            return name, mlp
    return "", None


def _others(block: nn.Module) -> list[str]:
    """The modules with vectors or matrices in a block that are no linear layers: experts, norms over neurons."""
    children = [(name, child) for name, child in block.named_children() if not isinstance(child, LINEAR) and name != _SUMS]
    return [name for name, child in children if any(parameter.numel() > 1 for parameter in child.parameters())]


def _inputs(block: nn.Module) -> list[str]:
    """The linear layers of a block that read the stream."""
    return [name for name, child in block.named_children() if isinstance(child, LINEAR) and name not in OUTPUTS]


def _output(block: nn.Module) -> str:
    """The linear layer of a block that writes to the stream; empty if there is none."""
    linear = [name for name, child in block.named_children() if isinstance(child, LINEAR)]
    return next((name for name in OUTPUTS if name in linear), "")


def _those_of(module: nn.Module, at: str, *names: str) -> tuple[str, ...]:
    """The attributes of these names that a module has, as dotted names."""
    return tuple(f"{at}.{name}" for name in names if hasattr(module, name))


def residual(model: Any) -> list[Axis]:
    """The width d of the stream: every norm over it, what reads it (by columns) or writes it (by rows), the embeddings.

    A norm is w · x / √(mean(x²) + ε), and its mean runs over all d channels. Let d' of them be not zero, and let the stream be
    c · x with c = √(d'/d). Then the mean over those d' channels is what it was over d, so ε stays, and the norm needs w / c. So a
    weight that writes to the stream is multiplied by c. A weight that reads it is divided by c: that of a norm, and those of a block
    without a norm before it (OLMo 2). A norm that follows a block reads c times the block's output and writes c times its own, so its
    w stays.

    If the head is tied to the embedding, it is multiplied by c too, so the last norm is divided by c twice. Gemma multiplies an
    embedding by √d when it is read. With d' channels left the code multiplies by √d' instead, so its embedding stays.

    Returns:
        The axis; nothing where a block of the model has parameters of which this file does not know how they meet the stream.
    """
    stack, (embedding, tokens), (head, logits) = stack_of(model), embedding_of(model), head_of(model)
    decoder = model.get_submodule(model.base_model_prefix)
    last = name_in(decoder, _LAST_NORMS)
    others = [child for name, child in decoder.named_children() if name != last and child is not tokens]
    if not last or any(is_there(child) for child in others if child is not model.get_submodule(stack)):
        return []
    last = f"{model.base_model_prefix}.{last}"
    of_layers: list[str] = []
    norms, after_blocks, unnormed, rows, columns = [last], [], [], [], [Slice(f"{embedding}.weight", 1)]
    tied = logits.weight is tokens.weight
    if not tied:
        columns.append(Slice(f"{head}.weight", 1))
    for index, layer in enumerate(model.get_submodule(stack)):
        at = f"{stack}.{index}"
        before, after, before_mlp, after_mlp = norms_of(layer)
        names, blocks_of = (*before, *after, *before_mlp, *after_mlp), (*ATTENTIONS, _LINEAR_ATTENTION, *MLPS)
        norms += [f"{at}.{norm}" for norm in (*before, *before_mlp) if is_there(getattr(layer, norm))]
        after_blocks += [f"{at}.{norm}" for norm in (*after, *after_mlp) if is_there(getattr(layer, norm))]
        of_layers += _those_of(layer, at, "hidden_size")
        if any(is_there(child) for name, child in layer.named_children() if name not in (*names, *blocks_of)):
            return []
        for name in blocks_of:
            block = getattr(layer, name, None)
            if block is None or not is_there(block):
                continue
            if not _output(block):
                return []
            inputs = [
                linear for linear in _inputs(block) if not linear.endswith("_b_proj")
            ]  # those read what `_a_proj` of MLA gives
            if any(ends_of(block.get_submodule(linear))[0] != tokens.weight.shape[1] for linear in inputs):
                return []
            reading = [_columns(block, f"{at}.{name}", linear) for linear in inputs]
            columns += reading
            if after and not (before_mlp if name in MLPS else before):  # a block that reads the stream without a norm (OLMo 2)
                unnormed += [piece.parameter.removesuffix(".weight") for piece in reading]
            rows += _rows(block, f"{at}.{name}", _output(block))
            of_layers += _those_of(block, f"{at}.{name}", "hidden_size") if name in MLPS else ()
    modules = [model.get_submodule(norm) for norm in (*norms, *after_blocks)]
    if not all(is_there(norm) and not isinstance(norm, nn.LayerNorm) for norm in modules):
        return []
    slices = (*(Slice(f"{norm}.weight", 0) for norm in (*norms, *after_blocks)), *rows, *columns)
    scaled = hasattr(tokens, "embed_scale")
    writing = [f"{embedding}.{name}" for name in (("scalar_embed_scale", "embed_scale") if scaled else ("weight",))]
    writing += [piece.parameter for piece in rows]
    reading_norms = {f"{norm}.weight": 0.5 for norm in norms}
    if tied and not scaled:
        reading_norms[f"{last}.weight"] = 1.0
    axis = Axis(
        name="residual",
        size=model.get_submodule(last).weight.shape[0],
        cost=unit_cost(model, slices),
        gate=Gate(last, kind="channels", also=(*norms[1:], *after_blocks, *unnormed)),
        slices=slices,
        fields=(("hidden_size", 1),),
        attributes=(f"{embedding}.embedding_dim", *of_layers),
        scaled=(
            *reading_norms.items(),
            *((f"{name}.weight", 0.5) for name in unnormed),
            *((name, -0.5) for name in writing),
        ),
    )
    if _adds_one(type(model.get_submodule(last))):
        axis = replace(axis, one_more=tuple(f"{norm}.weight" for norm in (*norms, *after_blocks)))
    return [axis]


def _adds_one(norm: Any) -> bool:
    """Whether norms of a class scale by 1 + w instead of w."""
    try:
        with torch.device("cpu"):  # a caller may be at work on the meta device
            made: Any = norm(4)
            made.weight = nn.Parameter(torch.zeros(4))
            return bool(made(torch.ones(1, 4)).any())
    except (TypeError, AttributeError):
        return False
