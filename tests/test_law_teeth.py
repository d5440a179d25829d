"""The law has teeth: each fault that is easily made in a family file breaks it."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.core.model.axes import Gate, Mask
from adapt_pruner.core.model.cut import cut, gated
from conftest import LAYOUTS, tiny_model
from test_law import gap, ids, random_mask, wide_norms

__all__ = ["ids"]  # a fixture


def _without(axis: Any, part: str) -> Any:
    return dataclasses.replace(axis, slices=tuple(piece for piece in axis.slices if part not in piece.parameter))


def _unscaled(axis: Any, part: str) -> Any:
    return dataclasses.replace(axis, scaled=tuple(entry for entry in axis.scaled if part not in entry[0]))


FAULTS = {
    "a forgotten bias": ("qwen2", "kv_heads", lambda axis: _without(axis, "q_proj.bias")),
    "a forgotten o_proj": ("llama", "kv_heads", lambda axis: _without(axis, "o_proj")),
    "a forgotten up_proj": ("llama", "neurons", lambda axis: _without(axis, "up_proj")),
    "heads gated one by one": (
        "llama",
        "kv_heads",
        lambda axis: dataclasses.replace(axis, gate=Gate(axis.gate.module, axis.gate.width // 2)),
    ),
    "a forgotten group size": ("llama", "query_heads", lambda axis: dataclasses.replace(axis, attributes=())),
    "query heads cut from one group": (
        "mobilellm",
        "query_heads",
        lambda axis: dataclasses.replace(axis, size=axis.entries, groups=1),
    ),
    "unscaled norms": ("llama", "residual", lambda axis: _unscaled(axis, "norm.weight")),
    "an unscaled last norm": ("llama", "residual", lambda axis: _unscaled(axis, "model.norm.weight")),
    "an unscaled writer": ("llama", "residual", lambda axis: _unscaled(axis, "o_proj")),
    "an unscaled bias of a writer": ("llama-mha-biased", "residual", lambda axis: _unscaled(axis, "down_proj.bias")),
    "an unscaled embedding": ("qwen3-untied", "residual", lambda axis: _unscaled(axis, "embed_tokens.weight")),
    "a forgotten bias that writes to the stream": ("llama-mha-biased", "residual", lambda axis: _without(axis, "o_proj.bias")),
    "norms of Gemma scaled as a Llama's": ("gemma3", "residual", lambda axis: dataclasses.replace(axis, one_more=())),
    "a last norm of Gemma scaled as that of a tied Llama": (
        "gemma3",
        "residual",
        lambda axis: dataclasses.replace(axis, scaled=(*axis.scaled, ("model.norm.weight", 0.5))),
    ),
    "an embedding of Gemma with the old scale": ("gemma3", "residual", lambda axis: _unscaled(axis, ".embed_scale")),
    "an untied head that is forgotten": ("qwen3-untied", "residual", lambda axis: _without(axis, "lm_head")),
    "a forgotten bias of the queries": ("qwen2", "query_heads", lambda axis: _without(axis, "q_proj.bias")),
    "an MLP that goes in the place of attention": (
        "llama",
        "attentions",
        lambda axis: dataclasses.replace(axis, modules=("model.layers.0.post_attention_layernorm", "model.layers.0.mlp")),
    ),
    "a norm after attention that gives its bias": (
        "gemma3-capped",
        "attentions",
        lambda axis: dataclasses.replace(axis, gate=Gate(axis.modules[0], kind="whole")),
    ),
    "query heads cut like KV heads": (
        "llama",
        "kv_heads",
        lambda axis: dataclasses.replace(
            axis, slices=tuple(dataclasses.replace(p, width=p.width // 2) if "q_proj" in p.parameter else p for p in axis.slices)
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_law_catches(fault: str, ids: torch.Tensor) -> None:
    name, kind, spoil = FAULTS[fault]
    model = wide_norms(tiny_model(next(layout for layout in LAYOUTS if layout[1] == name)).double())
    model.set_attn_implementation("eager")  # the kernel that reads the group size
    axes = [spoil(axis) for axis in families.axes(model) if axis.kind == kind]  # no other axis mends it
    try:
        found = gap(model, axes, random_mask(axes, (kind,), seed=1), ids)
    except (RuntimeError, ValueError):  # a gate or a slice does not fit
        return
    assert found > 1e-9


def test_the_law_catches_query_heads_folded_by_remainder(ids: torch.Tensor) -> None:
    """Cutting query heads h mod num_kv_heads, as the released fold has it, is not what the gate shuts."""
    model = tiny_model().double()
    axes = families.axes(model)
    mask = random_mask(axes, ("kv_heads",), seed=1)
    wrong = copy.deepcopy(model)
    for layer in wrong.model.layers:
        dim, kv = layer.self_attn.head_dim, layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
        folded = layer.self_attn.q_proj.weight.view(-1, kv, dim, layer.self_attn.q_proj.in_features).transpose(0, 1)
        layer.self_attn.q_proj.weight.data = folded.reshape(layer.self_attn.q_proj.weight.shape).clone()
    with torch.no_grad():
        cut(wrong, axes, mask)
        with gated(model, axes, mask):
            assert (wrong(ids).logits - model(ids).logits).abs().max() > 1e-9


def test_the_law_catches_a_stale_layer_number(ids: torch.Tensor) -> None:
    """The cache is addressed by layer number: with a stale one, cached generation goes wrong or fails."""
    model = tiny_model()
    cut(model, families.axes(model), Mask({"layers": torch.tensor([True, False, True])}))
    good = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
    model.model.layers[1].self_attn.layer_idx = 0
    try:
        bad = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
    except (RuntimeError, IndexError):
        return
    assert not torch.equal(good, bad)
