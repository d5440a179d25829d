"""The page of a run: headline, anatomy, reasons, recovery, costs, what to try next; one file that needs no network."""

import os
import time
from contextlib import suppress
from pathlib import Path

from adapt_pruner.core.events import BILL, Start
from adapt_pruner.core.events.words import by_model, compact, counted, duration, measured_text, shown, typed
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import check_place, is_page, why, write_whole
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.recipe import parts
from adapt_pruner.report import charts
from adapt_pruner.report.advice import Advice, advice
from adapt_pruner.report.figures import Figures, Row, figures_of
from adapt_pruner.report.record import Record, read_record
from adapt_pruner.report.template import placeless, rendered


def try_report(run_dir: Path) -> str | None:
    """Write the page of a run that has ended. A failure gives only a sentence, because the run is worth more than its page."""
    try:
        write_page(run_dir / filenames.PAGE, page(read_record(run_dir)))
    except Exception as error:
        return f"the run has no new report: {first_line(error)}; `{typed('report', run_dir)}` tries again"
    return None


def check_page(path: Path, folder: Path) -> None:
    """Refuse a page that would overwrite a foreign file, or lie in its own folder with another ending, or cannot be written.

    Raises:
        UsageError: the page is refused.
    """
    check_place(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the page, for example -o {path / 'report.html'}")
    if os.path.lexists(path) and not is_page(path):
        raise UsageError(
            f"{path} exists and is not an HTML page of adapt-pruner, and would be lost; name another file, such as report.html"
        )
    if path.suffix.lower() not in (".html", ".htm") and path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{path} is inside the folder that it describes and does not end in .html; name another file, such as report.html"
        )


def write_page(path: Path, text: str) -> Path:
    """Write a page, whole or not at all.

    Raises:
        RunError: the page cannot be written, or somebody else's file is there.
    """
    if os.path.lexists(path) and not is_page(path):
        raise RunError(f"{path} is not a page of adapt-pruner and stays as it is; name another file with -o")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise RunError(f"{path} could not be written: {why(error)}; name another file with -o") from error
    return path


def pictures(figures: Figures) -> list[charts.Chart]:
    """All pictures of a run for which there are figures, in the order of the page."""
    single = (charts.anatomy(figures), charts.importance(figures), charts.sparsity(figures), charts.costs(figures))
    possible: list[charts.Chart | None] = [
        *single,
        charts.usage(figures),
        charts.search(figures),
        charts.widths(figures),
        *charts.cut_lines(figures),
        charts.perplexities(figures),
        charts.tasks(figures),
        *charts.training(figures),
        charts.mixing(figures),
        charts.by_text(figures),
    ]
    return [chart for chart in possible if chart is not None]


def page(record: Record) -> str:
    """The page as HTML."""
    figures = figures_of(record)
    way, scored = _way(record)
    return rendered(
        "run.html", f=figures, recipe=record.recipe, charts=pictures(figures), model=Path(figures.model).name or figures.model,
        folder=record.path.resolve().name, lead=_lead(figures), way=way, scored=scored, answers=_answers(figures), phases=BILL,
        bill_rows=_bill(figures), facts=_facts(record), commands=_commands(record, figures), recipe_text=placeless(record.recipe_text or ""),
        advice=_advice(record, figures),
    )  # fmt: skip


def _lead(figures: Figures) -> str:
    """The run in a few sentences."""
    params = figures.rows[0] if figures.rows else None
    before, now = (params.before, params.now) if params else (None, None)
    sentences = []
    if before and now:
        cuts = len(figures.cuts)
        stages = len({cut.stage for cut in figures.cuts})
        many = f"{counted(cuts, 'iteration')}" + (f" in {stages} stages" if stages > 1 else "")
        zeros = next((row for row in figures.rows if row.name == "not zero"), None)
        done = f"removed {1 - now / before:.1%} of the parameters"
        if zeros is not None and now >= before:
            done, many = _of_zeros(zeros, cuts), ""
        sentences.append(f"{figures.method} {done}{f' in {many}' if cuts and many else ''}")
        if figures.tokens.get("train"):
            sentences[-1] += f", with training on {compact(figures.tokens['train'])} tokens"
    row = next((row for row in figures.rows if row.name == "perplexity"), None)
    if row and row.before and row.now:
        sentences.append(
            f"Perplexity {row.note} went from {shown(row.before, 'perplexity')} to "
            + ("" if row.after_cuts is None else f"{shown(row.after_cuts, 'perplexity')} by the cuts and to ")
            + f"{shown(row.now, 'perplexity')}{' by training' if row.after_cuts is not None else ''} ({shown(row.now / row.before, 'ratio')})"
        )
    if figures.status != "finished" and figures.target and now and now > figures.target:
        sentences.append(f"It is on its way to {shown(figures.target, 'params')}")
    return (". ".join(sentences) + ".") if sentences else "Nothing has been cut yet."


def _of_zeros(row: Row, cuts: int) -> str:
    """What a run that keeps all shapes did with single weights."""
    if not (row.now and row.before):
        return "makes parameters zero"
    return f"made {1 - row.now / row.before:.1%} of the parameters zero" if cuts else "kept the zeros of the model"


def _way(record: Record) -> tuple[str, bool]:
    """What a reduction without a chooser does, and whether it starts from scores; nothing if it has a chooser, or is not known."""
    way = str(record.recipe.get("reduce", "units"))
    with suppress(UsageError):  # this version may lack the reduction
        chosen = "chosen" in parts.needs("reduce", way)
        if record.recipe and not (chosen and way.partition("(")[0] == "units"):
            return parts.about("reduce", way), chosen
    return "", False


def _answers(figures: Figures) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt with the answers of the model at the start and of the model now."""
    by_name = {
        figures.begun if event.stage == 0 else "now": {answer["prompt"]: answer["text"] for answer in event.answers}
        for event in figures.answers
    }
    prompts = [answer["prompt"] for answer in figures.answers[-1].answers] if figures.answers else []
    return [(prompt, [(name, texts[prompt]) for name, texts in by_name.items() if prompt in texts]) for prompt in prompts]


def _bill(figures: Figures) -> list[list[str]]:
    """Time and tokens of each phase, and their sums."""
    total = sum(figures.seconds.values())
    rows = []
    for phase, name in BILL.items():
        seconds, tokens = figures.seconds.get(phase), figures.tokens.get(phase)
        if seconds or tokens:  # work after the newest checkpoint has only tokens
            time_and_share = [duration(seconds), f"{seconds / total:.1%}"] if seconds else ["–", "–"]
            rows.append([name, *time_and_share, compact(tokens) if tokens else "–"])
    return [*rows, ["together", duration(total), "100.0%", compact(sum(figures.tokens.values())) if figures.tokens else "–"]]


def _facts(record: Record) -> list[tuple[str, object]]:
    recipe = record.recipe
    calibration, training, evaluation = (recipe.get(key) or {} for key in ("calibration", "training", "evaluation"))
    dequantised = [event.dequantised for event in record.of(Start) if event.dequantised]
    first = next((event.time for event in record.events if event.time is not None), None)
    facts = [
        ("model", recipe.get("model")),
        ("its weights", f"dequantised from {dequantised[0]}; every figure of the dense model is of these weights" if dequantised else None),
        ("made by", record.made_by), ("seed", recipe.get("seed")), ("device, precision", _machine(record)),
        ("calibration text", _source(calibration.get("source"))), ("training text", _source(training.get("source"))),
        (measured_text(record.figures), _source(evaluation.get("source"))), ("of this text", _copies(record)),
        ("began", None if first is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(first))),
    ]  # fmt: skip
    return [(name, None if value is None else placeless(value)) for name, value in facts]


def _commands(record: Record, figures: Figures) -> list[str]:
    """Commands that repeat the run, and for its result."""
    folder, dense = placeless(record.path), placeless(figures.model)
    result = f"{folder}/model" if record.kept else folder
    commands = [typed("run", f"{folder}/recipe.yaml", "-o", "again")] if record.kept else []
    if figures.status == "finished":
        commands += [
            typed("eval", dense, result, "--text", "SPEC"),
            typed("inspect", result),
            typed("chat", result, "Why is the sky blue?", "--against", dense),
        ]
    return commands


def _machine(record: Record) -> str | None:
    start = next((event for event in reversed(record.of(Start)) if event.device), None)
    if start is None:
        return None
    together = f"; {start.processes} processes ({start.parallel})" if start.processes != 1 else ""
    return f"{start.device}, {start.precision} products{together}"


def _source(source: object) -> str | None:
    if isinstance(source, dict):
        return ", ".join(f"{_source(spec)} ({weight:g})" for spec, weight in source.items())
    written = by_model(source) if isinstance(source, str) else None
    if written:
        return f"{written} ({source})"
    return None if source is None else str(source)


def _copies(record: Record) -> str | None:
    """What of the text that was measured on the run also read."""
    roles = record.figures.get("not_held_out")
    return "; ".join(map(str, roles)) if isinstance(roles, list) else None


def _advice(record: Record, figures: Figures) -> list[Advice]:
    checkpoint = record.checkpoint.name if record.checkpoint is not None else None
    folder = placeless(record.path)
    remarks = advice(figures, record.recipe, folder=folder, checkpoint=checkpoint)
    if figures.status == "running":
        waiting = Advice("The run is still at work; watch it live, or write this page again later.", typed("watch", folder))
        remarks.insert(0, waiting)
    return remarks
