"""Grow a model by copying its own weights: more tokens, a wider stream, more neurons, heads and layers, experts.

    more_tokens    the row of a new token is the mean of the rows of its pieces under the old tokenizer
    wider          unit j is a copy of unit j mod n; what reads the copies shares the old weight among them at random
    deeper         layer i is a copy of layer i mod L
    with_experts   every expert is a copy of the MLP, and a new router chooses among them

A larger model computes what the smaller one does (of more tokens: the logits of the old ones), except with copied layers. Random
shares keep the sum, and give copies different gradients, so that training takes them apart; experts differ by the tokens they get.
`grown` takes a model through what a recipe asks for, and compares the logits.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner import families
from adapt_pruner.checkpoint.config import random_model
from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import needs_own_code
from adapt_pruner.checkpoint.untrusted import check_files
from adapt_pruner.core.events import Listener
from adapt_pruner.core.events.run import Grew
from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.system.files import expanded
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.recipe.tables import Grow

_CLASSES: dict[str, tuple[str, Callable[[int, int], dict[str, Any]]]] = {
    "llama": ("mixtral", lambda experts, width: {"num_local_experts": experts}),
    "mistral": ("mixtral", lambda experts, width: {"num_local_experts": experts}),
    "qwen3": (
        "qwen3_moe",
        lambda experts, width: {
            "num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    ),
}  # fmt: skip
"""Type of a dense model -> the type with experts, and a function that gives the config fields for them."""
_TRIED = 16  # tokens whose logits are compared
_CLOSE = 1e-3  # of the largest logit: far above rounding, far below a mistake


def grown(loaded: Loaded, how: Grow | None, *, seed: int, listen: Listener = lambda event: None) -> Loaded:
    """A model made larger as `how` says: tokens, stream, neurons, heads, layers, then experts; unchanged where that is None.

    Raises:
        UsageError: the model cannot grow so.
        RunError: the larger model computes something else.
    """
    if how is None:
        return loaded
    if families.task_of(loaded.model.config) != "causal_lm":
        raise UsageError(f"grow copies weights of causal language models, and {loaded.source} is none; leave grow out")
    if loaded.weight_mask is not None:
        raise UsageError(
            f"{loaded.source} has zeros that training keeps, and its copies would have none; grow the model that it was made from"
        )
    before = model = loaded.model
    tokenizer = loaded.tokenizer
    if how.vocabulary is not None:
        tokenizer = tokenizer_of(how.vocabulary)
        model = more_tokens(model, loaded.tokenizer, tokenizer, name=how.vocabulary)
    for kind in ("residual", "neurons", "kv_heads"):
        if (size := getattr(how, kind)) is not None:
            model = wider(model, kind, size, seed=seed)
    if how.layers is not None:
        model = deeper(model, how.layers)
    if how.experts is not None:
        model = with_experts(model, how.experts, how.experts_per_token, seed=seed)
    params, rows = count_parameters(model), model.get_input_embeddings().weight.shape[0]
    sizes = {"vocabulary": rows} if how.vocabulary is not None else {}
    sizes |= how.model_dump(exclude={"vocabulary", "experts_per_token"}, exclude_none=True)
    apart = _apart(before, model.eval(), seed=seed) if how.layers is None else None
    listen(Grew(params_before=count_parameters(before), params=params, sizes=sizes, apart=apart))
    return replace(
        loaded, model=model, tokenizer=tokenizer, mask=None, dense_params=None, weight_bytes=params * loaded.dtype.itemsize
    )


def tokenizer_of(folder: str) -> Any:
    """The tokenizer in a folder; the folder needs no model.

    Raises:
        UsageError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    path = expanded(folder)
    if not (path / "tokenizer.json").is_file():
        raise UsageError(f"grow.vocabulary {folder!r} is no folder with a tokenizer.json; name one that has the larger tokenizer")
    check_files(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises errors of many kinds for a broken tokenizer
        raise UsageError(f"the tokenizer in {folder} cannot be read ({first_line(error)}); get its files again") from error


@torch.no_grad()
def _apart(before: Any, after: Any, *, seed: int) -> float:
    """The largest difference between two models' logits of the first one's tokens.

    Raises:
        RunError: it is more than rounding.
    """
    rows = before.get_output_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, _TRIED), generator=torch.Generator().manual_seed(seed)).to(before.device)
    dense, larger = before(ids).logits, after(ids).logits[..., :rows]
    apart = float((larger - dense).abs().max())
    if not apart <= _CLOSE * max(1.0, float(dense.abs().max())):
        raise RunError(
            f"the grown model computes something else: a logit differs by {apart:.2g}, which is more than rounding; this is a fault of "
            f"adapt-pruner with models of type {before.config.model_type!r}, please report it"
        )
    return apart


@torch.no_grad()
def more_tokens(model: Any, tokenizer: Any, larger: Any, *, name: str = "grow.vocabulary") -> Any:
    """A model with a row for each token of a larger tokenizer.

        row(t) = 1/n · Σ_i row(p_i),        p_1 … p_n the pieces into which the old tokenizer splits token t

    Embedding and head both get such rows, and a bias of the head such entries. Rows of the old model without a token stay or are
    taken by new tokens.

    Args:
        model: left as found.
        tokenizer: its tokenizer.
        larger: has all tokens of that one, with the same numbers, and more.
        name: of the larger tokenizer, for messages.

    Raises:
        UsageError: the larger tokenizer lacks a token or numbers one otherwise, or has no more tokens.

    Source: CPM-2, arXiv:2106.10715, which appends tokens; the start of their rows is not in its code.
    """
    old, new = tokenizer.get_vocab(), larger.get_vocab()
    for token, number in old.items():
        if new.get(token) != number:
            other = f"gives it number {new[token]:,}" if token in new else "lacks it"
            raise UsageError(
                f"the model's token {token!r} has number {number:,}, and the tokenizer in {name} {other}; grow.vocabulary takes the "
                "model's own tokenizer with tokens added at its end"
            )
    added = {token: number for token, number in new.items() if token not in old}
    if not added:
        raise UsageError(f"the tokenizer in {name} has no token that the model lacks; leave grow.vocabulary out")
    axis = next(axis for axis in families.declared(model) if axis.kind == "vocabulary")
    rows = max(axis.size, max(added.values()) + 1)
    tensors, config = _parts(model)
    pieces = {number: _pieces(tokenizer, token, axis.size) for token, number in added.items()}
    for piece in axis.slices:
        tensor = tensors[piece.parameter]
        mean = tensor.mean(0, keepdim=True)
        filled = torch.cat([tensor, mean.expand(rows - axis.size, *mean.shape[1:])])
        for number, numbers in pieces.items():
            filled[number] = tensor[numbers].mean(0) if numbers else mean[0]
        tensors[piece.parameter] = filled
    config.vocab_size = rows
    return _built(model, config, tensors)


def _pieces(tokenizer: Any, token: str, rows: int) -> list[int]:
    """The numbers of the tokens into which a tokenizer splits a token of another; empty if it knows nothing of it."""
    try:
        numbers = [piece.id for piece in tokenizer.backend_tokenizer.model.tokenize(token)]
    except Exception:  # the library raises plain Exceptions, for example without an unknown token
        numbers = []
    numbers = numbers or tokenizer(token, add_special_tokens=False)["input_ids"]
    return [number for number in numbers if number < rows and number != tokenizer.unk_token_id]


@torch.no_grad()
def wider(model: Any, kind: str, size: int, *, seed: int = 0) -> Any:
    """A model with `size` neurons or KV heads in every layer, or a stream of `size` channels, that computes the same.

    Unit j of the larger model is a copy of unit j mod n. Let W read the units: its column of unit u becomes, for the copies of u,
    columns W_u ∘ s_j, with s_j random in each row and Σ_j s_j = 1. Copies of a channel of the stream leave the mean of a norm as it is, so
    its copies have to be as many of each channel. Where the head is tied to the embedding, the last norm is divided by their number
    instead.

    Args:
        model: left as found.
        kind: `neurons`, `kv_heads` (each with its query heads) or `residual`.
        size: units afterwards.
        seed: of the shares.

    Raises:
        UsageError: the model has no such units, or cannot have this many.

    Source: bert2BERT, arXiv:2110.07143, its function-preserving kind. Differs: there copies get equal shares, and with these equal
    gradients; and units are copied at random.
    """
    axes = families.axes(model)
    growing = [axis for axis in axes if axis.kind == kind]
    sizes = {axis.size for axis in growing}
    num_layers = len(decoder_layers(model))
    derived = kind != "neurons" and any(key == "keeps_head_dim" for axis in axes for key, _ in axis.pins)
    scaled = any("embed_scale" in name for axis in growing for name, _ in axis.scaled)
    if len(growing) != (1 if kind == "residual" else num_layers) or len(sizes) != 1 or derived or scaled:
        raise UsageError(
            f"models of type {model.config.model_type!r} cannot have more {kind} by copying, or their layers differ; leave grow.{kind} out"
        )
    old = sizes.pop()
    if size <= old:
        raise UsageError(f"grow.{kind} {size:,} is not above the {old:,} that the model has; raise it")
    if kind == "residual" and size % old:
        raise UsageError(
            f"grow.residual {size:,} is no whole multiple of the model's {old:,}, so norms would compute something else; set it to {2 * old:,}"
        )
    tensors, config = _parts(model)
    generator, source = torch.Generator().manual_seed(seed), torch.arange(size) % old
    for axis in growing:
        runs: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for piece in axis.slices:
            runs.setdefault((piece.parameter, piece.dim), []).append((piece.start, piece.width))
        for (name, dim), owned in runs.items():
            index = torch.cat([_entries(start, width, source) for start, width in sorted(owned)])
            length = tensors[name].shape[dim]
            tensors[name] = tensors[name].index_select(dim, index.to(tensors[name].device))
            if _reads(model, axis, name, dim):
                tensors[name] *= _shares(tensors[name], dim, index, length, generator)
        for field, factor in axis.fields:
            setattr(config, field, size * axis.groups * factor)
    if kind == "residual" and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        (last,) = (f"{axis.gate.module}.weight" for axis in growing)
        offset = 1.0 if last in growing[0].one_more else 0.0
        tensors[last] = (tensors[last] + offset) * (old / size) - offset
    if kind == "kv_heads" and any(axis.kind == "query_heads" for axis in axes):
        config.num_attention_heads = config.num_attention_heads // old * size
    for axis in axes:
        for field, value in axis.pins:
            setattr(config, field, value)
    return _built(model, config, tensors)


def _entries(start: int, width: int, source: Tensor) -> Tensor:
    """The indices that the copied entries of a slice own, one entry after the other."""
    return (start + source[:, None] * width + torch.arange(width)).flatten()


def _reads(model: nn.Module, axis: Axis, name: str, dim: int) -> bool:
    """Whether a parameter's dimension is the input of a linear layer that reads the units of an axis."""
    if axis.gate.is_linear:
        return name == f"{axis.gate.module}.weight" and dim == axis.gate.dim
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Linear) and name.endswith(".weight") and dim == 1


def _shares(tensor: Tensor, dim: int, index: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Numbers of a tensor's shape that add up to 1 over all copies of each of `length` indices along `dim`, row by row."""
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).add_(0.5)
    sums = drawn.new_zeros([length if d == dim else of for d, of in enumerate(tensor.shape)])
    total = sums.index_add_(dim, index, drawn)
    return (drawn / total.index_select(dim, index)).to(tensor)


def deeper(model: Any, layers: int) -> Any:
    """A model with `layers` layers, of which layer i is a copy of layer i mod L. It computes something else until it is trained.

    Args:
        model: left as found.
        layers: decoder layers afterwards.

    Raises:
        UsageError: the model has as many layers already, or they cannot be repeated.

    Source: StackingBERT (Gong et al., ICML 2019); bert2BERT stacks the same way where depth grows.
    """
    depth = next(axis for axis in families.declared(model) if axis.name == "layers")
    if layers <= depth.size:
        raise UsageError(f"grow.layers {layers:,} is not above the {depth.size:,} that the model has; raise it")
    tensors, config = _parts(model)
    for name in list(tensors):
        index, dot, rest = name.removeprefix(f"{depth.gate.module}.").partition(".")
        if dot and index.isdecimal():
            for place in range(int(index) + depth.size, layers, depth.size):
                tensors[f"{depth.gate.module}.{place}.{rest}"] = tensors[name].clone()
    for field, _ in depth.fields:
        setattr(config, field, layers)
    for field in depth.lists:
        kinds = getattr(config, field)
        setattr(config, field, [kinds[place % depth.size] for place in range(layers)])
    return _built(model, config, tensors)


@torch.no_grad()
def with_experts(model: Any, experts: int, per_token: int, *, seed: int = 0) -> Any:
    """A model of which every MLP has become `experts` copies of itself, with a router that sends each token to `per_token` of them.

        y = Σ_j g_j · MLP_j(x) = MLP(x),        Σ_j g_j = 1 over the chosen ones, since the router's weights are normalised

    The result is of transformers' Mixtral (from Llama and Mistral) or Qwen3-MoE (from Qwen3). The routers are drawn at random.

    Args:
        model: left as found.
        experts: of every layer.
        per_token: experts of a token.
        seed: of the routers.

    Raises:
        UsageError: no class has this model's layers with experts.

    Source: CPM-2, arXiv:2106.10715, section 5; sparse upcycling, arXiv:2212.05055. Differs: CPM-2 routes to one expert, by centroids
    that are fixed at random, with as many tokens for each. Here routers learn, and a loss balances them (`objectives.lm`).
    """
    from transformers import AutoConfig

    kind = model.config.model_type
    if kind not in _CLASSES:
        raise UsageError(
            f"no class of transformers has the layers of a {kind!r} model with experts in the place of its MLPs; grow.experts works for "
            f"{', '.join(_CLASSES)}"
        )
    if kind == "qwen3" and "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise UsageError(
            "grow.experts needs all layers to read the whole text, and this Qwen3 has sliding windows; name another model"
        )
    tensors, dense = _parts(model)
    target, stated = _CLASSES[kind]
    read = {*vars(AutoConfig.for_model(target)), "head_dim"}
    fields = {key: value for key, value in dense.to_dict().items() if key in read}
    for key in ("model_type", "architectures", "transformers_version"):
        fields.pop(key, None)
    config = AutoConfig.for_model(
        target, **fields | stated(experts, dense.intermediate_size) | {"num_experts_per_tok": per_token}
    )
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith(".mlp.gate_proj.weight")]:
        at = name.removesuffix(".gate_proj.weight")
        gate, up, down = (tensors.pop(f"{at}.{part}_proj.weight") for part in ("gate", "up", "down"))
        tensors[f"{at}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1).clone()
        tensors[f"{at}.experts.down_proj"] = down.expand(experts, -1, -1).clone()
        tensors[f"{at}.gate.weight"] = (torch.randn(experts, gate.shape[1], generator=generator) * dense.initializer_range).to(
            gate
        )
    return _built(model, config, tensors)


def _parts(model: Any) -> tuple[dict[str, Tensor], Any]:
    """A model's parameters by name, each once, and a copy of its config."""
    if needs_own_code(model.config):
        raise UsageError(
            "the layers of this model differ, and no stock class has them after growth; name a model with equal layers"
        )
    return {name: parameter.data for name, parameter in model.named_parameters()}, copy.deepcopy(model.config)


def _built(old: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The model of a config with these parameters; generation settings are those of `old`.

    Raises:
        UsageError: no such model can be built, or it has other parameters than these.
    """
    from transformers.initialization import no_init_weights

    kind = config.model_type
    try:
        for check in ("validate_architecture", "validate_rope"):
            getattr(config, check, lambda: None)()
        with torch.device(old.device), no_init_weights():
            model = random_model(config, {"trust_remote_code": False})
            model.tie_weights()
    except ValueError as error:
        raise UsageError(f"no model of type {kind!r} can have this size ({first_line(error)}); choose another in grow") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(shapes.items() ^ given.items()):
        name = wrong[0][0]
        raise UsageError(
            f"a model of type {kind!r} does not hold the grown weights: {name!r} is {_shape(given.get(name))} of these and "
            f"{_shape(shapes.get(name))} of the class, such as biases that one of them lacks; leave that growth out"
        )
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(True)
    if old.can_generate():
        model.generation_config = copy.deepcopy(old.generation_config)
    return model.train(old.training)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " × ".join(map(str, shape))
