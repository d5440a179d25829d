"""`reduce: nothing`: leave the model as it is, for a recipe that only grows or trains it."""

from collections.abc import Iterator

from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.work import Change, Reduction, Work


@part("reduce")
class Nothing(Reduction):
    """Remove nothing; the recipe grows the model (`grow`), trains it, or both."""

    def check(self, work: Work) -> None:
        """Refuse a recipe by which nothing would change."""
        if work.recipe.grow is None and not work.recipe.training.tokens and work.recipe.vocabulary is None:
            raise UsageError(
                "reduce nothing removes nothing, and the recipe neither grows nor trains the model; set grow, for example --set grow.experts=4"
            )

    def floor(self, work: Work) -> tuple[int, str]:
        """All parameters."""
        return work.num_params, "reduce nothing removes nothing"

    def steps(self, work: Work, target: int) -> Iterator[Change]:
        """Yield no step."""
        yield from ()
