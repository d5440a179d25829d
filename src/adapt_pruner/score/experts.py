"""What each expert is worth by the tokens that its router sends to it."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.score.calibrate import Evidence


@part("metric", needs={"text", "experts"})
def reap(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """How much an expert adds where it is chosen: the mean of the router's weight times the norm of what the expert gives (REAP).

        score[j] = 1 / |X_j| · Σ_{x ∈ X_j} g_j(x) · ‖f_j(x)‖₂

    X_j are the calibration tokens for which the router chooses expert j, f_j is what the expert gives, and g_j the weight with which
    it enters the sum of its layer, after the router's normalisation. An expert that is never chosen scores 0.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, non-negative. Comparable within a layer.

    Source: REAP, arXiv:2510.13999. Differs: what single experts give is computed a second time, since stock code adds them up.
    """
    with _watching(model, axes, outputs=True) as seen:
        yield Evidence.FORWARD
    return {name: (sums.worth / sums.tokens.clamp_min(1)).float().cpu() for name, sums in _over_processes(seen).items()}


@part("metric", needs={"text", "experts"})
def frequency(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """How often an expert is chosen: the share of the calibration tokens that the router sends to it; a control of reap.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, from 0 to 1. The shares of a layer add up to the experts of a token.

    Source: a baseline of REAP, arXiv:2510.13999.
    """
    shares = yield from usage(model, axes)
    return {axis.name: shares[used(axis)] for axis in axes if axis.gate.kind == "routed"}


def usage(model: nn.Module, axes: Sequence[Axis]) -> Generator[Evidence, None, Scores]:
    """What `frequency` counts, under the name `used(axis)`, so that it can be told beside the scores of any metric."""
    with _watching(model, axes, outputs=False) as seen:
        yield Evidence.FORWARD
    shares = {name: (sums.tokens / sums.of.clamp_min(1)).float().cpu() for name, sums in _over_processes(seen).items()}
    return {used(axis): shares[axis.name] for axis in axes if axis.name in shares}


def used(axis: Axis) -> str:
    """The name under which `usage` tells how often the experts of an axis are chosen."""
    return f"{axis.name}.used"


@dataclass
class _Sums:
    """Of the experts of a layer: tokens that were sent to each, tokens in all, and the sum of weight times norm; float64."""

    tokens: Tensor
    of: Tensor
    worth: Tensor


def _over_processes(seen: dict[str, _Sums]) -> dict[str, _Sums]:
    world.sum_in_place(*(tensor for sums in seen.values() for tensor in (sums.tokens, sums.of, sums.worth)))
    return seen


@contextmanager
def _watching(model: nn.Module, axes: Sequence[Axis], *, outputs: bool) -> Iterator[dict[str, _Sums]]:
    """While the context lasts, sum up what goes through experts: axis name -> sums; `worth` only with `outputs`."""
    axes = [axis for axis in axes if axis.gate.kind == "routed"]
    seen = {}

    def watch(axis: Axis) -> Any:
        experts: Any = model.get_submodule(axis.slices[0].parameter.rpartition(".")[0])
        where = {"dtype": torch.float64, "device": next(experts.parameters()).device}
        sums = seen[axis.name] = _Sums(
            torch.zeros(axis.entries, **where), torch.zeros((), **where), torch.zeros(axis.entries, **where)
        )

        @torch.no_grad()
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering, *routing = (*args, *kwargs.values())
            chosen, weights = sorted(routing[:2], key=Tensor.is_floating_point)
            sums.of += len(entering)
            sums.tokens += torch.bincount(chosen.flatten(), minlength=axis.entries)
            for slot in range(chosen.shape[1] if outputs else 0):  # one expert of each token at a time, each with weight 1
                of_slot = chosen[:, slot : slot + 1]
                given = experts.forward(entering, of_slot, torch.ones_like(weights[:, slot : slot + 1]))
                sums.worth.index_add_(0, of_slot[:, 0], (weights[:, slot] * given.float().norm(dim=-1)).double())

        return experts.register_forward_hook(look, with_kwargs=True)

    with attached(watch(axis) for axis in axes):
        yield seen
