"""`feed: fixed`: rows of token ids in an order that is fixed before training and does not depend on the number of processes."""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapt_pruner.core.events import Event
from adapt_pruner.core.model.feed import Goal
from adapt_pruner.core.system.parts import part
from adapt_pruner.data.packing import tokenised
from adapt_pruner.data.sources import Source, domains, written_nowhere, written_spec
from adapt_pruner.data.store import Kept, Store
from adapt_pruner.errors import UsageError

MOST_REPEATS = 10_000
"""Times that a training text may be read."""

Written = Mapping[str, Store]
"""SPEC of a text that the dense model writes, with its part -> what it wrote."""


def goal_of(kept: Kept) -> Goal:
    """What the predictions of rows are to become, of which a model's likeliest tokens are kept."""
    return Goal(torch.from_numpy(kept.tokens.astype(np.int64)), torch.from_numpy(kept.logs.astype(np.float32)))


class Rows:
    """All rows of a run in the order in which they are read, repeats included; row i is the same in every process.

    The number of rows taken so far is the position of a run.

    Attributes:
        length: tokens of the widest row.
    """

    def __init__(self, stores: Sequence[Store], order: NDArray[np.int64], *, names: Sequence[str] = ("",)) -> None:
        """`order` holds row numbers, counted through all stores one after another; `names` are the SPECs of the stores."""
        self._stores, self._names = stores, names
        self._first = np.cumsum([0, *(len(store) for store in stores)])
        self._order = order
        lengths = np.concatenate([np.diff(store.offsets) for store in stores])[order]
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._masked = any(store.mask is not None for store in stores)
        self.length = int(lengths.max())

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start` to `stop`; shorter rows are padded on the right with zeros to the widest of them.

        Returns:
            int64 [rows, width], and bool [rows, width], which tokens are predicted; None instead if all are.
        """
        chosen = []
        for number in self._order[start:stop]:
            which = self._store_of(number)
            store, row = self._stores[which], number - self._first[which]
            span = store.tokens_of(row)
            chosen.append((store.ids[span], None if store.mask is None else store.mask[span]))
        shape = len(chosen), max((len(ids) for ids, _ in chosen), default=0)
        batch, predicted = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        for row, (ids, mask) in enumerate(chosen):
            batch[row, : len(ids)] = ids
            predicted[row, : len(ids)] = True if mask is None else mask
        return torch.from_numpy(batch), torch.from_numpy(predicted) if self._masked else None

    def goals(self, start: int, stop: int) -> list[Goal | None]:
        """For each of rows `start` to `stop` the goal of its predicted tokens; None where no model wrote the row."""
        goals: list[Goal | None] = []
        for number in self._order[start:stop]:
            which = self._store_of(number)
            kept = self._stores[which].kept_of(number - self._first[which])
            goals.append(None if kept is None else goal_of(kept))
        return goals

    @property
    def has_goals(self) -> bool:
        """Whether any of the rows have goals."""
        return any(store.kept is not None for store in self._stores)

    def num_tokens(self, start: int, stop: int) -> int:
        """Tokens of rows `start` to `stop`, without padding."""
        return int(self._ends[stop] - self._ends[start])

    def mean_tokens(self, numbers: NDArray[np.int64]) -> float:
        """Tokens of a row, on average over the rows with these numbers."""
        lengths = np.concatenate([np.diff(store.offsets) for store in self._stores])
        return float(lengths[numbers].mean())

    def domains(self, start: int, stop: int) -> list[str]:
        """The SPEC of the text that each of rows `start` to `stop` comes from."""
        return [self._names[self._store_of(number)] for number in self._order[start:stop]]

    def by_text(self) -> dict[str, NDArray[np.int64]]:
        """SPEC of a text -> the numbers of its rows: first those in the order, each once, then those that it leaves out."""
        numbers = {}
        for which, name in enumerate(self._names):
            first, end = self._first[which], self._first[which + 1]
            ordered, at = np.unique(self._order[(self._order >= first) & (self._order < end)], return_index=True)
            besides = np.setdiff1d(np.arange(first, end), ordered, assume_unique=True)
            numbers[name] = np.concatenate([ordered[np.argsort(at)], besides])
        return numbers

    def reordered(self, places: Sequence[int]) -> "Rows":
        """The rows at these positions of the order, in this sequence; for feeds of others, as in docs/extending.md."""
        return self.picked(self._order[np.asarray(places, dtype=np.int64)])

    def picked(self, numbers: Sequence[int] | NDArray[np.int64]) -> "Rows":
        """The rows with these numbers, in this sequence."""
        return Rows(self._stores, np.asarray(numbers, dtype=np.int64), names=self._names)

    def digest(self) -> str:
        """A fingerprint of all rows and their order."""
        digest = hashlib.sha256("".join(store.digest for store in self._stores).encode())
        digest.update(self._order.astype("<i8").tobytes())
        return digest.hexdigest()

    def _store_of(self, number: int) -> int:
        return int(np.searchsorted(self._first, number, side="right")) - 1


@dataclass(frozen=True)
class Span:
    """Rows `first` to `last` of all rows, in their order."""

    rows: Rows
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows of the span."""
        return self.rows.num_tokens(self.first, self.last)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """See `Rows`; here and below rows are numbered within the span."""
        return self.rows.batch(self.first + start, self.first + stop)

    def domains(self, start: int, stop: int) -> list[str]:
        """See `Rows`."""
        return self.rows.domains(self.first + start, self.first + stop)

    def goals(self, start: int, stop: int) -> list[Goal | None]:
        """See `Rows`."""
        return self.rows.goals(self.first + start, self.first + stop)


@part("feed")
class Fixed:
    """All rows in a fixed order that does not depend on the model's losses; a mixture keeps its weights throughout."""

    wants_losses = False

    def __init__(self, rows: Rows) -> None:
        self._rows, self._next = rows, 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self._rows.num_tokens(0, len(self._rows))

    def ends(self, stage_tokens: Sequence[int]) -> list[int]:
        """See `stage_spans`."""
        return [span.stop for span in stage_spans(self._rows, stage_tokens)]

    def take(self, num_rows: int) -> Span:
        """The next rows of the order."""
        first, self._next = self._next, min(len(self._rows), self._next + num_rows)
        return Span(self._rows, first, self._next)

    def tell(self, losses: Mapping[str, tuple[float, float]]) -> None:
        """Ignore the losses: the order does not depend on them."""

    def news(self) -> list[Event]:
        """Always empty, because the order never changes."""
        return []

    def state(self) -> dict[str, Any]:
        """The number of the next row."""
        return {"rows": self._next}

    def inputs(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue at the row of `state`."""
        self._next = int(state.get("rows", 0))

    def skip_to(self, num_tokens: int) -> int:
        """Continue after the row that reaches `num_tokens` tokens, or at the end."""
        done = min(num_tokens, self.num_tokens)
        self._next = stage_spans(self._rows, [done, self.num_tokens - done])[0].stop
        return self._next


def training_rows(
    tokenizer: Any,
    source: Source,
    *,
    length: int,
    tokens: int,
    seed: int,
    warn: Callable[[str], None],
    repeat: bool = True,
    expected: int | None = None,
    moving: bool = False,
    cache: Path | None = None,
    written: Written = MappingProxyType({}),
) -> Rows:
    """Rows with `tokens` tokens in all, from a text or a mixture, tokenised once and kept on disk.

    Plain text: documents are shuffled, get an end-of-text token each, and are cut into rows of `length`. Conversations: one per
    row, cut at `length`; see `data.chat`. These rows are the same for all seeds. `seed` decides their order, and which rows are
    read if there are more than `tokens` needs. A text that is too short is repeated, each time in another order. In a mixture
    each text gives its share of the tokens. If it gives n rows, row k of them comes within the k-th n-th of the run.

    Args:
        tokens: of the whole run; the last row may exceed this number.
        warn: called with a sentence about repeated texts, conversations left out, or a damaged store.
        repeat: whether a text may be repeated.
        expected: how many of the tokens will be read, if time ends before; warnings count repeats of these.
        moving: whether the shares of a mixture may change. If so, each text also has rows beyond its share, for all `tokens` if
            it is long enough.
        cache: see `data.store.stored`.
        written: the texts that the dense model wrote, by their SPECs. They are repeated as often as need be: what is learnt from them
            is the dense model's distribution.

    Raises:
        UsageError: the text does not exist, is too short for one row, or is too short for all rows and may not be repeated.
        RunError: the tokens cannot be written.
    """
    stores, orders, places = [], [], []
    first = 0
    for number, (spec, share) in enumerate(domains(source).items()):
        share_tokens = max(1, round(tokens * share))
        by_model = written_spec(spec)
        if by_model is None:
            store = tokenised(tokenizer, spec, length=length, tokens=tokens if moving else share_tokens, cache=cache, warn=warn)
        else:
            store = written_text(written, spec)
        available, least = len(store.ids), tokens if moving and not repeat else share_tokens
        if available < least and by_model is None:
            may = "may be" if moving else "are"
            short = f"the training text {spec!r} has {available:,} tokens in rows of {length}, but {least:,} {may} asked for"
            if not repeat:
                raise UsageError(f"{short}; give more text, lower training.tokens or allow training.repeat")
            if share_tokens / available > MOST_REPEATS:
                raise UsageError(
                    f"{short}, which would repeat it {share_tokens / available:,.0f} times; at most {MOST_REPEATS:,} are allowed, so give "
                    "more text or lower training.tokens"
                )
            if (times := share_tokens / available * (1 if expected is None else min(1.0, expected / tokens))) > 1:
                warn(f"{short}, so it is repeated: it is read {times:.1f} times")
        random = np.random.default_rng([seed, number])
        order = _epochs(np.diff(store.offsets), share_tokens, random)
        stores.append(store)
        orders.append(first + order)
        places.append((np.arange(len(order)) + random.random(len(order))) / len(order))
        first += len(store)
    order = np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]
    return Rows(stores, order, names=list(domains(source)))


def written_text(written: Written, spec: str) -> Store:
    """What the dense model wrote of a SPEC.

    Raises:
        UsageError: it wrote nothing.
    """
    if spec not in written:
        raise written_nowhere(spec)
    if not len(written[spec]):
        raise UsageError(
            f"the dense model has written nothing for {spec!r} that came to an end; raise training.written, give more minutes, or name "
            "another text"
        )
    return written[spec]


def rows_of(sequences: Sequence[tuple[Sequence[int], Sequence[bool]]], *, tokens: int, seed: int) -> Rows:
    """Rows of a run made of sequences in memory, `tokens` tokens in a random order. Each comes once before any comes twice.

    Args:
        sequences: token ids, and for each token whether it is predicted; at least one sequence.
    """
    ids, masks = (np.concatenate([np.asarray(each[side]) for each in sequences]) for side in (0, 1))
    lengths = np.array([len(each) for each, _ in sequences])
    digest = hashlib.sha256(ids.astype("<i8").tobytes() + lengths.astype("<i8").tobytes() + masks.tobytes()).hexdigest()
    store = Store(ids, np.concatenate([[0], np.cumsum(lengths)]), masks.astype(np.bool_), digest, 0)
    return Rows([store], _epochs(lengths, tokens, np.random.default_rng(seed)))


def stage_spans(rows: Rows, stage_tokens: Sequence[int]) -> list[range]:
    """The rows of each stage, in order; a stage ends with the row that reaches its share of all tokens."""
    planned, available = sum(stage_tokens), rows.num_tokens(0, len(rows))
    ends = [
        bisect.bisect_left(range(len(rows) + 1), done * available, key=lambda row: rows.num_tokens(0, row) * planned)
        for done in itertools.accumulate(stage_tokens)
    ]
    return [range(start, end) for start, end in itertools.pairwise([0, *ends])]


def _epochs(lengths: NDArray[np.int64], tokens: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of rows that together have `tokens` tokens. Each comes once before any comes twice, shuffled again each time."""
    orders: list[NDArray[np.int64]] = []
    while tokens > 0:
        order = random.permutation(len(lengths))
        ends = np.cumsum(lengths[order])
        orders.append(order[: int(np.searchsorted(ends, tokens)) + 1])
        tokens -= int(ends[-1])
    return np.concatenate(orders)
