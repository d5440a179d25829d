"""Results as tables on stdout. A number stays on one line: if the terminal is too narrow for a table, each row becomes a paragraph."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from adapt_pruner.core.system.terminal import console, fitted, visible, wrapped

_GAP = 2  # columns between two of a table
_WORDS = 24  # least width of a column of words, unless its words are shorter


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table. The first `left` columns are words, the others are numbers; a row with its first cell alone is a heading."""
    header, rows = list(map(visible, header)), [list(map(visible, row)) for row in rows]
    out = console(highlight=False, markup=False)
    if not out.is_terminal:  # a pipe or file has no width of its own
        out = console(highlight=False, markup=False, width=200)
    whole = [row for row in rows if any(row[1:]) or len(row) == 1]
    widest = [max([len(row[index]) for row in whole], default=0) for index in range(len(header))]
    least = [
        min(_WORDS, max(widest[index], len(name))) if index < left else max(widest[index], *map(len, name.split() or [""]))
        for index, name in enumerate(header)
    ]
    if sum(least) + _GAP * (len(header) - 1) > out.width:
        _print_paragraphs(out, header, rows, left)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    narrow = sum(max(*pair) for pair in zip(widest, map(len, header), strict=True)) + _GAP * (len(header) - 1) > out.width
    for index, name in enumerate(header):
        words = index < left
        folded = name if words or not narrow else "\n".join(wrapped(name, least[index]))
        table.add_column(folded, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _print_paragraphs(out: Console, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """Print each row as its words, and below them its numbers with their names, on as many lines as they need."""
    for row in rows:
        if not any(row[1:]):
            out.print(row[0], style="bold", soft_wrap=True)
            continue
        words = [
            cell if index == 0 else f"{name} {cell}"
            for index, (name, cell) in enumerate(zip(header[:left], row[:left], strict=True))
            if cell
        ]
        numbers = [
            f"{name} {cell}".strip() for name, cell in zip(header[left:], row[left:], strict=True) if cell not in ("", "–")
        ]
        for line in fitted([word.strip() for word in words], out.width):
            out.print(line, soft_wrap=True)
        for line in fitted(numbers, out.width - _GAP):
            out.print(" " * _GAP + line, soft_wrap=True)


def said_perplexities(figures: Mapping[str, Any]) -> str:
    """A run's perplexities at the start and after each stage, with that after the stage's cuts: `28.50 → 61.20 after the cuts → 32.10`."""
    after_cuts = figures.get("perplexities_after_cuts") or []
    words = []
    for value, cut in zip(figures["perplexities"], itertools.chain(after_cuts, itertools.repeat(None)), strict=False):
        words += [] if cut is None else [f"{cut:.2f} after the cuts"]
        words.append("–" if value is None else f"{value:.2f}")
    return " → ".join(words)
