"""Send a run's figures to TensorBoard, Weights & Biases, trackio or MLflow, through accelerate's trackers."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt_pruner.core.events import Event, Listener, Start, Step, Warned
from adapt_pruner.core.events.run import Resumed
from adapt_pruner.core.system import world
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError, first_line
from adapt_pruner.recipe import Recipe
from adapt_pruner.recipe.schema import dotted


@contextmanager
def reporting(recipe: Recipe, run_dir: Path, listen: Listener) -> Iterator[Listener]:
    """A listener that tells `listen` and the trackers of the recipe; a tracker gets each figure as `event/figure`.

    Figures are reported at their optimiser step. A run that is continued adds to its figures, also for steps that it takes
    again. TensorBoard's files lie in `run_dir`/trackers/run. Only the main process reports. A tracker that fails during the run
    is dropped with a warning.

    Raises:
        UsageError: a tracker's package is not installed (raised at once), or the tracker cannot be started (raised at the event
            `start`, before the model changes).
    """
    check_trackers(recipe)
    if not recipe.report_to or not world.is_main():
        yield listen
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    running: dict[str, Any] = {}
    step = 0

    def start(name: str) -> None:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": str(run_dir / "trackers")} if tracker_class.requires_logging_directory else {}
        try:
            tracker = tracker_class("run" if where else run_dir.absolute().name, **where)
            if hasattr(tracker, "start"):
                tracker.start()
            settings = dotted(recipe.model_dump(mode="json"))
            plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in settings.items()}
            tracker.store_init_configuration(plain)
        except Exception as error:  # each tracker has its own kinds of errors
            raise UsageError(f"report_to {name} cannot be started ({first_line(error)}); set it up, or leave it out") from error
        running[name] = tracker

    def attempt(name: str, do: Callable[[Any], None]) -> None:
        try:
            do(running[name])
        except Exception as error:  # a run is worth more than its curves
            del running[name]
            listen(Warned(message=f"{name} failed and receives no more figures of this run: {first_line(error)}"))

    def tell(event: Event) -> None:
        nonlocal step
        listen(event)
        if isinstance(event, Start):  # not before: a run that is refused leaves nothing behind
            for name in recipe.report_to:
                start(name)
        step = event.step if isinstance(event, Step | Resumed) and event.step is not None else step
        figures = {f"{event.kind}/{name}": value for name, value in event.figures().items()}
        for tracked in list(running) if figures else ():
            attempt(tracked, lambda tracker: tracker.log(figures, step=step))

    try:
        yield tell
    finally:
        for tracked in list(running):
            attempt(tracked, lambda tracker: tracker.finish())


def check_trackers(recipe: Recipe) -> None:
    """Refuse a recipe's trackers that are not installed.

    Raises:
        UsageError: the package of one is missing.
    """
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"report_to {name} needs the package {name}; {to_install(name)}")
