"""From documents to the rows that training reads: plain text is packed, a conversation gets a row of its own. Tokenised once."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adapt_pruner.data.chat import encode_chats
from adapt_pruner.data.pieces import CHARACTERS, by_characters
from adapt_pruner.data.sources import Document, identity, read
from adapt_pruner.data.store import Chunk, Store, stored
from adapt_pruner.data.tokens import opening
from adapt_pruner.errors import UsageError

_LEAST = 2**18  # tokens kept of a text, if it has as many


def tokenised(tokenizer: Any, spec: str, *, length: int, tokens: int, cache: Path | None, warn: Callable[[str], None]) -> Store:
    """Rows of at most `length` tokens from one text, with at least `tokens` tokens in all unless the text is shorter.

    The number of tokens is `tokens` rounded up by at most an eighth, and at least 2^18. So runs with other seeds, or with about as
    many tokens, find their rows on disk. Each run draws which rows it reads and in which order.

    Plain text: documents come in a random order, the same for all runs, each with an end-of-text token after it. They are cut
    into rows of `length`, and the rest at the end is dropped. If the tokenizer puts a start-of-text token before a text by
    itself, every document and every row begins with one (see `data.tokens.opening`): the model reads a row like a text of its
    own.

    Conversations: one per row, cut at `length`; those without an answer in that part are left out.

    A hub data set keeps its own order.

    Raises:
        UsageError: there is no such text, it gives no row, or it holds both plain text and conversations.
        RunError: the rows cannot be written.
    """
    revision = identity(spec)
    documents: Iterable[Document] = read(spec)
    if revision is None:
        in_order = list(documents)
        revision = _digest(in_order)
        documents = (in_order[index] for index in np.random.default_rng(0).permutation(len(in_order)))
    unit = 1 << max(0, tokens.bit_length() - 4)
    limit = max(_LEAST, -(-tokens // unit) * unit)
    made_from = {
        "text": revision,
        "tokenizer": _tokenizer_digest(tokenizer),
        "end": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "length": length,
        "limit": limit,
    }
    largest = max(tokenizer.get_vocab().values(), default=0)
    store = stored(
        made_from,
        lambda: _rows(tokenizer, spec, iter(documents), length, limit),
        dtype="<u2" if largest < 2**16 else "<u4",
        cache=cache,
        warn=warn,
    )
    if not len(store.ids):
        what = "is shorter than one block of" if store.mask is None else "has no conversation with an answer in its first"
        raise UsageError(f"the training text {spec!r} {what} {length} tokens; give more text or change training.length")
    if store.left_out:
        warn(f"{store.left_out:,} conversations of {spec!r} are left out: no answer in their first {length} tokens")
    return store


def _rows(tokenizer: Any, spec: str, documents: Iterator[Document], length: int, limit: int) -> Iterator[Chunk]:
    opening = next(documents)
    of_one_kind = _of_one_kind(itertools.chain([opening], documents), opening, spec)
    return _chats(tokenizer, of_one_kind, length, limit) if opening.messages else _packed(tokenizer, of_one_kind, length, limit)


def _of_one_kind(documents: Iterable[Document], opening: Document, spec: str) -> Iterator[Document]:
    for document in documents:
        if bool(document.messages) != bool(opening.messages):
            plain, chat = (opening, document) if document.messages else (document, opening)
            raise UsageError(
                f"text {spec!r} contains plain text ({plain.name}) and conversations ({chat.name}); make them two texts of a "
                "mixture"
            )
        yield document


def _packed(tokenizer: Any, documents: Iterable[Document], length: int, limit: int) -> Iterator[Chunk]:
    end, start = tokenizer.eos_token_id, opening(tokenizer)
    before = [] if start == [end] else start  # if start and end are the same token, one of them between two texts is enough
    rows_left = -(-limit // length)
    stream: list[int] = []
    for batch in by_characters((piece[0], piece) for document in documents for piece in _pieces(document.text)):
        texts = [text for text, _, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for ids, (_, first, last) in zip(encoded, batch, strict=True):
            stream += (before if first else []) + ids + ([end] if last and end is not None else [])
        rows, taken = _cut(stream, start, length, rows_left)
        yield Chunk(np.array([token for row in rows for token in row], np.uint32), np.full(len(rows), length, np.int64))
        stream = stream[taken:]
        rows_left -= len(rows)
        if not rows_left:
            return


def _cut(stream: list[int], start: list[int], length: int, most: int) -> tuple[list[list[int]], int]:
    """Rows from the front of a stream, each of `length` tokens and beginning with `start`; and the stream tokens used."""
    rows: list[list[int]] = []
    taken = 0
    while len(rows) < most:
        opens = [] if stream[taken : taken + 1] == start else start
        stop = taken + length - len(opens)
        if stop > len(stream):
            break
        rows.append(opens + stream[taken:stop])
        taken = stop
    return rows, taken


def _pieces(text: str) -> Iterator[tuple[str, bool, bool]]:
    """A text in pieces that fit in memory once tokenised, cut before a blank; for each, whether it is the first and the last."""
    start = 0
    while start < len(text):
        stop = start + CHARACTERS
        blank = text.find(" ", stop, stop + CHARACTERS)
        stop = blank if blank >= 0 else stop + CHARACTERS
        yield text[start:stop], start == 0, stop >= len(text)
        start = stop


def _chats(tokenizer: Any, documents: Iterable[Document], length: int, limit: int) -> Iterator[Chunk]:
    for batch in by_characters((document.text, document) for document in documents):
        kept: list[tuple[list[int], list[bool]]] = []
        left_out = 0
        for ids, mask in encode_chats(tokenizer, batch):
            if any(mask[1:length]):  # token 0 cannot be predicted
                kept.append((ids[:length], mask[:length]))
                limit -= len(kept[-1][0])
            else:
                left_out += 1
            if limit <= 0:
                break
        yield Chunk(
            np.array([token for ids, _ in kept for token in ids], np.uint32),
            np.array([len(ids) for ids, _ in kept], np.int64),
            np.array([mark for _, mask in kept for mark in mask], np.bool_),
            left_out,
        )
        if limit <= 0:
            return


def _digest(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        content = json.dumps(document.messages) if document.messages else document.text
        digest.update(hashlib.sha256(content.encode()).digest())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    """A fingerprint of everything that decides how text becomes token ids; padding and truncation are settings of a call."""
    if tokenizer.is_fast:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described = {key: value for key, value in described.items() if key not in ("padding", "truncation")}
    else:
        described = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
