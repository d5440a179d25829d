"""Weights come to bfloat16 once where many passes are made, and nothing of that is left behind."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapt_pruner import families
from adapt_pruner.core.axes import Mask
from adapt_pruner.core.calibrate import casting_once, mean_loss, precision, score
from adapt_pruner.core.layerwise import score_behind
from adapt_pruner.core.loss import next_token_nll
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.speed import forward_speed
from adapt_pruner.metrics import activations, weights
from adapt_pruner.repair.closed_form import least_squares, mean_bias
from conftest import tiny_model

BATCHES = [torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(number)) for number in range(3)]


class Casts(TorchDispatchMode):
    """Counts, by the name of the weight, how often one is brought to bfloat16."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.dim() == 2}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr(), "")] += 1
        return func(*args, **kwargs)


def repaired(model: Any, repair: Callable[..., None]) -> None:
    axes = [axis for axis in families.axes(model) if axis.kind == "neurons"]
    mask = Mask({axis.name: torch.arange(axis.size) % 2 == 0 for axis in axes})
    repair(model, families.axes(model), mask, BATCHES, dtype="bfloat16")


def behind(model: Any) -> None:
    axes = families.axes(model)
    sizes = {axis.name: axis.size - 1 for axis in axes if axis.kind == "neurons"}
    score_behind(model, axes, sizes, BATCHES, metric=activations.wanda, known={}, dtype="bfloat16")


READERS: dict[str, tuple[Callable[[Any], object], int]] = {  # what reads the batches, and how many times each weight may be cast
    "perplexity": (lambda model: perplexity(model, BATCHES, dtype="bfloat16"), 1),
    "mean loss": (lambda model: mean_loss(model, BATCHES, dtype="bfloat16"), 1),
    "speed": (lambda model: forward_speed([model], BATCHES[0], dtype="bfloat16"), 1),
    "activations": (lambda model: score(model, families.axes(model), BATCHES, metrics=[activations.wanda], dtype="bfloat16"), 1),
    "behind": (behind, 2),  # the metric looks, then units are shut
    "least squares": (lambda model: repaired(model, least_squares), 1),
    "mean bias": (lambda model: repaired(model, mean_bias), 1),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_weights_are_cast_once(reader: str, frozen: bool) -> None:
    model = tiny_model(vocab_size=256).requires_grad_(not frozen)
    read, most = READERS[reader]
    before = list(model.parameters())
    with Casts(model) as casts:
        read(model)
    names = set(casts.names.values()) - {"model.embed_tokens.weight"}
    assert {name: casts.counts[name] for name in names if casts.counts[name] not in (1, most)} == {}
    assert casts.counts["model.embed_tokens.weight"] <= 1, "as the head"
    assert all(parameter.requires_grad is not frozen for parameter in before)


def test_gradients_cast_what_gets_one_once() -> None:
    model = tiny_model(vocab_size=256)
    axes = [axis for axis in families.axes(model) if axis.kind == "neurons"]
    with Casts(model) as casts:
        score(model, axes, BATCHES, metrics=[weights.taylor], dtype="bfloat16")
    assert {count for name, count in casts.counts.items() if ".mlp." in name} == {1}


@pytest.mark.parametrize("around", [nullcontext(), precision(torch.device("cpu"), "bfloat16")], ids=["alone", "in autocast"])
def test_nothing_is_left_of_it(around: AbstractContextManager[Any]) -> None:
    """A cast that was made without gradients is not used where they are wanted, and figures are what they were."""
    model, ids = tiny_model(vocab_size=256), BATCHES[0]

    def nll() -> Tensor:
        with precision(ids.device, "bfloat16"):
            return next_token_nll(model, ids)

    with torch.no_grad():
        alone = nll()
    with around:
        with torch.no_grad(), casting_once(model):
            assert [nll(), nll()] == [alone, alone]
        loss = nll()
        loss.backward()
    assert loss == alone
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        next(model.model.layers[0].mlp.parameters()).zero_()
        assert nll() != alone
