"""What a run is: `schema.py` the validated description, `parts.py` the parts that it names, rows in `methods/`, whole runs in `recipes/`."""

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
