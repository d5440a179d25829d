"""Text of others made safe to display: characters that control a terminal or reorder text are spelled out."""

import re

__all__ = ["one_line", "visible"]

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
