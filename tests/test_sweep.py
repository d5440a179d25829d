"""Gradients of a few layers at a time are those of whole backward passes, and no more of them exist at once."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.core.model import layers as layerwise
from adapt_pruner.core.model import loss as core_loss
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.layers import Sweep, layers_at_once
from adapt_pruner.core.model.precision import precision
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.errors import RunError
from adapt_pruner.score import blocks, curvature, weights
from adapt_pruner.score.calibrate import Evidence, score
from conftest import LAYOUTS, VOCAB, in_two_processes, tiny_model

BATCHES = [torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(number)) for number in range(3)]


def whole(model: Any, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and loss by backward passes through the whole model."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in BATCHES:
        with precision(batch.device, dtype):
            loss = CAUSAL_LM.loss(model, batch)
        (loss / 90).backward()
        total += loss.detach().double()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, total


def swept(model: Any, dtype: str, batches: Sequence[Tensor] = BATCHES) -> tuple[dict[str, Tensor], Tensor, list[list[str]]]:
    sweep = Sweep(model, batches, dtype=dtype)
    sweep.forward()
    total, found, groups = sweep.loss(over=90), {}, []
    for names in sweep.backward():
        found |= {name: model.get_parameter(name).grad.clone() for name in names}
        groups.append(names)
        with_gradients = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert {name for name in with_gradients if ".layers." in name} <= set(names)
    assert all(weight.grad is None for weight in model.parameters())
    return found, total, groups


def test_on_a_cpu_the_logits_of_few_tokens_exist_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring's peak is in its loss; see `LOGITS_OF`."""
    model, rows = tiny_model(vocab_size=VOCAB).eval(), []
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits of all tokens at once"))
    expected, loss = whole(model, "float32")

    def linear(entering: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(len(entering))
        return torch.nn.functional.linear(entering, weight, bias)

    monkeypatch.setattr(layerwise, "LOGITS_OF", 8)
    monkeypatch.setattr(core_loss, "F", SimpleNamespace(linear=linear))
    found, total, _ = swept(model, "float32")
    assert rows == 3 * [8, 8, 8, 6], "2 × 15 tokens are predicted in each of three batches"
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(found, expected)


@pytest.fixture(params=[1, 2, 3])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(layerwise, "layers_at_once", lambda depth, **sizes: request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_gradients_are_those_of_whole_passes(layout: tuple[str, str], dtype: str, at_once: int) -> None:
    model = tiny_model(layout, vocab_size=VOCAB).eval()
    expected, loss = whole(model, dtype)
    found, its_loss, groups = swept(model, dtype)
    assert its_loss == loss
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # an embedding tied to the head adds up its two parts in another order
        near = 1e-6 * float(gradient.abs().max())
        assert torch.equal(found[name], gradient) or torch.allclose(found[name], gradient, rtol=1e-5, atol=near), name
        if ".layers." in name:
            assert torch.equal(found[name], gradient), name
    depth = len(model.model.layers)
    assert len(groups) == -(-depth // at_once) + 1
    assert not any(".layers." in name for name in groups[-1])


def test_layers_that_lost_blocks_and_layers_that_nobody_asks_for(at_once: int) -> None:
    model = tiny_model(vocab_size=VOCAB, num_hidden_layers=4).eval()
    axes = families.axes(model)
    gone = [
        axis for axis in axes if axis.name in ("layers.1.attentions", "layers.1.mlps", "layers.3.attentions", "layers.3.mlps")
    ]
    assert len(gone) == 4
    cut(model, axes, Mask({axis.name: torch.zeros(1, dtype=torch.bool) for axis in gone}))
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers.2.mlp" in name)
    expected, _ = whole(model, "float32")
    found, _, groups = swept(model, "float32")
    assert [len(names) for names in groups] == [3]
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    assert list(swept(model, "float32")[0]) == ["model.embed_tokens.weight"]


def test_nobody_below_the_lowest_weight_that_is_asked_for_runs_again(at_once: int) -> None:
    model, runs = tiny_model(vocab_size=VOCAB, num_hidden_layers=4).eval().requires_grad_(False), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(True)
    swept(model, "float32")
    again = runs[4 * len(BATCHES) :]
    assert min(again) == 3 // at_once * at_once


def test_what_looks_beside_it_sees_every_batch_once(at_once: int) -> None:
    model = tiny_model(vocab_size=VOCAB)
    axes, told = families.axes(model), []
    metrics = [weights.taylor, blocks.cosine]
    both, loss = score(model, axes, BATCHES, metrics=metrics, dtype="float32", on_batch=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
    alone, same_loss = score(model, axes, BATCHES, metrics=[blocks.cosine], dtype="float32")
    assert loss == pytest.approx(same_loss, rel=1e-6)
    assert all(torch.equal(both[name], scores) for name, scores in alone.items())
    calls = []

    def counting(model: Any, axes: Any) -> Any:
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        try:
            yield Evidence.FORWARD
        finally:
            handle.remove()
        return {}

    score(model, axes, BATCHES, metrics=[counting, weights.taylor])
    assert len(calls) == len(BATCHES)


@pytest.mark.parametrize("metrics", [[curvature.kfac, weights.taylor], [weights.taylor, curvature.kfac]])
def test_gradients_of_what_flows_need_whole_passes(metrics: list[Any], at_once: int) -> None:
    """Taylor finds beside `curvature.kfac`, whose hooks see whole backward passes, what it finds alone, and the other way round."""
    model = tiny_model(vocab_size=VOCAB)
    axes = [axis for axis in families.axes(model) if axis.kind == "neurons"]
    both, _ = score(model, axes, BATCHES, metrics=metrics, dtype="float32")
    alone, _ = score(model, axes, BATCHES, metrics=metrics[1:], dtype="float32")  # whose scores are the ones that stay
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], scores) for name, scores in alone.items())


def test_a_stand_in_has_the_attributes_of_its_layer() -> None:
    model = tiny_model(vocab_size=VOCAB)
    model.model.layers[1].attention_type = "sliding_attention"
    its = list(model.model.layers)
    with layerwise._standing_in(model.model.layers):
        assert model.model.layers[1].attention_type == "sliding_attention"
        with pytest.raises(AttributeError):
            _ = model.model.layers[0].attention_type
        assert not any(layer is stand_in for layer, stand_in in zip(its, model.model.layers, strict=True))
    assert all(layer is same for layer, same in zip(its, model.model.layers, strict=True))


def test_a_loss_that_is_no_number_is_seen_before_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(vocab_size=VOCAB)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    monkeypatch.setattr(Sweep, "_through_group", lambda *_, **__: pytest.fail("there is nothing to see there"))
    with pytest.raises(RunError, match="the loss on the calibration text is nan"):
        score(model, families.axes(model), BATCHES, metrics=[weights.taylor])
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("depth", "hidden", "layer"), [(30, 18.9, 14.2), (32, 134, 800), (2, 1, 1), (1, 5, 1), (28, 1, 0), (12, 900, 1)]
)
def test_a_group_is_as_large_as_makes_both_least(depth: int, hidden: float, layer: float) -> None:
    def cost(k: int) -> float:
        return depth / k * hidden + k * layer

    k = layers_at_once(depth, hidden=hidden, layer=layer)
    assert 1 <= k <= depth
    assert cost(k) <= 1.07 * min(cost(one) for one in range(1, depth + 1))


def test_a_process_without_a_batch_gives_no_gradient() -> None:
    model = tiny_model(vocab_size=VOCAB).eval()
    sweep = Sweep(model, [], dtype="float32")
    sweep.forward()
    assert float(sweep.loss(over=1)) == 0
    names = [name for group in sweep.backward() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_processes_with_unequal_shares_sum_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three batches one gets two; what each would take for the best group by its own share differs, and the first one's is taken."""
    model = tiny_model(vocab_size=VOCAB, num_hidden_layers=4)
    axes = families.axes(model)
    alone, _ = score(model, axes, BATCHES, metrics=[weights.taylor], dtype="float32")
    liked = iter([2, 1])
    monkeypatch.setattr(layerwise, "layers_at_once", lambda depth, **sizes: next(liked))
    together = in_two_processes(monkeypatch, lambda: score(model, axes, BATCHES, metrics=[weights.taylor], dtype="float32")[0])
    assert next(liked, None) is None
    assert all(torch.allclose(together[name], scores, rtol=1e-4) for name, scores in alone.items())


def test_all_work_is_told_where_lower_layers_are_not_asked_for(at_once: int) -> None:
    model, told = tiny_model(vocab_size=VOCAB, num_hidden_layers=4), []
    axes = [axis for axis in families.axes(model) if axis.layer == 3]
    score(model, axes, BATCHES, metrics=[weights.taylor], on_batch=lambda *at: told.append(at))
    assert told[-1] == (3, 3)


def test_a_metric_that_returns_before_all_gradients_is_named_for_it() -> None:
    def early(model: Any, axes: Any) -> Any:
        yield Evidence.GRADIENTS
        return {}

    model = tiny_model(vocab_size=VOCAB)
    with pytest.raises(TypeError, match="yields again for each of them, until it gets None"):
        score(model, families.axes(model), BATCHES, metrics=[early])
    assert all(weight.grad is None for weight in model.parameters())
