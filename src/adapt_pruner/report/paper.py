"""Charts as files for papers: SVG, and PNG made of it by vl-convert (extra `plot`)."""

import importlib.util
import math
import os
import re
import struct
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

from adapt_pruner.core.system.files import whole_file, why
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.report import svg
from adapt_pruner.report.charts import Beside, Chart, Lines
from adapt_pruner.report.template import environment

_SOFTWARE = "adapt-pruner"
_SCALE = 200 / 96  # from the units of SVG to 200 dots an inch
_WIDTH, _PANEL = 640.0, 560.0  # of a picture, and of one of several side by side
_HEIGHTS = {"": 250.0, "short": 150.0, "tall": 190.0, "low": 60.0, "heatmap": 200.0, "task": 36.0}
_LETTER, _BOLD = 6.2, 7.4  # width of a letter of 12 units, also in fonts that are wider than the first choice


def has_png() -> bool:
    """Whether PNG files can be written: vl-convert is installed."""
    return importlib.util.find_spec("vl_convert") is not None


def check_png() -> None:
    """Refuse to write PNG files if vl-convert is not installed.

    Raises:
        UsageError: it is not installed.
    """
    if not has_png():
        raise UsageError(f"--png needs vl-convert; {to_install('plot')}, or leave --png out, since the page does not need it")


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
    """Write each chart as KEY.png or KEY.svg to `folder`, each whole or not at all; the same figures give the same file.

    Args:
        pictures: what to draw.
        folder: made if it does not exist.
        endings: `svg`, and `png` if vl-convert is installed.

    Returns:
        The paths of the files.

    Raises:
        RunError: a file cannot be written.
    """
    written = []
    for chart in pictures:
        text = picture(chart)
        for ending in endings:
            path = folder / f"{chart.key}.{ending}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as partial:
                    partial.write_bytes(_png(text) if ending == "png" else text.encode())
            except OSError as error:
                raise RunError(f"{path} could not be written: {why(error)}; name another folder") from error
            written.append(path)
    return written


def _png(text: str) -> bytes:
    """The picture as PNG, marked as ours."""
    import vl_convert

    png = vl_convert.svg_to_png(text, scale=_SCALE)
    chunk = b"tEXt" + f"Software\0{_SOFTWARE}".encode()
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]  # after IHDR


class Name(NamedTuple):
    """The name of a line beside its end: where it begins or ends (`anchor`), how high its middle lies, and a thin line there."""

    text: str
    x: float
    y: float
    anchor: str
    tone: str
    lead: svg.Path


class Frame(NamedTuple):
    """A plot and where it lies; with `names` at the ends of its lines, only a star keeps its note."""

    plot: svg.Plot
    x: float
    y: float
    width: float
    height: float
    names: Sequence[Name]


@dataclass
class Sheet:
    """What lies on a picture: plots, signs of legends (x, y, class, opacity), words (x, y, text) and the height of it all."""

    frames: list[Frame] = field(default_factory=list)
    signs: list[tuple[float, float, str, float]] = field(default_factory=list)
    words: list[tuple[float, float, str]] = field(default_factory=list)
    height: float = 0.0

    def write(self, text: str, x: float, y: float, *, wide: float) -> None:
        """Add words in lines, in place."""
        for line in textwrap.wrap(text, int(wide / _LETTER)):
            self.words.append((x, y, line))
            y += 16
        self.height = max(self.height, y)


def picture(chart: Chart | Beside) -> str:
    """A chart as SVG that needs nothing else, in the colours of light pages."""
    panels, wide = (chart.panels, _PANEL) if isinstance(chart, Beside) else ([chart], _WIDTH)
    sheet, full = Sheet(), wide * len(panels)
    for number, panel in enumerate(panels):
        _lay_out(sheet, panel, number * wide, wide, heading=panel.title if isinstance(chart, Beside) else "")
    if isinstance(chart, Beside):
        sheet.write(chart.note, 10, sheet.height + 6, wide=full - 20)
    templates = environment()
    colours = dict(re.findall(r"--(\w+): (#\w+)", templates.get_template("page.css").render().partition("@media")[0]))
    style = re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], templates.get_template("marks.css").render())
    return templates.get_template("picture.svg").render(sheet=sheet, wide=full, title=chart.title, style=style, colours=colours)


def _lay_out(sheet: Sheet, chart: Chart, left: float, wide: float, *, heading: str) -> None:
    """Put a chart with its legend and note on the sheet, in place."""
    drawing = svg.drawing(chart)
    margin = max(75.0, 30 + _LETTER * max(len(text) for plot in drawing.plots for _, text in plot.ys))
    width = wide - margin - (80 if drawing.plots[0].values else 16)
    named = isinstance(chart, Lines) and sum(series.dots for series in chart.series) > 1
    if isinstance(chart, Lines):
        room = (24 + _BOLD * max(len(series.name) for series in chart.series)) / width if named else None
        drawing = svg.lines(replace(chart, short=False), size=(width, _HEIGHTS[""]), room=room)
    x, y = left + margin, 38.0
    for plot in drawing.plots:
        y += 16 * bool(heading or plot.heading)
        names = _names(chart, plot) if named and isinstance(chart, Lines) else []
        sheet.frames.append(Frame(replace(plot, heading=heading or plot.heading), x, y, width, _HEIGHTS[plot.look], names))
        y += _HEIGHTS[plot.look] + (42 if plot.x_label else 14)
    y += 8
    for key in () if named else drawing.legend:
        long = 20 * len(key.signs) + _LETTER * len(key.text)
        if x + long > left + wide:
            x, y = left + margin, y + 18
        for tag, opacity in key.signs:
            sheet.signs.append((x, y, tag, 1.0 if opacity is None else opacity))
            x += 84 if tag == "ramp" else 14
        sheet.words.append((x + 2, y, key.text.strip()))
        x += 18 * bool(key.text) + _LETTER * len(key.text)
    sheet.write(chart.note, left + margin, y + 20 * (not named), wide=width)


def _names(chart: Lines, plot: svg.Plot) -> list[Name]:
    """The name of each line near its last point, on no other name and little else."""
    wide, high = plot.size
    drawn = [path for path in plot.paths if path.tag.startswith(("thin", "line", "whisker"))]
    ink = [place for path in plot.paths if path.tag.startswith("dot") for (place,) in path.lines for _ in range(4)]
    for (a, b), (c, d) in (pair for path in drawn for line in path.lines for pair in pairwise(line)):
        steps = 1 + int(max(abs(c - a), abs(d - b)) / 4)  # places that are drawn on, at intervals
        ink += [(a + (c - a) * step / steps, b + (d - b) * step / steps) for step in range(steps + 1)]
    taken = [
        (wide * x, high * y + 8, wide * x + _LETTER * len(text), high * y + 24)
        for x, y, text in plot.notes
        if (x, y) in plot.stars
    ]
    ends = [(max(path.lines[0]), path.tag) for path in drawn if path.tag.startswith("line")]
    names = []
    of = zip(ends, (series.name for series in chart.series if not series.star), strict=True)
    for ((x, y), tag), text in sorted(of, reverse=True):
        best, long = math.inf, _BOLD * len(text)
        for side, up in product((1, -1), range(-60, 61, 3)):
            near = x + 10 * side
            box = (min(near, near + side * long), y + up - 8, max(near, near + side * long), y + up + 8)
            crossed = sum(box[0] - 2 < a < box[2] + 2 and box[1] < b < box[3] for a, b in ink)
            outside = box[0] < 0 or box[2] > wide or box[1] < 0 or box[3] > high
            apart = all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken)
            cost = abs(up) + 6 * (side < 0) + 8 * crossed + 1000 * (outside + (not apart))
            if cost < best:
                lead = svg.Path("thin", [[(near, y + up), (x, y)]] if abs(up) > 6 else [])
                tone = re.sub(r".*(tone\d).*", r"\1", tag)
                best, chosen = cost, (box, Name(text, near, y + up, "start" if side > 0 else "end", tone, lead))
        taken.append(chosen[0])
        names.append(chosen[1])
    return names
