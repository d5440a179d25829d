"""Interrupts that wait for a safe moment, so that what was worked out so far can be saved before the work stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Held", "held"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Held:
    """Signals that have come while they were held.

    Attributes:
        pending: whether one has come.
    """

    def __init__(self) -> None:
        self.pending = False
        self._sent = signal.SIGINT
        self._handlers: dict[int, Any] = {}

    def hold(self) -> None:
        """Take, from now on, the place of the handlers there are; signals that the system handles or ignores stay as they are."""
        there = {sent: signal.getsignal(sent) for sent in _SIGNALS}
        self._handlers = {sent: handler for sent, handler in there.items() if callable(handler)}
        for sent in self._handlers:
            signal.signal(sent, self._hear)

    def let_go(self) -> None:
        """Put the handlers back; one whose signal came is called now."""
        for sent, handler in self._handlers.items():
            signal.signal(sent, handler)
        if self.pending:
            self.deliver()

    def deliver(self) -> None:
        """Call the handler of the signal that came.

        Raises:
            KeyboardInterrupt: the handler raised it, or none came to this process and another was interrupted.
        """
        self.pending = False
        handler = self._handlers.get(self._sent)
        if handler is not None:
            handler(self._sent, None)
        raise KeyboardInterrupt

    def _hear(self, sent: int, frame: Any) -> None:
        again, self.pending, self._sent = self.pending, True, signal.Signals(sent)
        if again and sent == signal.SIGINT:  # a second Ctrl-C waits for nothing
            self.deliver()


@contextmanager
def held(*, when: bool = True) -> Iterator[Held]:
    """While the context lasts SIGINT, SIGTERM and SIGHUP wait for `deliver`; a second SIGINT does not.

    Only signals that Python code handles wait: SIGTERM ends a program that has no handler for it, as ever. Outside the main thread,
    which alone may set handlers, or if not `when`, nothing waits.
    """
    signals = Held()
    if not when or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    signals.hold()
    try:
        yield signals
    finally:
        signals.let_go()
