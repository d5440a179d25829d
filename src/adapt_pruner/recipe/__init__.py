"""Recipes: `schema.py` describes a run, `tables.py` its tables, `fitting.py` refuses keys that do not fit together, `parts.py` finds the parts that a recipe names.
`overrides.py` reads keys that a user sets as KEY=VALUE, `prune_recipe.py` makes the recipe of `prune`.

The methods of papers lie in `methods/`, whole runs in `recipes/`.
"""

from adapt_pruner.recipe import fitting, schema, tables
from adapt_pruner.recipe.fitting import *  # noqa: F403
from adapt_pruner.recipe.schema import *  # noqa: F403
from adapt_pruner.recipe.tables import *  # noqa: F403

__all__ = [*fitting.__all__, *schema.__all__, *tables.__all__]
