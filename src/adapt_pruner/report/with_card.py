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
    """`loop.prune`, which writes the model card, too."""
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
    """`loop.run`, which writes the card of its result and its page, report.html, too; the trackers of `report_to` get the figures."""
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
    """Load a checkpoint and write it in the form of another tool (see `export.export`), with its model card if the form is a folder.

    Returns:
        Sentences about the result that a user should read; the listener gets them too.
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
