"""`@part` declares that recipes may name a function or class, and what it needs; `recipe.parts` finds parts by this decorator."""

from collections.abc import Callable
from typing import Any, TypeVar

CHOICE = frozenset({
    "axes", "metric", "distance", "head_metric", "chooser", "repair", "multiple_of", "equal_widths", "step", "debt", "sequential_scoring",
})  # fmt: skip
"""Keys of a recipe that a reduction with the need `chosen` reads, unless it says which of them."""

NEEDS = frozenset({
    "distance", "layers", "whole", "biases", "teacher", "text", "inputs", "chosen", "sparsity", "gram", "dense", "training",
    "one stage", "all its time", "structures",
})  # fmt: skip
"""What a part may need; `part` says what each means."""

T = TypeVar("T", bound=Callable[..., Any])


def part(
    *keys: str, needs: frozenset[str] | set[str] = frozenset(), reads: frozenset[str] | set[str] | None = None
) -> Callable[[T], T]:
    """Declare a function or class to be a part for these keys of a recipe; it is returned unchanged.

    There is no registry. `recipe.parts` reads the decorator in the source files of a folder without importing them. So all that it
    is given must be plain literals.

    Args:
        keys: keys of a recipe: `metric`, `distance`, `head_metric`, `chooser`, `repair`, `reduce`, `objective`, `schedule`,
            `feed`, `task`; `proposal` of `reduce: search`; `solver` of `reduce: sparse`.
        needs: what the part cannot work without. A recipe that lacks it is refused or given it before any work is done:

            distance   scores of whole layers, so the recipe names a distance (choosers)
            layers     every axis that may shrink lies in a layer (choosers)
            whole      an axis of whole layers, attentions or MLPs (choosers that drop these)
            structures a step that counts heads and channels, not their parameters (choosers)
            biases     a bias on each linear layer at a gate; those added count as parameters (repairs)
            teacher    a second model, handed in as `teacher` (objectives)
            text       calibration text (metrics, reductions)
            inputs     every axis that may shrink lies at the input of a linear layer (metrics)
            chosen     the recipe's axes, metric, chooser, repair and widths; a reduction without this need uses none of them
            sparsity   the recipe's sparsity instead of a budget (reductions)
            gram       sums of products of a layer's inputs (solvers, repairs)
            dense      the same sums of the dense model, beside those of the sparse one (solvers)
            training   training text, since the reduction trains the model while it removes (reductions)
            one stage  a run of one stage, because the reduction cannot continue from its own result (reductions)
            all its time   no `minutes`, because the reduction may take hours and cannot end early (reductions)
        reads: of a reduction, which keys of `CHOICE` it reads, and further `solver` and `calibration`; by default all of `CHOICE`
            if it needs `chosen`, else none. A key that somebody sets and no part reads is refused. The keys `step`, `amplitude`,
            `training.warmup`, `training.decay` and `training.floor` are read by the chooser or the schedule with such an argument.
    """
    return lambda function: function
