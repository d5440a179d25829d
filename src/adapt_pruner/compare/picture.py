"""The comparison as a picture: perplexity against parameters, one line a method, a bar from the lowest to the highest draw."""

import importlib.util
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt_pruner.compare.table import label
from adapt_pruner.core.files import whole_file
from adapt_pruner.report.comparison import left_out, within

__all__ = ["draw"]

# Okabe and Ito's colours, told apart by the colour-blind, without the yellow that paper swallows. Markers and dashes tell
# lines apart where there is no colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_GREY = "#555555"
_WIDTH, _HEIGHT = 5.6, 4.2  # inches of one panel
_APART, _TOP = 0.055, 0.98  # shares of the height: between two labels, and where the highest may be
_BESIDE = 0.12  # share of the width from which on names stand beside each other
_SIZES = 6  # as many are written out below the axis


def draw(result: Mapping[str, Any], folder: Path, *, warn: Callable[[str], None]) -> bool:
    """Write compare.svg and compare.png to `folder`, whole; whether there was anything to draw, and to draw with.

    Args:
        result: what `comparison.compare` returns.
        folder: where they go.
        warn: told in one sentence if matplotlib is not there.
    """
    if not any(math.isfinite(its["high"]) for row in result["rows"][1:] for its in row["texts"].values()):
        return False
    if importlib.util.find_spec("matplotlib") is None:
        warn("there is no picture, since matplotlib is not installed; pip install 'adapt-pruner[plot]' and run the same command")
        return False
    import matplotlib
    from matplotlib.figure import Figure

    texts = [text["text"] for text in result["texts"]]
    # The same figures give the same file: no date in it, and no random names.
    with matplotlib.rc_context({"svg.hashsalt": "adapt-pruner", "font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(_WIDTH * len(texts), _HEIGHT), layout="constrained")
        panels = figure.subplots(1, len(texts), squeeze=False)[0]
        for panel, text in zip(panels, texts, strict=True):
            _panel(panel, result["rows"], text, title=label(text, texts))
        figure.suptitle(f"{Path(result['arguments']['model']).name} pruned, not trained", fontsize=11, x=0.01, ha="left")
        figure.supxlabel(_caption(result), fontsize=7, color=_GREY, x=0.01, ha="left")
        for ending in ("svg", "png"):
            with whole_file(folder / f"compare.{ending}") as partial:
                figure.savefig(partial, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
    return True


def _caption(result: Mapping[str, Any]) -> str:
    draws = max(row["draws"] for row in result["rows"])
    spread = f"medians of {draws} draws, bars from the lowest to the highest; " if draws > 1 else ""
    windows = ", ".join(dict.fromkeys(str(text["windows"]) for text in result["texts"]))
    return f"{spread}{windows} windows of {result['arguments']['window']} tokens, {result['precision']}"


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]], text: str, *, title: str) -> None:
    """One text: the dense model, and a line a method from it down to its smallest size."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    every_row, rows, dense = rows, within(rows, text), rows[0]
    start = dense["params"] / 1e6, dense["texts"][text]["perplexity"]
    methods = dict.fromkeys(
        row["method"] for row in every_row[1:]
    )  # as they come in the table, the best at the largest size first
    ends = []
    for number, method in enumerate(methods):
        points = sorted(
            (row["params"] / 1e6, *(row["texts"][text][key] for key in ("perplexity", "low", "high")))
            for row in rows
            if row["method"] == method and row["texts"] and math.isfinite(row["texts"][text]["high"])
        )
        if not points:
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        xs, middles, lows, highs = (list(column) for column in zip(*points, strict=True))
        bars = [
            [m - low for m, low in zip(middles, lows, strict=True)],
            [high - m for m, high in zip(middles, highs, strict=True)],
        ]
        panel.plot([xs[-1], start[0]], [middles[-1], start[1]], color=colour, lw=0.8, alpha=0.45)
        panel.errorbar(
            xs, middles, yerr=bars, color=colour, marker=_MARKERS[number % len(_MARKERS)], markersize=5, lw=1.6, elinewidth=1.1,
            capsize=3, linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)], zorder=3,
        )  # fmt: skip
        ends.append((xs[0], middles[0], method, colour))
    panel.plot(*start, color="black", marker="*", markersize=9, zorder=4)
    panel.set_yscale("log")
    # Models of one size differ by less than a line is wide: the largest of them stands for the size.
    largest = {row["size"]: 0 for row in rows if row["texts"]}
    for row in rows:
        if row["texts"]:
            largest[row["size"]] = max(largest[row["size"]], row["params"])
    every = [params / 1e6 for params in largest.values()]
    room = (max(every) - min(every)) or 1.0
    widest = max(len(method) for *_, method, _ in ends) if ends else 0
    panel.set_xlim(min(every) - (0.12 + 0.024 * widest) * room, max(every) + 0.12 * room)  # names stand at the left
    if len(set(every)) <= _SIZES:
        panel.set_xticks(sorted(set(every)), [f"{size:,.1f}" if size >= 10 else f"{size:.3g}" for size in sorted(set(every))])
    low, high = panel.get_ylim()
    high = max(high, low * 1.6)
    panel.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)  # room for names
    ticks = _ticks(*panel.get_ylim())
    panel.set_yticks(ticks)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:.3g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.annotate(
        f"dense {start[1]:,.4g}", start, xytext=(0, -11), textcoords="offset points", ha="center", va="center", fontsize=8
    )
    _name(panel, ends)
    panel.set_title(title, fontsize=9, loc="left")
    far = textwrap.fill(left_out(every_row, text), 74)
    panel.set_xlabel("parameters (M)" + (f"\n{far}" if far else ""), fontsize=8)
    panel.set_ylabel("perplexity (log scale)")
    panel.grid(axis="y", color="#DDDDDD", lw=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log scale: 1, 2, 5 of each decade, and 1.5, 3, 7 where those are few; decades where they are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [1 + k / 10 for k in range(90)]):
        found = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
        if len(found) >= 4:
            break
    return found[:: -(-len(found) // 12)] if found else [low, high]


def _name(panel: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """The method's name to the left of its line's end, moved where it would lie on another's, with a thin line to it."""
    low, high = (math.log(limit) for limit in panel.get_ylim())
    left, right = panel.get_xlim()
    columns: list[list[tuple[float, float, float, float, str, str]]] = []  # ends that lie above each other, from left to right
    for x, y, method, colour in sorted(ends):
        across, up = (x - left) / (right - left), (math.log(y) - low) / (high - low)
        if not columns or across - columns[-1][0][0] > _BESIDE:
            columns.append([])
        columns[-1].append((across, up, x, y, method, colour))
    for column in columns:
        column.sort(key=lambda end: end[1])
        for (across, _, x, y, method, colour), at in zip(column, _spread([up for _, up, *_ in column]), strict=True):
            panel.annotate(
                method, (x, y), xytext=(across - 0.045, at), textcoords="axes fraction", ha="right", va="center", color=_darker(colour),
                fontsize=8.5, fontweight="bold", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 5},
            )  # fmt: skip


def _spread(heights: Sequence[float]) -> list[float]:
    """Ascending shares of the height, moved up until they are apart, and down again from the top where that is passed."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + _APART) if found else height)
    limit = _TOP
    for number in reversed(range(len(found))):
        found[number] = min(found[number], limit)
        limit = found[number] - _APART
    return found


def _darker(colour: str) -> str:
    """A colour that letters can be read in on white."""
    return "#" + "".join(f"{int(colour[i : i + 2], 16) * 7 // 10:02x}" for i in (1, 3, 5))
