"""FISTAPruner's solver: each linear layer is a convex problem, whose solution is rounded to the pattern.

    min over W'   1/2 ‖W' Z - W X‖² + λ ‖W'‖₁

FISTA solves it for one λ. The share of the error that comes from rounding decides whether the next λ is higher or lower.
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import largest
from adapt_pruner.core.system.parts import part
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.zeros.solvers import Inputs, quadratic

_LOWEST = 1e-6  # smallest λ tried, as a share of the λ at which all weights are zero


@part("solver", needs={"text", "gram", "dense"})
def fista(
    weight: Tensor,
    pattern: Pattern,
    inputs: Inputs,
    *,
    warm_start: str = "wanda",
    reads: Literal["corrected", "dense", "sparse"] = "corrected",
    rounds: Annotated[int, "1 or more"] = 5,
    steps: Annotated[int, "1 or more"] = 12,
    tolerance: Annotated[float, "0 or more"] = 1e-4,
    rounding: Annotated[float, "0 to 1"] = 0.3,
) -> tuple[Tensor, Tensor]:
    """Minimise 1/2 ‖W' Z - W X‖² + λ ‖W'‖₁ by FISTA and round to the pattern, for a λ found by bisection (FISTAPruner).

    A round takes up to `steps` steps of FISTA from the best weight so far, then rounds: the largest |W'_ij| of the matrix, or of
    each group, stay. E = ‖round(W') Z - W X‖ is the error after rounding, and R = ‖(W' - round(W')) Z‖ is what rounding changes.
    λ rises if R > `rounding` · E, and falls otherwise. The bisection is of log λ between 10⁻⁶ and 1 times max |W X Zᵀ|, above
    which all weights are zero. The result is the rounded weight with the least error; the warm start is a candidate, too.

    Args:
        weight: float32 [outputs, inputs].
        pattern: how many become zero.
        inputs: of the layer.
        warm_start: the solver whose result is the first weight: wanda, sparsegpt or magnitude.
        reads: what the linear layers of a decoder layer read. `corrected`, the paper's: the output of the dense layers before it,
            and each linear layer makes up for the changes of those before it in the same decoder layer. `dense`: without that,
            Z is X. `sparse`: the output of the sparse layers before it, as SparseGPT does; X is Z there.
        rounds: number of values of λ to try.
        steps: most steps of FISTA in a round.
        tolerance: a round ends when a step changes the weight by less than this share of its norm.
        rounding: ξ, the highest share of the error that may come from rounding.

    Returns:
        The new weight, and which of its entries stay, bool.

    Source: FISTAPruner, arXiv:2408.03728; ξ = 0.3 and the warm start from Wanda are the paper's for LLaMA. There is no official
    code: the range of λ, the numbers of rounds and steps, the tolerance and `reads=sparse` are ours.
    """
    assert inputs.gram is not None
    best, keep = parts.bind("solver", warm_start)(weight, pattern, inputs)
    gram = inputs.gram
    wanted = weight @ (gram if inputs.cross is None else inputs.cross)  # W X Zᵀ
    whole = quadratic(weight, gram if inputs.dense is None else inputs.dense)

    def error(solved: Tensor) -> float:
        """‖W' Z - W X‖²."""
        return max(0.0, float((solved * (solved @ gram - 2 * wanted)).sum(dtype=torch.float64)) + whole)

    least, bound = error(best), lipschitz(gram)
    high = float(wanted.abs().max())
    if bound <= 0 or high <= 0 or least == 0:  # the layer's inputs are all zero, or the warm start has no error
        return best, keep
    low, high = math.log(high * _LOWEST), math.log(high)
    for _ in range(rounds):
        middle = (low + high) / 2
        solved = iterated(best, gram, wanted, penalty=math.exp(middle), bound=bound, steps=steps, tolerance=tolerance)
        stays = largest(solved.abs(), pattern)
        rounded = solved * stays
        missed, changed = error(rounded), max(0.0, quadratic(solved - rounded, gram))
        if missed < least:
            best, keep, least = rounded, stays, missed
        if changed > rounding**2 * missed:
            low = middle
        else:
            high = middle
    return best, keep


def iterated(
    start: Tensor, gram: Tensor, wanted: Tensor, *, penalty: float, bound: float, steps: int, tolerance: float
) -> Tensor:
    """FISTA: up to `steps` steps of 1 / L from `start`, with t' = (1 + √(1 + 4 t²)) / 2, on 1/2 ‖W' Z - W X‖² + λ ‖W'‖₁.

    Args:
        start: float32 [outputs, inputs].
        gram: Z Zᵀ.
        wanted: W X Zᵀ.
        penalty: λ.
        bound: L, at least the largest eigenvalue of `gram`.
        steps: most steps.
        tolerance: see `fista`.
    """
    now = ahead = start
    t = 1.0
    for _ in range(steps):
        moved = ahead - (ahead @ gram - wanted) / bound
        after = torch.nn.functional.softshrink(moved, penalty / bound)
        t_after = (1 + math.sqrt(1 + 4 * t * t)) / 2
        change = after - now
        ahead = after + (t - 1) / t_after * change
        now, t = after, t_after
        if float(change.norm()) <= tolerance * float(now.norm()):
            break
    return now


def lipschitz(gram: Tensor) -> float:
    """The largest eigenvalue of a Gram matrix, by power iteration from its diagonal, and 1 % more to be on the safe side."""
    vector = gram.diagonal().double() + 1e-30
    matrix, largest_so_far = gram.double(), 0.0
    for _ in range(200):
        vector = vector / vector.norm()
        vector = matrix @ vector
        value = float(vector.norm())
        if abs(value - largest_so_far) <= 1e-5 * value:
            return 1.01 * value
        largest_so_far = value
    return 1.01 * largest_so_far
