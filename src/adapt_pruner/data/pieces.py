"""Token ids of a long text, piece by piece: the same ids as for the whole text, with much less memory than encoding it whole."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
CHARACTERS = 2**20  # of a group of texts that are handled together, or of a piece of a longer one
_PIECE = 2**17  # characters encoded at one time; a tokenizer meanwhile needs some 165 bytes per character
_OVERLAP = 2**12  # characters that two pieces share

Ids = NDArray[np.int64]


def by_characters(items: Iterable[tuple[str, T]]) -> Iterator[list[T]]:
    """The items in groups whose texts are together about `CHARACTERS` long."""
    group: list[T] = []
    characters = 0
    for text, item in items:
        group.append(item)
        characters += len(text)
        if characters >= CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def ids_in_pieces(tokenizer: Any, parts: Iterable[str]) -> Iterator[Ids]:
    """The ids of `tokenizer(text)`, some at a time, for the text that `parts` form one after another; reads only as far as asked.

    Pieces overlap. Two pieces are joined if they have the same tokens and the same words at the same places throughout the middle
    half of their overlap. No token crosses that place, so the ids before and behind it are those of the whole text. If the pieces
    differ (a long number that is cut every three digits), the first piece is made longer.

    This holds for byte-pair encoding by a fast tokenizer. With any other tokenizer the text is encoded whole.
    """
    around = _added(tokenizer)
    if around is None:
        yield np.array(tokenizer("".join(parts), verbose=False)["input_ids"], np.int64)
        return
    before, after = around
    yield np.array(before, np.int64)
    yield from _pieces(tokenizer, _Text(parts))
    yield np.array(after, np.int64)


class _Text:
    """A text that is read part by part as needed; `front` looks at its beginning."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts, self._held, self._at = iter(parts), "", 0

    def front(self, size: int) -> str:
        """At most `size` characters; fewer at the end of the text."""
        new, count = [], len(self._held) - self._at
        while count < size and (part := next(self._parts, None)) is not None:
            new.append(part)
            count += len(part)
        if new:
            self._held, self._at = "".join([self._held[self._at :], *new]), 0
        return self._held[self._at : self._at + size]

    def drop(self, size: int) -> None:
        self._at += size


def _pieces(tokenizer: Any, text: _Text) -> Iterator[Ids]:
    size = _PIECE
    if len(text.front(size + 1)) <= size:
        yield np.array(tokenizer(text.front(size), add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        return
    piece = _encoded(tokenizer, text.front(size))
    first = 0  # first token of this piece that has not been yielded
    while len(text.front(size + 1)) > size:
        shift = size - _OVERLAP
        behind = _encoded(tokenizer, text.front(shift + _PIECE)[shift:])
        shared, same = piece.shared(shift), behind.shared(0)
        if shared.start < shared.stop and np.array_equal(piece.table[shared] - [0, shift, 0], behind.table[same]):
            yield piece.table[first : shared.start, 0]
            text.drop(shift)
            piece, first, size = behind, same.start, _PIECE
        else:
            size *= 2
            piece = _encoded(tokenizer, text.front(size))
    yield piece.table[first:, 0]


@dataclass(frozen=True)
class _Piece:
    """Tokens of a piece.

    Attributes:
        table: int64 [tokens, 3]: its id, the character at which it begins, whether it begins a word of the pre-tokenizer.
    """

    table: NDArray[np.int64]

    def shared(self, shift: int) -> slice:
        """The tokens that begin in the middle half of an overlap that begins at character `shift`."""
        start, stop = np.searchsorted(self.table[:, 1], [shift + _OVERLAP // 4, shift + 3 * _OVERLAP // 4])
        return slice(int(start), int(stop))


def _encoded(tokenizer: Any, text: str) -> _Piece:
    """The tokens of a piece of text, without special tokens that the tokenizer would add."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    words = np.array([-1 if word is None else word for word in encoding.word_ids()], np.int64)
    starts = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    return _Piece(np.stack([np.array(encoding["input_ids"], np.int64), starts, np.diff(words, prepend=-1) != 0], axis=1))


def _added(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """What a tokenizer adds before and after every text; None if it must encode a text whole."""
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if type(model).__name__ != "BPE" or model.dropout:
        return None
    whole, bare = (tokenizer("x", add_special_tokens=adds, verbose=False)["input_ids"] for adds in (True, False))
    for at in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return None
