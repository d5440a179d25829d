"""What a run needs before its first step: the model, its stages, and the text each of them reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded, load, pick_device
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.data.feeds import calibration_feed, held_out_windows, training_shards
from adapt_pruner.plan import Stage, plan, reads_text
from adapt_pruner.recipe import Recipe

__all__ = ["Listener", "Prepared", "load_model", "prepare"]

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Prepared:
    """What a run is about to do and read.

    Attributes:
        stages: the rounds of pruning and training.
        budget: what is to be left.
        calibration: number of the iteration -> its batches, int64 [batch, length]; none where nothing looks at them.
        shards: the training blocks of each stage; empty when nothing is to be trained.
        held_out: evaluation windows; empty when nothing is to be evaluated.
    """

    stages: list[Stage]
    budget: Budget
    calibration: Callable[[int], list[Tensor]]
    shards: list[Tensor]
    held_out: list[Tensor]


def load_model(recipe: Recipe, listen: Listener, trust_remote_code: bool) -> Loaded:
    """The model that the recipe names, on the recipe's device."""
    listen({"event": "load", "model": recipe.model})
    loaded = load(recipe.model, device=pick_device(recipe.device), trust_remote_code=trust_remote_code)
    listen({"event": "loaded", "model": recipe.model, "params": count_parameters(loaded.model)})
    return loaded


def prepare(loaded: Loaded, recipe: Recipe, *, listen: Listener) -> Prepared:
    """Check that the recipe fits the model and that its texts are there, before any work is done.

    Raises:
        UsageError: the budget or a text does not fit.
    """
    planned, budget = plan(loaded.model, recipe)
    return Prepared(
        planned, budget, _calibration(loaded, recipe), _shards(loaded, recipe, planned, listen), _held_out(loaded, recipe)
    )


def _calibration(loaded: Loaded, recipe: Recipe) -> Callable[[int], list[Tensor]]:
    """A function from the number of the iteration to its batches; to none where nothing looks at them."""
    if not reads_text(loaded.model, recipe):
        return lambda iteration: []
    return calibration_feed(loaded.model, loaded.tokenizer, **recipe.calibration.model_dump(), seed=recipe.seed)


def _shards(loaded: Loaded, recipe: Recipe, planned: list[Stage], listen: Listener) -> list[Tensor]:
    """The training blocks of each stage; empty when nothing is to be trained."""
    asked = recipe.training
    if asked.source is None:
        return []
    tokens = [stage.tokens for stage in planned]
    return training_shards(
        loaded.tokenizer, source=asked.source, length=asked.length, stage_tokens=tokens, seed=recipe.seed,
        warn=lambda message: listen({"event": "warning", "message": message}),
    )  # fmt: skip


def _held_out(loaded: Loaded, recipe: Recipe) -> list[Tensor]:
    asked = recipe.evaluation
    if asked.source is None:
        return []
    return held_out_windows(loaded.tokenizer, source=asked.source, window=asked.window, max_windows=asked.max_windows)
