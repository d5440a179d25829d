"""The recipe that `adapt-pruner prune` and `adapt_pruner.prune` carry out: one model, one size and no training."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapt_pruner.errors import UsageError
from adapt_pruner.recipe.overrides import refuse_set_twice
from adapt_pruner.recipe.schema import Recipe, read

__all__ = ["to_prune"]


def to_prune(asked: Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that prunes a model once and does not train.

    Args:
        asked: dotted key of a recipe -> value; None if the user set none but the default.
        overrides: further keys as `KEY=VALUE`, as `recipe.read` takes them.

    Raises:
        UsageError: no size to reach is named, or two are; a key is set twice or has no effect; or the recipe trains.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    if "budget" in given and "latency" in given:
        raise UsageError(
            f"--params {given['budget']} and --latency {given['latency']} both say how far to prune; leave one of them out"
        )
    refuse_set_twice(given, overrides)
    recipe = read({}, values=given, overrides=overrides)
    if recipe.makes_zeros and not recipe.sparsity:
        raise UsageError(f"method {recipe.method!r} makes weights zero; say how many: add --sparsity 50% or --sparsity 2:4")
    if not (recipe.makes_zeros or recipe.budget or recipe.latency):
        raise UsageError("prune needs a size or a speed to reach; add --params 80% or --latency 0.7x")
    recipe = recipe.ready()
    if recipe.training.tokens:
        raise UsageError("prune does not train; write the training into a recipe and use: adapt-pruner run RECIPE.yaml")
    return recipe
