"""What can go wrong, in two kinds: a request that the user must change (UsageError), and a failure during work (RunError).

    Exception
    ├── UsageError (ValueError)    exit status 2: a wrong path, an unknown key, a budget out of reach
    └── RunError   (RuntimeError)  exit status 1: a full disk, a loss that is not a number, a damaged file

The message is one sentence with the value, the limit and the remedy; the command line prints it and nothing else.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_IN_PYTHON: ContextVar[bool] = ContextVar("in_python", default=False)


class UsageError(ValueError):
    """The request cannot be met as it is; the message says what to change."""

    raised_by_all = False  # see `of_all`


class RunError(RuntimeError):
    """The request was fine but the work failed. Nothing half-written has its final name."""

    raised_by_all = False


E = TypeVar("E", bound=UsageError | RunError)


@contextmanager
def spelled_for_python() -> Iterator[None]:
    """Let `option` and `settings` speak to a caller in Python until the end of the context."""
    before = _IN_PYTHON.set(True)
    try:
        yield
    finally:
        _IN_PYTHON.reset(before)


def option(name: str, value: Any = None) -> str:
    """An option in the caller's words, with an example: `--params 80%` in a shell, `params="80%"` in Python. True is a flag."""
    if _IN_PYTHON.get():
        return name if value is None else f"{name}={_literal(value)}"
    spelled = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
    return spelled if value is None or value is True else f"{spelled} {value}"


def settings(values: Mapping[str, Any]) -> str:
    """Keys of a recipe in the caller's words: `--set step=0.1` in a shell, `settings={"step": 0.1}` in Python."""
    if _IN_PYTHON.get():
        return f"settings={{{', '.join(f'{json.dumps(key)}: {_literal(value)}' for key, value in values.items())}}}"
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return " ".join(f"--set {key}={value}" for key, value in written.items())


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def of_all(error: E) -> E:
    """Mark an error that all processes of a run raise, so that only the main one prints it; returns the error."""
    error.raised_by_all = True
    return error


def is_of_all(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is marked by `of_all`."""
    cause = error.__cause__
    return getattr(error, "raised_by_all", False) or (cause is not None and is_of_all(cause))


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, in words for people; the kind of error if it says nothing."""
    if isinstance(error, OSError) and error.strerror:  # leaves out the number of the error
        return error.strerror[0].lower() + error.strerror[1:] + (f": {error.filename}" if error.filename else "")
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()]  # without colours
    announced = len(lines) > 1 and lines[0].endswith(":")  # the first line only announces the next
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(lines[: 1 + announced]))
    return re.sub(r"\b[A-Z]\w*Error: (?=\S)", "", said) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory: in Python, in torch on CPU or GPU, or for mapping a file."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return (
        isinstance(error, Exception) and re.search("allocate memory|not enough memory|memory allocation", str(error)) is not None
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the closest known word, or all of them if none is close."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"
