"""A model spread over the processes while it trains (torch's `fully_shard`, FSDP2), and put back where it was afterwards.

`spread` gives each process its rows of all weights and moments. Those on a shelf are read row by row from the files, so no process
ever holds the model. Afterwards one tensor after the other is gathered, and goes back to the shelf. A model in memory is emptied
meanwhile, and filled again.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.moments import is_quantised
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.model.shelf import Shelf, Shelved, Stored, on_shelf
from adapt_pruner.core.system import world
from adapt_pruner.errors import UsageError

_gather: Any = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor  # its older name


@contextmanager
def spread(
    model: nn.Module, optimizer: Optimizer, *, dtype: str, weights: torch.dtype = torch.float32, moments: bool = True
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Yield a sharded twin of `model`, and the optimiser; afterwards `model` has the trained weights, in memory or on its shelf.

    A single process gets `model` itself. While the twin is in use, the optimiser holds the twin's parameters, and `model`'s own are
    empty or on their shelf, so that each process holds only its share. After an error they stay so.

    Args:
        model: plain and the same on every process.
        optimizer: over its parameters that train; changed in place.
        dtype: precision of the matrix products, which is also that of the gathered weights.
        weights: the format in which the shares are held.
        moments: whether the optimiser's moments are needed afterwards.
    """
    if world.size() == 1:
        yield model, optimizer
        return
    device = next(model.parameters()).device
    formats = {plain: plain.dtype for plain in model.parameters()}
    empty = {
        id(plain): nn.Parameter(torch.empty(plain.shape, dtype=weights, device="meta"), plain.requires_grad) for plain in formats
    }
    twin = copy.deepcopy(model, empty | {id(buffer): buffer for buffer in model.buffers()})
    shard(twin, device, dtype="bfloat16" if weights == torch.bfloat16 else dtype)
    parts = dict(zip(formats, _filled(twin, model, weights=weights), strict=True))
    _point(optimizer, parts, lambda plain, key, value: _shared(key, value, parts[plain], optimizer))
    yield twin, optimizer
    if not moments:
        optimizer.state.clear()
    away, whole = _put_away(model, parts, optimizer), {part: plain for plain, part in parts.items()}
    for plain, part in parts.items():
        if not isinstance(plain, Shelved):
            plain.data = Share.of("", part).gather().to(formats[plain])

    def whole_again(part: nn.Parameter, key: str, value: Any) -> Any:
        return away[part, key] if (part, key) in away else _gathered(value, part, whole[part], optimizer)

    _point(optimizer, whole, whole_again)


def _filled(twin: nn.Module, model: nn.Module, *, weights: torch.dtype) -> list[nn.Parameter]:
    """Give a sharded model without numbers this process's rows of the model's, in place, and empty that; returns its parameters."""
    from torch.distributed.tensor import DTensor

    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in twin.modules():
        for leaf, part in module._parameters.items():
            owners.setdefault(id(part), []).append((module, leaf))
    parts: list[nn.Parameter] = []
    for plain, like in list(zip(model.parameters(), twin.parameters(), strict=True)):
        sharded: Any = like
        rows = _rows(plain).to(plain.device, weights)
        numbers = DTensor.from_local(
            rows, sharded.device_mesh, sharded.placements, run_check=False, shape=plain.shape, stride=sharded.stride()
        )
        parts.append(nn.Parameter(numbers, plain.requires_grad))
        for module, leaf in owners[id(like)]:
            module._parameters[leaf] = parts[-1]
        if not isinstance(plain, Shelved):
            plain.data = torch.empty(0, dtype=plain.dtype, device=plain.device)
    return parts


def _put_away(model: nn.Module, parts: Mapping[nn.Parameter, Any], optimizer: Optimizer) -> dict[tuple[Any, str], Shelved]:
    """Lay trained weights on the shelf of the model, in place, and moments in float32; returns these by parameter and key."""
    weights = [weight for weight in on_shelf(model) if weight.requires_grad]
    moments = [
        (weight, key, value) for weight in weights for key, value in optimizer.state.get(parts[weight], {}).items() if value.dim()
    ]
    if not weights:
        return {}
    shelf, each = (
        weights[0].shelf,
        itertools.chain(((weight, parts[weight]) for weight in weights), ((weight, value) for weight, _, value in moments)),
    )
    stored = iter(shelf.laid_together(Share.of("", _wide(value), parts[weight]).gather() for weight, value in each))
    for weight, place in zip(weights, stored, strict=False):
        weight.stored, weight.changed = place, True
    return {
        (parts[weight], key): Shelved.of(place, shelf, weight.shape, dtype=torch.float32, device=weight.device)
        for (weight, key, _), place in zip(moments, stored, strict=True)
    }


def _point(optimizer: Optimizer, to: Mapping[Any, Any], change: Callable[[Any, str, Any], Any]) -> None:
    """Point an optimiser, in place, to other parameters; `change` gives their state."""
    for group in optimizer.param_groups:
        group["params"] = [to[parameter] for parameter in group["params"]]
    for old, new in to.items():
        if (state := optimizer.state.pop(old, None)) is not None:
            optimizer.state[new] = {key: change(old, key, value) if value.dim() else value for key, value in state.items()}


def shard(model: Any, device: torch.device, *, dtype: str) -> None:
    """Shard `model`, in place, over all processes: each decoder layer is a group, and the rest is one more.

    `model.as_forward(f, …)` then calls f(model, …) with the model gathered as in its own forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    narrow = torch.bfloat16 if uses_bfloat16(device, dtype) else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.as_forward = MethodType(lambda self, function, *args: function(self, *args), model)
    register_fsdp_forward_method(model, "as_forward")


def _all_bounds(rows: int) -> list[tuple[int, int]]:
    """For each process the first of its rows of so many, and the first after them, as `fully_shard` deals them out."""
    each = -(-rows // world.size())
    return [(min(rows, rank * each), min(rows, (rank + 1) * each)) for rank in range(world.size())]


def _rows(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, in memory of their own; of one on a shelf only they are read."""
    start, stop = _all_bounds(len(tensor))[world.rank()]
    if isinstance(tensor, Shelved) and not tensor.here:
        return tensor.stored.at({0: torch.arange(start, stop)}).read()
    return tensor.detach()[start:stop].clone()


@dataclass(frozen=True)
class Share(Stored):
    """A process's share of numbers that the processes hold together.

    Attributes:
        key: its name, by which the main process asks for it (see `world.on_main`).
        local: the share.
        lengths: how many numbers each process has.
        shape: of the whole.
    """

    key: str
    local: Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, key: str, value: Any, part: Any = None, *, every: int = 1) -> "Share":
        """Of a sharded parameter, or of what lies beside the shares of one, `part`: a number for each `every` numbers of it."""
        part = value if part is None else part
        row = part.shape[1:].numel()
        counts = [(stop - start) * row // every for start, stop in _all_bounds(part.shape[0])]
        local = value.to_local() if hasattr(value, "to_local") else value
        return cls(key, local, tuple(counts), tuple(part.shape) if every == 1 else (sum(counts),))

    @property
    def dtype(self) -> torch.dtype:
        """See `Stored`."""
        return self.local.dtype

    def gather(self) -> Tensor:
        """The whole; every process must call this."""
        longest = max(self.lengths)
        padded = self.local.detach().new_zeros(longest)
        padded[: self.local.numel()] = self.local.detach().reshape(-1)
        gathered = padded.new_empty(world.size() * longest)
        _gather(gathered, padded)
        each = [gathered[rank * longest :][:length] for rank, length in enumerate(self.lengths)]
        return torch.cat(each).view(self.shape)

    def read(self) -> Tensor:
        """The whole, on the main process at work in `world.on_main`."""
        with world.together(self.key):
            return self.gather().cpu()


def full_state(model: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and moments as `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`; nothing is copied.

    What is not here as a whole is a `Shelved`, whose numbers are read, or gathered, when it is written; weights as in the model's own
    files are left out. A quantised moment is two tensors, `exp_avg.codes.NAME` and `exp_avg.scale.NAME`: quantised again, it would
    change.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Shelved) or parameter.changed:
            weights[name] = _to_be_read(name, parameter, parameter)
        for key, value in ({} if optimizer is None else optimizer.state.get(parameter, {})).items():
            for of, tensor in _tensors(key, value).items():
                every = value.numel() // tensor.numel() if is_quantised(value) else 1
                moments[f"{of}.{name}"] = _to_be_read(f"{of}.{name}", tensor, parameter, every=every)
    return weights, moments


def gathering(*tensors: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """For `world.on_main`: what every process does when the main process reads one of these tensors."""
    named = (item for mapping in tensors for item in mapping.items())
    return {
        key: tensor.stored.gather for key, tensor in named if isinstance(tensor, Shelved) and isinstance(tensor.stored, Share)
    }


def _to_be_read(key: str, value: Any, part: Any, *, every: int = 1) -> Tensor:
    if isinstance(value, Shelved) or not hasattr(part, "to_local") or not value.dim():
        return value if isinstance(value, Shelved) else value.detach()
    share = Share.of(key, value, part, every=every)
    return Shelved.of(share, Shelf(list, scratch=None), share.shape, dtype=share.dtype, device=share.local.device)


def load_moments(model: nn.Module, optimizer: Any, moments: Mapping[str, Tensor], *, stay: bool = False) -> None:
    """Put moments, as `full_state` names them, into the optimiser, in place.

    With `stay`, those of weights on a shelf stay in their file until `spread` deals them out.

    Raises:
        UsageError: they are quantised, and not as the optimiser has them.
    """
    for name, parameter in model.named_parameters():
        if f"step.{name}" not in moments:
            continue
        state = optimizer.state[parameter]
        state["step"] = _read(moments[f"step.{name}"]).to(parameter.device)
        for key in ("exp_avg", "exp_avg_sq"):
            found = {of: moments[f"{of}.{name}"] for of in (key, f"{key}.codes", f"{key}.scale") if f"{of}.{name}" in moments}
            if stay and isinstance(parameter, Shelved):
                state[key] = found[key] if key in found else Codes(found[f"{key}.codes"], found[f"{key}.scale"], name)
            else:
                state[key] = _new_moment(optimizer, parameter, key)
                _copy(state[key], {of: _read(tensor) for of, tensor in found.items()}, key, name)


def _read(tensor: Tensor) -> Tensor:
    return tensor.stored.read() if isinstance(tensor, Shelved) else tensor


def _new_moment(optimizer: Any, parameter: Any, key: str) -> Any:
    """Room for a moment of a parameter, or of this process's share of it."""
    if hasattr(optimizer, "_new_buffer"):
        return optimizer._new_buffer(parameter, key == "exp_avg")
    return torch.empty_like(parameter, memory_format=torch.preserve_format)


def _copy(moment: Any, numbers: Mapping[str, Tensor], key: str, name: str) -> None:
    """Copy numbers, or codes and scales, into a moment, in place.

    Raises:
        UsageError: they are quantised, and the moment is not, or otherwise.
    """
    held = {key: moment} if key in numbers else _tensors(key, moment)
    for of, tensor in held.items():
        if of not in numbers or numbers[of].shape != tensor.shape:
            raise UsageError(
                f"the checkpoint's moments of {name} have another number of bits than this run's training.optimizer, or shares of another "
                "size; set it as it was, or start in another folder"
            )
        tensor.copy_(numbers[of])


@dataclass(frozen=True)
class Codes:
    """A quantised moment in a file, of the parameter `name`."""

    codes: Any
    scale: Any
    name: str

    def dim(self) -> int:
        """Dimensions of the codes."""
        return int(self.codes.dim())


def widen(model: nn.Module, optimizer: Any) -> None:
    """Turn moments that lie in a file as codes into float32 on the shelf, in place, so that a cut can slice them."""
    coded = [
        (parameter, key, value)
        for parameter in on_shelf(model)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Codes)
    ]

    def wide() -> Iterator[Tensor]:
        for parameter, key, value in coded:
            moment = _new_moment(optimizer, parameter, key)
            _copy(moment, {f"{key}.codes": _read(value.codes), f"{key}.scale": _read(value.scale)}, key, value.name)
            yield _wide(moment)

    for (parameter, key, _), place in zip(coded, coded[0][0].shelf.laid_together(wide()) if coded else [], strict=True):
        optimizer.state[parameter][key] = Shelved.of(
            place, parameter.shelf, parameter.shape, dtype=torch.float32, device=parameter.device
        )


def _tensors(key: str, value: Any) -> dict[str, Tensor]:
    coded = is_quantised(value) or isinstance(value, Codes)
    return {f"{key}.codes": value.codes, f"{key}.scale": value.scale} if coded else {key: value}


def _wide(value: Any) -> Any:
    return value.dequantize() if is_quantised(value) else value


def _shared(key: str, value: Any, part: Any, optimizer: Any) -> Any:
    """This process's share of a whole moment."""
    moment = _new_moment(optimizer, part, key)
    local = moment.to_local() if hasattr(moment, "to_local") else moment
    if not (isinstance(value, Codes) or (is_quantised(value) and is_quantised(local))):
        local.copy_(_rows(value if isinstance(value, Shelved) else _wide(value)))
        return moment
    start, stop = (bound * part.shape[1:].numel() for bound in _all_bounds(part.shape[0])[world.rank()])
    numbers = {}
    for of in ("codes", "scale"):
        whole = _read(getattr(value, of)).reshape(-1)
        every = part.numel() // whole.numel()
        piece, held = whole[start // every : stop // every], _tensors(key, local).get(f"{key}.{of}")
        numbers[f"{key}.{of}"] = piece if held is None or held.numel() != piece.numel() else piece.view(held.shape)
    _copy(local, numbers, key, getattr(value, "name", key))
    return moment


def _gathered(value: Any, part: Any, plain: nn.Parameter, optimizer: Any) -> Any:
    """A whole moment, of the processes' shares."""
    moment = _new_moment(optimizer, plain, "exp_avg" if getattr(value, "signed", True) else "exp_avg_sq")
    if not (is_quantised(value) and is_quantised(moment)):
        moment.copy_(Share.of("", _wide(value), part).gather())
        return moment
    for of in ("codes", "scale"):
        tensor, local = getattr(moment, of), getattr(value, of)
        tensor.copy_(Share.of("", local, part, every=value.numel() // local.numel()).gather().view(tensor.shape))
    return moment
