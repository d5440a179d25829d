"""What each unit is worth by its weights, alone or with their gradients."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis, Scores
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.shelf import numbers_of
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.score.calibrate import Evidence

Rows = dict[tuple[str, int], Tensor]
"""(axis name, number of one of its slices) -> what each row (or column) of that matrix is worth, float32 [rows]."""

Worth = Callable[[nn.Parameter, str, slice], Tensor]
"""(parameter, its name, some of its rows) -> what each weight of these rows is worth, float32 of their shape."""

_CACHED = 1 << 17  # weights that are handled at a time; together with their gradients they fit the cache of a core


@part("metric", needs={"text"})
def taylor(
    model: nn.Module,
    axes: Sequence[Axis],
    *,
    form: Literal["element", "vector", "second", "mixed"] = "element",
    authors_fold: bool = False,
) -> Generator[Evidence, str | None, Scores]:
    """Taylor importance: how much the loss moves if a unit's weights go to zero, from its first or second derivative.

    L is the mean loss over the calibration text (of a causal LM in nats per token). g = dL/dw is summed over all batches first.
    In every coupled matrix a unit owns `width` rows (or columns) r; score[u] is the sum, over all of them, of

        element   Σ_{w ∈ r} |w · g|
        vector    | Σ_{w ∈ r} w · g |                  one absolute value per row or column, none across matrices
        second    Σ_{w ∈ r} w² · F
        mixed     Σ_{w ∈ r} |w · g - w² · F / 2|       the expansion of L at w = 0 to second order, with its signs

    F, the diagonal of the Fisher information, stands for the second derivative: F = N · Σ_n g_n² over the N sequences, with g_n
    what sequence n adds to g. If all sequences have the same length, F is the mean over them of the squared gradient of each
    sequence's own mean loss. A KV head is credited with the query heads that read it (head h belongs to KV head h // group).

    Args:
        model: causal LM. For `second` and `mixed` its weights, their gradients and as much again must fit in memory together, and
            the text runs one sequence at a time. For the other forms, only gradients of a few layers exist at once.
        axes: axes to score; those without slices (`layers`) are skipped.
        form: `element`, `vector`, `second` or `mixed`.
        authors_fold: for reproduction. Query head h is credited to KV head h mod num_kv_heads, as in the released code, although
            other query heads are removed with that KV head.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, non-negative. Comparable within an axis only.

    Raises:
        RuntimeError: a scored parameter got no gradient (named in the message).

    Source: LLM-Pruner, arXiv:2305.11627, the authors' `param_first`, `vectorize`, `param_second` and `param_mix`;
    Adapt-Pruner uses the first. Biases do not count. Differs: the fold, unless `authors_fold`.
    """
    squares: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def worth(parameter: nn.Parameter, name: str, some: slice) -> Tensor:
        if parameter.grad is None:
            raise RuntimeError(f"{name} got no gradient from the calibration text, so it cannot be scored")
        weight = parameter.detach()[some].float()
        if form == "second":
            return weight.square() * squares[name][some]
        terms = weight * parameter.grad[some].float()
        if form == "mixed":
            terms -= weight.square() * squares[name][some] / 2
        return terms if form == "vector" else terms.abs_()

    rows: Rows = {}
    of_samples = form in ("second", "mixed")
    with _squaring(model, axes, squares, seen) if of_samples else nullcontext():
        while (name := (yield Evidence.SAMPLE_GRADIENTS if of_samples else Evidence.GRADIENTS)) is not None:
            if name in squares:
                world.sum_in_place(squares[name], seen[name])
                squares[name].mul_(float(seen[name]))
            rows |= _rows(model, axes, worth, only=name)
            squares.pop(name, None)
    if form == "vector":
        rows = {key: sums.abs() for key, sums in rows.items()}
    return _summed(axes, rows, authors_fold=authors_fold)


@contextmanager
def _squaring(model: nn.Module, axes: Sequence[Axis], squares: dict[str, Tensor], seen: dict[str, Tensor]) -> Iterator[None]:
    """While the context lasts, sum g_n² over n for every matrix on an axis into `squares`, in float32, and count N in `seen`."""

    def hook(name: str, gradient: Tensor) -> None:
        squares[name].addcmul_(gradient.float(), gradient.float())
        seen[name] += 1

    parameters = {name: model.get_parameter(name) for axis in axes for name in (piece.parameter for piece in axis.slices)}
    matrices = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
    for name, parameter in matrices.items():
        squares[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        seen[name] = torch.zeros(())
    with attached(parameter.register_hook(partial(hook, name)) for name, parameter in matrices.items()):
        yield


@part("metric")
def magnitude(model: nn.Module, axes: Sequence[Axis], *, norm: Literal["l1", "l2"] = "l1") -> Generator[Evidence, None, Scores]:
    """Size of a unit's weights: the sum of |w| (norm=l1) or of w² (norm=l2) over its coupled matrices; no text needed.

    Args:
        norm: `l1` or `l2`.

    Returns:
        axis name -> float32 [axis.entries] on the CPU, non-negative.

    Source: the magnitude baselines of LLM-Pruner (arXiv:2305.11627), its options `l1` and `l2`.
    """
    yield Evidence.WEIGHTS

    def worth(parameter: nn.Parameter, name: str, some: slice) -> Tensor:
        weight = parameter.detach()[some].float()
        return weight.abs() if norm == "l1" else weight.square()

    return _summed(axes, _rows(model, axes, worth))


@part("metric")
def random(model: nn.Module, axes: Sequence[Axis], *, seed: int = 0) -> Generator[Evidence, None, Scores]:
    """Random numbers, uniform in [0, 1), from a seed; the control that every metric has to beat.

    Args:
        seed: of the generator; the same seed gives the same scores.

    Returns:
        axis name -> float32 [axis.entries] on the CPU.
    """
    yield Evidence.WEIGHTS
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.entries, generator=generator) for axis in axes if axis.slices}


def _rows(model: nn.Module, axes: Sequence[Axis], worth: Worth, *, only: str | None = None) -> Rows:
    """For each slice, the sum of `worth` over the weights of each row that its units own, [entries · width], on the CPU.

    Biases do not count.

    Args:
        only: the name of one parameter; None for all.
    """
    pieces = [piece for axis in axes for piece in axis.slices if only in (None, piece.parameter)]
    dims: dict[str, set[int]] = {}
    for piece in pieces:
        dims.setdefault(piece.parameter, set()).add(piece.dim)
    sums: dict[tuple[str, int], Tensor] = {}  # a matrix that several slices share is computed once
    for name, summed_over in dims.items():
        if (parameter := model.get_parameter(name)).dim() > 1:
            with numbers_of(parameter):
                found = _sums(parameter, summed_over, partial(worth, parameter, name))
            sums |= {(name, dim): values for dim, values in found.items()}
    return {
        (axis.name, number): sums[piece.parameter, piece.dim][piece.start : piece.start + axis.entries * piece.width]
        for axis in axes
        for number, piece in enumerate(axis.slices)
        if (piece.parameter, piece.dim) in sums
    }


def _sums(parameter: nn.Parameter, dims: Iterable[int], terms: Callable[[slice], Tensor]) -> dict[int, Tensor]:
    """Sums of a matrix's terms, on the CPU: of each row if `dims` has 0, of each column if it has 1.

    On a CPU the terms are computed for as many rows at a time as the cache holds, which is three times as fast.
    """
    length = parameter.shape[0]
    at_once = max(1, _CACHED // (parameter.numel() // length)) if parameter.device.type == "cpu" else length
    found: dict[int, list[Tensor]] = {dim: [] for dim in dims}
    for start in range(0, length, at_once):
        some = terms(slice(start, start + at_once))
        for dim, values in found.items():
            sums = some.sum(dim=[other for other in range(some.dim()) if other != dim])
            if dim == 0 or not values:
                values.append(sums)
            else:
                values[0] += sums
    return {dim: torch.cat(values).cpu() for dim, values in found.items()}


def _summed(axes: Sequence[Axis], rows: Rows, *, authors_fold: bool = False) -> Scores:
    """Axis name -> what each unit is worth: the sum over its rows (or columns) in all matrices."""
    scores: Scores = {}
    for axis in axes:
        narrowest = min((piece.width for piece in axis.slices), default=0)
        for number, piece in enumerate(axis.slices):
            if (axis.name, number) in rows:
                sums = rows[axis.name, number]
                if authors_fold:
                    units = sums.view(-1, len(sums) // piece.width, narrowest).sum(dim=(0, 2))
                else:
                    units = sums.view(-1, piece.width).sum(dim=1)
                scores[axis.name] = scores[axis.name] + units if axis.name in scores else units
    return scores
