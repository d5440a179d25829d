"""Gates of every kind: what is declared is what is shut, measured and repaired, also where a weight lies transposed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from adapt_pruner import families, score
from adapt_pruner.core.model.axes import Axis, Gate, Mask, Slice
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.reduce.repair.closed_form import least_squares, mean_bias
from adapt_pruner.score import activations, curvature, weights
from adapt_pruner.score.blocks import block_influence
from conftest import LAYOUTS, half, tiny_model
from test_law import gap, ids, random_mask, wide_norms

__all__ = ["ids"]  # a fixture


def transposed(model: Any) -> Any:
    """The same model with GPT-2's kind of layer, whose weight is [inputs, outputs], at the end of every MLP; changed in place."""
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        turned = Conv1D(linear.out_features, linear.in_features)
        turned.weight.data, turned.bias.data = linear.weight.data.t().contiguous(), linear.bias.data
        layer.mlp.down_proj = turned.to(linear.weight.dtype)
    return model


def axes_of() -> tuple[Axis, ...]:
    """What a family with such layers would declare, for a model whose weights were turned after they were made."""
    found = []
    for axis in families.axes(tiny_model(("llama", "llama-mha-biased"), mlp_bias=True)):
        gate = axis.gate
        if gate.module.endswith("down_proj"):
            gate = replace(gate, dim=0)
        pieces = tuple(
            replace(piece, dim=1 - piece.dim) if piece.parameter.endswith("down_proj.weight") else piece for piece in axis.slices
        )
        found.append(replace(axis, gate=gate, slices=pieces))
    return tuple(found)


def both() -> tuple[Any, Any]:
    plain, turned = (tiny_model(("llama", "llama-mha-biased"), mlp_bias=True) for _ in range(2))
    return plain, transposed(turned)


@pytest.mark.parametrize("kinds", [("neurons",), ("residual",), ("neurons", "residual", "kv_heads", "layers")], ids="+".join)
def test_the_law_holds_where_a_weight_lies_transposed(kinds: tuple[str, ...], ids: torch.Tensor) -> None:
    model = wide_norms(both()[1].double())
    assert gap(model, axes_of(), random_mask(axes_of(), kinds, seed=1), ids) <= 1e-9


def test_scores_and_repairs_know_which_dimension_is_the_input(batches: list[torch.Tensor]) -> None:
    plain, turned = both()
    for metric in (activations.wanda, activations.fluctuation, activations.magnitude, curvature.kfac, weights.taylor):
        expected, _ = score(plain, families.axes(plain), batches, metrics=[metric], dtype="float32")
        found, _ = score(turned, axes_of(), batches, metrics=[metric], dtype="float32")
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-6), (metric.__name__, name)
    mask = half(families.axes(plain))
    for repair in (mean_bias, least_squares):
        repair(plain, families.axes(plain), mask, batches, dtype="float32")
        repair(turned, axes_of(), mask, batches, dtype="float32")
    for one, other in zip(plain.model.layers, turned.model.layers, strict=True):
        assert torch.allclose(one.mlp.down_proj.weight, other.mlp.down_proj.weight.t(), atol=1e-4)
        assert torch.allclose(one.mlp.down_proj.bias, other.mlp.down_proj.bias, atol=1e-4)


def test_a_transposed_layer_knows_its_sizes_after_a_cut() -> None:
    model = both()[1]
    cut(model, axes_of(), random_mask(axes_of(), ("neurons", "residual"), seed=1))
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.nx, layer.nf) == (20, 24) == tuple(layer.weight.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_axis_layers_is_where_the_decoder_layers_are(layout: str) -> None:
    model = tiny_model(layout)
    gate = next(axis.gate for axis in families.axes(model) if axis.name == "layers")
    assert decoder_layers(model) is model.get_submodule(gate.module)


def test_a_gate_of_each_kind() -> None:
    kinds = {axis.kind: axis.gate.kind for axis in families.axes(tiny_model())}
    assert kinds == {
        "neurons": "inputs", "kv_heads": "inputs", "query_heads": "inputs", "residual": "channels", "vocabulary": "logits",
        "layers": "whole", "attentions": "whole", "mlps": "whole",
    }  # fmt: skip
    assert Gate("m").is_linear
    assert not Gate("m", kind="channels").is_linear
    assert Gate("m", kind="whole").is_whole
    assert Mask({"a": torch.ones(2, dtype=torch.bool)}).of(Axis("a", 2, 1, Gate("m"), (Slice("p", 0),))).all()


def test_hooks_come_off_also_where_a_later_one_cannot_be_attached() -> None:
    """After an error inside, after one while they are attached, and after a metric that is let go in its middle."""
    model = tiny_model()
    layers = [*model.model.layers]

    def hooks(last: Any) -> Iterator[Any]:
        for layer in (*layers, last):
            yield layer.register_forward_hook(lambda module, args, output: output)

    def on() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    with attached(hooks(model.model.norm)):
        assert on() == 4
    with pytest.raises(KeyError), attached(hooks(model.model.norm)):
        raise KeyError
    assert on() == 0
    with pytest.raises(AttributeError), attached(hooks(None)):
        pass
    assert on() == 0
    for metric in (activations.wanda, curvature.kfac, block_influence):
        looking = metric(model, families.axes(model))
        next(looking)
        assert on() > 0
        looking.close()
        assert on() == 0
