"""Telling a tracker (TensorBoard, Weights & Biases, trackio, MLflow) what the log says, by accelerate's own trackers."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt_pruner.core import world
from adapt_pruner.errors import UsageError
from adapt_pruner.prepare import Listener
from adapt_pruner.recipe import Recipe

__all__ = ["reporting"]

_FIGURES = {
    "step": ("loss", "lr", "gradient_norm", "tokens", "tokens_per_second", "peak_bytes"),
    "evaluation": ("perplexity", "params"),
    "cut": ("params", "loss"),
}
"""Event -> what of it is told, as `event/figure`."""


@contextmanager
def reporting(recipe: Recipe, run_dir: Path, listen: Listener) -> Iterator[Listener]:
    """`listen`, and beside it the trackers that the recipe reports to; local ones write below `run_dir`/trackers.

    Figures are told at the optimiser step they belong to. Only the main process reports.

    Raises:
        UsageError: a tracker's package is not installed.
    """
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"report_to {name} needs a package; pip install 'adapt-pruner[{name}]'")
    if not recipe.report_to or not world.is_main():
        yield listen
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    running: list[Any] = []
    step = 0

    def tell(event: dict[str, Any]) -> None:
        nonlocal step
        listen(event)
        kind = event["event"]
        if kind == "start" and not running:  # not before: a run that is refused leaves nothing behind
            for name in recipe.report_to:
                tracker_class = LOGGER_TYPE_TO_CLASS[name]
                where = {"logging_dir": str(run_dir / "trackers")} if tracker_class.requires_logging_directory else {}
                tracker = tracker_class(f"{run_dir.name}" if not where else "run", **where)
                if hasattr(tracker, "start"):
                    tracker.start()
                tracker.store_init_configuration(_flat(recipe.model_dump(mode="json")))
                running.append(tracker)
        step = event["step"] if kind in ("step", "resumed") else step
        told = {f"{kind}/{figure}": event[figure] for figure in _FIGURES.get(kind, ()) if event.get(figure) is not None}
        for tracker in running if told else ():
            tracker.log(told, step=step)

    try:
        yield tell
    finally:
        for tracker in running:
            tracker.finish()


def _flat(data: dict[str, Any], above: str = "") -> dict[str, Any]:
    """One level of plain values, which is what every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[above + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
