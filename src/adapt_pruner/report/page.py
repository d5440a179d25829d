"""The page of a run: headline, anatomy, reasons, recovery, costs, what to try next; one file that needs no network."""

import base64
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from adapt_pruner.core.events import Start
from adapt_pruner.core.files import why, write_whole
from adapt_pruner.core.marks import PAGE_FOOT, is_page
from adapt_pruner.core.places import check_place
from adapt_pruner.core.words import compact, counted, duration, measured_text, shown, typed
from adapt_pruner.data.sources import SELF
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.recipe import parts
from adapt_pruner.report import charts
from adapt_pruner.report.advice import Advice, advice
from adapt_pruner.report.figures import PHASES, Figures, Row, figures_of
from adapt_pruner.report.record import Record, read_record
from adapt_pruner.report.svg import drawn, escaped, table

__all__ = ["check_page", "framed", "page", "pictures", "try_report", "write_page", "write_report"]

_STATUS = {"finished": "finished", "running": "still running", "stopped": "stopped before its end"}


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, whole or not at all; a run in any state has a page.

    Args:
        run_dir: the run's folder.
        out: the page; by default report.html in that folder.

    Returns:
        The path of the page.

    Raises:
        UsageError: it is not the folder of a run.
        RunError: the page cannot be written.
    """
    record = read_record(run_dir)
    return write_page(Path(out) if out is not None else record.path / "report.html", page(record))


def try_report(run_dir: Path) -> str | None:
    """Write the page of a run that has ended. A failure gives only a sentence, because the run is worth more than its page."""
    try:
        write_report(run_dir)
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
    by_key = {chart.key: drawn(chart) for chart in pictures(figures)}
    lines = [key for key in by_key if key.startswith("line-")]
    sections = [
        ("anatomy", "Anatomy", "What the model was, and what of it is left.", by_key.get("anatomy", "")),
        ("why", "Why there", _why(record), _pair(by_key, "search", "widths") + _pair(by_key, "importance", "sparsity") + _pair(by_key, *lines, tag="pair" if len(lines) % 3 else "trio") + by_key.get("costs", "")),
        ("recovery", "Recovery", _recovery(figures), by_key.get("perplexity", "") + by_key.get("loss", "") + _pair(by_key, "lr", "speed", "memory", tag="trio") + _pair(by_key, "mixing", "by-text")),
        ("tasks", "What it still can do", "", by_key.get("tasks", "")),
        ("answers", "What it says", "", _answers(figures)),
        ("bill", "The bill", "", _bill(figures) + _facts(record, figures)),
        ("next", "What to try next", "", _next(record, figures)),
    ]  # fmt: skip
    sections = [section for section in sections if section[3]]
    links = [(key, title) for key, title, *_ in sections]
    body = "".join(
        f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{escaped(title)}</h2>{f"<p>{about}</p>" if about else ""}{inner}</section>'
        for key, title, about, inner in ((f"s-{key}", title, about, inner) for key, title, about, inner in sections)
    )
    return framed(
        title=f"{figures.name}: {_short(figures.model)} pruned",
        head=_head(figures),
        links=[(f"s-{key}", title) for key, title in links],
        body=_tiles(figures.rows) + _remarks(figures) + body,
        foot=f"{PAGE_FOOT} on {time.strftime('%Y-%m-%d %H:%M')} from {record.path.resolve().name}. This page needs no network.",
    )


def framed(*, title: str, head: str, links: list[tuple[str, str]], body: str, foot: str) -> str:
    """A whole page around a body, with the style and script that all pages share."""
    here = Path(__file__).parent
    style, script = ((here / f"page.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    items = "".join(f'<li><a href="#{key}">{escaped(name)}</a></li>' for key, name in links)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,"><title>{escaped(title)}</title>'
        f"<style>{style}</style></head>\n<body><header>{head}</header>"
        f'<nav aria-label="On this page"><ul>{items}</ul></nav>\n<main>{body}</main>\n'
        f'<footer>{escaped(foot)}</footer><div id="tip" role="status" hidden></div><script>{script}</script></body></html>\n'
    )


def _unbroken(command: str) -> str:
    """A command whose words are not broken at their hyphens on a narrow screen."""
    return " ".join(f"<span>{escaped(word)}</span>" for word in command.split(" "))


_ABSOLUTE = re.compile(r"(?<![\w.~*/-])/(?:[^\s'\",:/]+/)+(?=[^\s'\",:/])")


def _placeless(text: object) -> str:
    """Text without folders of this machine: absolute paths become `FOLDER/notes.txt`, paths in the working directory relative."""
    return _ABSOLUTE.sub("FOLDER/", str(text).replace(f"{Path.cwd()}{os.sep}", ""))


def _short(model: str) -> str:
    return Path(model).name or model


def _head(figures: Figures) -> str:
    params = figures.rows[0] if figures.rows else None
    before, now = (params.before, params.now) if params else (None, None)
    title = escaped(_short(figures.model))
    if before and now:
        title += f": {shown(before, 'params')} → {shown(now, 'params')} parameters"
    chip = f'<span class="chip {figures.status}">{_STATUS[figures.status]}</span>'
    bars = ""
    if params and before and now:
        bars = '<div class="bars" aria-hidden="true">' + "".join(
            f'<div class="bar{tag}">{name}<div><i style="width:{100 * value / max(before, now):.2f}%"></i></div><span>{shown(value, "params")}</span></div>'
            for name, value, tag in ((params.begun, before, ""), ("now", now, " now"))
        ) + "</div>"  # fmt: skip
    return f'<p class="over">{escaped(figures.name)} {chip}</p><h1>{title}</h1><p class="lead">{_lead(figures, before, now)}</p>{bars}'


def _lead(figures: Figures, before: float | None, now: float | None) -> str:
    """The run in a few sentences."""
    said = []
    if before and now:
        cuts = len(figures.cuts)
        stages = len({cut.stage for cut in figures.cuts})
        many = f"{counted(cuts, 'iteration')}" + (f" in {stages} stages" if stages > 1 else "")
        zeros = next((row for row in figures.rows if row.name == "not zero"), None)
        done = f"removed {1 - now / before:.1%} of the parameters"
        if zeros is not None and now >= before:
            done, many = _of_zeros(zeros, cuts), ""
        said.append(f"{escaped(figures.method)} {done}{f' in {many}' if cuts and many else ''}")
        if figures.tokens.get("train"):
            said[-1] += f", with training on {compact(figures.tokens['train'])} tokens"
    row = next((row for row in figures.rows if row.name == "perplexity"), None)
    if row and row.before and row.now:
        said.append(
            f"Perplexity {row.note} went from {shown(row.before, 'perplexity')} to "
            + ("" if row.after_cuts is None else f"{shown(row.after_cuts, 'perplexity')} by the cuts and to ")
            + f"{shown(row.now, 'perplexity')}{' by training' if row.after_cuts is not None else ''} ({shown(row.now / row.before, 'ratio')})"
        )
    if figures.status != "finished" and figures.target and now and now > figures.target:
        said.append(f"It is on its way to {shown(figures.target, 'params')}")
    return (". ".join(said) + ".") if said else "Nothing has been cut yet."


def _of_zeros(row: Row, cuts: int) -> str:
    """What a run that keeps all shapes did with single weights."""
    if not (row.now and row.before):
        return "makes parameters zero"
    return f"made {1 - row.now / row.before:.1%} of the parameters zero" if cuts else "kept the zeros of the model"


def _tiles(rows: Iterable[Row]) -> str:
    return f'<dl class="tiles">{"".join(map(_tile, rows))}</dl>'


def _tile(row: Row) -> str:
    change = ""
    if row.before and row.now:
        percent = row.now / row.before - 1
        better = percent > 0 if row.form == "right" else percent < 0
        known = row.form != "plain"  # nobody knows of a plain score whether more is better
        tone = "" if not known else "good" if better else "bad" if abs(percent) > 0.0005 else ""
        change = f' <b class="{tone}">{percent:+.1%}</b>'.replace("-", "−")
    said = [row.note, f"{shown(row.after_cuts, row.form)} after the cuts" if row.after_cuts is not None else ""]
    note = f'<dd class="note">{escaped("; ".join(filter(None, said)))}</dd>' if any(said) else ""
    now = shown(row.now, row.form) if row.now is not None else "not yet"
    return f'<div class="tile"><dt>{escaped(row.name)}</dt><dd class="now">{now}</dd><dd class="was">{row.begun} {shown(row.before, row.form)}{change}</dd>{note}</div>'


def _remarks(figures: Figures) -> str:
    """What could not be read, and the run's warnings."""
    parts = ""
    for name, lines in (("About this page", figures.notes), ("The run warned", figures.warnings)):
        if lines:
            items = "".join(f"<li>{escaped(_placeless(line))}</li>" for line in lines[:12])
            more = f"<li>and {len(lines) - 12} more in log.jsonl</li>" if len(lines) > 12 else ""
            parts += f'<div class="aside"><strong>{name}</strong><ul>{items}{more}</ul></div>'
    return parts


def _pair(drawings: dict[str, str], *keys: str, tag: str = "pair") -> str:
    present = [drawings[key] for key in keys if key in drawings]
    return f'<div class="{tag}">{"".join(present)}</div>' if present else ""


def _why(record: Record) -> str:
    recipe = record.recipe
    if not recipe:
        return ""
    with suppress(UsageError):  # this version may lack the reduction
        way = str(recipe.get("reduce", "units"))
        if "chosen" not in parts.needs("reduce", way):
            return escaped(parts.about("reduce", way))
        if way.partition("(")[0] != "units":
            return f"{escaped(parts.about('reduce', way))} Its scores at the start are those of <code>{escaped(recipe.get('metric'))}</code>."
    said = f"Units were scored by <code>{escaped(recipe.get('metric'))}</code>, and <code>{escaped(recipe.get('chooser'))}</code> said how many of each layer go"
    if recipe.get("distance"):
        said += f", from what <code>{escaped(recipe['distance'])}</code> says a layer is worth"
    step = float(recipe.get("step") or 0)
    removes = "A stage removes all at once" if step >= 1 else f"Each iteration removes about {step:.1%}"
    return said + f". {removes}. Cuts are named stage.iteration."


def _recovery(figures: Figures) -> str:
    if figures.steps:
        return "What training gave back. One learning-rate curve runs over all stages."
    yet = "" if figures.status == "finished" else " yet"
    return f"Nothing was trained{yet}; this is what the cuts left." if figures.evaluations else ""


def _answers(figures: Figures) -> str:
    """Each prompt with the answers of the model at the start and of the model now, side by side."""
    if not figures.answers:
        return ""
    by_name = {
        figures.begun if one.stage == 0 else "now": {said["prompt"]: said["text"] for said in one.answers}
        for one in figures.answers
    }
    said = ""
    for number, prompt in enumerate(answer["prompt"] for answer in figures.answers[-1].answers):
        texts = [(name, answers[prompt]) for name, answers in by_name.items() if prompt in answers]
        cells = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(text) or '(nothing)'}</dd></div>" for name, text in texts)
        said += f'<figure class="said" id="said-{number + 1}"><figcaption>{escaped(prompt)}</figcaption><dl>{cells}</dl></figure>'
    return said + '<p class="legend">The likeliest token each time, cut off at 48 tokens.</p>'


def _bill(figures: Figures) -> str:
    total = sum(figures.seconds.values())
    if not total:
        return f"<p>About {duration(figures.wall)} from the first line of the log to the last.</p>" if figures.wall else ""
    order = list(PHASES)
    parts = [(phase, figures.seconds[phase]) for phase in order if phase in figures.seconds]
    split = "".join(f'<i class="phase{order.index(phase)}" style="flex:{seconds / total:.4f}"></i>' for phase, seconds in parts)
    keys = "".join(
        f'<span class="name"><i class="key phase{order.index(phase)}"></i>{PHASES[phase]}</span>' for phase, _ in parts
    )
    rows = []
    for phase in order:
        seconds, tokens = figures.seconds.get(phase), figures.tokens.get(phase)
        if seconds or tokens:  # work after the newest checkpoint has only tokens
            time_and_share = [duration(seconds), f"{seconds / total:.1%}"] if seconds else ["–", "–"]
            rows.append([PHASES[phase], *time_and_share, compact(tokens) if tokens else "–"])
    rows.append(["together", duration(total), "100.0%", compact(sum(figures.tokens.values())) if figures.tokens else "–"])
    memory = f" At its peak it held {figures.peak_bytes / 2**30:.2f} GiB." if figures.peak_bytes else ""
    return (
        f"<p>{duration(total)} of work.{memory}</p>"
        f'<div class="split" aria-hidden="true">{split}</div><p class="legend" aria-hidden="true">{keys}</p>'
        f"{table(['phase', 'time', 'share', 'tokens'], rows, caption='Time and tokens by phase')}"
    )


def _dequantised(record: Record) -> str | None:
    """A sentence if the dense model's weights were dequantised, so that they differ from the published ones."""
    files = [event.dequantised for event in record.of(Start) if event.dequantised]
    return f"dequantised from {files[0]}; every figure of the dense model is of these weights" if files else None


def _facts(record: Record, figures: Figures) -> str:
    recipe = record.recipe
    training, evaluation = recipe.get("training") or {}, recipe.get("evaluation") or {}
    facts = [
        ("model", recipe.get("model")), ("its weights", _dequantised(record)), ("made by", record.made_by), ("seed", recipe.get("seed")),
        ("device, precision", _machine(record)),
        ("calibration text", _source((recipe.get("calibration") or {}).get("source"))), ("training text", _source(training.get("source"))),
        (measured_text(record.figures), _source(evaluation.get("source"))), ("of this text", _copies(record)), ("began", _when(record)),
    ]  # fmt: skip
    listed = "".join(f"<dt>{name}</dt><dd>{escaped(_placeless(value))}</dd>" for name, value in facts if value not in (None, ""))
    folder, dense = _placeless(record.path), _placeless(figures.model)
    result = folder if not record.kept else f"{folder}/model" if figures.status == "finished" else None
    lines = [typed("run", f"{folder}/recipe.yaml", "-o", "again")] if record.kept else []
    if result:
        lines += [
            typed("eval", dense, result, "--text", "SPEC"),
            typed("inspect", result),
            typed("chat", result, "Why is the sky blue?", "--against", dense),
        ]
    commands = f'<pre tabindex="0"><code>{escaped(chr(10).join(lines))}</code></pre>'
    text = ""
    if record.recipe_text:
        data = base64.b64encode(_placeless(record.recipe_text).encode()).decode()
        text = (
            f'<details><summary>The whole recipe</summary><p><a download="recipe.yaml" href="data:text/yaml;base64,{data}">Save recipe.yaml</a></p>'
            f'<pre tabindex="0"><code>{escaped(_placeless(record.recipe_text))}</code></pre></details>'
        )
    return f'<h3>What it was made of</h3><dl class="facts">{listed}</dl><h3>The same again, and what to do with it</h3>{commands}{text}'


def _machine(record: Record) -> str | None:
    start = next((event for event in reversed(record.of(Start)) if event.device), None)
    return None if start is None else f"{start.device}, {start.precision} products{_processes(start)}"


def _processes(start: Start) -> str:
    return f"; {start.processes} processes ({start.parallel})" if start.processes != 1 else ""


def _source(source: object) -> str | None:
    if isinstance(source, dict):
        return ", ".join(f"{_source(spec)} ({weight:g})" for spec, weight in source.items())
    if source == SELF:
        return "self-written text (self)"
    return None if source is None else str(source)


def _copies(record: Record) -> str | None:
    """What of the text that was measured on the run also read."""
    found = record.figures.get("not_held_out")
    return "; ".join(map(str, found)) if isinstance(found, list) else None


def _when(record: Record) -> str | None:
    first = next((event.time for event in record.events if event.time is not None), None)
    return None if first is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(first))


def _next(record: Record, figures: Figures) -> str:
    checkpoint = record.checkpoint.name if record.checkpoint is not None else None
    folder = _placeless(record.path)
    remarks = advice(figures, record.recipe, folder=folder, checkpoint=checkpoint)
    if figures.status == "running":
        remarks.insert(
            0,
            Advice(
                "The run is still at work; watch it live, or write this page again later.",
                typed("watch", folder),
            ),
        )
    if not remarks:
        return (
            "<p>No rule found a problem: the budget is met and the loss had settled. A smaller budget, or a second seed, would "
            "tell more.</p>"
        )
    items = "".join(
        f"<li>{escaped(one.text)}{f' <code>{_unbroken(one.try_it)}</code>' if one.try_it else ''}</li>" for one in remarks
    )
    return f'<ul class="next">{items}</ul>'
