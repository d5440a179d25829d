"""SAAP's scores against plain loops over sequences."""

from functools import partial

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.saap import _fused, saap
from adapt_pruner.score.weights import taylor
from conftest import in_two_processes, tiny_model


@pytest.mark.parametrize("stability", [False, True])
@pytest.mark.parametrize("terms", ["both", "vector", "element"])
def test_scores_are_the_formula(terms: str, stability: bool, batches: list[torch.Tensor]) -> None:
    """Neurons of all layers, sequence by sequence, from the gradients of the stock loss; scales and σ are those of the kind."""
    model = tiny_model()
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "kv_heads")]
    found, _ = score(model, axes, batches, metrics=[lambda m, a: saap(m, a, terms=terms, stability=stability)], dtype="float32")
    mixed, _ = score(model, axes, batches, metrics=[lambda m, a: taylor(m, a, form="mixed")], dtype="float32")
    sequences = [row for batch in batches for row in batch.split(1)]
    names = [axis.name for axis in axes if axis.kind == "neurons"]
    signed, absolute = [], []
    for ids in sequences:
        model.zero_grad()
        (model(ids, labels=ids).loss / len(sequences)).backward()
        mlps = [layer.mlp for layer in model.model.layers]
        terms_of = [[(m.gate_proj.weight, 1), (m.up_proj.weight, 1), (m.down_proj.weight, 0)] for m in mlps]
        signed.append(torch.cat([sum((w * w.grad).sum(dim=dim) for w, dim in weights).detach() for weights in terms_of]))
        absolute.append(torch.cat([sum((w * w.grad).abs().sum(dim=dim) for w, dim in weights).detach() for weights in terms_of]))
    a, e = torch.stack(signed), torch.stack(absolute)
    n = len(sequences)
    vector = (a.sum(0) - n / 2 * a.square().sum(0)).abs()
    element = torch.cat([mixed[name] for name in names])
    sigma = [(x.var(0, correction=0) / x.mean(0).square()).mean().sqrt() for x in (a.abs(), e)]
    fused = sum(x / x.mean() / (2 * s**2) for x, s in zip((vector, element), sigma, strict=True))
    expected = {"both": fused, "vector": vector, "element": element}[terms]
    if stability:
        expected = expected / (e.std(0, correction=0) / e.mean(0))
    if terms == "both":
        expected = expected + sum(s.log() for s in sigma)
    assert torch.allclose(torch.cat([found[name] for name in names]), expected, rtol=1e-3)
    assert set(found) == {axis.name for axis in axes}


def test_of_units_worth_the_same_the_unsteady_one_goes_first() -> None:
    """Also where both are worth so little beside a third that the logarithms outweigh their terms."""
    signed = torch.tensor([[0.01, 0.01, 1.0], [0.02, 0.02, 2.0]])
    absolute = torch.tensor([[0.09, 0.05, 1.0], [0.11, 0.15, 1.5]])
    elements = torch.tensor([0.1, 0.1, 9.0])
    alike, also, _ = _fused(elements, signed, absolute, terms="both", stability=False).tolist()
    assert alike == also < 0
    steady, unsteady, much = _fused(elements, signed, absolute, terms="both", stability=True).tolist()
    assert unsteady < steady < much


def test_two_processes_find_the_same(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    axes = [axis for axis in families.axes(model) if axis.kind == "neurons"]
    for count in (2, 1):  # of one batch, a process has none
        text = batches[:count]
        alone, _ = score(model, axes, text, metrics=[saap], dtype="float32")
        both, _ = in_two_processes(monkeypatch, partial(score, model, axes, text, metrics=[saap], dtype="float32"))
        assert all(torch.allclose(both[name], values, rtol=1e-4) for name, values in alone.items())
