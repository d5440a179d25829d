"""Sums of products of features over tokens. The matrix is symmetric, so only its lower triangle is added up: 0.6 times the operations."""

from torch import Tensor

PANEL = 256
"""Rows of the matrix that are added at a time, from the first column to the diagonal."""


def add_gram(total: Tensor, values: Tensor) -> None:
    """Add valuesᵀ · values, in place, to the lower triangle of `total`; call `complete` once all is added.

    Args:
        total: [features, features], zeros at first. Above the diagonal it holds nothing of use until `complete`.
        values: [tokens, features], of the same dtype.
    """
    for begin in range(0, len(total), PANEL):
        end = begin + PANEL
        total[begin:end, :end].addmm_(values[:, begin:end].t(), values[:, :end])


def complete(total: Tensor) -> Tensor:
    """Copy the lower triangle of `total` over its upper one, in place."""
    for begin in range(0, len(total), PANEL):
        end = begin + PANEL
        total[:begin, begin:end] = total[begin:end, :begin].t()
        square = total[begin:end, begin:end]
        square.copy_(square.tril() + square.tril(-1).t())
    return total
