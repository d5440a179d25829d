"""Recipes: `schema.py` describes a run, `parts.py` finds the parts that a recipe names.

The methods of papers lie in `methods/`, whole runs in `recipes/`.
"""

from adapt_pruner.recipe.schema import (
    PAPERS,
    WHOLE,
    Calibration,
    Evaluation,
    Lora,
    Recipe,
    Source,
    Training,
    Vocabulary,
    builtin,
    differing,
    in_todays_keys,
    methods,
    parse_latency,
    read,
)

__all__ = [
    "PAPERS",
    "WHOLE",
    "Calibration",
    "Evaluation",
    "Lora",
    "Recipe",
    "Source",
    "Training",
    "Vocabulary",
    "builtin",
    "differing",
    "in_todays_keys",
    "methods",
    "parse_latency",
    "read",
]
