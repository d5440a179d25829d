"""Solvers of `reduce: sparse`: each chooses the weights of one linear layer that become zero, and sets the weights that stay.

Symbols: W the weight, [outputs, inputs]; Z the layer's inputs at all calibration tokens, [inputs, tokens], when earlier layers
are sparse already; X the same in the dense model. A solver is a function (W, pattern, inputs) -> (W', mask) and says what it
needs:

    text     ‖Z_j‖² of each input j
    gram     also Z Zᵀ
    dense    each decoder layer reads the output of the dense layers before it, unless `reads` says otherwise; within a decoder
             layer also X Zᵀ and X Xᵀ
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import largest
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import RunError


@dataclass(frozen=True)
class Inputs:
    """What a solver is told about the inputs of a linear layer.

    Attributes:
        squares: ‖Z_j‖², float64 [inputs].
        gram: Z Zᵀ, float32 [inputs, inputs]; None where no solver needs it.
        cross: X Zᵀ; None where X is Z.
        dense: X Xᵀ; None where X is Z.
    """

    squares: Tensor
    gram: Tensor | None = None
    cross: Tensor | None = None
    dense: Tensor | None = None

    def error(self, weight: Tensor, solved: Tensor) -> float | None:
        """‖W' Z - W X‖² / ‖W X‖²; None without `gram`."""
        if self.gram is None:
            return None
        whole = quadratic(weight, self.gram if self.dense is None else self.dense)
        if self.cross is None:
            missed = quadratic(solved - weight, self.gram)
        else:
            missed = float((solved * (solved @ self.gram - 2 * (weight @ self.cross))).sum(dtype=torch.float64)) + whole
        return max(0.0, missed) / whole if whole > 0 else 0.0


def quadratic(weight: Tensor, gram: Tensor) -> float:
    """tr(W G Wᵀ)."""
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))


@part("solver")
def magnitude(weight: Tensor, pattern: Pattern, inputs: Inputs | None = None) -> tuple[Tensor, Tensor]:
    """The smallest |W_ij| of the matrix, or of each group, become zero; the others stay as they are.

    Args:
        weight: float32 [outputs, inputs].
        pattern: how many become zero.
        inputs: not read.

    Returns:
        The new weight, and which of its entries stay, bool.
    """
    keep = largest(weight.abs(), pattern)
    return weight * keep, keep


@part("solver", needs={"text"})
def wanda(weight: Tensor, pattern: Pattern, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The smallest |W_ij| · ‖Z_j‖ of each output, or of each group, become zero; the others stay as they are.

    Args:
        weight: float32 [outputs, inputs].
        pattern: how many become zero, the same number in each output.
        inputs: of the layer.

    Returns:
        The new weight, and which of its entries stay, bool.

    Source: Wanda, arXiv:2306.11695, and its released code.
    """
    keep = largest(weight.abs() * inputs.squares.sqrt().to(weight.dtype), pattern, per_row=True)
    return weight * keep, keep


@part("solver", needs={"text", "gram"})
def sparsegpt(
    weight: Tensor,
    pattern: Pattern,
    inputs: Inputs,
    *,
    block: Annotated[int, "1 or more"] = 128,
    damping: Annotated[float, "above 0"] = 0.01,
) -> tuple[Tensor, Tensor]:
    """Column by column, the smallest W_ij² / U_jj² become zero, and the later columns make up for them (SparseGPT).

    H = Z Zᵀ + damping · mean diagonal · I, and H⁻¹ = Uᵀ U with U upper triangular. Once column j is done, with error
    e = (W_j - W'_j) / U_jj, each later column k becomes W_k - e U_jk. An unstructured pattern chooses its zeros for one block of
    columns at a time, over all outputs together. N:M chooses them for each group, when its first column is reached.

    Args:
        weight: float32 [outputs, inputs].
        pattern: how many become zero.
        inputs: of the layer.
        block: columns of a block; rounded up to whole groups.
        damping: of H, as in the formula. It is multiplied by ten until H has a Cholesky factor.

    Returns:
        The new weight, and which of its entries stay, bool.

    Raises:
        RunError: what enters the layer is not finite.

    Source: SparseGPT, arXiv:2301.00774, and its released code. Differs: the factor is computed in float64. With an unstructured
    pattern the blocks get exactly as many zeros as their total asks for; the authors' threshold also zeroes weights equal to it.
    """
    assert inputs.gram is not None
    left, outputs = weight.clone(), weight.shape[0]
    columns = weight.shape[1]
    upper, dead = _factor(inputs.gram, damping)
    left[:, dead] = 0  # the inputs of these weights are always zero
    upper, scale = upper.to(left.dtype), upper.diagonal().to(left.dtype)
    keep = torch.ones_like(left, dtype=torch.bool)
    size = -(-block // pattern.m) * pattern.m if pattern.m else block
    for start in range(0, columns, size):
        end = min(columns, start + size)
        errors = left.new_zeros(outputs, end - start)
        if not pattern.m:
            worth = (left[:, start:end] / scale[start:end]).square()
            due = outputs * pattern.zeros_of(columns)
            num_zeros = due * end // columns - due * start // columns
            lowest = worth.flatten().argsort(stable=True)[:num_zeros]
            chosen = torch.ones(worth.numel(), dtype=torch.bool, device=worth.device)
            chosen[lowest] = False
            keep[:, start:end] = chosen.view_as(worth)
        for j in range(start, end):
            if pattern.m and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                keep[:, group] = largest((left[:, group] / scale[group]).square(), pattern)
            before = left[:, j].clone()
            left[:, j] *= keep[:, j]
            errors[:, j - start] = (before - left[:, j]) / scale[j]
            left[:, j + 1 : end] -= errors[:, j - start, None] * upper[j, j + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]
    return left, keep


def _factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U of H⁻¹ = Uᵀ U, float64, and which inputs are always zero."""
    hessian = gram.double()
    if not bool(torch.isfinite(hessian).all()):
        raise RunError(
            "what enters a layer on the calibration text is not finite; the model's weights are damaged: get the files again"
        )
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.double())
    mean = float(hessian.diagonal().mean())
    while True:
        lower, failed = torch.linalg.cholesky_ex(
            hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        )
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper, dead
        damping *= 10
