"""How far training will get in the time that is left, at its pace so far."""

import math
from collections import deque
from collections.abc import Callable

from adapt_pruner.core.system import world

_STEPS = 32  # the pace is that of the last so many steps, since on a shared machine it changes


class Pace:
    """How many tokens fit before a deadline; the slower the pace, the earlier the learning-rate curve ends.

    The pace is measured by the time left, so it includes all that happens between two steps (saving, the caller's work). The
    first step does not count, since it includes preparation. Every process uses the clock of the main process.
    """

    def __init__(
        self,
        seconds_left: Callable[[], float] | None,
        *,
        of_stage: Callable[[], float] | None = None,
        expected: float = math.inf,
    ) -> None:
        """Start the clock.

        Args:
            seconds_left: how many seconds training may still take; None stands for no deadline.
            of_stage: how many of these are left to the present stage; None stands for all.
            expected: tokens of the whole run that should be read by then, as long as the pace is not known.
        """
        self._seconds_left, self._of_stage, self._expected = seconds_left, of_stage or seconds_left, expected
        self._marks: deque[tuple[float, int]] = deque(maxlen=_STEPS + 1)  # (seconds left, tokens read) after each step

    def taken(self, tokens: int) -> None:
        """Note that a step was taken; `tokens` of the whole run are now read."""
        if self._seconds_left is not None:
            self._marks.append((self._left(), tokens))

    def reach(self, tokens: int) -> float:
        """The tokens of the whole run that will have been read when the time is up, at the pace so far; `tokens` are read now.

        Infinite without a deadline; before there is a pace it is what was expected.
        """
        if self._seconds_left is None:
            return math.inf
        if len(self._marks) < 2:
            return self._expected
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return tokens + (after - before) / max(first - last, 1e-9) * max(0.0, self._left())

    def is_up(self) -> bool:
        """Whether the stage has no time for another step: less than half of what each of the last steps took, on average."""
        if self._of_stage is None:
            return False
        each = (self._marks[0][0] - self._marks[-1][0]) / (len(self._marks) - 1) if len(self._marks) > 1 else 0.0
        return world.agreed(self._of_stage()) <= each / 2

    def _left(self) -> float:
        assert self._seconds_left is not None
        return world.agreed(self._seconds_left())
