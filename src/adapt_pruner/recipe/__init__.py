"""Recipes: `schema.py` describes a run, `parts.py` finds the parts that a recipe names.

The methods of papers lie in `methods/`, whole runs in `recipes/`.
"""

from adapt_pruner.recipe import schema
from adapt_pruner.recipe.schema import *  # noqa: F403

__all__ = schema.__all__
