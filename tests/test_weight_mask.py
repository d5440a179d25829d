"""The mask over weights: its patterns, its bits, and that it goes together with cuts of axes in either order."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import (
    WeightMask,
    count_nonzero,
    holds,
    largest,
    linear_layers,
    oriented,
    packed,
    unpacked,
)
from adapt_pruner.errors import UsageError
from adapt_pruner.train.loop import make_optimizer
from conftest import LAYOUTS, tiny_model

HALF, TWO_OF_FOUR = Pattern.parse("50%"), Pattern.parse("2:4")


def by_magnitude(model: Any, pattern: Pattern) -> WeightMask:
    """The largest weights of every linear layer."""
    return WeightMask({name: largest(oriented(module).abs(), pattern) for name, module in linear_layers(model).items()}, pattern)


@pytest.mark.parametrize(
    "kinds", [("neurons", "query_heads"), ("residual", "kv_heads"), ("layers",), ("attentions", "mlps")], ids="+".join
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_zeros_then_a_cut_are_a_cut_then_zeros(layout: tuple[str, str], kinds: tuple[str, ...]) -> None:
    first, second = tiny_model(layout).double(), tiny_model(layout).double()
    axes = families.axes(first)
    mask = Mask({axis.name: torch.arange(axis.entries) % axis.size % 2 == 0 for axis in axes if axis.kind in kinds})
    if "attentions" in kinds:
        mask = Mask({"layers.0.attentions": torch.tensor([False]), "layers.1.mlps": torch.tensor([False])})
    zeros = by_magnitude(first, HALF)
    zeros.apply(first)
    left = zeros.cut(first, axes, mask)

    cut(second, axes, mask)
    left.check(second)
    assert left.kept.keys() == linear_layers(second).keys()
    left.apply(second)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    assert not left.unmasked(first)


def test_a_mask_covers_the_linear_layers_of_the_decoder_alone() -> None:
    model = tiny_model(("phi3", "phi3"))
    names = linear_layers(model).keys()
    assert {name.rpartition(".")[2] for name in names} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert len(names) == 4 * model.config.num_hidden_layers
    assert list(linear_layers(model, layer=1)) == [name for name in names if ".layers.1." in name]


def test_a_cut_that_breaks_groups_says_so_and_one_of_whole_groups_does_not() -> None:
    for keep, pattern in ((torch.arange(40) % 2 == 0, None), (torch.arange(40) < 20, TWO_OF_FOUR)):
        model = tiny_model()
        zeros = by_magnitude(model, TWO_OF_FOUR)
        zeros.apply(model)
        left = zeros.cut(model, families.axes(model), Mask({f"layers.{i}.neurons": keep for i in range(3)}))
        assert left.pattern == pattern
        assert left.broken(model) == []


@pytest.mark.parametrize("written", ["50%", "2:4", "37.5%", "4:8", "1:4"])
def test_a_mask_keeps_exactly_what_the_pattern_says(written: str) -> None:
    pattern = Pattern.parse(written)
    scores = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with equals among them
    for per_row in (False, True):
        keep = largest(scores, pattern, per_row=per_row)
        assert holds(keep, pattern)
        rows = scores.reshape(-1, pattern.m) if pattern.m else scores if per_row else scores.reshape(1, -1)
        for row, stays in zip(rows, keep.reshape(rows.shape), strict=True):
            assert row[stays].min() >= row[~stays].max()
        one_more = keep.clone()
        one_more.view(-1)[int(keep.view(-1).int().argmin())] = True
        assert not holds(one_more, pattern)


def test_what_does_not_hold_the_pattern_is_named() -> None:
    for pattern, said in ((TWO_OF_FOUR, "a group of 4 in"), (HALF, "weights of")):
        model = tiny_model()
        zeros = by_magnitude(model, pattern)
        assert len(zeros.broken(model)) == len(linear_layers(model))
        dense = count_nonzero(model)
        zeros.apply(model)
        assert zeros.broken(model) == []
        assert count_nonzero(model) == dense - zeros.num_zeros
        name, module = list(linear_layers(model).items())[4]
        oriented(module)[~zeros.kept[name]] = 1.0
        assert len(zeros.broken(model)) == 1
        assert said in zeros.broken(model)[0]
        assert zeros.unmasked(model) == [name]


def test_bits_come_back() -> None:
    for shape in ((3, 5), (4, 8), (1, 1)):
        keep = torch.rand(shape) < 0.5
        assert torch.equal(unpacked(packed(keep), shape), keep)
    assert packed(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist() == [129, 128]
    with pytest.raises(ValueError, match="no mask of 40 entries"):
        unpacked(torch.zeros(4, dtype=torch.uint8), (5, 8))


def test_training_leaves_held_zeros_at_zero_and_moves_the_rest() -> None:
    model = tiny_model()
    zeros = by_magnitude(model, TWO_OF_FOUR)
    zeros.apply(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.1)
    with zeros.keeping_zeros(model):
        for _ in range(3):
            model(torch.arange(3, 15)[None]).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert zeros.unmasked(model) == []
    assert not torch.equal(
        model.state_dict()["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"]
    )
    model(torch.arange(3, 15)[None]).logits.square().mean().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad[~zeros.kept["model.layers.0.mlp.down_proj"]].abs().max() > 0


def test_a_mask_of_another_model_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="which is not a linear layer"):
        WeightMask({"lm_head": torch.ones(97, 48, dtype=torch.bool)}).check(model)
    with pytest.raises(ValueError, match=r"is \(2, 2\), the weight is \(48, 40\)"):
        WeightMask({"model.layers.0.mlp.down_proj": torch.ones(2, 2, dtype=torch.bool)}).check(model)


def test_weights_that_lie_as_inputs_by_outputs_are_turned() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(8, 4)
    nn.init.normal_(module.weight)
    assert oriented(module).shape == (8, 4)
    oriented(module)[0] = 0
    assert module.weight[:, 0].abs().max() == 0


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("5:4", "keeps 5 of every 4"), ("4:4", "keeps 4 of every 4"), ("0:4", "keeps 0 of every 4"), ("0%", "makes no weight zero"),
        ("100%", "makes all weights zero"), ("0.5", "neither a share nor a pattern"), ("half", "neither"), ("1:2048", "M up to 1,024"),
    ],
)  # fmt: skip
def test_a_pattern_that_is_none_is_refused(written: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"write the share of zeros, such as 50%, or N:M, such as 2:4") as refused:
        Pattern.parse(written)
    assert said in str(refused.value)


def test_layers_that_a_pattern_does_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"down has 42 inputs, which is not a multiple of 4, so sparsity 2:4 does not fit it"):
        TWO_OF_FOUR.check_inputs("down", 42)
    with pytest.raises(UsageError, match=r"down has 5 inputs, of which sparsity 10% makes none zero"):
        Pattern.parse("10%").check_inputs("down", 5)
