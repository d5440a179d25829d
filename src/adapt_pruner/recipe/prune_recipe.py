"""The recipe that `adapt-pruner prune` and `adapt_pruner.prune` carry out: one model, one size and no training."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapt_pruner.errors import UsageError, option
from adapt_pruner.recipe.overrides import refuse_set_twice
from adapt_pruner.recipe.schema import Recipe, read

__all__ = ["to_prune"]


def to_prune(options: Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that prunes a model once and does not train.

    Args:
        options: dotted key of a recipe -> value; None if the user did not set it.
        overrides: further keys as `KEY=VALUE`, as `recipe.read` takes them.

    Raises:
        UsageError: no size to reach is named, or two are; a key is set twice or has no effect; or the recipe trains.
    """
    values = {key: value for key, value in options.items() if value is not None}
    if "budget" in values and "latency" in values:
        raise UsageError(
            f"{option('params', values['budget'])} and {option('latency', values['latency'])} both say how far to prune; leave one of them "
            "out"
        )
    refuse_set_twice(values, overrides)
    recipe = read({}, values=values, overrides=overrides)
    if recipe.makes_zeros and not recipe.sparsity:
        raise UsageError(
            f"method {recipe.method!r} makes weights zero; say how many: add {option('sparsity', '50%')} or {option('sparsity', '2:4')}"
        )
    if not (recipe.makes_zeros or recipe.budget or recipe.latency):
        raise UsageError(f"prune needs a size or a speed to reach; add {option('params', '80%')} or {option('latency', '0.7x')}")
    recipe = recipe.ready()
    if recipe.training.tokens:
        raise UsageError("prune does not train; write the training into a recipe and use: adapt-pruner run RECIPE.yaml")
    return recipe
