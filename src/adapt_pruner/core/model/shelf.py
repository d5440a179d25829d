"""Weights of decoder layers that lie elsewhere while no pass needs them: in the files of the model, or in memory as stored.

    with at_hand(layer):        # the layer's numbers are read, widened and cast once
        ...                     # the whole text goes through the layer
                                # what was changed is written to the shelf, and the numbers are dropped

A model in memory has no shelf, and the same code runs without a cost. Between its turns a weight on a shelf keeps its name, shape,
number format and device. Its numbers are NaN in four bytes, and writing into them raises. So a pass that forgets to fetch a layer
gives NaN, which every figure refuses. Layers also fetch themselves when they are called outside `fetched`. That is right in every
pass, and reads the layer once per batch.

No file stays mapped, since pages of an open map count as memory of the process. A changed weight goes into a file without a name,
which the system removes with the process.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapt_pruner.core.model.precision import casting_once
from adapt_pruner.core.system import world
from adapt_pruner.core.system.files import write_failure
from adapt_pruner.errors import RunError


class Stored(Protocol):
    """The numbers of a weight on a shelf, in the format `dtype`."""

    @property
    def dtype(self) -> torch.dtype:
        """Their format."""

    def read(self) -> Tensor:
        """The numbers, on the CPU or the device where they lie, in the format in which they are stored; not to be changed."""

    def at(self, index: Mapping[int, Tensor]) -> "Stored":
        """The numbers at these indices along these dimensions; they are read for this, unless a class knows better."""
        return InMemory(select(self.read(), index))


@dataclass(frozen=True)
class InMemory(Stored):
    """Numbers that stay in memory as they are stored."""

    numbers: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """See `Stored`."""
        return self.numbers.dtype

    def read(self) -> Tensor:
        """See `Stored`."""
        return self.numbers


class Source:
    """A file that is read in pieces; it may lose its name while it is open.

    Args:
        path: the file.
        number: of an open file, to be closed with this object.
    """

    def __init__(self, path: Path, number: int | None = None) -> None:
        self._path, self._number = path, os.open(path, os.O_RDONLY) if number is None else number
        self._found = self._now()

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)

    def _now(self) -> tuple[int, int]:
        about = os.fstat(self._number)
        return about.st_size, about.st_mtime_ns

    def read(self, offset: int, size: int) -> Tensor:
        """`size` bytes from `offset` on, uint8.

        Raises:
            RunError: the file changed since it was opened, or cannot be read.
        """
        bytes_read = torch.empty(size, dtype=torch.uint8)
        view, done = bytes_read.numpy().data, 0
        while done < size:
            try:
                count = os.preadv(self._number, [view[done:]], offset + done)
            except OSError as error:
                raise RunError(f"{self._path} cannot be read ({error.strerror}); check the disk and start again") from error
            if not count:
                break
            done += count
        if done < size or self._now() != self._found:
            raise RunError(
                f"{self._path} changed while it was read; it holds the weights of the model, so leave it alone and start again"
            )
        return bytes_read


@dataclass(frozen=True)
class InFile:
    """Numbers in a file.

    Attributes:
        source: the file.
        offset: where they begin, in bytes.
        dtype: their format in the file.
        shape: their shape in the file.
        index: the indices that are left along some dimensions.
    """

    source: Source
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    index: Mapping[int, Tensor] = field(default_factory=dict)

    def read(self) -> Tensor:
        """See `Stored`."""
        index, (length, *others) = dict(self.index), self.shape or (1,)
        row, first, stop = torch.Size(others).numel() * self.dtype.itemsize, 0, length
        if (rows := index.get(0)) is not None:  # those before and after are not read
            first, stop = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
            index[0] = rows - first
        numbers = self.source.read(self.offset + first * row, (stop - first) * row).view(self.dtype)
        return select(numbers.view(stop - first, *others) if self.shape else numbers.view(()), index)

    def at(self, index: Mapping[int, Tensor]) -> "InFile":
        """See `Stored`."""
        composed = {dim: self.index[dim][stays] if dim in self.index else stays for dim, stays in index.items()}
        return replace(self, index={**self.index, **composed})


@dataclass(frozen=True)
class Stacked(Stored):
    """Numbers that lie apart: each entry of the first dimension is one part, or the rows of several.

    Attributes:
        parts: those of each entry.
    """

    parts: tuple[tuple[InFile, ...], ...]

    @property
    def dtype(self) -> torch.dtype:
        """See `Stored`."""
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Their shape together."""
        return (len(self.parts), sum(part.shape[0] for part in self.parts[0]), *self.parts[0][0].shape[1:])

    def read(self) -> Tensor:
        """See `Stored`."""
        return torch.stack([torch.cat([part.read() for part in entry]) for entry in self.parts])

    def at(self, index: Mapping[int, Tensor]) -> Stored:
        """See `Stored`; of single entries nothing else is read."""
        if index.keys() == {0}:
            return Stacked(tuple(self.parts[entry] for entry in index[0].tolist()))
        return InMemory(select(self.read(), index))


def select(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """The numbers at these indices along these dimensions, contiguous; of a tensor on a shelf, which stays there."""
    if isinstance(tensor, Shelved):
        return tensor.cut(index)
    for dim, stays in index.items():
        tensor = tensor.index_select(dim, stays.to(tensor.device))
    return tensor.contiguous()


def absent(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that reads as NaN everywhere, refuses to be written to, and takes the memory of one number."""
    return torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(tuple(shape))


class Shelved(nn.Parameter):
    """A parameter whose numbers lie on a shelf.

    Attributes:
        stored: its numbers.
        shelf: the shelf.
        here: whether the numbers are in the parameter now.
        wide: the format that they have there.
        changed: whether they differ from those of the model's files, or of what a cut left of them.
    """

    stored: Stored
    shelf: "Shelf"
    here: bool
    wide: torch.dtype
    changed: bool
    _seen: int

    @classmethod
    def of(cls, stored: Stored, shelf: "Shelf", shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> "Shelved":
        """A parameter that is on the shelf."""
        new = cls(absent(shape, dtype=dtype, device=device), requires_grad=dtype.is_floating_point)
        new.stored, new.shelf, new.here, new.wide, new.changed = stored, shelf, False, dtype, False
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shelved":
        if id(self) not in memo:
            memo[id(self)] = self.kept_as(self.stored, self.shape)
        copied: Shelved = memo[id(self)]
        return copied

    def cut(self, index: Mapping[int, Tensor]) -> "Shelved":
        """The parameter with these indices along these dimensions; nothing is read."""
        shape = [len(index[dim]) if dim in index else length for dim, length in enumerate(self.shape)]
        return self.kept_as(self.stored.at(index), shape)

    def kept_as(self, stored: Stored, shape: Sequence[int]) -> "Shelved":
        """A parameter on the same shelf with other numbers."""
        new = Shelved.of(stored, self.shelf, shape, dtype=self.wide, device=self.device)
        new.changed = self.changed
        return new

    def fetch(self, numbers: Tensor, *, narrow: torch.dtype | None = None) -> None:
        """Put what was read into the parameter, widened unless it is stored in the format `narrow`."""
        wide = numbers.to(self.device, narrow if narrow == numbers.dtype else self.dtype)
        self.data = wide.clone() if wide.data_ptr() == numbers.data_ptr() and isinstance(self.stored, InMemory) else wide
        self.here, self._seen = True, self._version

    def put_back(self) -> None:
        """Drop the numbers, and write them to the shelf first if they were changed, as all processes have changed them."""
        if self._version != self._seen:
            numbers = self.data.clone() if isinstance(self.stored, InMemory) else self.data
            (self.stored,), self.changed = self.shelf.laid_together([numbers]), True
        self.drop()

    def drop(self) -> None:
        """Drop the numbers; what was changed is lost."""
        self.data, self.here = absent(self.shape, dtype=self.wide, device=self.device), False


class Shelf:
    """Fetches the weights of a layer when it is due, and the next layer's in the background.

    The layer after the one asked for is the next in the direction of the last two, so that passes up and down both find it. Never
    more than two layers are read at a time, of which one is at hand.

    Args:
        stack: returns the decoder layers as they are now, in order.
        scratch: the folder for changed weights; None keeps them in memory.
        ahead: whether to read the next layer in the background.
    """

    def __init__(self, stack: Callable[[], Sequence[nn.Module]], *, scratch: Path | None, ahead: bool = True) -> None:
        self._stack, self._scratch = stack, scratch
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shelf") if ahead else None
        self._lane: Any = None  # the CUDA stream on which the next layer goes to the device
        self._next: tuple[list[Stored], Future[list[Tensor]]] | None = None
        self._last = -1
        self.read_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shelf":
        return self

    @property
    def on_disk(self) -> bool:
        """Whether the shelf writes to a disk: changed weights, and the hidden states that a pass keeps."""
        return self._scratch is not None

    def laid(self, numbers: Tensor) -> Stored:
        """Lay numbers here that nobody changes any more.

        Raises:
            RunError: there is no room.
        """
        if self._scratch is None:
            return InMemory(numbers)
        cpu = numbers.detach().cpu().contiguous()
        with self._written(), tempfile.TemporaryFile(dir=self._scratch) as file:
            file.write(cpu.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            source = Source(self._scratch, os.dup(file.fileno()))
        return InFile(source, 0, cpu.dtype, tuple(cpu.shape))

    def laid_together(self, tensors: Iterable[Tensor]) -> list[Stored]:
        """Lay tensors here that every process has, one after the other; on a disk the processes of a machine share one file.

        Every process must call this.

        Raises:
            RunError: there is no room.
        """
        if self._scratch is None or world.size() == 1:
            return [self.laid(numbers) for numbers in tensors]
        writes = int(os.environ.get("LOCAL_RANK", world.rank())) == 0
        path = self._scratch / f".weights-{world.agreed(uuid.uuid4().hex)}-{os.environ.get('GROUP_RANK', 0)}"
        places, end = list[tuple[int, torch.dtype, tuple[int, ...]]](), 0
        with self._written(), ExitStack() as stack:
            file = stack.enter_context(path.open("xb")) if writes else None
            world.meet()
            number = os.open(path, os.O_RDONLY)
            world.meet()
            path.unlink(missing_ok=True)  # still empty; the system removes it with the processes
            for numbers in tensors:
                if file is not None:
                    file.write(numbers.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                places.append((end, numbers.dtype, tuple(numbers.shape)))
                end += numbers.nbytes
        world.meet()
        source = Source(self._scratch, number)
        return [InFile(source, *place) for place in places]

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"changed weights could not be written to {self._scratch} ({write_failure(error) or error.strerror}); free some "
                f"space, or name a folder on another disk in {SCRATCH}"
            ) from error

    def read(self, weights: Sequence[Shelved], layers: Sequence[nn.Module]) -> list[Tensor]:
        """The stored numbers of the weights of some layers; the next layer is read meanwhile."""
        wanted, ahead, self._next = [weight.stored for weight in weights], self._next, None
        if ahead is not None and len(ahead[0]) == len(wanted) and all(a is b for a, b in zip(*(ahead[0], wanted), strict=True)):
            found = ahead[1].result()
            if self._lane is not None:
                torch.cuda.current_stream().wait_stream(self._lane)
                for numbers in found:
                    numbers.record_stream(torch.cuda.current_stream())
        else:
            if ahead is not None and not ahead[1].cancel():
                ahead[1].exception()  # two readers at a time would be slower, and a third layer in memory
            found = [stored.read() for stored in wanted]
        self.read_bytes += sum(numbers.nbytes for numbers in found)
        if self._reader is not None and len(layers) == 1:
            self._read_next(layers[0])
        return found

    def read_alone(self, weight: Shelved) -> Tensor:
        """The stored numbers of a weight; what is read ahead stays."""
        numbers = weight.stored.read()
        self.read_bytes += numbers.nbytes
        return numbers

    def _read_next(self, layer: nn.Module) -> None:
        stack = list(self._stack())
        now = next((index for index, other in enumerate(stack) if other is layer), None)
        if now is None or self._reader is None:
            return
        step, self._last = -1 if now < self._last or now == len(stack) - 1 else 1, now
        if 0 <= now + step < len(stack):
            following = [weight.stored for weight in on_shelf(stack[now + step]) if not weight.here]
            device = next(layer.parameters()).device
            if device.type == "cuda" and self._lane is None:
                self._lane = torch.cuda.Stream(device)
            self._next = (
                following,
                self._reader.submit(lambda: [_sent(stored.read(), device, self._lane) for stored in following]),
            )


def _sent(numbers: Tensor, device: torch.device, lane: Any) -> Tensor:
    """Numbers on their way to a GPU, from pinned memory on a stream of their own; on a CPU, as they are."""
    if lane is None:
        return numbers
    with torch.cuda.stream(lane):
        return numbers.pin_memory().to(device, non_blocking=True)


SCRATCH = "ADAPT_PRUNER_SCRATCH"
"""The environment variable that names the folder for changed weights."""


def on_shelf(*modules: nn.Module, recurse: bool = True) -> list[Shelved]:
    """The distinct parameters of modules that lie on a shelf, in order; with `recurse` also those of modules inside."""
    found = (weight for module in modules for weight in module.parameters(recurse) if isinstance(weight, Shelved))
    return list(dict.fromkeys(found))


def is_shelved(model: nn.Module) -> bool:
    """Whether any weight of a model lies on a shelf."""
    return any(isinstance(weight, Shelved) for weight in model.parameters())


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that were read from the shelf so far; 0 for a model without one."""
    weights = on_shelf(model)
    return weights[0].shelf.read_bytes if weights else 0


@contextmanager
def _filled(away: Sequence[Shelved], read: Callable[[], list[Tensor]], narrow: torch.dtype | None = None) -> Iterator[None]:
    """Within this context what `read` returns is in these parameters; what was changed in place goes back to the shelf."""
    try:
        if away:
            found = read()
            for weight in away:
                weight.fetch(found.pop(0), narrow=narrow)
        yield
        for weight in away:
            if weight.here:
                weight.put_back()
    finally:
        for weight in away:
            if weight.here:  # after an error, which other processes may not have
                weight.drop()
        if away:
            torch.clear_autocast_cache()  # otherwise an enclosing autocast keeps cast copies of every layer


@contextmanager
def fetched(*layers: nn.Module, narrow: torch.dtype | None = None) -> Iterator[None]:
    """Within this context the numbers of these layers are at hand; what was changed in place goes back to the shelf.

    Numbers that are stored in the format `narrow` are not widened, for products that would be made in that format anyway.
    """
    away = [weight for weight in on_shelf(*layers) if not weight.here]
    with _filled(away, lambda: away[0].shelf.read(away, layers), narrow):
        yield


@contextmanager
def unused(module: nn.Module) -> Iterator[None]:
    """Within this context a module whose output nobody uses does not fetch its weights; it gives NaN then."""
    away = [weight for weight in on_shelf(module) if not weight.here]
    try:
        for weight in away:
            weight.here = True
        yield
    finally:
        for weight in away:
            weight.here = False


@contextmanager
def in_memory(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While the context lasts, all weights of a shelf are in memory as `dtype`; then they go back to it. After an error they stay.

    They are the same parameters, so an optimiser goes on with them.
    """
    away = on_shelf(model)
    for weight in away:
        weight.data = weight.shelf.read_alone(weight).to(weight.device, dtype)
        weight.stored, weight.changed, weight.here = InMemory(weight.data), True, True
    yield
    for weight in away:
        (weight.stored,) = weight.shelf.laid_together([weight.data])
        weight.drop()


@contextmanager
def at_hand(layer: nn.Module) -> Iterator[None]:
    """Within this context a layer's numbers are at hand, and passes without gradients cast them only once."""
    with fetched(layer), casting_once(layer):
        yield


@contextmanager
def numbers_of(weight: nn.Parameter) -> Iterator[None]:
    """Within this context the numbers of a parameter are at hand; the rest of its layer stays on the shelf."""
    away = [weight] if isinstance(weight, Shelved) and not weight.here else []
    with _filled(away, lambda: [away[0].shelf.read_alone(away[0])]):
        yield


def fetch_on_call(layer: nn.Module) -> None:
    """Let a layer fetch its own weights whenever it is called and they are not at hand."""
    entered: list[AbstractContextManager[None]] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(fetched(module))
        entered[-1].__enter__()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if entered:  # not if fetching failed
            entered.pop().__exit__(None, None, None)

    layer.register_forward_pre_hook(before, prepend=True)
    layer.register_forward_hook(after, always_call=True)
