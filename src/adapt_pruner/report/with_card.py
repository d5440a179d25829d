"""`prune`, `run` and `export` for users: `run/` and `export/` do the work, and this file adds the model card and the page."""

from functools import partial
from pathlib import Path

from adapt_pruner.checkpoint.load import load_that_fits
from adapt_pruner.checkpoint.stored import load_unread
from adapt_pruner.core.events import Event, Interrupted, Listener, Load, Saved, Warned
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import check_place, expanded
from adapt_pruner.export import check_form, is_lazy
from adapt_pruner.export import export as write
from adapt_pruner.recipe import Recipe
from adapt_pruner.report.card import try_card, write_card_of_export
from adapt_pruner.report.page import try_report
from adapt_pruner.run import loop, trackers
from adapt_pruner.run.results import Outcome


def prune(recipe: Recipe, out: str | Path, *, listen: Listener = lambda event: None, trust_remote_code: bool = False) -> Outcome:
    """Run the recipe and write the resulting checkpoint, with its model card, to the folder `out`; nothing else is saved.

    Args:
        recipe: the run.
        out: a folder that does not exist or is empty.
        listen: called with every event.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UsageError: the budget or a text does not fit the model, or `out` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    write_more = partial(try_card, path=Path(out), listen=listen)
    return loop.prune(recipe, out, listen=listen, trust_remote_code=trust_remote_code, write_more=write_more)


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
    force_recipe: bool = False,
) -> Outcome | None:
    """Run the recipe in a run folder (see `run.folder`), and write the card of its result and its page, report.html.

    An unfinished run in that folder continues where it stopped. The trackers of `report_to` get the figures, too.

    Args:
        recipe: the run.
        run_dir: a new or empty folder, or that of a run.
        listen: called with every event.
        trust_remote_code: whether code that comes with the model may run.
        force_recipe: continue with this recipe although the run began with another.

    Returns:
        The result; None if the run there was already finished.

    Raises:
        UsageError: the recipe does not fit the model or the folder; nothing has been changed.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    folder = Path(run_dir)

    def tell(event: Event) -> None:
        finished = isinstance(event, Saved | Interrupted) and Path(event.path or "") == folder / filenames.RESULT
        trouble = try_report(folder) if finished else None
        listen(event)
        if trouble:
            listen(Warned(message=trouble))

    with trackers.reporting(recipe, folder, listen) as listen:
        write_more = partial(try_card, path=folder / filenames.RESULT, listen=listen)
        return loop.run(
            recipe, folder, listen=tell, trust_remote_code=trust_remote_code, force_recipe=force_recipe, write_more=write_more
        )


def export(
    model: str,
    out: str | Path,
    *,
    to: str,
    quant: str | None = None,
    pad: int | None = None,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a checkpoint in the form of another tool, with its model card if the form is a folder.

    Args:
        model: as `checkpoint.load` takes it.
        out: a new folder; for `gguf` a new file.
        to: a name of `export.forms()`.
        quant: for `gguf`, the type of the stored matrices; None keeps the checkpoint's.
        pad: for `gguf`, 32 or 256: MLPs are zero-padded to multiples of it.
        listen: called with every event.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        Sentences about the result that a user should read; the listener gets them too.

    Raises:
        UsageError: there is no such model or form, the form cannot hold the model, or `out` is taken.
        RunError: the model's files are damaged, or the result could not be written.
    """
    out = Path(out)
    check_form(to, quant=quant, pad=pad)
    check_place(out)
    listen(Load(model=model))
    if is_lazy(to):
        loaded = load_unread(model, trust_remote_code=trust_remote_code)
    else:
        loaded = load_that_fits(model, trust_remote_code=trust_remote_code, any_task=to == "onnx")
    notes = write(loaded, out, to=to, quant=quant, pad=pad)
    if out.is_dir() and (lacking := write_card_of_export(expanded(loaded.source), out, to)) is not None:
        notes = [*notes, lacking]
    for note in notes:
        listen(Warned(message=note))
    return notes
