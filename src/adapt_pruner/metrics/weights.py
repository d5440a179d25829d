"""What each unit is worth by its weights, alone or with their gradients."""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn

from adapt_pruner.core.axes import Axis, Scores, Slice
from adapt_pruner.core.calibrate import Evidence
from adapt_pruner.errors import UsageError

__all__ = ["magnitude", "random", "taylor"]


def taylor(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """First-order Taylor importance: how much the loss moves if a unit's weights go to zero.

    score[u] = sum over the weights w of unit u of |w · dL/dw|, with L the mean next-token cross-entropy over the
    calibration text (nats per token); the gradient is summed over all batches before the absolute value is taken.
    A KV head is credited with the query heads that read it (head h belongs to KV head h // group).

    Args:
        model: causal LM; weights and the gradients of its decoder layers must fit in memory together.
        axes: axes to score; those without slices (`layers`) are skipped.

    Returns:
        axis name -> float32 [axis.size] on the CPU, non-negative. Comparable within an axis only.

    Raises:
        RuntimeError: a scored parameter got no gradient (named in the message).

    Source: LLM-Pruner, arXiv:2305.11627, the authors' `param_first`, as Adapt-Pruner uses it; biases do not count.
    Differs: the released code of both credits query head h to KV head h mod num_kv_heads.
    """
    yield Evidence.GRADIENTS

    def saliency(parameter: nn.Parameter, name: str) -> Tensor:
        if parameter.grad is None:
            raise RuntimeError(f"{name} got no gradient from the calibration text, so it cannot be scored")
        return (parameter.detach().float() * parameter.grad.float()).abs()

    return _summed(model, axes, saliency)


def magnitude(model: nn.Module, axes: Sequence[Axis], *, norm: str = "l1") -> Generator[Evidence, None, Scores]:
    """Size of a unit's weights: the sum of |w| (norm=l1) or of w² (norm=l2) over its coupled matrices; no text needed.

    Args:
        norm: `l1` or `l2`.

    Returns:
        axis name -> float32 [axis.size] on the CPU, non-negative.

    Raises:
        UsageError: another norm.

    Source: the magnitude baselines of LLM-Pruner (arXiv:2305.11627), its options `l1` and `l2`.
    """
    if norm not in ("l1", "l2"):
        raise UsageError(f"magnitude norm {norm!r} is not known; known: l1, l2")
    yield Evidence.WEIGHTS

    def saliency(parameter: nn.Parameter, _: str) -> Tensor:
        weight = parameter.detach().float()
        return weight.abs() if norm == "l1" else weight.square()

    return _summed(model, axes, saliency)


def random(model: nn.Module, axes: Sequence[Axis], *, seed: int = 0) -> Generator[Evidence, None, Scores]:
    """Chance: uniform numbers in [0, 1) from a seed; the control that every metric has to beat.

    Args:
        seed: of the generator; the same seed gives the same scores.

    Returns:
        axis name -> float32 [axis.size] on the CPU.
    """
    yield Evidence.WEIGHTS
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator) for axis in axes if axis.slices}


def _summed(model: nn.Module, axes: Sequence[Axis], saliency: Callable[[nn.Parameter, str], Tensor]) -> Scores:
    """Each unit's saliency summed over the matrices it owns rows or columns of."""
    scores: Scores = {}
    for axis in axes:
        if not axis.slices:
            continue
        score = torch.zeros(axis.size)
        for piece in axis.slices:
            parameter = model.get_parameter(piece.parameter)
            if parameter.dim() > 1:
                score += _per_unit(saliency(parameter, piece.parameter), piece).cpu()
        scores[axis.name] = score
    return scores


def _per_unit(saliency: Tensor, piece: Slice) -> Tensor:
    others = [dim for dim in range(saliency.dim()) if dim != piece.dim]
    return saliency.sum(dim=others).view(-1, piece.width).sum(dim=1)
