"""Which axes a model type that no family file names may shrink along: those on which the law holds for a tiny model of its class.

A tiny random model is built from the real config: every size is shrunk, every kind of layer, sharing and window stays. Then each
kind of axis of `convention.axes` is tried by itself, with several masks in float64, and after that all that passed together:

    admitted    max |logits(gated) - logits(cut)| <= 1e-9; the gate changes the logits; only what the axis names is freed; and the stock
                class, built from the config that the cut has written, takes the weights and gives the same logits

A kind that fails is left whole, with the reason. Parameters and persistent buffers are random, because a zero bias or a weight of one
hides a mistake. While the tiny model runs, casts to float32 give float64, so that the norms of stock code do not round.
"""

import copy
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from adapt_pruner.core.model import modeling_pruned, routed
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated, num_left
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.core.system.strict_json import remembered
from adapt_pruner.errors import first_line
from adapt_pruner.families import convention, experts

GAP = 1e-9
ROUNDED = 1e-4  # of a model built anew, whose positions were computed in float32
SEEDS = (1, 2)
MOST_PARAMETERS = 4_000_000
TOKENS = 24  # of each text, so that windows, which shrink to 8, matter
_SIZES = {
    "vocab_size": 97, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": 128,
    "original_max_position_embeddings": 64, "sliding_window": 8, "attention_chunk_size": 8, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "moe_num_experts": 8, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "first_k_dense_replace": 1, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_expand": 2, "conv_L_cache": 3, "max_window_layers": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "ffn_hidden_size": 96, "ffn_dim": 40, "word_embed_proj_dim": 48, "rotary_dim": 8,
    "num_hash_layers": 0, "moe_layer_start_index": 1, "moe_intermediate_size_mlp": 24, "intermediate_size_mlp": 40,
}  # fmt: skip
"""Fields of configs -> what they are in the tiny model; each only if the config has it and it is not 0."""
_VERDICTS: dict[str, "Verdict"] = {}  # of this process, by fingerprint
_OF_ONE_FOLDER = {
    "_name_or_path", "allow_global_per_layer_attribute_access", "architectures", "auto_map", "dtype", "per_layer_config",
    "quantization_config", "torch_dtype", "transformers_version",
}  # fmt: skip
"""Fields that say nothing of the class that builds a model."""
_LEAST_LAYERS, _MOST_LAYERS = 3, 8
_SAID = 160  # characters of a reason
KINDS = ("neurons", "kv_heads", "query_heads", "experts", "attentions", "mlps", "residual", "vocabulary", "layers")


@dataclass(frozen=True)
class Verdict:
    """What may shrink in models of a type, and what may not.

    Attributes:
        admitted: the kinds of axes on which the law holds.
        refused: kind -> why not; `all` -> why nothing may. Kinds of which a tiny model has nothing to remove are in neither.
    """

    admitted: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


class Wide(TorchFunctionMode):
    """Within this mode, what would be cast to float32 is cast to float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.float:
            return args[0].double()
        if function in (Tensor.to, Tensor.type) or "dtype" in kwargs:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


def shrunk(config: Any) -> Any:
    """The config of a tiny model of the same class. It is the same for every size of a model, and after a cut.

    Args:
        config: of a causal LM of transformers, or of a model of several parts, of which this takes the text part; left as it is.
    """
    config = config.get_text_config(decoder=True)
    raw = {key: value for key, value in config.to_dict().items() if key not in _OF_ONE_FOLDER}
    depth = _depth(raw)
    named = {config.attribute_map.get(key, key): value for key, value in (_SIZES | {"num_hidden_layers": depth}).items()}
    tiny = {**raw, **{key: value for key, value in named.items() if raw.get(key)}}
    if raw.get("kv_lora_rank") and raw.get("num_key_value_heads"):
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]  # all heads share one vector, so that none has fewer keys
    for key in convention.per_layer(raw, raw.get("num_hidden_layers")):
        tiny[key] = raw[key][:depth]
    for key, value in raw.items():
        if key.endswith("_token_id") and value is not None:
            tiny[key] = {"bos_token_id": 1, "eos_token_id": 2}.get(key, 0)
    return type(config).from_dict(tiny)


def _depth(raw: dict[str, Any]) -> int:
    """The fewest layers, at least three, that have every kind of layer of a config."""
    total = raw.get("num_hidden_layers") or _LEAST_LAYERS
    lists = [raw[key] for key in convention.per_layer(raw, total)]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * total
    least = next(depth for depth in range(1, total + 1) if {str(kind) for kind in kinds[:depth]} == {str(kind) for kind in kinds})
    least += 2 if raw.get("num_kv_shared_layers") else 0
    return min(total, max(_LEAST_LAYERS, least), _MOST_LAYERS)


def tiny_model(tiny: Any) -> Any:
    """A model of a config that `shrunk` made, in float64, with random parameters and persistent buffers."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            count = count_parameters(AutoModelForCausalLM.from_config(copy.deepcopy(tiny)))
        if count > MOST_PARAMETERS:
            raise ValueError(f"its tiny model would have {count:,} parameters; at most {MOST_PARAMETERS:,} are tried")
        model = _built(tiny)
        if model is None:
            raise ValueError("its config sizes layers one by one")
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    near = 1.0 if tensor.dim() == 1 and "norm" in name and tensor.mean() > 0.5 else 0.0
                    tensor.copy_(
                        near + torch.randn_like(tensor) * (0.3 if tensor.dim() < 2 else 1.5 / math.sqrt(tensor.shape[-1]))
                    )
    return model


def _built(config: Any) -> Any:
    """A model of a config as its stock class builds it, in float64; None if its layers differ, which a stock class cannot build.

    Heads that the stock class would make wider are built by ours (`modeling_pruned.has_narrow_heads`).
    """
    from transformers import AutoModelForCausalLM

    if config.is_heterogeneous:
        return None
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    if modeling_pruned.has_narrow_heads(config):
        stock = AutoModelForCausalLM._model_mapping[type(config)].__name__
        return getattr(modeling_pruned, f"Pruned{stock}")(config).double().eval()
    return AutoModelForCausalLM.from_config(config).double().eval()


def verdict_of(config: Any) -> Verdict:
    """Which kinds of axes may shrink in models of a config's type, the same before and after a cut.

    It takes about a second. The cache folder keeps what was found for a config and the versions of torch and transformers.
    """
    try:
        tiny = shrunk(config)
    except Exception as error:  # the config class of any type may refuse in any way
        return Verdict(refused={"all": first_line(error)[:_SAID]})
    name = fingerprint(tiny)

    def make() -> dict[str, Any]:
        with torch.device("cpu"):  # a caller may be at work on another device
            return asdict(_tried(tiny))

    if name not in _VERDICTS:
        path = cache_folder() / "families" / f"{name}.json"
        _VERDICTS[name], _ = remembered(path, _read, make)
    return _VERDICTS[name]


def fingerprint(tiny: Any) -> str:
    """What decides a verdict: the fields of a config that `shrunk` made, less those that a cut writes, and the code that tries it."""
    fields = {key: value for key, value in tiny.to_dict().items() if key not in ("head_dim", *_OF_ONE_FOLDER)}
    fields = {key: value for key, value in fields.items() if not key.endswith(("_eps", "_epsilon"))}
    return hashlib.sha256(f"{code()}{json.dumps(fields, sort_keys=True, default=str)}".encode()).hexdigest()[:32]


@cache
def code() -> str:
    """Another word for each change of the code that decides a verdict, and of the libraries that it calls."""
    ours = [
        Path(str(module.__file__)).read_bytes()
        for module in (convention, experts, modeling_pruned, routed, sys.modules[__name__])
    ]
    return hashlib.sha256(b"".join([*ours, version("transformers").encode(), version("torch").encode()])).hexdigest()[:16]


def _read(kept: Any) -> Verdict:
    return Verdict(tuple(kept["admitted"]), dict(kept["refused"]))


def _tried(tiny: Any) -> Verdict:
    try:
        model = tiny_model(tiny)
        ids = torch.randint(3, 97, (3, TOKENS), generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), Wide():
            dense = model(ids).logits
            loss = CAUSAL_LM.loss(model, ids)
        targets = ids[:, 1:].flatten()
        if not abs(loss - cross_entropy(dense[:, :-1].flatten(0, 1), targets, reduction="sum")) <= GAP * targets.numel():
            return Verdict(
                refused={"all": "its logits are not those of its head, scaled or capped by a known field of its config"}
            )
    except Exception as error:  # stock code of any type may fail in any way on a tiny model
        return Verdict(refused={"all": first_line(error)[:_SAID]})
    try:
        axes = convention.axes(model)
    except AttributeError:
        return Verdict(refused={"all": "its modules have other names than those of a Llama, GPT-2 or GPT-NeoX"})
    kinds = [kind for kind in KINDS if any(axis.kind == kind and axis.size > axis.least for axis in axes)]
    routed = any(name.endswith(".experts") for name, _ in model.named_modules())
    named = [kind for kind in KINDS if routed or kind != "experts"]
    refused = {kind: "its modules are of another kind" for kind in named if all(axis.kind != kind for axis in axes)}
    refused |= {kind: why for kind in kinds if (why := _why_not(model, axes, (kind,), ids, dense))}
    admitted = [kind for kind in kinds if kind not in refused]
    if why := _why_not(model, axes, admitted, ids, dense):
        return Verdict(refused={**refused, "all": f"together: {why}"})
    return Verdict(tuple(admitted), refused)


def _why_not(model: Any, axes: Sequence[Axis], kinds: Sequence[str], ids: Tensor, dense: Tensor) -> str:
    """Why axes of these kinds may not shrink; empty if they may."""
    for seed in SEEDS:
        mask = random_mask([axis for axis in axes if axis.kind in kinds], seed, ids)
        if not mask.kept:
            continue
        smaller, entering = copy.deepcopy(model), ids
        tokens = mask.of(next(axis for axis in axes if axis.kind == "vocabulary"))
        if not tokens.all():
            entering = tokens.cumsum(0)[ids] - 1
        try:
            with torch.no_grad(), Wide():
                with gated(model, axes, mask):
                    shut = model(ids).logits
                left = num_left(model, axes, mask)
                cut(smaller, axes, mask)
                logits = smaller(entering).logits
                gap = float((logits - shut[..., tokens]).abs().max())
                again = _built(smaller.config)
                if again is not None:
                    again.load_state_dict(smaller.state_dict())
                    if not torch.allclose(again(entering).logits, logits, rtol=ROUNDED, atol=ROUNDED):
                        return "its stock class computes other logits with the smaller config"
        except Exception as error:  # as above
            return f"with fewer it does not run ({first_line(error)[:_SAID]})"
        if not gap <= GAP:
            return f"logits differ by {gap:.1e}"
        if torch.equal(shut, dense):
            return "shutting its units changes no logits"
        if count_parameters(smaller) != left:
            return f"{count_parameters(smaller):,} parameters are left instead of {left:,}"
    return ""


def random_mask(axes: Sequence[Axis], seed: int, ids: Tensor | None = None) -> Mask:
    """A mask that shuts about half of the units of each axis, never all of one that has to stay, and no token of `ids`."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for axis in axes:
        if axis.may_be_empty:
            kept[axis.name] = torch.rand(1, generator=generator) < 0.5
        elif axis.size > 1:
            number = max(axis.least, axis.size // 2)
            order = torch.rand(axis.groups, axis.size, generator=generator).argsort(dim=1)
            kept[axis.name] = (order < number).flatten()
            kept[axis.name][list(axis.stays)] = True
        if axis.kind == "vocabulary" and ids is not None:
            kept[axis.name][[*ids.flatten().tolist(), 0, 1, 2]] = True
    return Mask(kept)
