"""Slices of fused matrices: several runs of one parameter, and what `cut` refuses because it would leave a part behind."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from adapt_pruner import score
from adapt_pruner.core.model.axes import Axis, Gate, Mask, Slice
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated, num_left
from adapt_pruner.score import weights
from test_law import gap, ids, wide_norms

__all__ = ["ids"]  # a fixture

NEURONS, WIDTH = 40, 48
FUSED, DOWN = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"
KEEP = torch.arange(NEURONS) % 3 > 0


def fused_model() -> Any:
    """A model whose layers have the rows of gate and up in one matrix."""
    torch.manual_seed(0)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=97, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
            eos_token_id=2,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def neurons(*slices: Slice) -> list[Axis]:
    return [Axis("layers.0.neurons", NEURONS, 3 * WIDTH, Gate("model.layers.0.mlp.down_proj"), slices)]


GATE, UP, COLUMNS = Slice(FUSED, 0), Slice(FUSED, 0, start=NEURONS), Slice(DOWN, 1)


def test_two_runs_of_one_matrix_are_cut_and_gated_alike(ids: torch.Tensor) -> None:
    model, axes, mask = wide_norms(fused_model().double()), neurons(GATE, UP, COLUMNS), Mask({"layers.0.neurons": KEEP})
    before = model.get_parameter(FUSED).detach().clone()
    assert gap(model, axes, mask, ids) <= 1e-9
    left = num_left(model, axes, mask)
    cut(model, axes, mask)
    assert torch.equal(model.get_parameter(FUSED), before[torch.cat([KEEP, KEEP])])
    assert count_parameters(model) == left == count_parameters(fused_model()) - int((~KEEP).sum()) * 3 * WIDTH


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ((GATE, COLUMNS), rf"together own 40 of 80 along dimension 0 of {FUSED}; the family must declare the others"),
        ((GATE, replace(UP, start=39), COLUMNS), rf"together own 79 of 80 along dimension 0 of {FUSED}"),
        ((GATE, replace(UP, start=41), COLUMNS), rf"layers.0.neurons owns 41 to 81 along dimension 0 of {FUSED}, which has 80;"),
        ((replace(GATE, width=3), COLUMNS), rf"owns 0 to 120 along dimension 0 of {FUSED}, which has 80;"),
    ],
    ids=["a forgotten half", "an overlap", "beyond the end", "too wide"],
)
def test_a_matrix_that_is_not_covered_is_refused_before_anything_changes(slices: tuple[Slice, ...], message: str) -> None:
    model, mask = fused_model(), Mask({"layers.0.neurons": KEEP})
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    for refused in (cut, num_left):
        with pytest.raises(ValueError, match=message):
            refused(model, neurons(*slices), mask)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


def test_axes_share_a_dimension(ids: torch.Tensor) -> None:
    """Rows of one matrix may belong to several axes, one after the other or one inside the other; each cuts its own."""
    model, name = fused_model(), "model.layers.0.self_attn.qkv_proj.weight"
    before = model.get_parameter(name).detach().clone()
    first = Axis("layers.0.first", 4, 1, Gate("x"), (Slice(name, 0, 12),))
    pairs = Axis("layers.0.pairs", 2, 1, Gate("x"), (Slice(name, 0, 24), Slice(name, 0, 48, 48)))
    keep = {"layers.0.first": torch.tensor([True, False, True, True]), "layers.0.pairs": torch.tensor([True, False])}
    cut(model, [first, pairs], Mask(keep))
    assert torch.equal(model.get_parameter(name), before[[*range(12), *range(48, 96)]])


def test_a_gate_of_another_width_is_refused(ids: torch.Tensor) -> None:
    model, axes = fused_model(), neurons(GATE, UP, COLUMNS)
    for gate, features in ((Gate("model.layers.0.mlp.down_proj", 2), 80), (Gate("model.layers.0.mlp.gate_up_proj"), 40)):
        with (
            pytest.raises(ValueError, match=rf"of which its entries own {features}"),
            gated(model, [replace(axes[0], gate=gate)], Mask({"layers.0.neurons": KEEP})),
        ):
            pass


def test_scores_read_the_rows_of_their_own_run(batches: list[torch.Tensor]) -> None:
    model = fused_model()
    found, _ = score(model, neurons(GATE, UP, COLUMNS), batches, metrics=[weights.magnitude], dtype="float32")
    rows = model.get_parameter(FUSED).detach().abs().sum(dim=1)
    expected = rows[:NEURONS] + rows[NEURONS:] + model.get_parameter(DOWN).detach().abs().sum(dim=0)
    assert torch.allclose(found["layers.0.neurons"], expected)
