"""Charts as PNG files for papers, by matplotlib (extra `plot`)."""

import importlib.util
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapt_pruner.core.files import whole_file, why
from adapt_pruner.core.words import shown, tick, ticks
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.report.charts import Anatomy, Chart, HeatMap, Histogram, Lines, Scores

__all__ = ["check_matplotlib", "write_pictures"]

_KEPT, _GONE, _HEAT = "#1f6f8b", "#d9722b", "Purples"
_COLOURS = ("#1f6f8b", "#d55e00", "#009e73", "#b65390", "#a87800", "#3f8fd0")
_MARKERS, _DASHES = ("o", "s", "^"), ("-", "--", ":")  # of the first turn through the colours, the second and the third
_WIDTH = 6.4  # inches


def check_matplotlib() -> None:
    """Refuse where matplotlib is not installed.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib; pip install 'adapt-pruner[plot]', or leave it out: the page needs nothing")


def write_pictures(pictures: Iterable[Chart], folder: Path, *, dpi: int = 200) -> list[Path]:
    """Write each chart as KEY.png to `folder`, each whole or not at all.

    Args:
        pictures: what to draw.
        folder: made where there is none.
        dpi: dots an inch; a picture is 6.4 inches wide.

    Returns:
        The files.

    Raises:
        UsageError: matplotlib is not installed.
        RunError: they cannot be written.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    with matplotlib.rc_context(
        {"font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}
    ):
        for chart in pictures:
            panels = len(chart.panels) if isinstance(chart, Anatomy) else 1
            height = 1.3 + 1.5 * panels if isinstance(chart, Anatomy) else 2.2 if isinstance(chart, Histogram) else 3.0
            figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            figure.suptitle(chart.title, fontsize=10, x=0.01, ha="left")
            _DRAWERS[type(chart)](figure, chart)
            path = folder / f"{chart.key}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as partial:
                    figure.savefig(partial, format="png", dpi=dpi)
            except OSError as error:
                raise RunError(f"{path} could not be written: {why(error)}; name another folder") from error
            written.append(path)
    return written


def _lines(figure: Any, chart: Lines) -> None:
    axes = figure.subplots()
    for number, series in enumerate(chart.series):
        colour = _COLOURS[0 if any(s.faint for s in chart.series) else number % len(_COLOURS)]
        xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
        look = {"alpha": 0.35, "lw": 0.8} if series.faint else {"lw": 1.6}
        turn = number // len(_COLOURS) % len(_MARKERS)
        marker = _MARKERS[turn] if series.dots else None
        axes.plot(xs, ys, color=colour, marker=marker, ls=_DASHES[turn], markersize=4, label=series.name, **look)
        if series.low:
            axes.fill_between(xs, series.low, series.high, color=colour, alpha=0.2, lw=0)
    for x, y, text in chart.named():
        away = {"xytext": (0, -5), "ha": "center", "va": "top"} if chart.below else {"xytext": (-4, 5), "ha": "right"}
        axes.annotate(text, (x, y), textcoords="offset points", fontsize=7.5, **away)
    for x, text in chart.marks:
        axes.axvline(x, color="#777777", lw=0.7, ls=":")
        if len(chart.marks) <= 12:
            axes.annotate(
                text, (x, 1), xycoords=("data", "axes fraction"), xytext=(2, -8), textcoords="offset points", fontsize=7
            )
    if len(chart.series) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(chart.series) > len(_COLOURS) else {}
        axes.legend(frameon=False, fontsize=7.5, **beside)
    if chart.note:
        figure.supxlabel(textwrap.fill(chart.note, 110), fontsize=7, color="#555555", x=0.01, ha="left")
    if chart.log:
        axes.set_yscale("log")
    if chart.below:
        low, high = axes.get_ylim()
        axes.set_ylim(low / (high / low) ** 0.12 if chart.log else low - (high - low) * 0.12, high)
    left, right = axes.get_xlim()
    places = [x for x in ticks(left, right, most=6) if left <= x <= right]
    axes.set_xticks(places, [tick(x, chart.x_form) for x in places])
    low, high = axes.get_ylim()
    heights = [y for y in ticks(low, high, log=chart.log, most=5) if low <= y <= high]
    axes.set_yticks(heights, [tick(y, chart.y_form) for y in heights])
    axes.minorticks_off()
    if chart.falls:
        axes.invert_xaxis()
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", color="#eeeeee")


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


_DRAWERS: dict[type, Any] = {Lines: _lines, HeatMap: _heatmap, Anatomy: _anatomy, Histogram: _histogram, Scores: _scores}
