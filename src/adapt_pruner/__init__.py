"""Small language models out of larger ones: adaptive structured pruning, with training in between.

The names below are imported when they are first used, so that `import adapt_pruner` loads neither torch nor transformers.
Two of them, `run` and `score`, are also folders of the package: `adapt_pruner.run` is the function, and what lies in the folder is
imported with `from adapt_pruner.run import loop`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapt_pruner.checkpoint.load import Loaded, load
    from adapt_pruner.checkpoint.save import save
    from adapt_pruner.core.axes import Axis, Gate, Mask, Scores, Slice
    from adapt_pruner.core.budget import Budget, count_parameters
    from adapt_pruner.core.surgery import cut, gated
    from adapt_pruner.errors import RunError, UsageError
    from adapt_pruner.evaluate.perplexity import perplexity
    from adapt_pruner.families import axes
    from adapt_pruner.recipe import Recipe
    from adapt_pruner.report.documented import prune, run
    from adapt_pruner.run.forecast import dry_run
    from adapt_pruner.score.calibrate import score

_HOMES = {
    "Axis": "core.axes",
    "Budget": "core.budget",
    "Gate": "core.axes",
    "Loaded": "checkpoint.load",
    "Mask": "core.axes",
    "Recipe": "recipe",
    "RunError": "errors",
    "Scores": "core.axes",
    "Slice": "core.axes",
    "UsageError": "errors",
    "axes": "families",
    "count_parameters": "core.budget",
    "cut": "core.surgery",
    "gated": "core.surgery",
    "dry_run": "run.forecast",
    "load": "checkpoint.load",
    "perplexity": "evaluate.perplexity",
    "prune": "report.documented",
    "run": "report.documented",
    "save": "checkpoint.save",
    "score": "score.calibrate",
}

__all__ = [
    "Axis",
    "Budget",
    "Gate",
    "Loaded",
    "Mask",
    "Recipe",
    "RunError",
    "Scores",
    "Slice",
    "UsageError",
    "axes",
    "count_parameters",
    "cut",
    "dry_run",
    "gated",
    "load",
    "perplexity",
    "prune",
    "run",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapt_pruner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adapt_pruner.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Python binds a folder's name here once something in it is imported; the public function of that name stays what it is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
