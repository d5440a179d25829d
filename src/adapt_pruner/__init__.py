"""Small language models out of larger ones: adaptive structured pruning, with training in between.

    import adapt_pruner as ap

    small = ap.prune("smollm2-135m-instruct", params="80%", text="my.txt", progress=True)

The names below are imported at first use, so `import adapt_pruner` loads neither torch nor transformers. Some names, such as
`run` and `export`, are also folders of the package. `adapt_pruner.run` is the function; import from the folder with
`from adapt_pruner.run import loop`.
"""

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapt_pruner.api.exporting import export
    from adapt_pruner.api.measuring import Comparison, Evaluation, Verification, chat, compare, evaluate, verify
    from adapt_pruner.api.pruning import Result, dry_run, prune, run, shrink
    from adapt_pruner.checkpoint.load import Loaded, load
    from adapt_pruner.checkpoint.save import save
    from adapt_pruner.core.model.axes import Axis, Gate, Mask, Scores, Slice
    from adapt_pruner.core.model.budget import Budget, count_parameters
    from adapt_pruner.core.model.cut import cut, gated
    from adapt_pruner.data.windows import text_batches
    from adapt_pruner.errors import RunError, UsageError
    from adapt_pruner.evaluate.perplexity import perplexity
    from adapt_pruner.families import axes
    from adapt_pruner.recipe import Recipe
    from adapt_pruner.reduce.choose.allocate import Debt, adaptive, uniform
    from adapt_pruner.reduce.repair.closed_form import least_squares
    from adapt_pruner.score.calibrate import score
    from adapt_pruner.train.given import train

for _name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of kernels that nothing here uses
    logging.getLogger(_name).setLevel(logging.ERROR)

_HOMES = {name: home for home, names in {
    "api.exporting": "export",
    "api.measuring": "Comparison Evaluation Verification chat compare evaluate verify",
    "api.pruning": "Result dry_run prune run shrink",
    "checkpoint.load": "Loaded load",
    "checkpoint.save": "save",
    "core.model.axes": "Axis Gate Mask Scores Slice",
    "core.model.budget": "Budget count_parameters",
    "core.model.cut": "cut gated",
    "data.windows": "text_batches",
    "errors": "RunError UsageError",
    "evaluate.perplexity": "perplexity",
    "families": "axes",
    "recipe": "Recipe",
    "reduce.choose.allocate": "Debt adaptive uniform",
    "reduce.repair.closed_form": "least_squares",
    "score.calibrate": "score",
    "train.given": "train",
}.items() for name in names.split()}  # fmt: skip
"""Public name -> the module that has it."""

__all__ = [
    "Axis",
    "Budget",
    "Comparison",
    "Debt",
    "Evaluation",
    "Gate",
    "Loaded",
    "Mask",
    "Recipe",
    "Result",
    "RunError",
    "Scores",
    "Slice",
    "UsageError",
    "Verification",
    "adaptive",
    "axes",
    "chat",
    "compare",
    "count_parameters",
    "cut",
    "dry_run",
    "evaluate",
    "export",
    "gated",
    "least_squares",
    "load",
    "perplexity",
    "prune",
    "run",
    "save",
    "score",
    "shrink",
    "text_batches",
    "train",
    "uniform",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapt_pruner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adapt_pruner.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps public functions visible: Python would rebind their names to folders when a module in the folder is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
