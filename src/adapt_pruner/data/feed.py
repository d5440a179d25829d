"""`Feed`: training text on its way; which rows come next, told of what the model makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Feed", "Taken"]


class Taken(Protocol):
    """Rows that a feed has given: the same on every process, of which each looks at a part."""

    num_tokens: int
    """Of all rows together, padding left out."""

    def __len__(self) -> int:
        """Number of rows."""

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start` to `stop`: ids int64 [n, width], padded on the right, and bool [n, width], which of them are predicted.

        None in the place of the second where all are.
        """

    def domains(self, start: int, stop: int) -> Sequence[str]:
        """The text that each of these rows comes from, by its SPEC."""


class Feed(Protocol):
    """Training text on its way, the same on every process. One class a file of `data/`, which says `@part("feed")`.

    Its name in a recipe is that of its file. It is made with `rows`, all rows that there are, and with the options that its
    `__init__` takes by keyword.

    Attributes:
        num_tokens: of the whole run.
        wants_losses: whether `tell` is to be called; then a step works the rows of each text out apart.
    """

    num_tokens: int
    wants_losses: bool

    def ends(self, stage_tokens: Sequence[int]) -> list[int]:
        """The number of rows after which each stage ends, one stage after another."""

    def take(self, num_rows: int) -> Taken:
        """The next rows."""

    def tell(self, losses: Mapping[str, tuple[float, float]]) -> None:
        """Hear, after each step, of each text: the sum of the losses of its predicted tokens in nats, and their number."""

    def state(self) -> dict[str, Any]:
        """Everything that decides which rows come next, as plain data."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on, in place, from what `state` gave."""

    def skip_to(self, num_tokens: int) -> int:
        """Go on, in place, after so many tokens, as a run does whose text was replaced; the rows that lie before them."""
