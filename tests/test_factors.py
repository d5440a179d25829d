"""A factor per block: held against autograd's derivatives by factors of every token, against gates, and what it promises: the loss falls, or nothing changes."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt_pruner import families
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.errors import RunError
from adapt_pruner.reduce.repair.closed_form import least_squares
from adapt_pruner.reduce.repair.factors import DAMPING, MOST, PIECE, rescale_blocks
from adapt_pruner.score.calibrate import mean_loss
from conftest import LAYOUTS, half, in_two_processes, tiny_model

UNITS = ("neurons", "kv_heads")


@pytest.fixture
def text() -> list[Tensor]:
    """What is fitted to, every second sequence, and beside each the same again: nothing else of random text is foretold by some of it."""
    rows = torch.randint(3, 97, (12, 40), generator=torch.Generator().manual_seed(12))
    return list(rows.repeat_interleave(2, dim=0)[:-1].split((4, 4, 3, 4, 4, 4)))


def blocks_of(model: Any) -> list[Axis]:
    return [axis for axis in families.axes(model) if axis.kind in ("attentions", "mlps")]


class Multiplied:
    """Hooks that multiply what blocks add to the stream, written anew: by factors [n], or [n, length]."""

    def __init__(self, model: Any, factors: Tensor) -> None:
        self.handles = []
        for number, axis in enumerate(blocks_of(model)):

            def hook(module: nn.Module, args: Any, output: Any, factor: Tensor = factors[number, ..., None]) -> Any:
                return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

            self.handles.append(model.get_submodule(axis.modules[-1]).register_forward_hook(hook))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def loss_of_each(model: Any, mask: Mask, text: Sequence[Tensor], factors: Tensor) -> Tensor:
    """The summed cross-entropy of every sequence, [R]."""
    losses = []
    with gated(model, families.axes(model), mask), Multiplied(model, factors):
        for ids in [row for batch in text for row in batch.split(1)]:
            logits = model(ids).logits[:, :-1].double().transpose(1, 2)
            losses.append(nn.functional.cross_entropy(logits, ids[:, 1:], reduction="sum"))
    return torch.stack(losses)


def expected(model: Any, mask: Mask, text: list[Tensor]) -> Tensor:
    """The factors after one step, one sequence at a time."""
    number = len(blocks_of(model))
    ones = torch.ones(number, 40, dtype=torch.float64, requires_grad=True)
    rows = [row for batch in text for row in batch.split(1)]
    fitted, others = rows[::2], rows[1::4]
    losses = loss_of_each(model, mask, fitted, ones)
    by_token = torch.stack([torch.autograd.grad(loss, ones, retain_graph=True)[0] for loss in losses], dim=1)
    each = torch.cat([by_token[..., at : at + PIECE].sum(-1) for at in range(0, 40, PIECE)], dim=1)
    predicted = sum(ids[:, 1:].numel() for ids in fitted)
    deviations = each - each.mean(1, keepdim=True)
    fisher = deviations @ deviations.t() / predicted
    damping = DAMPING * max(1, number / each.shape[1])
    change = torch.linalg.solve(fisher + damping * fisher.diagonal().diag(), each.sum(1) / predicted)
    change *= min(1.0, MOST / float(change.abs().max()))
    with torch.no_grad():
        before = loss_of_each(model, mask, others, ones).sum()
        for share in (1.0, 0.5, 0.25):
            if loss_of_each(model, mask, others, 1 - share * change).sum() < before:
                return 1 - share * change
    return torch.ones(number)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one[1])
def test_a_step_is_that_of_autograd_and_lies_in_the_weights(layout: tuple[str, str], text: list[Tensor]) -> None:
    """After it the model, gated and cut, is the one before with every block multiplied: in the last linear layer, bias too, or norm."""
    model = tiny_model(layout).double()
    dense, axes = copy.deepcopy(model), families.axes(model)
    mask = half(axes, UNITS)
    factors = expected(dense, mask, text)
    assert float((factors - 1).abs().max()) > 1e-3
    losses = rescale_blocks(model, axes, mask, text, dtype="float32")
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for loss, its in zip(losses, (torch.ones(len(factors)), factors), strict=True):
        held_out = loss_of_each(dense, mask, torch.cat(text)[1::4].split(1), its).mean() / 39
        assert loss == pytest.approx(float(held_out.detach()), abs=1e-5)
    with torch.no_grad(), gated(model, axes, mask):
        found = model(text[0]).logits
    with torch.no_grad(), gated(dense, axes, mask), Multiplied(dense, factors):
        wanted = dense(text[0]).logits
    assert torch.allclose(found, wanted, atol=1e-5), float((found - wanted).abs().max())
    cut(model, axes, mask)
    with torch.no_grad():
        logits = model(text[0]).logits
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_that_are_too_loud_are_turned_down(text: list[Tensor]) -> None:
    """Text that the model finds likely, and a block that was made three times as strong."""
    model = tiny_model()
    with torch.no_grad():
        said = model.generate(torch.tensor([[5], [6], [7], [8]] * 8), do_sample=True, max_new_tokens=31, pad_token_id=0)
        model.model.layers[1].mlp.down_proj.weight *= 3
    loud = model.model.layers[1].mlp.down_proj.weight.clone()
    losses = rescale_blocks(model, families.axes(model), Mask(), list(said.split(4)), steps=4, dtype="float32")
    assert losses == sorted(losses, reverse=True)
    assert len(losses) > 2
    factor = float((model.model.layers[1].mlp.down_proj.weight.detach() / loud.detach()).mean())
    assert 0.1 < factor < 0.7, factor


def test_blocks_that_go_and_layers_that_go_get_no_factor(text: list[Tensor]) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    gone = {"layers": [True, False, True], "layers.0.mlps": [False], "layers.2.attentions": [False]}
    mask = Mask({name: torch.tensor(keep) for name, keep in gone.items()})
    assert len(rescale_blocks(model, families.axes(model), mask, text, dtype="float32")) == 2
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}


def test_a_step_that_does_not_help_is_left_out(text: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = tiny_model(), []
    before = copy.deepcopy(model.state_dict())

    def worse(*args: Any, **others: Any) -> float:
        tried.append(mean_loss(*args, **others))
        return 1e9

    monkeypatch.setattr("adapt_pruner.reduce.repair.factors.mean_loss", worse)
    losses = rescale_blocks(model, families.axes(model), half(families.axes(model), UNITS), text, steps=3, dtype="float32")
    assert len(losses) == 1
    assert len(set(tried)) == 4  # before, and of three lengths
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("sizes", "length"), [((1,), 40), ((2,), PIECE), ((1, 1), PIECE)])
def test_one_piece_says_nothing_of_the_spread_and_nothing_is_done(sizes: tuple[int, ...], length: int) -> None:
    """Nor is there anything to do with nothing to judge by."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    few = [torch.arange(3, 3 + length).repeat(rows, 1) for rows in sizes]
    said: list[str] = []
    assert rescale_blocks(model, families.axes(model), Mask(), few, dtype="float32", warn=said.append) == []
    assert len(said) == 1
    pieces = sum(sizes[0::2]) if len(sizes) > 1 else -(-sizes[0] // 2) * -(-length // PIECE)
    held_out = sum(sizes) // 2
    assert f"the calibration text has {pieces} and {held_out}; all factors stay 1; set calibration.samples higher" in said[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fewer_pieces_than_factors_are_said(text: list[Tensor]) -> None:
    model, said = tiny_model(), []
    few = torch.cat(text)[:4, :PIECE]  # two of them are fitted to, a piece each; three layers have six factors
    assert few.shape == (4, PIECE)
    rescale_blocks(model, families.axes(model), half(families.axes(model), UNITS), [few], dtype="float32", warn=said.append)
    assert said == [
        "2 pieces of 16 tokens, of every second sequence, are few for 6 factors; their steps were damped 3.0 times as much; set calibration.samples higher"
    ]


def test_a_block_that_does_nothing_keeps_its_weights(text: list[Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert len(rescale_blocks(model, families.axes(model), half(families.axes(model), UNITS), text, dtype="float32")) == 2
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert not model.model.layers[0].mlp.down_proj.weight.any()


def test_two_processes_find_the_factors_of_one(text: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> Any:  # one step: in this play the first process does not hear of the second
        model = tiny_model()
        rescale_blocks(model, families.axes(model), half(families.axes(model), UNITS), text, dtype="float32")
        return model.state_dict()

    alone = work()
    both = in_two_processes(monkeypatch, work)
    assert all(torch.allclose(tensor, both[name], atol=1e-6) for name, tensor in alone.items())


def test_least_squares_takes_the_steps_afterwards(text: list[Tensor]) -> None:
    """As if the two had been called one after the other; progress ends where it should."""
    model, told = tiny_model(), []
    by_hand = copy.deepcopy(model)
    axes = families.axes(model)
    mask = half(axes, UNITS)
    least_squares(model, axes, mask, text, factors=2, dtype="float32", on_layer=lambda done, of: told.append((done, of)))
    least_squares(by_hand, axes, mask, text, dtype="float32")
    rescale_blocks(by_hand, axes, mask, text, steps=2, dtype="float32")
    assert all(torch.equal(tensor, by_hand.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert told[-1] == (9, 9)
    assert told == sorted(told)


def test_bad_input_is_said(text: list[Tensor]) -> None:
    model = tiny_model()
    axes = families.axes(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="the loss on the calibration text is nan"):
        rescale_blocks(model, axes, half(axes, UNITS), text, dtype="float32")
