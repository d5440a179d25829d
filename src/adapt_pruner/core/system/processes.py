"""Child processes that import no Python file of the current folder, exchange lines of JSON, and end with their parent.

    python -P -m adapt_pruner.core.system.processes PARENT MODULE [WORDS …]

runs a module as `python -m` does, until the module ends or the process PARENT ends, for whatever reason. On Linux the kernel
tells a process that its parent has ended. Elsewhere stdin tells it: stdin is a pipe, and its other end closes with the parent.

`deferred` lets interrupts wait for a safe moment, so that finished work can be saved before the program stops.
"""

import ctypes
import json
import os
import runpy
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from adapt_pruner.errors import RunError

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_PATIENCE = 30.0  # seconds that a process may tidy up after its parent has ended


def module(name: str, *words: str) -> list[str]:
    """The command that runs a module in a process that ends with this one; its stdin must be a pipe from this process."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), name, *words]


class Child:
    """A process that answers each line of JSON with a line of JSON."""

    def __init__(self, process: "subprocess.Popen[bytes]", silent: str) -> None:
        self._process, self._silent = process, silent

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def ask(self, question: Any) -> Any:
        """Send a question and return the answer.

        Raises:
            RunError: the process ended without an answer.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; `hear` reads what it said before, or raises
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        """The next line that the process says.

        Raises:
            RunError: the process ended without another line.
        """
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RunError(self._silent.replace("{status}", str(self._process.wait())))
        return json.loads(line)

    def read(self, count: int) -> bytes:
        """The `count` bytes that follow an answer.

        Raises:
            RunError: the process ended before that.
        """
        assert self._process.stdout is not None
        if len(data := self._process.stdout.read(count)) < count:
            raise RunError(self._silent.replace("{status}", str(self._process.wait())))
        return data


@contextmanager
def talking(command: Sequence[str], *, silent: str) -> Iterator[Child]:
    """Start a process that reads questions on stdin and answers on stdout, and kill it at the end; its stderr is dropped.

    Args:
        command: `module(…)`, or Python with -P and the path of a file that ends when its stdin is closed.
        silent: the error message if the process ends without an answer; `{status}` is its exit status.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        try:
            yield Child(process, silent)
        finally:
            with suppress(BrokenPipeError):  # the process may have ended before it read the last question
                process.stdin.close()
            process.kill()


def _end_with(parent: int) -> None:
    """End this process by SIGTERM, so that it tidies up, when its parent ends. The parent may have ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_pipe, daemon=True).start()


def _end_with_pipe() -> None:
    """Wait until the other end of stdin is closed, then end this process. Nothing is read from the pipe."""
    pipe = select.poll()
    pipe.register(0, 0)
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in pipe.poll()):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


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


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
