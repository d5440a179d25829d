"""A person's text in two parts: one to train on, and one held out."""

import hashlib
import json
from pathlib import Path

from adapt_pruner.core.files import write_whole
from adapt_pruner.data.sources import SELF, Document, read
from adapt_pruner.data.store import cache_folder
from adapt_pruner.errors import UsageError

__all__ = ["apart"]

_PIECE = 4_000  # characters of a piece of a document
_FEWEST = 40  # documents of which one in 20 makes a part
_ONE_IN = 10  # pieces is held out


def apart(spec: str, *, cache: Path | None = None) -> tuple[str, str, int]:
    """SPECs of the part to train on and of the part held out, and the characters of the first.

    A text of many documents is parted by documents (SPEC#train, SPEC#heldout). Of one of few the documents are cut into pieces of about
    4,000 characters, at blank lines where there are any; one in ten is held out, and the parts are kept in the cache folder.

    Args:
        spec: a text, or its train part.
        cache: folder for the pieces; by default `data.store.cache_folder()`.

    Raises:
        UsageError: there is no such text, it is the model's own, or it is too short to be parted.
    """
    if spec == SELF:
        raise UsageError("--text self would train the model on its own text; name a file, a folder or a data set")
    base = spec.removesuffix("#train")
    if base == "python-docs" or base.startswith("python-docs:"):
        parts = "python-docs:train", "python-docs:heldout"
        return *parts, sum(len(document.text) for document in read(parts[0]))
    if base.startswith("hub:"):
        return f"{base}#train", f"{base}#heldout", 10**12  # it is streamed, and taken to have no end
    documents = list(read(base))
    if len(documents) >= _FEWEST:
        try:
            characters = sum(len(document.text) for document in read(f"{base}#train"))
            next(read(f"{base}#heldout"))
        except UsageError:
            pass  # by chance all of few documents fell into one part
        else:
            return f"{base}#train", f"{base}#heldout", characters
    return _in_pieces(base, documents, (cache or cache_folder()) / "texts")


def _in_pieces(spec: str, documents: list[Document], cache: Path) -> tuple[str, str, int]:
    if any(document.messages for document in documents):
        raise UsageError(
            f"the text {spec!r} has only {len(documents)} conversations, of which none can be held out; give at least {_FEWEST}"
        )
    pieces = [piece for document in documents for piece in _pieces(document.text)]
    held_out = [piece for number, piece in enumerate(pieces) if number % _ONE_IN == _ONE_IN // 2]
    train = [piece for number, piece in enumerate(pieces) if number % _ONE_IN != _ONE_IN // 2]
    if not held_out:
        raise UsageError(
            f"the text {spec!r} has {sum(map(len, pieces)):,} characters, too few to train on one part and hold out another; give at least "
            f"{_ONE_IN * _PIECE:,}"
        )
    folder = cache / hashlib.sha256("".join(document.text for document in documents).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("heldout", held_out)):
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps({"text": piece}) + "\n" for piece in part))
    return str(folder / "train.jsonl"), str(folder / "heldout.jsonl"), sum(map(len, train))


def _pieces(text: str) -> list[str]:
    """A text in pieces of `_PIECE` characters or a little more, cut at a blank line, else at a line's end or a blank."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + _PIECE
        cuts = [text.find(mark, stop, stop + _PIECE) for mark in ("\n\n", "\n", " ")]
        stop = next((cut for cut in cuts if cut >= 0), stop)
        pieces.append(text[start:stop])
        start = stop
    return [piece for piece in pieces if piece.strip()]
