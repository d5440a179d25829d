"""The page of a comparison: methods by sizes, quality against size and against speed, failures; and its picture for papers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapt_pruner.core.events.words import Form, counted, shown
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import number_of, read_json
from adapt_pruner.errors import UsageError
from adapt_pruner.report.charts import Beside, Lines, Series
from adapt_pruner.report.template import rendered

_MOST_SIZES = 6  # with more sizes, they are not written below the axis
_APART = 0.09  # least distance between two of them, as a share of the axis
_FAR = 100  # times the dense model's perplexity; anything beyond would squeeze the rest together


def read_comparison(folder: str | Path) -> dict[str, Any]:
    """The content of compare.json in the folder of a comparison.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    path = Path(folder) / filenames.COMPARISON
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}); run the same `adapt-pruner compare` again") from error
    if not isinstance(result, dict) or not result.get("rows") or not result.get("arguments"):
        raise UsageError(f"{path} is not what `adapt-pruner compare` writes; run it again into another folder")
    return result


def comparison_pictures(result: Mapping[str, Any]) -> list[Lines]:
    """Perplexity over parameters, speed and seconds of pruning, a picture per text; a point that no other beats has its name."""
    every = (_picture(result, number, of) for number in range(len(_texts(result))) for of in ("params", "speed_up", "seconds"))
    return [picture for picture in every if picture is not None]


def comparison_panels(result: Mapping[str, Any]) -> Beside | None:
    """Perplexity over parameters for papers, the texts side by side; None if nothing pruned has a figure."""
    texts = _texts(result)
    panels = [
        replace(picture, title=label(text, texts))
        for number, text in enumerate(texts)
        if (picture := _picture(result, number, "params")) is not None
    ]
    draws = max(row["draws"] for row in result["rows"])
    spread = f"medians of {draws} draws, bars from the lowest to the highest; " if draws > 1 else ""
    windows = ", ".join(dict.fromkeys(str(text["windows"]) for text in result["texts"]))
    note = f"{spread}{windows} windows of {result['arguments']['window']} tokens, {result['precision']}"
    title = f"{Path(result['arguments']['model']).name} pruned, not trained"
    return Beside("compare", title, panels, note) if panels else None


def _picture(result: Mapping[str, Any], number: int, of: str) -> Lines | None:
    """Perplexity on a text over `params`, `speed_up` or `seconds`; None below two points."""
    texts = _texts(result)
    text = texts[number]
    rows = within(result["rows"], text)
    front = _front(rows, text, of)
    every = [
        _series(method, [row for row in rows if row["method"] == method], text, of, front)
        for method in dict.fromkeys(row["method"] for row in result["rows"])
    ]
    if sum(len(series.points) for series in every) < 2:
        return None
    axes: dict[str, tuple[str, str, str, Form]] = {
        "params": ("size", "Quality against size", "parameters", "params"),
        "speed_up": ("speed", "Quality against speed", "times as fast as dense", "ratio"),
        "seconds": ("seconds", "Quality against time", "seconds of pruning", "plain"),
    }
    key, title, x_label, x_form = axes[of]
    return Lines(
        f"{key}-{number}", title + (f" on {label(text, texts)}" if len(texts) > 1 else ""),
        "Perplexity, lower is better; bars run from the lowest to the highest draw. "
        "Names mark the methods that no other beats in both.",
        [series for series in every if series.points], x_label, "perplexity", x_form, "perplexity", log=True, falls=of == "params",
        note=_left_out(result["rows"], text), below=True, x_ticks=_sizes(rows) if of == "params" else [],
    )  # fmt: skip


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Parameters of the largest model of each size, without those too close to another; empty if there are many sizes."""
    largest: dict[int | None, float] = {}
    for row in rows:
        if row["texts"]:
            largest[row["size"]] = max(largest.get(row["size"], 0.0), float(row["params"]))
    sizes: list[float] = []
    for size in sorted(largest.values(), reverse=True):
        if not sizes or sizes[-1] - size > _APART * (max(largest.values()) - min(largest.values())):
            sizes.append(size)
    return sizes if len(sizes) <= _MOST_SIZES else []


def comparison_page(
    result: Mapping[str, Any],
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    name: str,
    sparse: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> str:
    """The page as HTML.

    Args:
        result: the content of `compare.json`.
        header: header of the full table, from `compare.table.table`.
        lines: its rows; a row with only its first cell filled is a heading of the rows below.
        name: name of the folder.
        sparse: header and rows of the table of methods that make zeros, if there are any.
    """
    arguments, rows = result["arguments"], result["rows"]
    sizes = [size for size in dict.fromkeys(row["size"] for row in rows) if size is not None]
    return rendered(
        "comparison.html", name=name, model=Path(arguments["model"]).name, counted=_counted(result), params=rows[0]["params"],
        winners=_winners(result, sizes), matrices=[_matrix(result, text, sizes) for text in _texts(result) if sizes],
        charts=comparison_pictures(result), tables=[(header, lines), *([sparse] if sparse else [])], failures=failures(result),
        tokens_note=tokens_note(result), facts=_facts(result),
    )  # fmt: skip


def _counted(result: Mapping[str, Any]) -> str:
    """How many methods were compared, at how many sizes and patterns of zeros."""
    zeros = result.get("sparse_rows") or []
    methods = {row["method"] for row in [*result["rows"], *zeros]} - {"dense"}
    sizes = {row["size"] for row in result["rows"] if row["size"] is not None}
    patterns = {row["sparsity"] for row in zeros if row["method"] != "dense"}
    at = [counted(len(sizes), "size")] if sizes or not patterns else []
    at += [f"{counted(len(patterns), 'pattern')} of zeros"] if patterns else []
    return f"{counted(len(methods), 'method')} at {' and '.join(at)}"


def _texts(result: Mapping[str, Any]) -> list[str]:
    return list(result["rows"][0]["texts"])


def label(text: str, texts: Sequence[str]) -> str:
    """A short name of a text: the last two parts of a path without its ending, or the SPEC if it is not a path."""
    names = ["/".join([*Path(spec).parts[-2:-1], Path(spec).name.partition(".")[0]]) for spec in texts]
    name = names[list(texts).index(text)]
    return name if names.count(name) == 1 and len(name) < len(text) else text


def num_draws(arguments: Mapping[str, Any]) -> int:
    """Calibration draws that a comparison asks for: files of token ids, or seeds if there are no files."""
    return len(arguments["calibration_ids"]) or int(arguments["draws"])


def texts_in_words(result: Mapping[str, Any]) -> str:
    """The texts of a comparison and how much of each was read."""
    return "; ".join(
        f"{text['text']} ({counted(text['windows'], 'window')}, {text['tokens']:,} tokens)" for text in result["texts"]
    )


def failures(result: Mapping[str, Any]) -> list[str]:
    """A line for each cell that failed."""
    return [
        f"{cell['method']}, {cell.get('sparsity') or 'at most ' + format(cell['size'], ',')}, draw {cell['draw']}: {cell['error']}"
        for cell in result.get("cells", [])
        if "error" in cell
    ]


def tokens_note(result: Mapping[str, Any]) -> str:
    """A sentence on how models with fewer tokens are measured; empty if all have the dense model's tokens."""
    dense, *others = (row.get("vocab_size") for row in [*result["rows"], *(result.get("sparse_rows") or [])])
    fewer = sorted({size for size in others if size not in (None, dense)})
    if not fewer or dense is None:
        return ""
    counts = " or ".join(f"{size:,}" for size in fewer)
    return (
        f"Pruned models have a vocabulary of {counts} tokens, the dense one {dense:,}. All read the same text, and perplexity counts "
        "the dense model's tokens, so that it compares."
    )


def _perplexity(row: Mapping[str, Any], text: str) -> float | None:
    figures = row["texts"].get(text) if row["texts"] else None
    return number_of(figures.get("perplexity")) if figures else None


def within(rows: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """The rows that a picture shows: those without figures, and those with a perplexity not too far above the dense model's.

    If the highest draw of a row lies further up, it is lowered to the edge of the picture. If no pruned model is near, all rows
    are shown.

    Args:
        rows: as `compare.table.rows_of` gives them, the dense model first.
        text: SPEC of the text.
    """
    dense = _perplexity(rows[0], text)
    if dense is None:
        return list(rows)
    near: list[Mapping[str, Any]] = []
    for row in rows:
        value = _perplexity(row, text)
        if not row["texts"]:
            near.append(row)
        elif value is not None and value <= _FAR * dense:
            figures = row["texts"][text]
            high = min(_FAR * dense, number_of(figures["high"]) or math.inf)
            near.append({**row, "texts": {**row["texts"], text: {**figures, "high": high}}})
    return near if any(row["texts"] for row in near[1:]) else list(rows)


def _left_out(rows: Sequence[Mapping[str, Any]], text: str) -> str:
    """A sentence on the rows that a picture leaves out because they lie too far above; empty if all are shown."""
    shown_rows = {(row["method"], row["size"]) for row in within(rows, text)}
    far: dict[str, list[str]] = {}
    for row in rows:
        if (row["method"], row["size"]) not in shown_rows:
            far.setdefault(row["method"], []).append(shown(row["size"], "params"))
    listed = "; ".join(f"{method} at {', '.join(sizes)}" for method, sizes in far.items())
    return f"Beyond {_FAR} times the dense model, and not shown: {listed}." if far else ""


def _front(rows: Iterable[Mapping[str, Any]], text: str, of: str) -> set[tuple[str, Any]]:
    """(method, size) of the rows that no other row beats in both perplexity and `of`; models of one size count as equal."""

    def cost(row: Mapping[str, Any]) -> float:
        if of == "params":
            return float(row["size"] or row["params"])
        return -float(row[of]) if of == "speed_up" else float(row[of])

    points = [
        (row["method"], row["size"], cost(row), value)
        for row in rows
        if row[of] and (value := _perplexity(row, text)) is not None
    ]
    return {
        (method, size) for method, size, x, y in points
        if not any(a <= x and b <= y and (a < x or b < y) for _, _, a, b in points)
    }  # fmt: skip


def _series(method: str, rows: Sequence[Mapping[str, Any]], text: str, of: str, front: set[tuple[str, Any]]) -> Series:
    points = [(float(row[of]), value, row) for row in rows if row[of] and (value := _perplexity(row, text)) is not None]
    ordered = sorted(points, key=lambda point: point[:2])
    lows, highs = (
        [value for *_, row in ordered if (value := number_of(row["texts"][text][key])) is not None] for key in ("low", "high")
    )
    spread = lows != highs and len(lows) == len(highs) == len(ordered)
    dense = method == "dense"
    name = _named(method, rows, text)
    labels = [name if (method, row["size"]) in front else "" for *_, row in ordered]
    if dense:
        labels = [f"dense {shown(y, 'perplexity')}" for _, y, _ in ordered]
    return Series(
        name,
        [(x, y) for x, y, _ in ordered],
        lows if spread else [],
        highs if spread else [],
        dots=True,
        star=dense,
        labels=labels,
    )


def _named(method: str, rows: Sequence[Mapping[str, Any]], text: str) -> str:
    """The method, and whether it was calibrated on the kind of text that is measured."""
    in_domain = any(row["method"] == method and text in (row.get("in_domain") or ()) for row in rows)
    return f"{method} (in-domain)" if in_domain else method


def _matrix(result: Mapping[str, Any], text: str, sizes: Sequence[int]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and caption: perplexity by method and size, its ratio to the dense model's, and bits per byte if known."""
    rows = [row for row in result["rows"] if row["method"] != "dense"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    best = {
        size: min((value for row in rows if row["size"] == size and (value := _perplexity(row, text)) is not None), default=None)
        for size in sizes
    }

    def words(row: Mapping[str, Any]) -> str:
        value = _perplexity(row, text)
        if value is None:
            return "∞" if text in row["texts"] else "–"
        ratio, bits = (number_of(row["texts"][text].get(key)) for key in ("ratio", "bits_per_byte"))
        star = "★ " if value == best[row["size"]] and len(methods) > 1 else ""
        times = f" ({shown(ratio, 'times')})" if ratio is not None else ""
        return f"{star}{shown(value, 'perplexity')}{times}" + (f", {bits:.3f} bits" if bits is not None else "")

    cells = {(row["method"], row["size"]): words(row) for row in rows}
    lines = [[_named(method, rows, text), *(cells.get((method, size), "–") for size in sizes)] for method in methods]
    dense = _perplexity(result["rows"][0], text)
    caption = (
        f"Perplexity on {text}; dense {shown(dense, 'perplexity')}; in brackets its ratio to "
        "the dense model’s; ★ marks the lowest of a size"
        + ("; bits are per byte of text" if any(" bits" in cell for line in lines for cell in line) else "")
    )
    return ["method", *(f"at most {shown(size, 'params')}" for size in sizes)], lines, caption


def _winners(result: Mapping[str, Any], sizes: Sequence[int]) -> str:
    text = _texts(result)[0]
    winning = []
    for size in sizes:
        measured = [
            (value, _named(row["method"], [row], text))
            for row in result["rows"]
            if row["size"] == size and (value := _perplexity(row, text)) is not None
        ]
        if len(measured) > 1:
            winning.append((min(measured)[1], shown(size, "params")))
    winners = {method for method, _ in winning}
    if len(winners) == 1 and len(winning) > 1:
        return f"{winners.pop()} has the lowest perplexity at each of them."
    return f"Lowest perplexity: {', '.join(f'{method} at {size}' for method, size in winning)}." if winning else ""


def _facts(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    arguments = result["arguments"]
    return [
        ("model", arguments["model"]), ("dequantised from", result.get("dequantised")), ("text", texts_in_words(result)),
        ("windows", f"of {arguments['window']} tokens, {result['precision']}, {result['device']}"), ("draws", num_draws(arguments)),
        ("calibration", arguments["calibration"]), ("changed", ", ".join(arguments["overrides"])), ("made by", result["made_by"]),
    ]  # fmt: skip
