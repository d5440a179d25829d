"""Where text comes from: a SPEC, as typed on the command line, becomes documents; a mixture is several SPECs with weights.

notes.txt                     one document
books/  'corpus/*/*.jsonl.gz' every .txt, .md, .jsonl[.gz|.zst] (or .ndjson…) and .parquet below a folder, but for hidden files and what we
                              wrote, or under a glob; a glob also .json.gz|.zst
data.jsonl.gz  data.parquet   one document a row: its field `text`, or a conversation in its field `messages`
saved/                        a folder written by `datasets.save_to_disk`; rows as above
hub:NAME[:config][:split][:field]   a data set by its name, streamed by the datasets library (split `train`, field `text`)
python-docs[:train|:heldout]  Python's own language reference, which comes with Python
self                          self-written text (see data.selfwritten; needs the model)

SPEC#train  SPEC#heldout      for any of these but `self`: the part to train on, or the held-out part, one document in 20

A text of fewer than 100 documents that are no conversations is split by pieces instead. Each document is cut at blank lines into
pieces of about 4,000 characters, and one piece in ten is held out.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt_pruner.data import readers
from adapt_pruner.errors import UsageError

__all__ = ["SELF", "Document", "Source", "beginning", "documents", "domains", "identity", "read", "texts"]

SELF = "self"
Source = str | Mapping[str, float]
"""A SPEC, or a mixture: SPEC -> its weight, positive; weights need not sum to 1."""

_PARTS = ("train", "heldout")
_HELD_OUT = 20  # one document in this many is held out
_FEW = 100  # with fewer documents, pieces are held out instead
_PIECE, _HELD_OUT_PIECE = 4_000, 10  # characters of a piece; one piece in this many is held out
_MAX_HUB_DOCUMENTS = 200_000


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
    return (document.text for document in beginning(spec, _MAX_HUB_DOCUMENTS))


def beginning(spec: str, most: int) -> Iterator[Document]:
    """The documents of `read`, of a hub data set at most `most`."""
    return itertools.islice(read(spec), most if spec.startswith("hub:") else None)


def read(spec: str) -> Iterator[Document]:
    """The documents that `spec` names, one after another, in a fixed order; empty ones are left out.

    Raises:
        UsageError: as `documents`, once the faulty place is reached.
    """
    base, part = _split(spec)
    kind, _, rest = base.partition(":")
    if kind == "python-docs":  # has a split of its own, whose parts share no paragraph
        whole, part = _python_docs(":".join(filter(None, (rest, part))) or "all"), ""
    else:
        whole = itertools.starmap(_document, readers.hub(base) if kind == "hub" else readers.local(base))
        if part and kind != "hub":
            begun = list(itertools.islice(whole, _FEW))
            if len(begun) < _FEW and not any(document.messages for document in begun):
                yield from _of_few(spec, part, begun)
                return
            whole = itertools.chain(begun, whole)
    yielded = count = 0
    for document in whole:
        if document.text.strip():
            count += 1
            if part in ("", _part(document)):
                yielded += 1
                yield document
    if count and not yielded:
        raise UsageError(
            f"text {spec!r} is empty: none of the {count:,} documents of {base!r} falls in that part, since one in {_HELD_OUT} "
            "is held out; give a text with more documents, or another one"
        )
    if not yielded:
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


def _split(spec: str) -> tuple[str, str]:
    """The SPEC before #train or #heldout, and the part; an empty part means the whole text."""
    base, mark, part = spec.rpartition("#")
    if not mark or Path(spec).exists() or not part.isalpha():
        return spec, ""
    if part not in _PARTS:
        raise UsageError(f"text {spec!r} has no part {part!r}; known: {', '.join(_PARTS)}")
    return base, part


def _of_few(spec: str, part: str, documents: Iterable[Document]) -> Iterator[Document]:
    """The pieces of one part of a text with few documents."""
    pieces = [
        Document(f"{document.name}, piece {number}", piece)
        for document in documents
        for number, piece in enumerate(_pieces(document.text), start=1)
    ]
    held_out = pieces[_HELD_OUT_PIECE // 2 :: _HELD_OUT_PIECE]
    if not held_out:
        raise UsageError(
            f"the text {spec!r} has {sum(len(piece.text) for piece in pieces):,} characters, too few to train on one part and hold out "
            f"another; give at least {_HELD_OUT_PIECE * _PIECE:,}"
        )
    yield from (
        held_out
        if part == "heldout"
        else (piece for number, piece in enumerate(pieces) if number % _HELD_OUT_PIECE != _HELD_OUT_PIECE // 2)
    )


def _pieces(text: str) -> list[str]:
    """A text in pieces of `_PIECE` characters or a little more, cut at a blank line, otherwise at a line end or a blank."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + _PIECE
        cuts = [text.find(mark, stop, stop + _PIECE) for mark in ("\n\n", "\n", " ")]
        stop = next((cut for cut in cuts if cut >= 0), stop)
        pieces.append(text[start:stop])
        start = stop
    return [piece for piece in pieces if piece.strip()]


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
