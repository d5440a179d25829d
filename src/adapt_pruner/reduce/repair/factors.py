"""Scale the output of each attention and each MLP by one factor, to minimise the loss.

Once units are removed, a block's output is partly wrong, and the rest of the model may do better with less of it. Least squares
looks at one layer at a time and cannot tell how much less. A model of L layers has only 2 L factors, so they can be fitted to
the loss itself without overfitting. The factors are multiplied into existing weights: no parameter is added.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.cut import first, gated, multiply, with_first
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.precision import linears_cast
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.memory import give_back
from adapt_pruner.score.calibrate import Evidence, mean_loss, score

DAMPING = 0.1
"""Share of the curvature's diagonal that is added to it; more if there are fewer pieces of text than factors."""

PIECE = 16
"""Tokens in a piece of text; the curvature is estimated from the spread of the derivatives over the pieces."""

MOST = 0.5
"""The most that a factor changes in a step, as a share of itself."""

_SHARES = (1.0, 0.5, 0.25)  # of a step, tried in turn until the loss falls
_FITTED, _HELD_OUT = (0, 2), (1, 4)  # number of the first sequence, and distance from one sequence to the next


@torch.no_grad()
def rescale_blocks(
    model: nn.Module,
    axes: Sequence[Axis],
    mask: Mask,
    batches: Sequence[Tensor],
    *,
    steps: int = 1,
    task: Task = CAUSAL_LM,
    dtype: str,
    warn: Callable[[str], None] = lambda message: None,
    tell: Callable[[float], None] = lambda share: None,
) -> list[float]:
    """Scale each block's output, in place, by a factor f, found by Gauss-Newton steps on the loss of the pruned model.

        f ← f (1 - δ),   δ = (F + λ diag F)⁻¹ ∂L/∂log f,   F = (Σ s sᵀ - (Σ s)(Σ s)ᵀ / P) / T,   λ = 0.1 · max(1, n / P)

    There are n factors, and T predicted tokens in P pieces of 16. L is the mean loss (of a causal LM in nats per token). s [n] is
    the derivative of the summed loss by log f, if f multiplies one piece only. F is the Fisher information, estimated by the
    spread of s around its mean, since the mean is no curvature. Pieces are short so that there are many per factor. With whole
    sequences there would be few, and steps from two halves of a text would have little in common. No factor changes by more than
    half of itself in a step.

    The factors are fitted to every second sequence. On other text, overfitting costs about n / 2T nats: 0.002 for 60 factors and
    12,000 tokens. A step is halved, at most twice, until the loss falls on half of the other sequences. If it does not fall, the
    step is dropped and no further step is taken.

    A factor is multiplied into the linear layer that ends the block, with its bias, or into the norm after it (Gemma).

    Args:
        model: causal LM; weights change.
        axes: its axes, `attentions` and `mlps` of each layer among them.
        mask: the cut that follows; blocks that it removes get no factor.
        batches: token ids, int64 [batch, length]; with fewer than two sequences nothing is done.
        steps: number of steps. Each takes a forward and backward pass over half of the text, and one to three forward passes
            over a quarter.
        task: what the model learns.
        dtype: precision of the matrix products.
        warn: told when there is too little text.
        tell: told the share of the work that is done.

    Returns:
        The mean loss on the held-out sequences before the first step and after each step that was kept, nats per token.

    Raises:
        RunError: the loss is not finite.

    Source: ours. Gauss-Newton with the empirical Fisher information, as in Amari's natural gradient. LayerScale
    (arXiv:2103.17239) has a factor per block, too, but trains it.
    """
    blocks = [axis for axis in axes if axis.modules and mask.renamed(axis.name) and bool(mask.of(axis).all())]
    fitted, held_out = _every(batches, *_FITTED), _every(batches, *_HELD_OUT)
    pieces, predicted = sum(len(batch) * -(-batch.shape[1] // PIECE) for batch in fitted), task.num_predicted(fitted)
    if not blocks:
        return []
    if not held_out or pieces < 2:
        warn(
            f"factors of blocks take 2 pieces of {PIECE} tokens to fit and 1 sequence to test, and the calibration text has "
            f"{pieces} and {sum(map(len, held_out))}; all factors stay 1; set calibration.samples higher"
        )
        return []
    if pieces < len(blocks):
        warn(
            f"{pieces} pieces of {PIECE} tokens, of every second sequence, are few for {len(blocks)} factors; their steps were damped "
            f"{len(blocks) / pieces:.1f} times as much; set calibration.samples higher"
        )
    factors = torch.ones(len(blocks), dtype=torch.float64)
    give_back()  # return memory that the phase before has freed, before all weights are copied
    with gated(model, axes, mask), _multiplied(model, blocks, factors), linears_cast(model, dtype):
        losses = [mean_loss(model, held_out, task=task, dtype=dtype)]
        for step in range(steps):

            def on_batch(done: int, of: int, step: int = step) -> None:
                tell((step + 0.75 * done / of) / steps)

            sums, _ = score(model, [], fitted, metrics=[_slopes(blocks)], task=task, dtype=dtype, on_batch=on_batch)
            change, now = _solved(sums["slopes"], sums["squares"], pieces=pieces, predicted=predicted), factors.clone()
            for share in _SHARES:
                factors.copy_(now * (1 - share * change))
                after = mean_loss(model, held_out, task=task, dtype=dtype)
                if after < losses[-1]:
                    losses.append(after)
                    break
            else:
                factors.copy_(now)
                break
            tell((step + 1) / steps)
    for axis, factor in zip(blocks, factors.tolist(), strict=True):
        scale_block(model, axes, axis, factor)
    return losses


def _every(batches: Sequence[Tensor], start: int, nth: int) -> list[Tensor]:
    """Sequence number `start` and every `nth` after it, grouped in the same batches."""
    chosen, before = [], 0
    for batch in batches:
        chosen.append(batch[(start - before) % nth :: nth])
        before += len(batch)
    return [rows for rows in chosen if len(rows)]


def _solved(slopes: Tensor, squares: Tensor, *, pieces: int, predicted: int) -> Tensor:
    """δ, float64 [n]: the share by which each factor falls; the arguments come from `_slopes`."""
    # The derivatives are those of the mean loss, 1 / T of those of the sum.
    curvature = (squares - slopes[:, None] * slopes / pieces) * predicted
    damping = DAMPING * max(1.0, len(slopes) / pieces)
    diagonal = curvature.diagonal()
    # a block that does nothing has neither slope nor curvature
    diagonal = damping * diagonal + torch.where(diagonal > 0, 0.0, 1.0)
    change = torch.linalg.solve(curvature + diagonal.diag(), slopes)
    shortened: Tensor = change * min(1.0, MOST / max(float(change.abs().max()), 1e-12))
    return shortened


def _slopes(blocks: Sequence[Axis]) -> Callable[[nn.Module, Sequence[Axis]], Generator[Evidence, Any, Scores]]:
    """A metric that returns the sums of the derivatives of the loss by log f, and of their products.

    `slopes` is Σ s, [n], and `squares` is Σ s sᵀ, [n, n], over all pieces of text. Here s is the derivative of the mean loss.
    """

    def look(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, Any, Scores]:
        seen: list[list[Tensor]] = [[] for _ in blocks]

        def watch(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                added = first(output)
                given = added.detach()

                def backward(gradient: Tensor) -> None:
                    per_token = (gradient.float() * given.float()).sum(dim=-1, dtype=torch.float64).cpu()
                    seen[number] += [piece.sum(dim=-1) for piece in per_token.split(PIECE, dim=-1)]

                if added.requires_grad:  # not where a pass only goes forwards
                    added.register_hook(backward)

            return hook

        ends = [model.get_submodule(axis.modules[-1]) for axis in blocks]
        with attached(end.register_forward_hook(watch(number)) for number, end in enumerate(ends)):
            yield Evidence.STREAM_GRADIENTS
        each = torch.stack([torch.cat([torch.zeros(0, dtype=torch.float64), *rows]) for rows in seen])  # [n, P]
        sums = {"slopes": each.sum(dim=1), "squares": each @ each.t()}
        world.sum_in_place(*sums.values())
        return sums

    return look


@contextmanager
def _multiplied(model: nn.Module, blocks: Sequence[Axis], factors: Tensor) -> Iterator[None]:
    """While the context lasts, multiply each block's output by its current entry of `factors`."""

    def hook(number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_first(output, first(output) * float(factors[number]))

    ends = [model.get_submodule(axis.modules[-1]) for axis in blocks]
    with attached(end.register_forward_hook(partial(hook, number)) for number, end in enumerate(ends)):
        yield


def scale_block(model: nn.Module, axes: Sequence[Axis], block: Axis, factor: float) -> None:
    """Multiply the output of an attention or MLP, in place: in the norm after it, or else in the linear layer that ends it."""
    last = block.modules[-1]
    linear = [axis.gate.module for axis in axes if block.name in axis.enclosing and axis.gate.is_linear]
    ends = linear[0] if linear and linear[0].startswith(f"{last}.") else last
    for name, _ in list(model.get_submodule(ends).named_parameters(prefix=ends)):
        multiply(model, name, factor, 1.0 if any(name in axis.one_more for axis in axes) else 0.0)


@torch.no_grad()
def scale_units(model: nn.Module, axis: Axis, factors: Tensor) -> None:
    """Multiply each unit of an axis inside a layer by its factor, in place: in the columns that read it at its gate.

    Args:
        model: its weights change.
        axis: neurons or heads.
        factors: float [entries].
    """
    weight = axis.gate.oriented(model.get_parameter(f"{axis.gate.module}.weight"))
    weight.mul_(factors.repeat_interleave(axis.gate.width).to(weight))
