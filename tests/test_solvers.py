"""Solvers of one linear layer against slow, independent ones, and what their patterns keep."""

import math

import pytest
import torch
from torch import Tensor

from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import holds
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.zeros.fista import fista, iterated, lipschitz
from adapt_pruner.reduce.zeros.solvers import Inputs, magnitude, sparsegpt, wanda

HALF, TWO_OF_FOUR = Pattern.parse("50%"), Pattern.parse("2:4")


def problem(outputs: int = 12, inputs: int = 16, tokens: int = 200, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs [inputs, tokens] that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator) @ torch.randn(inputs, tokens, generator=generator)
    scaled = mixed * torch.linspace(0.2, 3, inputs)[:, None]
    return torch.randn(outputs, inputs, generator=generator), scaled


def told(values: Tensor, dense: Tensor | None = None) -> Inputs:
    """What a solver is told of inputs Z, and of X where they differ."""
    others = () if dense is None else (dense @ values.t(), dense @ dense.t())
    return Inputs(values.double().square().sum(dim=1), values @ values.t(), *others)


def slow_wanda(weight: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Row by row, group by group, in Python."""
    result = weight.clone()
    size = pattern.m or weight.shape[1]
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            worth = {
                j: abs(float(weight[i, j])) * math.sqrt(sum(float(v) ** 2 for v in values[j])) for j in range(start, start + size)
            }
            for j in sorted(worth, key=worth.__getitem__)[: pattern.zeros_of(size)]:
                result[i, j] = 0.0
    return result


def slow_sparsegpt(weight: Tensor, values: Tensor, pattern: Pattern, *, block: int, damping: float = 0.01) -> Tensor:
    """One weight at a time, by optimal brain surgery: the inverse of the Hessian of the columns that are left is computed anew for each."""
    left = weight.double().clone()
    hessian = values.double() @ values.double().t()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    outputs, columns = left.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]  # of column j and those after it
    gone = torch.zeros(outputs, columns, dtype=torch.bool)

    def cheapest(rows: range, at: list[int], number: int) -> None:
        cost = {(i, j): float(left[i, j] ** 2 / inverses[j][0, 0]) for i in rows for j in at}
        for i, j in sorted(cost, key=cost.__getitem__)[:number]:
            gone[i, j] = True

    for j in range(columns):
        if pattern.m and j % pattern.m == 0:
            for i in range(outputs):
                cheapest(range(i, i + 1), list(range(j, j + pattern.m)), pattern.m - pattern.n)
        elif not pattern.m and j % block == 0:
            at = list(range(j, min(columns, j + block)))
            cheapest(range(outputs), at, outputs * pattern.zeros_of(columns) * len(at) // columns)
        for i in range(outputs):
            if gone[i, j]:
                left[i, j:] -= left[i, j] / inverses[j][0, 0] * inverses[j][0]
                left[i, j] = 0.0
    return left


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
def test_wanda_is_the_authors(pattern: Pattern) -> None:
    weight, values = problem()
    solved, keep = wanda(weight, pattern, told(values))
    assert torch.equal(solved, slow_wanda(weight, values, pattern))
    assert torch.equal(solved, weight * keep)
    assert (keep.sum(dim=1) == 8).all()


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern: Pattern, block: int) -> None:
    weight, values = problem()
    solved, keep = sparsegpt(weight, pattern, told(values), block=block)
    expected = slow_sparsegpt(weight, values, pattern, block=block)
    assert torch.equal(solved == 0, expected == 0)
    assert torch.allclose(solved.double(), expected, atol=1e-4)
    assert holds(keep, pattern)
    assert not solved[~keep].any()


def test_sparsegpt_takes_inputs_that_never_come_and_blocks_that_cut_groups() -> None:
    weight, values = problem()
    values[3] = 0
    values[8:] = values[:8]  # the Hessian is singular
    solved, keep = sparsegpt(weight, TWO_OF_FOUR, told(values), block=6)
    assert holds(keep, TWO_OF_FOUR)
    assert torch.isfinite(solved).all()
    assert not solved[:, 3].any()


def test_the_more_a_solver_looks_at_the_less_it_misses_and_fista_less_than_its_warm_start() -> None:
    weight, values = problem(outputs=48, inputs=64, tokens=400)
    for pattern in (HALF, TWO_OF_FOUR):
        inputs = told(values)
        errors = {solver: inputs.error(weight, solver(weight, pattern, inputs)[0]) for solver in (magnitude, wanda, sparsegpt)}
        assert list(errors.values()) == sorted(errors.values(), reverse=True)  # type: ignore[type-var]
        for start in errors:
            solved, keep = fista(weight, pattern, inputs, warm_start=start.__name__)
            never_worse = inputs.error(weight, solved) <= errors[start]  # type: ignore[operator]
            assert never_worse if start is sparsegpt else inputs.error(weight, solved) < 0.95 * errors[start]  # type: ignore[operator]
            assert holds(keep, pattern)
            assert not solved[~keep].any()


def test_fista_reaches_the_minimum_of_its_convex_problem() -> None:
    weight, values = problem(outputs=3, inputs=6, tokens=100)
    gram, penalty = values @ values.t(), 40.0
    solved = iterated(weight, gram, weight @ gram, penalty=penalty, bound=lipschitz(gram), steps=4000, tolerance=0.0)
    slope = (
        solved.double() - weight.double()
    ) @ gram.double()  # of the smooth part; -λ sign(w) where w is not zero, within ±λ where it is
    there = solved != 0
    assert 0 < int(there.sum()) < there.numel()
    assert torch.allclose(slope[there], -penalty * solved[there].sign().double(), atol=0.05)
    assert (slope[~there].abs() <= penalty + 0.05).all()
    assert lipschitz(gram) >= float(torch.linalg.eigvalsh(gram.double()).max())


def test_fista_makes_up_for_inputs_that_have_changed() -> None:
    weight, dense = problem(outputs=24, inputs=32, tokens=300)
    values = dense + 0.3 * dense.roll(1, 0)
    both, of_sparse = told(values, dense), told(values)
    with_it, without = fista(weight, HALF, both)[0], fista(weight, HALF, of_sparse)[0]
    exact = (with_it @ values - weight @ dense).square().sum() / (weight @ dense).square().sum()
    assert both.error(weight, with_it) == pytest.approx(float(exact), rel=1e-3)
    assert both.error(weight, with_it) < both.error(weight, without)  # type: ignore[operator]


def test_fista_takes_a_layer_that_nothing_enters() -> None:
    weight, values = problem()
    solved, keep = fista(weight, HALF, told(values * 0))
    assert holds(keep, HALF)
    assert torch.isfinite(solved).all()


def test_every_solver_says_what_it_needs() -> None:
    needs = {name: set(parts.needs("solver", name)) for name in parts.names("solver")}
    assert needs == {
        "solvers.magnitude": set(), "solvers.wanda": {"text"}, "solvers.sparsegpt": {"text", "gram"},
        "fista.fista": {"text", "gram", "dense"},
    }  # fmt: skip
