"""What a run still has to do, as an event: its phases in their order, how often each comes, and the operations that it takes."""

from typing import Literal

from typing_extensions import TypedDict

from adapt_pruner.core.events import Count, Event

__all__ = ["Item", "Planned"]


class Item(TypedDict):
    """A phase of a run.

    `phase` is one of `core.events.Progress`; `stage` is 0 before the first stage. `times` is how often the phase comes in that
    stage; it is an estimate if the phase is part of an iteration (`repeats`). `flops` are the operations of one time: 0 where
    they do not matter, None where nobody knows.
    """

    phase: str
    stage: Count
    times: Count
    flops: float | None
    repeats: bool


class Planned(Event):
    """A run was planned, and is about to read its text. A resumed run lists only what is still to come.

    Attributes:
        targets: parameters at the end of each stage.
        tokens: tokens still to be trained on in each stage.
        items: the phases in their order.
    """

    event: Literal["planned"] = "planned"
    logged = False
    targets: list[Count]
    tokens: list[Count]
    items: list[Item]
