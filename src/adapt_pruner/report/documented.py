"""`prune` and `run` as users call them: `run.loop` does the work, and the card and the page are written of what it saves."""

from functools import partial
from pathlib import Path
from typing import Any

from adapt_pruner.core.events import Interrupted, Saved, Warned, parse
from adapt_pruner.recipe import Recipe
from adapt_pruner.reduce.work import Listener
from adapt_pruner.report.card import try_card
from adapt_pruner.report.page import try_report
from adapt_pruner.run import loop
from adapt_pruner.run.results import Outcome

__all__ = ["prune", "run"]


def prune(recipe: Recipe, out: str | Path, *, listen: Listener = lambda event: None, trust_remote_code: bool = False) -> Outcome:
    """Run the recipe and write the resulting checkpoint, with its model card, to the folder `out`; nothing is saved on the way.

    Args:
        recipe: the run.
        out: a folder that does not exist or is empty.
        listen: told of every event.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UsageError: the budget or a text does not fit the model, or `out` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    beside = partial(try_card, path=Path(out), listen=listen)
    return loop.prune(recipe, out, listen=listen, trust_remote_code=trust_remote_code, beside=beside)


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
    force_recipe: bool = False,
) -> Outcome | None:
    """Run the recipe in a run folder (see `run.folder`), and write the card of its result and its page, report.html.

    An unfinished run in that folder goes on where it was.

    Args:
        recipe: the run.
        run_dir: a new or empty folder, or that of a run.
        listen: told of every event.
        trust_remote_code: whether code that comes with the model may run.
        force_recipe: go on with this recipe although the run began with another.

    Returns:
        What came of it; None where the run there was already finished.

    Raises:
        UsageError: the recipe does not fit the model or the folder; nothing has been changed.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    folder = Path(run_dir)

    def tell(data: dict[str, Any]) -> None:
        event = parse(data)
        finished = isinstance(event, Saved | Interrupted) and Path(event.path or "") == folder / "model"
        trouble = try_report(folder) if finished else None
        listen(data)
        if trouble:
            listen(Warned(message=trouble).told())

    beside = partial(try_card, path=folder / "model", listen=listen)
    return loop.run(recipe, folder, listen=tell, trust_remote_code=trust_remote_code, force_recipe=force_recipe, beside=beside)
