"""Split a user's text in two: one part to train on, and one held out."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapt_pruner.data.chat import encode_chats
from adapt_pruner.data.sources import SELF, Document, domains, parts_of, read
from adapt_pruner.errors import UsageError, option

_ENDLESS = 10**12  # characters of a data set that is streamed
_PLENTY = 500_000  # characters of a held-out part; more are not counted
_SAMPLE, _CHATS = 100_000, 200  # characters of a text, or conversations, that are tokenised for an estimate


@dataclass(frozen=True)
class Split:
    """The two parts of a text.

    Attributes:
        train: SPEC of the part to train on.
        held_out: SPEC of the part that is held out.
        characters: those of `train`.
        documents: those of `train`.
        held_out_characters: those of `held_out`, or 500,000 if there are more.
    """

    train: str
    held_out: str
    characters: int
    documents: int
    held_out_characters: int

    def tokens(self, tokenizer: Any, *, length: int) -> tuple[int, int]:
        """About how many tokens training reads of `train` in one pass, and how many `held_out` has.

        Plain text is estimated by the beginning of its first document. A conversation is one row, cut at `length` tokens, and is
        left out if the assistant says nothing by then. So conversations are estimated by the rows of the first 200.
        """
        documents = read(self.train)
        first = next(documents)
        sample = first.text[:_SAMPLE]
        each = len(tokenizer(sample, add_special_tokens=False)["input_ids"]) / len(sample)
        held_out = round(self.held_out_characters * each)
        if not first.messages:
            return round(self.characters * each), held_out
        chats = [first, *itertools.islice(documents, _CHATS - 1)]
        rows = [len(ids[:length]) for ids, marks in encode_chats(tokenizer, chats) if any(marks[1:length])]
        return round(self.documents * sum(rows) / len(chats)), held_out


def specs_of(spec: str) -> tuple[str, str]:
    """The SPECs of the two parts of a text, or of the text that a training part belongs to; nothing is read.

    Raises:
        UsageError: it has no name, is written by the model itself, or is a held-out part.
    """
    domains(spec)  # refuses an empty name
    if spec == SELF:
        raise UsageError(f"{option('text', 'self')} would train the model on its own text; name a file, a folder or a data set")
    if spec.endswith(("#heldout", ":heldout")):
        raise UsageError(
            f"{option('text', spec)} is a held-out part, which nothing may train on; name the whole text, of which shrink holds out a part itself"
        )
    return parts_of(spec)


def split_off_heldout(spec: str) -> Split:
    """Split a text in two, and count what is in the parts.

    Args:
        spec: a text, or its training part.

    Raises:
        UsageError: as `specs_of`, or there is no such text, or it is too short to split.
    """
    parts = specs_of(spec)
    if spec.startswith("hub:"):
        return Split(*parts, _ENDLESS, _ENDLESS, _PLENTY)
    held_out, _ = _counted(read(parts[1]), most=_PLENTY)
    return Split(*parts, *_counted(read(parts[0])), held_out)


def _counted(documents: Iterator[Document], *, most: float = math.inf) -> tuple[int, int]:
    """The characters and the number of documents, up to `most` characters."""
    characters = number = 0
    for document in documents:
        characters, number = characters + len(document.text), number + 1
        if characters >= most:
            break
    return int(min(characters, most)), number
