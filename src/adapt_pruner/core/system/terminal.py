"""All text to the terminal passes through here: characters that would control a terminal are spelled out on stdout and stderr.

A pipe may end in a terminal too, so pipes get the same treatment. Our own colours and bars bypass the filter: rich writes them to
the streams beneath it, and the text given to rich has already been through `visible`.

`visible` makes text of others safe to display: characters that control a terminal or reorder text are spelled out.
"""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every command imports this file, but few draw with rich
    from rich.console import Console


class _Filtered:
    """A text stream whose `write` spells out control characters; everything else comes from the stream beneath."""

    def __init__(self, beneath: Any) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        """Write the text, and return the number of characters of `text` itself."""
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
    """Within this context stdout and stderr are filtered."""
    with redirect_stdout(_Filtered(sys.stdout)), redirect_stderr(_Filtered(sys.stderr)):
        yield


def console(*, stderr: bool = False, **options: Any) -> "Console":
    """Rich's console on the stream beneath the filter; pass text through `visible` before giving it to the console."""
    from rich.console import Console

    stream: Any = sys.stderr if stderr else sys.stdout
    while isinstance(stream, _Filtered):
        stream = stream.beneath
    return Console(file=stream, stderr=stderr, **options)


_BETWEEN = " · "


def fitted(parts: Sequence[str], width: int) -> list[str]:
    """Join the parts, with dots between them, into as few lines of `width` as possible; a part wider than a line breaks between its words."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(_BETWEEN) + len(part) <= width:
            lines[-1] += _BETWEEN + part
        else:
            lines += wrapped(part, width)
    return lines


def wrapped(text: str, width: int, *, indent: str = "") -> list[str]:
    """Break a text into lines between words; a word wider than a line, such as a path, stays whole."""
    return textwrap.wrap(
        text, max(1, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, expand_tabs=False,
        replace_whitespace=False,
    ) or [""]  # fmt: skip


_MOST = 500  # characters of `one_line`
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line end: ESC, BEL, and C1, some of which begin sequences
    "\u2028\u2029\u202a-\u202e\u2066-\u2069\u206a-\u206f\ufff9-\ufffb"  # line separators; embeddings, overrides, isolates of direction
    "\ud800-\udfff]"  # surrogates, which names of files may contain; they cannot be printed
)


def visible(text: str) -> str:
    r"""The text with each such character replaced by its escape, \x1b or \u202e; the rest is unchanged."""
    return _STEERING.sub(_spelled, text)


def one_line(text: str) -> str:
    """The text on one line, without such characters, and cut off after 500 characters."""
    return _STEERING.sub(" ", text.replace("\n", " ").replace("\t", " "))[:_MOST].strip()


def _spelled(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
