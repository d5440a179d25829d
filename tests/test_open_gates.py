"""Gates that are open in part: at 0 and 1 they are the mask's, between them the logits can be differentiated by them."""

from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import gated
from conftest import LAYOUTS, tiny_model
from test_law import ids, random_mask, wide_norms

__all__ = ["ids"]  # a fixture

KINDS = ("neurons", "kv_heads", "query_heads", "residual", "attentions", "mlps", "layers", "vocabulary")


def model_of(layout: tuple[str, str]) -> Any:
    return wide_norms(tiny_model(layout).double())


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS[:-1]], ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_at_zero_and_one_they_are_those_of_a_mask(layout: tuple[str, str], kinds: tuple[str, ...], ids: torch.Tensor) -> None:
    model = model_of(layout)
    axes = families.axes(model)
    mask = random_mask(axes, kinds, seed=1)
    gates = {name: mask[name].double() for name in mask}
    with torch.no_grad():
        dense = model(ids).logits
        with gated(model, axes, mask):
            expected = model(ids).logits
        with gated(model, axes, gates):
            found = model(ids).logits
        assert torch.equal(model(ids).logits, dense), "gates come off"
    assert torch.equal(found.isinf(), expected.isinf())
    assert (found - expected).nan_to_num().abs().max() <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout", [("llama", "qwen3"), ("gemma3", "gemma3-capped"), ("phi3", "phi3")], ids=lambda layout: layout[1]
)
def test_gradients_by_the_gates_are_finite_differences(layout: tuple[str, str], kind: str, ids: torch.Tensor) -> None:
    """Of the mean loss by every axis of a kind; two entries of each are moved a little either way. Also beyond 1, and below 0."""
    model = model_of(layout)
    model.requires_grad_(False)
    axes = [axis for axis in families.axes(model) if axis.kind == kind]
    generator = torch.Generator().manual_seed(5)
    gates = {axis.name: torch.rand(axis.entries, dtype=torch.float64, generator=generator) + 0.3 for axis in axes}
    if kind not in ("vocabulary", "residual"):
        for gate in gates.values():
            gate[-1] = -0.4

    def loss(gates: dict[str, torch.Tensor]) -> torch.Tensor:
        with gated(model, axes, gates):
            logits = model(ids).logits[:, :-1].flatten(0, 1)
        found: torch.Tensor = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        return found

    opened = {name: gate.clone().requires_grad_() for name, gate in gates.items()}
    loss(opened).backward()
    largest = 0.0
    for name, gate in gates.items():
        gradient = opened[name].grad
        assert gradient is not None
        for entry in {0, gate.numel() - 1}:
            step = torch.zeros_like(gate)
            step[entry] = 1e-6
            slope = float(loss({**gates, name: gate + step}) - loss({**gates, name: gate - step})) / 2e-6
            assert float(gradient[entry]) == pytest.approx(slope, rel=1e-4, abs=1e-7), (name, entry)
            largest = max(largest, abs(slope))
    assert largest > 1e-5, "the gates must do something"


def test_a_token_whose_gate_is_shut_has_no_gradient_and_spoils_none(ids: torch.Tensor) -> None:
    model = model_of(("llama", "llama"))
    gate = torch.ones(97, dtype=torch.float64)
    gate[0] = 0.0
    gate.requires_grad_()
    with gated(model, families.axes(model), {"vocabulary": gate}):
        logits = model(ids).logits
    assert logits[..., 0].isneginf().all()
    logits.logsumexp(-1).mean().backward()
    assert gate.grad is not None
    assert torch.isfinite(gate.grad).all()
    assert gate.grad[0] == 0
    assert (gate.grad[1:] > 0).all()


def test_gates_follow_the_precision_of_what_they_multiply(ids: torch.Tensor) -> None:
    model = tiny_model().to(torch.bfloat16)
    axes = families.axes(model)
    gates = {axis.name: torch.full((axis.entries,), 0.5, requires_grad=True) for axis in axes if axis.kind in KINDS}
    with gated(model, axes, gates):
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    logits.float().mean().backward()
    assert all(gate.grad is not None and gate.grad.dtype == torch.float32 for gate in gates.values())


def test_gates_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    axes = families.axes(model)
    for gates, said in (
        ({"layers.9.neurons": torch.ones(40)}, "gates name 'layers.9.neurons', which is not an axis of this model"),
        (
            {"layers.0.neurons": torch.ones(39)},
            r"gates of 'layers.0.neurons' must be 40 floats, not torch.float32 of shape \(39,\)",
        ),
        ({"layers.0.neurons": torch.ones(40, dtype=torch.long)}, "must be 40 floats, not torch.int64"),
    ):
        with pytest.raises(ValueError, match=said), gated(model, axes, gates):
            pass
    with gated(model, axes, Mask()), gated(model, axes, {}):
        pass
