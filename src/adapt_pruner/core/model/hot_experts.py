"""Experts one by one: of a model on a shelf, fetch only those that a router chooses, and keep those that were used last.

    with one_by_one(model, axes, room=2**30) as hot:   # at most 1 GiB of experts stay in memory, as stored
        model(ids)
    hot.hits, hot.misses, hot.read_bytes, hot.waited

Stock classes take an expert's weights as `tensor[expert]`, so the parameters of experts are replaced by something that reads one entry.
As soon as a router has chosen, a second thread reads the next missing expert of its layer while one computes.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.shelf import Shelved

_Key = tuple[str, int]
"""The name of a parameter of experts, and the number of an expert."""


class Hot:
    """The experts that are in memory, those used last; and how often one that was needed was among them.

    Attributes:
        weights: the parameters of experts, by name.
        room: bytes that they may take; the expert at work is kept in any case.
        hits: entries of a parameter that were there when they were needed.
        misses: entries that had to be read.
        read_bytes: bytes that were read.
        most_bytes: the most that were in memory at a time.
        waited: seconds for which the model waited for reading.
    """

    def __init__(self, room: int) -> None:
        self.weights: dict[str, Shelved] = {}
        self.room = room
        self.hits = self.misses = self.read_bytes = self.most_bytes = 0
        self.waited = 0.0
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._due: deque[_Key] = deque()
        self._coming: tuple[_Key, Future[Tensor]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")

    @property
    def share(self) -> float:
        """The share of the needed entries that were in memory."""
        return self.hits / max(1, self.hits + self.misses)

    def expect(self, keys: Sequence[_Key]) -> None:
        """Begin to read those of the entries that are not here, in order, one ahead of the computation."""
        self._due = deque(key for key in keys if key not in self._kept)
        self._coming = None  # of a pass that ended early
        self._read_ahead()

    def take(self, key: _Key) -> Tensor:
        """An entry as it is stored, on the device of its parameter."""
        if (numbers := self._kept.get(key)) is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return numbers
        self.misses += 1
        began = time.perf_counter()
        coming, numbers = self._coming, None
        if coming is not None and coming[0] == key:
            self._coming, numbers = None, coming[1].result()
            self._read_ahead()
        if numbers is None:
            numbers = self._read(key)
            self.read_bytes += numbers.nbytes
        self.waited += time.perf_counter() - began
        numbers = numbers.to(self.weights[key[0]].device)
        self._kept[key] = numbers
        self._bytes += numbers.nbytes
        while self._bytes > self.room and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self.most_bytes = max(self.most_bytes, self._bytes)
        return numbers

    def figures(self) -> dict[str, float]:
        """What was counted, as plain data."""
        return {
            "hits": self.hits, "misses": self.misses, "share": self.share, "read_bytes": self.read_bytes, "most_bytes": self.most_bytes,
            "waited": self.waited,
        }  # fmt: skip

    def close(self) -> None:
        """End the reading and forget the experts."""
        self._reader.shutdown(cancel_futures=True)
        self._kept.clear()

    def _read_ahead(self) -> None:
        if self._coming is None and self._due:
            key = self._due.popleft()
            weight = self.weights[key[0]]
            self.read_bytes += weight[0].numel() * weight.stored.dtype.itemsize
            self._coming = key, self._reader.submit(self._read, key)

    def _read(self, key: _Key) -> Tensor:
        name, entry = key
        return self.weights[name].stored.at({0: torch.tensor([entry])}).read()[0]


class _Entries:
    """A parameter of experts, of which single entries can be taken."""

    def __init__(self, name: str, hot: Hot) -> None:
        self.name, self.hot = name, hot

    def __getitem__(self, expert: Any) -> Tensor:
        return self.hot.take((self.name, int(expert))).to(self.hot.weights[self.name].wide)


@contextmanager
def one_by_one(model: Any, axes: Sequence[Axis], *, room: int) -> Iterator[Hot]:
    """Within this context routed experts are fetched alone, and at most `room` bytes of them stay in memory.

    Args:
        model: on a shelf; for passes without gradients. Left as found.
        axes: its axes; those of experts count.
        room: bytes.
    """
    hot = Hot(room)
    owners = [axis.slices[0].parameter.rpartition(".")[0] for axis in axes if axis.gate.kind == "routed"]
    with ExitStack() as stack:
        stack.callback(hot.close)
        for owner in owners:
            stack.enter_context(_entry_wise(model.get_submodule(owner), owner, hot))
        if owners:
            stack.callback(setattr, model.config, "_experts_implementation", model.config._experts_implementation)
            model.config._experts_implementation = "eager"  # the one that takes experts singly
        yield hot


@contextmanager
def _entry_wise(experts: nn.Module, at: str, hot: Hot) -> Iterator[None]:
    """Within this context the parameters of the module `experts`, called `at`, are read entry by entry."""
    held = dict(experts._parameters)
    names = {leaf: f"{at}.{leaf}" for leaf, weight in held.items() if isinstance(weight, Shelved)}

    def chosen(module: nn.Module, args: tuple[Any, ...]) -> None:
        hot.expect([(name, expert) for expert in args[1].unique().tolist() for name in names.values()])

    for leaf, name in names.items():
        weight = experts._parameters.pop(leaf)
        assert isinstance(weight, Shelved)
        hot.weights[name] = weight
        experts.__dict__[leaf] = _Entries(name, hot)
    try:
        with attached([experts.register_forward_pre_hook(chosen)]):
            yield
    finally:
        for leaf in names:
            del experts.__dict__[leaf]
        experts._parameters.clear()
        experts._parameters.update(held)
