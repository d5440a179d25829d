"""Charts as files for papers, drawn by matplotlib (extra `plot`)."""

import importlib.util
import os
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from adapt_pruner.core.files import whole_file, why
from adapt_pruner.core.provenance import to_install
from adapt_pruner.core.words import shown, tick, ticks
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.report.charts import Anatomy, Beside, Chart, HeatMap, Histogram, Lines, Scores

__all__ = ["check_matplotlib", "check_ours", "has_matplotlib", "write_pictures"]

_KEPT, _GONE, _HEAT = "#1f6f8b", "#d9722b", "Purples"
_COLOURS = ("#1f6f8b", "#d55e00", "#009e73", "#b65390", "#a87800", "#3f8fd0")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")  # for the first use of each colour, the second and the third
_SOFTWARE = "adapt-pruner"
_METADATA = {"svg": {"Date": None}, "png": {"Software": _SOFTWARE}}
_DPI = 200
_WIDTH, _PANEL = 6.4, (5.6, 4.2)  # inches: width of a picture, and size of one of several pictures side by side


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib() -> None:
    """Refuse to draw if matplotlib is not installed.

    Raises:
        UsageError: it is not installed.
    """
    if not has_matplotlib():
        raise UsageError(f"--png needs matplotlib; {to_install('plot')}, or leave --png out, since the page does not need it")


def check_ours(pictures: Iterable[Chart | Beside], folder: Path) -> None:
    """Refuse to write PNG files of these charts over files of the same names that are not ours.

    Raises:
        UsageError: such a file exists.
    """
    for path in (folder / f"{chart.key}.png" for chart in pictures):
        if os.path.lexists(path) and not _is_ours(path):
            raise UsageError(f"{path} exists and was not written by adapt-pruner; move it, or name another page with -o")


def _is_ours(path: Path) -> bool:
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return f"Software\0{_SOFTWARE}".encode() in file.read(1024)
    return False


def write_pictures(pictures: Iterable[Chart | Beside], folder: Path, *, endings: Sequence[str] = ("png",)) -> list[Path]:
    """Write each chart as KEY.png to `folder`, each whole or not at all; the same figures give the same file.

    Args:
        pictures: what to draw.
        folder: made if it does not exist.
        endings: kinds of files that matplotlib writes.

    Returns:
        The paths of the files.

    Raises:
        UsageError: matplotlib is not installed.
        RunError: a file cannot be written.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    look = {"font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}
    written = []
    with matplotlib.rc_context(look | {"svg.hashsalt": "adapt-pruner"}):  # so that ids in the SVG are not random
        for chart in pictures:
            figure = Figure(figsize=_size(chart), layout="constrained")
            figure.suptitle(chart.title, fontsize=10, x=0.01, ha="left")
            _DRAWERS[type(chart)](figure, chart)
            for ending in endings:
                path = folder / f"{chart.key}.{ending}"
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    with whole_file(path) as partial:
                        figure.savefig(partial, format=ending, dpi=_DPI, metadata=_METADATA.get(ending))
                except OSError as error:
                    raise RunError(f"{path} could not be written: {why(error)}; name another folder") from error
                written.append(path)
    return written


def _size(chart: Chart | Beside) -> tuple[float, float]:
    if isinstance(chart, Beside):
        return _PANEL[0] * len(chart.panels), _PANEL[1]
    return _WIDTH, 1.3 + 1.5 * len(chart.panels) if isinstance(chart, Anatomy) else 2.2 if isinstance(chart, Histogram) else 3.0


def _lines(figure: Any, chart: Lines) -> None:
    _beside(figure, Beside(chart.key, "", [replace(chart, title="", note="")], chart.note))


def _beside(figure: Any, chart: Beside) -> None:
    if chart.note:
        figure.supxlabel(textwrap.fill(chart.note, 110), fontsize=7, color="#555555", x=0.01, ha="left")
    panels = list(zip(figure.subplots(1, len(chart.panels), squeeze=False)[0], chart.panels, strict=True))
    for axes, panel in panels:
        axes.set_title(panel.title, fontsize=9, loc="left")
        _draw_lines(axes, panel)
        _scale(axes, panel)
    figure.draw_without_rendering()  # computes the layout
    for axes, panel in panels:
        if _names_at_ends(panel):
            _name_ends(axes, panel)


def _names_at_ends(chart: Lines) -> bool:
    """Whether names stand beside the lines instead of in a legend: if several lines have dots."""
    return sum(series.dots for series in chart.series) > 1


def _draw_lines(axes: Any, chart: Lines) -> None:
    for series, (turn, tone), lead in zip(chart.series, chart.looks(), chart.leads(), strict=True):
        colour, (xs, ys) = _COLOURS[tone], zip(*series.points, strict=True)
        if series.star:
            axes.plot(xs, ys, color="black", marker="*", markersize=9, zorder=4)
            continue
        if lead:
            axes.plot(*zip(*lead, strict=True), color=colour, lw=0.8, alpha=0.45)
        look = {"alpha": 0.35, "lw": 0.8} if series.faint else {"lw": 1.6}
        marker = _MARKERS[(turn * len(_COLOURS) + tone) % len(_MARKERS)] if series.dots else None
        axes.plot(xs, ys, color=colour, marker=marker, ls=_DASHES[turn % len(_DASHES)], markersize=5, label=series.name, **look)
        if series.low and series.dots:
            bars = [
                [y - low for y, low in zip(ys, series.low, strict=True)],
                [high - y for y, high in zip(ys, series.high, strict=True)],
            ]
            axes.errorbar(xs, ys, yerr=bars, color=colour, ls="none", elinewidth=1.1, capsize=3)
        elif series.low:
            axes.fill_between(xs, series.low, series.high, color=colour, alpha=0.2, lw=0)
    stars = [(*series.points[0], series.labels[0]) for series in chart.series if series.star]
    for x, y, text in stars if _names_at_ends(chart) else chart.named():
        away = {"xytext": (0, -5), "ha": "center", "va": "top"} if chart.below else {"xytext": (-4, 5), "ha": "right"}
        axes.annotate(text, (x, y), textcoords="offset points", fontsize=7.5, **away)
    for x, text in chart.marks:
        axes.axvline(x, color="#777777", lw=0.7, ls=":")
        if len(chart.marks) <= 12:
            axes.annotate(
                text, (x, 1), xycoords=("data", "axes fraction"), xytext=(2, -8), textcoords="offset points", fontsize=7
            )
    if len(chart.series) > 1 and not _names_at_ends(chart):
        axes.legend(frameon=False, fontsize=7.5)


def _scale(axes: Any, chart: Lines) -> None:
    """Set limits with room for words, round numbers on both axes, and their labels."""
    if chart.log:
        axes.set_yscale("log")
    if chart.below:
        low, high = axes.get_ylim()
        axes.set_ylim(low / (high / low) ** 0.12 if chart.log else low - (high - low) * 0.12, high)
    left, right = axes.get_xlim()
    axes.set_xticks(*zip(*chart.x_names(left, right, most=6), strict=True))
    low, high = axes.get_ylim()
    heights = [y for y in ticks(low, high, log=chart.log, most=5) if low <= y <= high]
    axes.set_yticks(heights, [tick(y, chart.y_form) for y in heights])
    axes.minorticks_off()
    if _names_at_ends(chart):
        side, room = (right - left) * 0.05, (right - left) * 0.02 * max(len(series.name) for series in chart.series)
        axes.set_xlim(*(left - room, right + side) if chart.falls else (left - side, right + room))
    if chart.falls:
        axes.invert_xaxis()
    axes.set_xlabel("\n".join(filter(None, (chart.x_label, textwrap.fill(chart.note, 74)))), fontsize=8)
    axes.set_ylabel(chart.y_label + " (log scale)" * chart.log, fontsize=8)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)


def _name_ends(axes: Any, chart: Lines) -> None:
    """Write each line's name near its last point, on no other name and little else; a thin line leads to a far name."""
    from matplotlib.colors import to_rgb
    from matplotlib.transforms import Bbox

    place, scale = axes.transData.transform, axes.figure.dpi / 72
    bars = [
        [(x, low), (x, high)] for one in chart.series for (x, _), low, high in zip(one.points, one.low, one.high, strict=False)
    ]
    ink = []  # pixels that are drawn on, sampled at intervals
    for line in (*chart.leads(), *(series.points for series in chart.series), *bars):
        for (a, b), (c, d) in pairwise(map(place, line)):
            steps = 1 + int(max(abs(c - a), abs(d - b)) / (3 * scale))
            ink += [(a + (c - a) * step / steps, b + (d - b) * step / steps) for step in range(steps + 1)]
    taken = [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    lines = [(series, tone) for series, (_, tone) in zip(chart.series, chart.looks(), strict=True) if not series.star]
    for series, tone in sorted(lines, key=lambda one: one[0].points[0 if chart.falls else -1], reverse=not chart.falls):
        end = series.points[0 if chart.falls else -1]
        colour = to_rgb(_COLOURS[tone])
        text = axes.annotate(
            series.name, end, (0, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight="bold", color=[0.7 * part for part in colour],
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 6},
        )  # fmt: skip
        x, y = place(end)
        wide, high = text.get_window_extent().width, 11 * scale
        candidates = []
        for side, up in product((1, -1), range(-60, 61, 3)):
            left, middle = x + side * 9 * scale - (wide if side < 0 else 0), y + up * scale
            box = Bbox.from_bounds(left, middle - high / 2, wide, high)
            cost = abs(up) + (side < 0) * 6 + 6 * sum(box.padded(2 * scale).contains(*point) for point in ink)
            cost += 1000 * (sum(map(box.overlaps, taken)) + (not (frame.contains(*box.min) and frame.contains(*box.max))))
            candidates.append((cost, side, up, box))
        _, side, up, box = min(candidates, key=lambda one: one[0])
        text.set(position=(9 * side, up), ha="left" if side > 0 else "right")
        text.set_in_layout(False)
        taken.append(box)


def _heatmap(figure: Any, chart: HeatMap) -> None:
    axes = figure.subplots()
    shades = [[float("nan") if shade is None else shade for shade in line] for line in chart.shades()]
    picture = axes.imshow(shades, aspect="auto", cmap=_HEAT, vmin=0, vmax=1, interpolation="nearest")
    every = max(1, -(-len(chart.columns) // 10))
    axes.set_xticks(range(0, len(chart.columns), every), chart.columns[::every])
    every = max(1, -(-len(chart.rows) // 8))
    axes.set_yticks(range(0, len(chart.rows), every), chart.rows[::every])
    axes.set_xlabel("layer")
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, ticks=[0, 1])
    bar.ax.set_yticklabels([chart.low, chart.high])
    bar.outline.set_visible(False)


def _anatomy(figure: Any, chart: Anatomy) -> None:
    tall = [3 if max(panel.total) > 64 else 1 for panel in chart.panels]
    rows = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False, height_ratios=tall)[:, 0]
    for axes, panel in zip(rows, chart.panels, strict=True):
        axes.bar(chart.layers, panel.left, color=_KEPT, width=0.85)
        bottom = list(panel.left)
        for number in reversed(range(len(panel.gone))):
            shade = 0.25 + 0.6 * (number + 1) / len(panel.gone)
            axes.bar(chart.layers, panel.gone[number], bottom=bottom, color=_GONE, alpha=shade, width=0.85)
            bottom = [a + b for a, b in zip(bottom, panel.gone[number], strict=True)]
        axes.set_ylabel(panel.name, fontsize=8)
        axes.set_ylim(0, max(panel.total))
        axes.set_yticks([0, max(panel.total)], ["0", f"{max(panel.total):,}"])
    every = max(1, -(-len(chart.layers) // 10))
    rows[-1].set_xticks(chart.layers[::every])
    rows[-1].set_xlabel(
        f"layer; gone ones light to dark: {chart.groups[0][0]} to {chart.groups[-1][0]}, {shown(chart.groups[-1][1], 'params')} left"
    )


def _histogram(figure: Any, chart: Histogram) -> None:
    axes = figure.subplots()
    half = len(chart.kept) // 2
    places = [(i - half) / 4 + 0.125 for i in range(len(chart.kept))]
    axes.bar(places, chart.removed, width=0.22, color=_GONE, label="removed")
    axes.bar(places, chart.kept, bottom=chart.removed, width=0.22, color=_KEPT, label="kept")
    axes.axvline(0, color="black", lw=1.2)
    known = [at for at, a, b in zip(places, chart.kept, chart.removed, strict=True) if a or b]
    low, high = min([*known, -1.0]) - 0.5, max([*known, 1.0]) + 0.5
    axes.set_xlim(low, high)
    powers = range(2 * round(low / 2), int(high) + 1, 2)
    axes.set_xticks(list(powers), [f"{2.0**power:g}×" for power in powers])
    axes.set_xlabel("score / cut line")
    axes.set_ylabel("units")
    axes.legend(frameon=False, fontsize=7.5)


def _scores(figure: Any, chart: Scores) -> None:
    axes = figure.subplots()
    for name, colour, shift, figures in (
        (chart.begun, "#a9b1b9", 0.2, [one.before for one in chart.scores]),
        ("now", _KEPT, -0.2, [one.now for one in chart.scores]),
    ):
        known = [(len(figures) - i + shift, 100 * of[0], 100 * (of[1] or 0)) for i, of in enumerate(figures) if of]
        if known:
            places, values, errors = zip(*known, strict=True)
            axes.barh(places, values, 0.38, xerr=errors, color=colour, label=name, error_kw={"lw": 0.8})
    for i, one in enumerate(chart.scores):
        if one.chance is not None:
            axes.plot([100 * one.chance] * 2, [len(chart.scores) - i - 0.42, len(chart.scores) - i + 0.42], color="black", lw=1.2)
    axes.set_yticks(range(len(chart.scores), 0, -1), [one.task for one in chart.scores])
    axes.set_xlim(0, 100)
    axes.set_xlabel("right, %")
    axes.legend(frameon=False, fontsize=7.5)


_DRAWERS: dict[type, Any] = {
    Lines: _lines,
    Beside: _beside,
    HeatMap: _heatmap,
    Anatomy: _anatomy,
    Histogram: _histogram,
    Scores: _scores,
}
