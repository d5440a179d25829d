"""What can go wrong, in two kinds: what the user can mend in the command (UsageError), and what failed on the way (RunError).

    Exception
    ├── UsageError (ValueError)    exit status 2: a wrong path, an unknown key, a budget out of reach
    └── RunError   (RuntimeError)  exit status 1: a full disk, a loss that is not a number, a damaged file

The message is one sentence with the value, the limit and the remedy; the command line prints it and nothing else.
"""

import difflib
import re
from collections.abc import Iterable

__all__ = ["RunError", "UsageError", "first_line", "is_out_of_memory", "nearest"]


class UsageError(ValueError):
    """The request cannot be met as it stands; the message says what to change."""


class RunError(RuntimeError):
    """The request was fine and the work failed; nothing is half-written under its final name."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in words for people and without the rest; its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:  # without the number of the error
        return error.strerror[0].lower() + error.strerror[1:] + (f": {error.filename}" if error.filename else "")
    lines = [line.strip() for line in str(error).strip().splitlines()]
    announced = len(lines) > 1 and lines[0].endswith(":")  # by a line that says what follows
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(lines[: 1 + announced]))
    return re.sub(r"\b[A-Z]\w*Error: (?=\S)", "", said) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says that there is not enough memory: Python, torch on CPU or GPU, or a file that cannot be mapped."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return (
        isinstance(error, Exception) and re.search("allocate memory|not enough memory|memory allocation", str(error)) is not None
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of a sentence that names the closest known word, else all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"
