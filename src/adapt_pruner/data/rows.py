"""What training reads: rows of token ids in an order that is the same for any number of processes, and exact on resume."""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapt_pruner.data.packing import tokenised
from adapt_pruner.data.sources import SELF, Source, domains
from adapt_pruner.data.store import Store
from adapt_pruner.errors import UsageError

__all__ = ["Rows", "stage_spans", "training_rows"]


class Rows:
    """The rows of a whole run, repeats included, in the order a run sees them: row i is the same in every process.

    The position of a run is one number, the rows it has taken.

    Attributes:
        length: tokens of the widest row.
    """

    def __init__(self, stores: Sequence[Store], order: NDArray[np.int64]) -> None:
        """`order` counts through the rows of all stores, one store after another."""
        self._stores = stores
        self._first = np.cumsum([0, *(len(store.offsets) - 1 for store in stores)])
        self._order = order
        lengths = np.concatenate([np.diff(store.offsets) for store in stores])[order]
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._masked = any(store.mask is not None for store in stores)
        self.length = int(lengths.max())

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start` to `stop`, shorter ones padded on the right with zeros to the widest of them.

        Returns:
            int64 [rows, width], and bool [rows, width], which of the tokens are to be predicted; None where all are.
        """
        chosen = [self._row(number) for number in self._order[start:stop]]
        shape = len(chosen), max((len(ids) for ids, _ in chosen), default=0)
        batch, predicted = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        for row, (ids, mask) in enumerate(chosen):
            batch[row, : len(ids)] = ids
            predicted[row, : len(ids)] = True if mask is None else mask
        return torch.from_numpy(batch), torch.from_numpy(predicted) if self._masked else None

    def num_tokens(self, start: int, stop: int) -> int:
        """Tokens of rows `start` to `stop`, padding not counted."""
        return int(self._ends[stop] - self._ends[start])

    def digest(self) -> str:
        """A fingerprint of all rows and their order."""
        digest = hashlib.sha256("".join(store.digest for store in self._stores).encode())
        digest.update(self._order.astype("<i8").tobytes())
        return digest.hexdigest()

    def _row(self, number: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        store, row = self._stores[which], number - self._first[which]
        span = slice(int(store.offsets[row]), int(store.offsets[row + 1]))
        return store.ids[span], None if store.mask is None else store.mask[span]


def training_rows(
    tokenizer: Any,
    source: Source,
    *,
    length: int,
    tokens: int,
    seed: int,
    warn: Callable[[str], None],
    repeat: bool = True,
    cache: Path | None = None,
) -> Rows:
    """As many rows as hold `tokens` tokens of a text or a mixture, tokenised once and kept on disk.

    Plain text: documents shuffled, an end-of-text token after each, cut into rows of `length`. Conversations: one a row,
    cut at `length`; see `data.chat`. The rows are shuffled in turn. A text that runs out is repeated in another order each
    time. In a mixture each text gives its share of the tokens, and the k-th of its n rows comes within the k-th n-th of the run.

    Args:
        tokens: of the whole run; the last row goes over it.
        warn: told in one sentence of repeated texts, conversations left out and a damaged store.
        repeat: whether a text may be repeated.
        cache: see `data.store.stored`.

    Raises:
        UsageError: there is no such text, it is too short for one row, or for all of them and may not be repeated.
        RunError: the tokens cannot be written.
    """
    stores, orders, places = [], [], []
    first = 0
    for number, (spec, share) in enumerate(domains(source).items()):
        if spec == SELF:
            raise UsageError(
                "training.source 'self' would train the model on its own text; it serves calibration only, name a text"
            )
        asked = max(1, round(tokens * share))
        store = tokenised(tokenizer, spec, length=length, limit=asked, seed=seed, cache=cache, warn=warn)
        there = len(store.ids)
        if there < asked:
            short = f"the training text {spec!r} has {there:,} tokens in rows of {length} and {asked:,} are asked for"
            if not repeat:
                raise UsageError(f"{short}; give more text, lower training.tokens or allow training.repeat")
            warn(f"{short}, so it is repeated: it is read {asked / there:.1f} times")
        random = np.random.default_rng([seed, number])
        order = _epochs(np.diff(store.offsets), asked, random)
        stores.append(store)
        orders.append(first + order)
        places.append((np.arange(len(order)) + random.random(len(order))) / len(order))
        first += len(store.offsets) - 1
    return Rows(stores, np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")])


def stage_spans(rows: Rows, stage_tokens: Sequence[int]) -> list[range]:
    """The rows of each stage, one stage after another: it ends with the row that reaches its share of all tokens."""
    asked, there = sum(stage_tokens), rows.num_tokens(0, len(rows))
    ends = [
        bisect.bisect_left(range(len(rows) + 1), done * there, key=lambda row: rows.num_tokens(0, row) * asked)
        for done in itertools.accumulate(stage_tokens)
    ]
    return [range(start, end) for start, end in itertools.pairwise([0, *ends])]


def _epochs(lengths: NDArray[np.int64], asked: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of rows with `asked` tokens together: all of them before any twice, shuffled anew each time."""
    orders: list[NDArray[np.int64]] = []
    while asked > 0:
        order = random.permutation(len(lengths))
        ends = np.cumsum(lengths[order])
        orders.append(order[: int(np.searchsorted(ends, asked)) + 1])
        asked -= int(ends[-1])
    return np.concatenate(orders)
