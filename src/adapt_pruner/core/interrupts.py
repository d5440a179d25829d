"""Interrupts that wait for a safe moment, so that finished work can be saved before the program stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Deferred", "deferred"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Deferred:
    """Signals that arrived while they were held back.

    Attributes:
        pending: whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.pending = False
        self._sent = signal.SIGINT
        self._handlers: dict[int, Any] = {}

    def hold(self) -> None:
        """From now on, replace the present handlers; signals that the system handles or ignores stay as they are."""
        handlers = {sent: signal.getsignal(sent) for sent in _SIGNALS}
        self._handlers = {sent: handler for sent, handler in handlers.items() if callable(handler)}
        for sent in self._handlers:
            signal.signal(sent, self._hear)

    def let_go(self) -> None:
        """Put the handlers back; if a signal has arrived, call its handler now."""
        for sent, handler in self._handlers.items():
            signal.signal(sent, handler)
        if self.pending:
            self.deliver()

    def deliver(self) -> None:
        """Call the handler of the signal that arrived.

        Raises:
            KeyboardInterrupt: the handler raised it, or the signal reached another process and not this one.
        """
        self.pending = False
        handler = self._handlers.get(self._sent)
        if handler is not None:
            handler(self._sent, None)
        raise KeyboardInterrupt

    def _hear(self, sent: int, frame: Any) -> None:
        again, self.pending, self._sent = self.pending, True, signal.Signals(sent)
        if again and sent == signal.SIGINT:  # a second Ctrl-C takes effect at once
            self.deliver()


@contextmanager
def deferred(*, when: bool = True) -> Iterator[Deferred]:
    """Within this context SIGINT, SIGTERM and SIGHUP wait for `deliver`; a second SIGINT takes effect at once.

    Only signals that Python code handles are held: SIGTERM still ends a program without a handler for it. Nothing is held if
    `when` is false, or outside the main thread, which alone may set handlers.
    """
    signals = Deferred()
    if not when or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    signals.hold()
    try:
        yield signals
    finally:
        signals.let_go()
