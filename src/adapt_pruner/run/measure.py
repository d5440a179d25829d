"""What a run measures of its model at the start and after a stage: into its figures, and for its listener.

`figures["perplexities"]` and `figures["bits_per_byte"]` have the model at the start first and then each stage, `figures["tasks"]` the start
and the end; None stands where nothing was measured since the recipe was changed on the way, and in JSON for infinity.
"""

from dataclasses import asdict
from typing import Any

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.core import world
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.tasks import average, evaluate_tasks
from adapt_pruner.recipe import Recipe
from adapt_pruner.run.position import Position
from adapt_pruner.run.prepare import Listener, Prepared, progress

__all__ = ["measure_tasks", "measure_text"]


def measure_text(model: Any, ready: Prepared, recipe: Recipe, at: Position, listen: Listener, *, stage: int) -> None:
    """Measure the perplexity of held-out text, where the recipe names one."""
    if ready.held_out:
        with at.clock("evaluate"):
            measured = perplexity(
                model,
                ready.held_out,
                dtype=recipe.dtype,
                num_bytes=ready.held_out_bytes,
                on_window=progress(listen, "evaluate", stage=stage),
            )
        for name, figure in (("perplexities", measured.perplexity), ("bits_per_byte", measured.bits_per_byte)):
            known = at.figures.setdefault(name, [])
            known += [None] * (stage - len(known))  # of stages that went before somebody asked for it
            known.append(figure)
        listen({"event": "evaluation", "stage": stage, "params": count_parameters(model), **asdict(measured)})


def measure_tasks(loaded: Loaded, ready: Prepared, recipe: Recipe, at: Position, listen: Listener, *, stage: int) -> None:
    """Score the recipe's tasks, on the main process alone; what the cache has of the same model is not scored again."""
    asked = recipe.evaluation
    if asked.tasks is None:
        return

    def told(task: str, done: int, of: int) -> None:
        listen({"event": "progress", "phase": "task", "task": task, "done": done, "of": of})

    def warn(message: str) -> None:
        listen({"event": "warning", "message": message})

    with at.clock("evaluate"):
        settings: dict[str, Any] = {"limit": asked.limit, "dtype": recipe.dtype, "on_task": told, "warn": warn}
        scores = world.on_main(lambda: evaluate_tasks(loaded.model, loaded.tokenizer, ready.tasks, **settings))
    mean, stderr = average(scores) or (None, None)
    found = {"average": mean, "stderr": stderr, "scores": [score.headline() for score in scores]}
    at.figures["tasks"] = [*at.figures.get("tasks", [None] if stage else []), found]  # of the start and of the end
    listen({"event": "tasks", "stage": stage, "params": count_parameters(loaded.model), **found})
