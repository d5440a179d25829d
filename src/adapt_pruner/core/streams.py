"""The one way of text to the terminal: whoever prints on stdout or stderr, what would steer a terminal is spelled out.

A pipe may end in a terminal too, so it is the same there. Our own colours and bars go past the filter: rich writes them to the
streams beneath, and what it is given to show has been through `visible`.
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from adapt_pruner.core.visible import visible

if TYPE_CHECKING:  # every command imports this file, and few show what rich draws
    from rich.console import Console

__all__ = ["console", "filtered", "fitted", "wrapped"]


class _Filtered:
    """A text stream whose `write` spells out what steers a terminal; all else is that of the stream beneath."""

    def __init__(self, beneath: Any) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        """Write; the number of characters that were asked for."""
        self.beneath.write(visible(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


@contextmanager
def filtered() -> Iterator[None]:
    """Have stdout and stderr filtered, as they are now; afterwards they are as before."""
    with redirect_stdout(_Filtered(sys.stdout)), redirect_stderr(_Filtered(sys.stderr)):
        yield


def console(*, stderr: bool = False, **options: Any) -> "Console":
    """Rich's console on the stream beneath the filter; what it is given to show must have been through `visible`."""
    from rich.console import Console

    stream: Any = sys.stderr if stderr else sys.stdout
    while isinstance(stream, _Filtered):
        stream = stream.beneath
    return Console(file=stream, stderr=stderr, **options)


def fitted(parts: Sequence[str], width: int, *, between: str = " · ") -> list[str]:
    """Figures in as few lines of a width as they take; one that is wider than a line breaks between its words."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(between) + len(part) <= width:
            lines[-1] += between + part
        else:
            lines += wrapped(part, width)
    return lines


def wrapped(text: str, width: int, *, indent: str = "") -> list[str]:
    """A text in lines that break between words; a word that is wider than a line, such as a path, stays whole."""
    return textwrap.wrap(
        text, max(1, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, expand_tabs=False,
        replace_whitespace=False,
    ) or [""]  # fmt: skip
