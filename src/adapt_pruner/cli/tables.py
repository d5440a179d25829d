"""Results as tables on stdout."""

from collections.abc import Sequence

from rich.table import Table

from adapt_pruner.cli.streams import console
from adapt_pruner.core.visible import visible

__all__ = ["print_table"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: int = 1) -> None:
    """Print a table. The first `left` columns are words, the others are numbers."""
    table = Table(title=title and visible(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(visible(name), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    out = console(highlight=False, markup=False)
    if not out.is_terminal:  # a pipe or file has no width of its own
        out = console(highlight=False, markup=False, width=200)
    out.print(table)
