"""Which parts of a text stand in another text too, whatever stands around them."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapt_pruner.data.pieces import by_characters

_RUN = 100  # bytes of a passage, about 16 words: two texts do not share so many by chance
_SAMPLED = 4  # one passage in this many is kept, chosen by its hash, so that every text keeps the same ones
_BLOCK = 2**18  # bytes that are hashed at a time
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
_BLANK = 32
_MIXES = np.uint64(0xBF58476D1CE4E5B9)


def _powers(base: int) -> NDArray[np.uint64]:
    return np.multiply.accumulate(np.concatenate([np.ones(1, np.uint64), np.full(_BLOCK + _RUN, base, np.uint64)]))


_POWERS, _INVERSES = _powers(_BASE), _powers(pow(_BASE, -1, 2**64))


class Passages:
    """The passages of some texts: runs of 100 bytes that begin with a word, with each white space as one blank.

    One passage in four is kept, and each text as a whole, so that equal texts cover each other.
    """

    def __init__(self, texts: Iterable[str], *, most: int | None = None) -> None:
        """Read the texts; a passage that comes more than `most` times is left out: it is a formula, such as a licence or a prompt."""
        sampled = [_sampled(batch).hashes for batch in by_characters((text, text) for text in texts)]
        hashes, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *sampled]), return_counts=True)
        self._hashes = hashes if most is None else hashes[counts <= most]

    def cover(self, texts: Iterable[str]) -> Iterator[NDArray[np.bool_]]:
        """For each text, and each byte of it with single blanks: whether it lies in one of these passages."""
        for batch in by_characters((text, text) for text in texts):
            sampled = _sampled(batch)
            shared = np.zeros(len(sampled.hashes), np.bool_)
            if len(self._hashes):
                place = np.searchsorted(self._hashes, sampled.hashes)
                shared = self._hashes[np.minimum(place, len(self._hashes) - 1)] == sampled.hashes
            first = np.searchsorted(sampled.owners[shared], np.arange(len(batch) + 1))
            starts, stops = sampled.starts[shared], sampled.stops[shared]
            for number, size in enumerate(sampled.sizes):
                if first[number] == first[number + 1]:
                    yield np.zeros(size, np.bool_)
                    continue
                within = slice(first[number], first[number + 1])
                edges = np.bincount(starts[within], minlength=size + 1) - np.bincount(stops[within], minlength=size + 1)
                yield np.cumsum(edges)[:size] > 0


@dataclass(frozen=True)
class _Sampled:
    """The passages kept of some texts, text by text: the number of the text, the first byte and the one after the last, the hash.

    `sizes` are the bytes of each text with single blanks.
    """

    owners: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    sizes: list[int]


def _sampled(texts: Sequence[str]) -> _Sampled:
    """The passages kept of some texts.

    hash = Σ_j byte[j] · base^j modulo 2^64, with its bits mixed        over the bytes j of the passage
    """
    squeezed = [" ".join(text.split()).encode() for text in texts]
    sizes = [len(text) for text in squeezed]
    firsts = np.cumsum([0, *(size + 1 for size in sizes)])
    joined = np.frombuffer(b" ".join([*squeezed, b""]), np.uint8)
    starts, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for at in range(0, len(joined) - _RUN + 1, _BLOCK):
        block = joined[at : at + _BLOCK + _RUN - 1]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(block * _POWERS[: len(block)], dtype=np.uint64)])
        opens = np.concatenate([[at == 0 or joined[at - 1] == _BLANK], block[:-1] == _BLANK])
        begins = np.flatnonzero(opens[: len(block) - _RUN + 1])
        digests = (sums[begins + _RUN] - sums[begins]) * _INVERSES[begins]
        digests = (digests ^ (digests >> np.uint64(29))) * _MIXES
        digests ^= digests >> np.uint64(32)
        kept = digests % np.uint64(_SAMPLED) == 0
        starts.append(at + begins[kept])
        hashes.append(digests[kept])
    begins, digests = np.concatenate(starts), np.concatenate(hashes)
    owners = np.searchsorted(firsts, begins, side="right") - 1
    within = begins + _RUN < firsts[owners + 1]
    begins = (begins - firsts[owners])[within]
    wholes = [int.from_bytes(hashlib.sha256(text).digest()[:8], "big") for text in squeezed]
    owners = np.concatenate([owners[within], np.arange(len(texts))])
    order = np.argsort(owners, kind="stable")
    return _Sampled(
        owners[order],
        np.concatenate([begins, np.zeros(len(texts), np.int64)])[order],
        np.concatenate([begins + _RUN, np.array(sizes, np.int64)])[order],
        np.concatenate([digests[within], np.array(wholes, np.uint64)])[order],
        sizes,
    )
