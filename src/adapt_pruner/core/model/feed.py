"""`Feed`: decides which rows of the training text come next; it may go by the model's losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adapt_pruner.core.events import Event


@dataclass(frozen=True)
class Goal:
    """What the predictions of some rows are to become: the likeliest tokens by the model that wrote the rows.

    Attributes:
        tokens: int64 [predicted tokens, k], row by row.
        logs: float32, the same shape: log p of each.
    """

    tokens: Tensor
    logs: Tensor


class Taken(Protocol):
    """Rows that a feed has given. They are the same on every process, and each process reads a part of them."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together, without padding."""

    def __len__(self) -> int:
        """Number of rows."""

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start` to `stop`: ids int64 [n, width], padded on the right, and bool [n, width], which tokens are predicted.

        The second is None if all tokens are predicted.
        """

    def domains(self, start: int, stop: int) -> Sequence[str]:
        """The SPEC of the text that each of these rows comes from; a feed may leave a row without one."""

    def goals(self, start: int, stop: int) -> Sequence[Goal | None]:
        """For each of these rows the goal of its predicted tokens; None for a row that is learnt by the recipe's objective."""


class Feed(Protocol):
    """Gives the training text, the same on every process: a class with `@part("feed")`, one per file of `data/`.

    A recipe names it by its file. Its `__init__` gets `rows`, all rows of the run, and options by keyword.

    Attributes:
        wants_losses: whether `tell` is to be called. A step then computes the rows of each text separately.
    """

    wants_losses: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run; an estimate if the feed decides on the way which rows come."""

    def ends(self, stage_tokens: Sequence[int]) -> list[int]:
        """The number of rows that are read when each stage ends, stage by stage."""

    def take(self, num_rows: int) -> Taken:
        """The next rows."""

    def tell(self, losses: Mapping[str, tuple[float, float]]) -> None:
        """Hear the task's own loss, whatever is trained: SPEC of a text -> (sum over its predicted tokens in nats, their number)."""

    def news(self) -> Sequence[Event]:
        """Events that say how the feed has changed since this was last asked, in their order; the run tells them."""

    def inputs(self) -> Mapping[str, str]:
        """What it reads besides the rows: what people call it -> its fingerprint. A run goes on only if that is the same."""

    def state(self) -> dict[str, Any]:
        """The state that decides which rows come next, as plain data."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the state, in place, to what `state` returned."""

    def skip_to(self, num_tokens: int) -> int:
        """Go on after `num_tokens` tokens, in place, as a run does whose text was replaced; returns the rows before them."""
