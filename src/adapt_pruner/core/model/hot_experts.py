"""Experts one by one: of a model on a shelf, fetch only those that a router chooses, and keep those that were used last.

    with one_by_one(model, axes, room=2**30) as hot:   # at most 1 GiB of experts stay in memory, as stored
        model(ids)
    hot.hits, hot.misses, hot.read_bytes, hot.waited

Stock classes take an expert's weights as `tensor[expert]`, so the parameters of experts are replaced by something that reads one entry.
As soon as a router has chosen, a second thread reads the missing experts of its layer while others compute, and then those that the next
layer's router is likely to choose: the ones that it would choose for the tokens of this layer.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.axes import Axis
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.shelf import Shelved, numbers_of

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
        guesses: entries of the next layer that were expected.
        right: how many of them were needed.
    """

    def __init__(self, room: int) -> None:
        self.weights: dict[str, Shelved] = {}
        self.room = room
        self.hits = self.misses = self.read_bytes = self.most_bytes = self.guesses = self.right = 0
        self.waited = 0.0
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._due: deque[_Key] = deque()
        self._guessed: set[_Key] = set()
        self._coming: dict[_Key, Future[Tensor]] = {}
        self._ahead = 1
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")

    @property
    def share(self) -> float:
        """The share of the needed entries that were in memory."""
        return self.hits / max(1, self.hits + self.misses)

    def expect(self, keys: Sequence[_Key], guesses: Sequence[_Key], *, ahead: int) -> None:
        """Begin to read those of the entries that are not here: `keys`, then `guesses` of the next layer, at most `ahead` before they are taken."""
        needed, self._ahead = set(keys), ahead
        self.right += len(self._guessed & needed)
        self.guesses += len(guesses)
        self._guessed = set(guesses)
        for key in self._coming.keys() - needed - self._guessed:
            wrong = self._coming.pop(key)
            if wrong.cancel():
                self.read_bytes -= self._size(key)
            elif wrong.done():
                self._keep(key, wrong.result())
        self._due = deque(key for key in (*keys, *guesses) if key not in self._kept and key not in self._coming)
        self._read_ahead()

    def take(self, key: _Key) -> Tensor:
        """An entry as it is stored, on the device of its parameter."""
        if (numbers := self._kept.get(key)) is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return numbers
        self.misses += 1
        began = time.perf_counter()
        if (coming := self._coming.pop(key, None)) is not None:
            numbers = coming.result()
        else:
            self._due = deque(other for other in self._due if other != key)
            numbers = self._read(key)
            self.read_bytes += numbers.nbytes
        self._read_ahead()
        self.waited += time.perf_counter() - began
        return self._keep(key, numbers)

    def figures(self) -> dict[str, float]:
        """What was counted, as plain data."""
        return {
            "hits": self.hits, "misses": self.misses, "share": self.share, "read_bytes": self.read_bytes, "most_bytes": self.most_bytes,
            "waited": self.waited, "guesses": self.guesses, "right": self.right,
        }  # fmt: skip

    def close(self) -> None:
        """End the reading and forget the experts."""
        self._reader.shutdown(cancel_futures=True)
        self._kept.clear()

    def _keep(self, key: _Key, numbers: Tensor) -> Tensor:
        numbers = self._kept[key] = numbers.to(self.weights[key[0]].device)
        self._bytes += numbers.nbytes
        while self._bytes > self.room and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self.most_bytes = max(self.most_bytes, self._bytes)
        return numbers

    def _read_ahead(self) -> None:
        while self._due and len(self._coming) < self._ahead:
            key = self._due.popleft()
            self.read_bytes += self._size(key)
            self._coming[key] = self._reader.submit(self._read, key)

    def _size(self, key: _Key) -> int:
        weight = self.weights[key[0]]
        return weight[0].numel() * weight.stored.dtype.itemsize

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
        room: bytes. Those that a token needs in one layer may be read before, besides.
    """
    hot = Hot(room)
    layers = [_Layer(model, axis, hot) for axis in axes if axis.gate.kind == "routed"]
    with ExitStack() as stack:
        stack.callback(hot.close)
        for layer, following in zip(layers, [*layers[1:], None], strict=False):
            stack.enter_context(layer.entry_wise(following))
        if layers:
            stack.callback(setattr, model.config, "_experts_implementation", model.config._experts_implementation)
            model.config._experts_implementation = "eager"  # the one that takes experts singly
        yield hot


class _Layer:
    """The experts of a layer and their router."""

    def __init__(self, model: Any, axis: Axis, hot: Hot) -> None:
        at = axis.slices[0].parameter.rpartition(".")[0]
        self.experts, self.hot = model.get_submodule(at), hot
        held = self.experts._parameters.items()
        self.names = {leaf: f"{at}.{leaf}" for leaf, weight in held if isinstance(weight, Shelved)}
        router = model.get_submodule(axis.gate.module).weight
        with numbers_of(router):
            self.router = router.detach().clone()

    def keys(self, chosen: Iterable[int]) -> list[_Key]:
        """The entries of these experts."""
        return [(name, expert) for expert in chosen for name in self.names.values()]

    def likely(self, states: Tensor, number: int) -> list[int]:
        """The experts that the router would choose for these inputs of another layer, the most frequent first."""
        counts = (states.to(self.router.dtype) @ self.router.T).topk(number).indices.flatten().bincount()
        often: list[int] = counts.argsort(descending=True).tolist()
        return often[: int(counts.count_nonzero())]

    @contextmanager
    def entry_wise(self, following: "_Layer | None") -> Iterator[None]:
        """Within this context the parameters of experts are read entry by entry, and then those that the `following` layer may need."""
        experts, held = self.experts, dict(self.experts._parameters)

        def chosen(module: nn.Module, args: tuple[Any, ...]) -> None:
            states, indices = args[:2]
            number = indices.shape[-1]
            guesses = following.keys(following.likely(states, number)) if following is not None else []
            self.hot.expect(self.keys(indices.unique().tolist()), guesses, ahead=number * len(self.names))

        for leaf, name in self.names.items():
            weight = experts._parameters.pop(leaf)
            assert isinstance(weight, Shelved)
            self.hot.weights[name] = weight
            experts.__dict__[leaf] = _Entries(name, self.hot)
        try:
            with attached([experts.register_forward_pre_hook(chosen)]):
                yield
        finally:
            for leaf in self.names:
                del experts.__dict__[leaf]
            experts._parameters.clear()
            experts._parameters.update(held)
