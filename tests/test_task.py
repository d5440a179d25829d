"""What is learnt is said in one place: with another task, scoring, repairs and training go by that one."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adapt_pruner
from adapt_pruner import families, score
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.layers import Sweep
from adapt_pruner.core.model.task import CAUSAL_LM, CausalLM
from adapt_pruner.reduce.repair.closed_form import least_squares, mean_bias
from adapt_pruner.reduce.repair.factors import rescale_blocks
from adapt_pruner.score import activations, curvature, weights
from adapt_pruner.score.blocks import block_influence, loss_drop
from adapt_pruner.score.calibrate import mean_loss, score_sequentially
from adapt_pruner.train import objectives
from conftest import half, tiny_model

SRC = Path(adapt_pruner.__file__).parent


@dataclass(frozen=True)
class LastToken(CausalLM):
    """A classifier of texts: of each sequence what follows its last position but one is predicted, at a squared error of logits."""

    def num_predicted(self, batches: Any) -> int:
        return sum(batch.shape[0] for batch in batches)

    def loss(self, model: Any, batch: Tensor, *, predicted: Tensor | None = None, chunk: int | None = None) -> Tensor:
        logits = self.head(model)(self.read(model, batch).last_hidden_state[:, -2])
        return (logits - F.one_hot(batch[:, -1], logits.shape[-1])).square().sum()


LAST = LastToken()


def slow_loss(model: Any, batches: list[Tensor]) -> Tensor:
    """The mean loss of `LastToken`, by the stock forward."""
    total = sum((model(ids).logits[:, -2] - F.one_hot(ids[:, -1], 97)).square().sum() for ids in batches)
    return total / sum(len(ids) for ids in batches)


def test_gradients_are_those_of_the_task(batches: list[Tensor]) -> None:
    """In whole passes, in a few layers at a time, sequence by sequence, and of what flows."""
    model = tiny_model()
    axes = families.axes(model)
    expected = slow_loss(model, batches)
    expected.backward()
    neurons = {
        f"layers.{i}.neurons": sum(
            (weight * weight.grad).detach().abs().sum(dim=dim)
            for weight, dim in ((layer.mlp.gate_proj.weight, 1), (layer.mlp.up_proj.weight, 1), (layer.mlp.down_proj.weight, 0))
        )
        for i, layer in enumerate(model.model.layers)
    }
    model.zero_grad()
    for beside in ([], [partial(curvature.kfac, task=LAST)], [partial(weights.taylor, form="second")]):
        metrics = [*beside, weights.taylor]
        found, loss = score(model, axes, batches, metrics=metrics, task=LAST, dtype="float32")
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, values in neurons.items():
            assert torch.allclose(found[name], values, rtol=1e-3, atol=1e-6), name


def test_curvature_counts_what_the_task_predicts(batches: list[Tensor]) -> None:
    """G is of the gradients of the sum: those of the mean times the number of predictions."""
    model = tiny_model()
    axes = [axis for axis in families.axes(model) if axis.kind == "neurons"]
    ours, _ = score(model, axes, batches, metrics=[partial(curvature.kfac, task=LAST)], task=LAST, dtype="float32")
    theirs, _ = score(model, axes, batches, metrics=[curvature.kfac], task=LAST, dtype="float32")
    for name in ours:
        assert torch.allclose(theirs[name], ours[name] * 11, rtol=1e-3), "of a sequence of 12 tokens 11 are predicted, or one"


def test_losses_are_those_of_the_task(batches: list[Tensor]) -> None:
    model = tiny_model()
    axes = families.axes(model)
    with torch.no_grad():
        assert mean_loss(model, batches, task=LAST, dtype="float32") == pytest.approx(float(slow_loss(model, batches)), rel=1e-5)
        depth = [axis for axis in axes if axis.name == "layers"]
        found = loss_drop(model, depth, batches, task=LAST, dtype="float32")["layers"]
        for index in range(3):
            gates = {"layers": (torch.arange(3) != index).float()}
            with gated(model, axes, gates):
                assert float(found[index]) == pytest.approx(float(slow_loss(model, batches)), rel=1e-4)
        assert float(objectives.lm(model, batches[0], task=LAST)) == pytest.approx(
            2 * float(slow_loss(model, batches[:1])), rel=1e-5
        )


def test_a_repair_reads_and_weighs_as_the_task_does(batches: list[Tensor]) -> None:
    """Factors lessen the task's own loss; every pass below the head goes through `read`."""
    reads: list[int] = []

    @dataclass(frozen=True)
    class Counted(LastToken):
        def read(self, model: Any, batch: Tensor, **asked: Any) -> Any:
            reads.append(batch.shape[0])
            return super().read(model, batch, **asked)

    model, task = tiny_model(), Counted()
    axes, mask = families.axes(model), half(families.axes(model))
    for repair in (least_squares, mean_bias):
        reads.clear()
        repair(model, axes, mask, batches, task=task, dtype="float32")
        assert reads == [2, 2, 2]
    reads.clear()
    sizes = {name: int(keep.sum()) for name, keep in mask.kept.items()}
    score_sequentially(model, axes, sizes, batches, metric=activations.wanda, known={}, task=task, dtype="float32")
    score(model, axes, batches, metrics=[block_influence], task=task, dtype="float32")
    assert reads == [2] * 6
    text = [torch.cat(batches * 4)]
    losses = rescale_blocks(model, axes, mask, text, steps=2, task=LAST, dtype="float32")
    assert losses[-1] < losses[0]
    held_out = [text[0][1::4]]
    with gated(model, axes, mask), torch.no_grad():
        assert float(slow_loss(model, held_out)) == pytest.approx(losses[-1], rel=1e-4)


def test_a_sweep_is_of_the_task(batches: list[Tensor]) -> None:
    model = tiny_model()
    expected = slow_loss(model, batches)
    sweep = Sweep(model, batches, task=LAST, dtype="float32")
    sweep.forward()
    assert float(sweep.loss(over=6)) / 6 == pytest.approx(float(expected.detach()), rel=1e-5)


def test_nobody_else_knows_what_is_learnt() -> None:
    """Neither head, labels nor the order of tokens are named in code of core, score, reduce and train, but where they are the matter."""
    known = {
        "core/model/task.py", "reduce/slice.py",  # these turn embeddings and head of a Llama
    }  # fmt: skip
    words = re.compile(r"lm_head|labels=|get_output_embeddings|get_input_embeddings|get_decoder\(\)\(|:-1\], \w+\[:, 1:\]")
    for room in ("core", "score", "reduce", "train"):
        for path in (SRC / room).rglob("*.py"):
            name = path.relative_to(SRC).as_posix()
            assert name in known or not words.search(path.read_text(encoding="utf-8")), name
    assert words.search((SRC / "core" / "model" / "task.py").read_text(encoding="utf-8"))


def test_the_causal_lm_predicts_all_but_the_first(batches: list[Tensor]) -> None:
    model = tiny_model()
    assert CAUSAL_LM.num_predicted(batches) == 3 * 2 * 11
    with torch.no_grad():
        total = float(CAUSAL_LM.loss(model, batches[0]))
        assert total / 22 == pytest.approx(float(model(batches[0], labels=batches[0]).loss), rel=1e-5)
        some = torch.zeros(2, 12, dtype=torch.bool)
        some[:, 3] = some[:, 0] = True
        logits = model(batches[0]).logits[:, 2]
        expected = F.cross_entropy(logits, batches[0][:, 3], reduction="sum")
        assert float(CAUSAL_LM.loss(model, batches[0], predicted=some)) == pytest.approx(float(expected), rel=1e-5)
