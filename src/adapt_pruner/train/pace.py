"""How far training will come in the time that is left, by the pace it has had so far."""

import math
from collections import deque
from collections.abc import Callable

from adapt_pruner.core import world

__all__ = ["Pace"]

_STEPS = 32  # the last ones, by which the pace is measured: a machine that is shared has others by turns


class Pace:
    """What fits into a deadline: the end of the curve comes nearer as the pace is slower.

    Time is read from what is left of it, so all that happens between two steps (saving, the caller's work) counts. The first step,
    which makes ready, does not count. Every process goes by the main one's clock.
    """

    def __init__(self, seconds_left: Callable[[], float] | None) -> None:
        """`seconds_left` says how many seconds training may still take; None stands for no deadline."""
        self._seconds_left = seconds_left
        self._marks: deque[tuple[float, int]] = deque(maxlen=_STEPS + 1)  # (seconds left, tokens read) after each step

    def taken(self, tokens: int) -> None:
        """Hear that a step is taken, after `tokens` tokens of the whole run."""
        if self._seconds_left is not None:
            self._marks.append((self._left(), tokens))

    def reach(self, tokens: int) -> float:
        """The tokens of the whole run that will have been read when the time is up, if it goes on as it did; `tokens` are read now.

        Infinite without a deadline, and before there is a pace.
        """
        if self._seconds_left is None or len(self._marks) < 2:
            return math.inf
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return tokens + (after - before) / max(first - last, 1e-9) * max(0.0, self._left())

    def is_up(self) -> bool:
        """Whether there is no time for another step: less than half of what the last ones took each."""
        if self._seconds_left is None:
            return False
        each = (self._marks[0][0] - self._marks[-1][0]) / (len(self._marks) - 1) if len(self._marks) > 1 else 0.0
        return self._left() <= each / 2

    def _left(self) -> float:
        assert self._seconds_left is not None
        return world.agreed(self._seconds_left())
