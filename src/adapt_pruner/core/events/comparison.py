"""The events of a comparison; they are written to no log."""

from typing import Any

from adapt_pruner.core.events import Count, Event, Seconds, parse, words
from adapt_pruner.core.events.words import millions, shown
from adapt_pruner.core.system.strict_json import perplexity_of


class Reused(Event, kind="reused"):
    """Finished cells of a comparison are used again."""

    logged = False
    done: Count
    of: Count

    def line(self, begun: str = "dense") -> str:
        return f"{self.done} of {self.of} cells are finished and used again"


class _OfCell(Event):
    """Fields of an event about a cell: number `cell` of `of`, its method, its target `size`, for a method that makes zeros its `sparsity`, and draw `draw` of `draws`."""

    logged = False
    cell: Count
    of: Count
    method: str
    size: Count
    draw: Count
    draws: Count
    sparsity: str | None = None

    @property
    def name(self) -> str:
        """The cell's name for people."""
        which = f", draw {self.draw} of {self.draws}" if self.draws > 1 else ""
        goal = f"with {self.sparsity} zeros" if self.sparsity else f"to {millions(self.size)}"
        return f"cell {self.cell} of {self.of}: {self.method} {goal}{which}"


class CellBegun(_OfCell, kind="cell"):
    """A cell begins.

    Attributes:
        seconds_left: until all cells are done; None while nobody knows.
        seconds_here: of these, the seconds that this cell takes.
    """

    seconds_left: Seconds | None = None
    seconds_here: Seconds | None = None

    def line(self, begun: str = "dense") -> str:
        return self.name + ("" if self.seconds_left is None else f", about {words.span(self.seconds_left)} left")


class CellDone(_OfCell, kind="cell_done"):
    """A cell has ended: with its mean loss on the first text, `nll`, or an `error`."""

    nll: float | None = None
    error: str | None = None

    def line(self, begun: str = "dense") -> str:
        perplexity = None if self.nll is None else perplexity_of(self.nll)
        result = f"perplexity {shown(perplexity, 'perplexity')}" if self.error is None else f"failed: {self.error}"
        return f"{self.name}: {result}"


class CellLine(Event, kind="said"):
    """A line that the process of a cell wrote."""

    logged = False
    text: str

    @property
    def often(self) -> bool:
        return True

    def line(self, begun: str = "dense") -> str:
        return f"  {self.text}"


class InCell(Event, kind="in_cell"):
    """An event that the process of a cell told, in the form that listeners get."""

    logged = False
    said: dict[str, Any]

    @property
    def inner(self) -> Event | None:
        """The event; None where the process told something else."""
        return parse(self.said)

    @property
    def often(self) -> bool:
        return True

    def line(self, begun: str = "dense") -> str:
        text = "" if self.inner is None else self.inner.line(begun)
        return text and f"  {text}"
