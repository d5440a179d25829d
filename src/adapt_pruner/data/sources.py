"""Where text comes from: a SPEC, as typed on the command line, becomes documents; a mixture is several SPECs with weights.

notes.txt                     one document
books/  'corpus/*/*.jsonl.gz' every .txt, .md, .jsonl[.gz|.zst] (or .ndjson…) and .parquet below a folder, but for hidden files and what we
                              wrote, or under a glob; a glob also .json.gz|.zst
data.jsonl.gz  data.parquet   one document a row: its field `text`, or a conversation in its field `messages`
saved/                        a folder written by `datasets.save_to_disk`; rows as above
hub:NAME[:config][:split][:field]   a data set by its name, streamed by the datasets library (split `train`, field `text`)
python-docs[:train|:heldout]  Python's own language reference, which comes with Python
self                          self-written text (see data.selfwritten; needs the model)
self-chat[:SPEC]              conversations whose answers the dense model writes (see data.conversations; needs the model); to the
                              prompts of the conversations of SPEC, or to ours and to prompts that it draws itself

SPEC#train  SPEC#heldout      for any of these: the part to train on, or the held-out part, one document in 20

A text of fewer than 100 documents that are no conversations is split by pieces instead. Each document is cut at blank lines into
pieces of about 4,000 characters, and one piece in ten is held out.

Near copies of the held-out part are left out of the part to train on: documents that stand in it for half of their length or
more, or, of pieces, such lines. Of conversations only what the assistant says counts. A hub data set is not searched for them.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt_pruner.data import readers
from adapt_pruner.data.copies import Passages
from adapt_pruner.errors import UsageError

SELF, SELF_CHAT = "self", "self-chat"
Source = str | Mapping[str, float]
"""A SPEC, or a mixture: SPEC -> its weight, positive; weights need not sum to 1."""

_PARTS = ("train", "heldout")
_HELD_OUT = 20  # one document in this many is held out
_FEW = 100  # with fewer documents, pieces are held out instead
_PIECE, _HELD_OUT_PIECE = 4_000, 10  # characters of a piece; one piece in this many is held out
_COPIED = 0.5  # share of a text in the held-out part from which it counts as a near copy of that
_FORMULA = 2  # a passage that comes more often in the held-out part is a formula of the text, and no copy
MAX_HUB_DOCUMENTS = 200_000
COMPARED = 10_000
"""Documents of a hub data set that show whether it has changed, or shares passages with another text."""


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text with its name for messages.

    Attributes:
        name: file and row, data set and row, or topic.
        text: its text; for a conversation, the messages joined by a blank line.
        messages: for a conversation, the input of a chat template: objects with `role`, `content` and perhaps more.
    """

    name: str
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def learnt(self) -> str:
        """The text that training learns to predict: of a conversation, what the assistant says."""
        replies = (message["content"] for message in self.messages if message["role"] == "assistant")
        return "\n\n".join(replies) if self.messages else self.text

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text with its white space squeezed; documents with equal digests count as the same."""
        return hashlib.sha256(_squeezed(self.text).encode()).digest()


def documents(spec: str) -> list[str]:
    """The texts that `spec` names, in a fixed order; empty ones are left out. A hub data set gives its first 200,000.

    Args:
        spec: as described at the top of this file, except `self`.

    Raises:
        UsageError: nothing is there, it holds no text, or its content does not match its name; the message has the remedy.
    """
    return list(texts(spec))


def texts(spec: str) -> Iterator[str]:
    """The texts of `documents` one after another; nothing is read before it is asked for.

    Raises:
        UsageError: as `documents`, once the faulty place is reached.
    """
    return (document.text for document in beginning(spec, MAX_HUB_DOCUMENTS))


def beginning(spec: str, most: int) -> Iterator[Document]:
    """The documents of `read`, of a hub data set at most `most`."""
    return itertools.islice(read(spec), most if spec.startswith("hub:") else None)


def read(spec: str) -> Iterator[Document]:
    """The documents that `spec` names, one after another, in a fixed order; empty ones are left out.

    Raises:
        UsageError: as `documents`, once the faulty place is reached.
    """
    if written_spec(spec) is not None:
        raise written_nowhere(spec)
    base, part = _split(spec)
    kind, _, rest = base.partition(":")
    if kind == "python-docs":  # has a split of its own, whose parts share no paragraph
        whole = _python_docs(":".join(filter(None, (rest, part))) or "all")
    elif kind == "hub":
        whole = _of_part(_by_digest(itertools.starmap(_document, readers.hub(base))), spec, part)
    elif part:
        whole = _of_part(_units(base), spec, part, kept=_kept(base, readers.stamp(base)) if part == "train" else {})
    else:
        whole = itertools.starmap(_document, readers.local(base))
    empty = True
    for document in whole:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise UsageError(f"text {spec!r} is empty; name a file or folder that contains text")


def identity(spec: str) -> str | None:
    """What identifies a text without reading it: SPEC and revision for a hub data set; None for all others."""
    return f"{spec} {readers.hub_revision(_split(spec)[0])}" if spec.startswith("hub:") else None


def domains(source: Source) -> dict[str, float]:
    """SPEC -> its share of the tokens; the shares sum to 1.

    Raises:
        UsageError: there is no SPEC, a weight is not positive, or `self` is one of several.
    """
    for spec in source:
        if not isinstance(spec, str):
            raise UsageError(f"the text {spec!r} is not a string; quote it")
    if not all(spec.strip() for spec in ([source] if isinstance(source, str) else source)):
        raise UsageError(
            "the text's name is empty, perhaps because a shell variable is not set; name a file, a folder or another SPEC"
        )
    if isinstance(source, str):
        return {source: 1.0}
    for spec, weight in source.items():
        if not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise UsageError(f"the weight of {spec!r} is {weight!r}; give a number above 0, or leave that text out")
    if not source:
        raise UsageError("the mixture names no text; write it like {wiki.jsonl.gz: 3, books/: 1}")
    if SELF in source and len(source) > 1:
        raise UsageError("'self' cannot be part of a mixture; name it alone, or leave it out")
    total = math.fsum(source.values())
    return {spec: weight / total for spec, weight in source.items()}


def written_spec(spec: str) -> tuple[str, str] | None:
    """The SPEC without its part, and the part, of text that the dense model writes; None for any other text."""
    base, _, part = spec.partition("#") if spec.count("#") == 1 else (spec, "", "")
    if base not in (SELF, SELF_CHAT) and not base.startswith(f"{SELF_CHAT}:"):
        return None
    if part not in ("", *_PARTS):
        raise UsageError(f"text {spec!r} has no part {part!r}; known: {', '.join(_PARTS)}")
    return base, part


def written_nowhere(spec: str) -> UsageError:
    """The error to raise if nothing can write such a text."""
    return UsageError(
        f"text {spec!r} is written by the model of a run, and there is none here; name a file, a folder or a data set"
    )


def parts_of(spec: str) -> tuple[str, str]:
    """The SPECs of the part to train on and of the held-out part of the text that a SPEC, or a part of it, names."""
    base = spec.removesuffix("#train").removesuffix("#heldout")
    if base.partition(":")[0] == "python-docs":
        return "python-docs:train", "python-docs:heldout"
    return f"{base}#train", f"{base}#heldout"


def _split(spec: str) -> tuple[str, str]:
    """The SPEC before #train or #heldout, and the part; an empty part means the whole text."""
    base, mark, part = spec.rpartition("#")
    if not mark or Path(spec).exists() or not part.isalpha():
        return spec, ""
    if part not in _PARTS:
        raise UsageError(f"text {spec!r} has no part {part!r}; known: {', '.join(_PARTS)}")
    return base, part


def _of_part(
    units: Iterable[tuple[Document, str]], spec: str, part: str, *, kept: Mapping[int, str] = MappingProxyType({})
) -> Iterator[Document]:
    """The documents of one part, or all if `part` is empty. Of those whose number is in `kept` only that text is left."""
    number, given = 0, False
    for number, (document, part_of_unit) in enumerate(units, start=1):
        if part in ("", part_of_unit):
            left = replace(document, text=kept[number]) if number in kept else document
            given = given or bool(left.text)
            yield left
    if number and not given:
        raise UsageError(
            f"text {spec!r} is empty: all {len(kept):,} documents of that part stand in the held-out part, too; give a text that repeats itself less"
            if kept
            else f"text {spec!r} is empty: none of the {number:,} documents of {_split(spec)[0]!r} falls in that part, since one in {_HELD_OUT} "
            "is held out; give a text with more documents, or another one"
        )


def _by_digest(documents: Iterable[Document]) -> Iterator[tuple[Document, str]]:
    """Documents with their parts."""
    return ((document, _part(document)) for document in documents if document.text.strip())


def _units(base: str) -> Iterator[tuple[Document, str]]:
    """The documents of a local text, or the pieces of few documents, with their parts."""
    documents = itertools.starmap(_document, readers.local(base))
    begun = list(itertools.islice(documents, _FEW))
    if len(begun) == _FEW or any(document.messages for document in begun):
        yield from _by_digest(itertools.chain(begun, documents))
        return
    parts = [
        _Piece(f"{document.name}, piece {number}", piece)
        for document in begun
        for number, piece in enumerate(pieces(document.text), start=1)
    ]
    if begun and len(parts) <= _HELD_OUT_PIECE // 2:
        raise UsageError(
            f"the text {base!r} has {sum(len(piece.text) for piece in parts):,} characters, too few to train on one part and hold out "
            f"another; give at least {_HELD_OUT_PIECE * _PIECE:,}"
        )
    yield from (
        (piece, "heldout" if number % _HELD_OUT_PIECE == _HELD_OUT_PIECE // 2 else "train") for number, piece in enumerate(parts)
    )


class _Piece(Document):
    """A piece of a long document."""


@functools.lru_cache(maxsize=8)
def _kept(base: str, stamp: Hashable) -> Mapping[int, str]:
    """What is left of those units of the training part that repeat the held-out part: the number of the unit, from 1 -> its text.

    Args:
        base: a local text.
        stamp: changes when the text does.
    """
    held_out = Passages((document.learnt for document, part in _units(base) if part == "heldout"), most=_FORMULA)
    training, same = itertools.tee(
        (number, document) for number, (document, part) in enumerate(_units(base), start=1) if part == "train"
    )
    kept = {}
    for (number, document), covered in zip(training, held_out.cover(document.learnt for _, document in same), strict=True):
        if isinstance(document, _Piece) and covered.any():
            kept[number] = _uncovered(document.text, covered)
        elif covered.any() and covered.mean() >= _COPIED:
            kept[number] = ""
    return kept


def _uncovered(text: str, covered: NDArray[np.bool_]) -> str:
    """The lines of a text of which nothing is covered; `covered` has the bytes of the text with single blanks."""
    lines, at = [], 0
    for line in text.split("\n"):
        size = len(_squeezed(line).encode())
        if not covered[at : at + size].any():
            lines.append(line)
        at += size + (size > 0)
    return "\n".join(lines)


def pieces(text: str) -> list[str]:
    """A text in pieces of `_PIECE` characters or a little more, cut at a blank line, otherwise at a line end or a blank."""
    parts, start = [], 0
    while start < len(text):
        stop = start + _PIECE
        cuts = [text.find(mark, stop, stop + _PIECE) for mark in ("\n\n", "\n", " ")]
        stop = next((cut for cut in cuts if cut >= 0), stop)
        parts.append(text[start:stop])
        start = stop
    return [piece for piece in parts if piece.strip()]


def _part(document: Document) -> str:
    return "train" if int.from_bytes(document.digest[:8], "big") % _HELD_OUT else "heldout"


def _document(name: str, content: str | list[Mapping[str, Any]]) -> Document:
    if isinstance(content, str):
        return Document(name, content)
    return Document(name, "\n\n".join(message["content"] for message in content), tuple(content))


def _python_docs(part: str) -> Iterator[Document]:
    """Python's language reference by topic; a tenth of it is held out and shares no paragraph with the rest."""
    if part not in ("all", *_PARTS):
        raise UsageError(f"python-docs has no part {part!r}; known: {', '.join(_PARTS)}")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "this Python was installed without pydoc_data, so python-docs is not available; give a text file"
        ) from error
    held_out = {name for name in topics if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0}
    # Topics quote each other, so paragraphs of the held-out topics are removed from the rest.
    held_out_paragraphs = {_squeezed(paragraph) for name in held_out for paragraph in topics[name].split("\n\n")}
    for name in sorted({"all": set(topics), "heldout": held_out, "train": set(topics) - held_out}[part]):
        paragraphs = topics[name].split("\n\n")
        if part == "train":
            paragraphs = [paragraph for paragraph in paragraphs if _squeezed(paragraph) not in held_out_paragraphs]
        yield Document(f"python-docs topic {name!r}", "\n\n".join(paragraphs))


def _squeezed(text: str) -> str:
    return " ".join(text.split())
