"""The events of a comparison, which has no log."""

from typing import Literal

from adapt_pruner.core import words
from adapt_pruner.core.events import Count, Event
from adapt_pruner.core.strict_json import perplexity_of
from adapt_pruner.core.words import millions, shown

__all__ = ["Cell", "CellDone", "Reused", "Said"]


class Reused(Event):
    """Cells of a comparison that are finished are used again."""

    event: Literal["reused"] = "reused"
    logged = False
    done: Count
    of: Count

    def line(self, begun: str = "dense") -> str:
        return f"{self.done} of {self.of} cells are finished and used again"


class _OfCell(Event):
    """What is told of a cell: number `cell` of `of`, a method, to `size` parameters, draw number `draw` of `draws` of its calibration text."""

    logged = False
    cell: Count
    of: Count
    method: str
    size: Count
    draw: Count
    draws: Count

    @property
    def name(self) -> str:
        """The cell for people."""
        which = f", draw {self.draw} of {self.draws}" if self.draws > 1 else ""
        return f"cell {self.cell} of {self.of}: {self.method} to {millions(self.size)}{which}"


class Cell(_OfCell):
    """A cell begins; `seconds_left` are those until all cells are done, None while nobody knows."""

    event: Literal["cell"] = "cell"
    seconds_left: float | None = None

    @property
    def left(self) -> str:
        """What is left of the time, for people."""
        return "" if self.seconds_left is None else f"about {words.span(self.seconds_left)} left"

    def line(self, begun: str = "dense") -> str:
        return self.name + (f", {self.left}" if self.left else "")


class CellDone(_OfCell):
    """A cell has ended: with its mean loss on the first text, `nll`, or an `error`."""

    event: Literal["cell_done"] = "cell_done"
    nll: float | None = None
    error: str | None = None

    def line(self, begun: str = "dense") -> str:
        perplexity = None if self.nll is None else perplexity_of(self.nll)
        came = f"perplexity {shown(perplexity, 'perplexity')}" if self.error is None else f"failed: {self.error}"
        return f"{self.name}: {came}"


class Said(Event):
    """A line that the process of a cell wrote."""

    event: Literal["said"] = "said"
    logged = False
    text: str

    @property
    def often(self) -> bool:
        return True

    def line(self, begun: str = "dense") -> str:
        return f"  {self.text}"
