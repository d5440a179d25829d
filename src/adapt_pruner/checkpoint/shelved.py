"""Load a model whose weights stay in its files, or in memory as stored, until a pass needs them (see `core.model.shelf`).

The model is built without numbers. Every matrix then gets its place in a safetensors file, whose header is read here because
safetensors does not tell offsets. What has one dimension (norms, biases) is read at once.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig

from adapt_pruner.checkpoint.config import random_model
from adapt_pruner.checkpoint.untrusted import FORMATS, weight_files
from adapt_pruner.core.events.words import counted
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.shelf import SCRATCH, InFile, InMemory, Shelf, Shelved, Source, absent, fetch_on_call, on_shelf
from adapt_pruner.core.system.files import expanded
from adapt_pruner.errors import RunError, UsageError

_LARGEST_HEADER = 100_000_000  # bytes, as safetensors allows


Offload = Literal["none", "cpu", "disk"]
PLACES: tuple[Offload, ...] = ("none", "cpu", "disk")
"""Where weights may lie while no pass needs them, the fastest first."""


@dataclass(frozen=True)
class Shelving:
    """Where the weights of a model lie while no pass needs them.

    Attributes:
        scratch: the folder for changed weights, and the files of the model hold all others; None keeps all in memory as stored.
    """

    scratch: Path | None

    @classmethod
    def at(cls, place: Offload, beside: Path | None = None) -> "Shelving | None":
        """For a place as a recipe names it.

        Changed weights go to the folder in ADAPT_PRUNER_SCRATCH, or to `beside`, or to the system's folder for temporary files.
        """
        if place == "none":
            return None
        return cls(expanded(os.environ.get(SCRATCH, "") or beside or tempfile.gettempdir()) if place == "disk" else None)

    @property
    def place(self) -> Offload:
        """The place as a recipe names it."""
        return "cpu" if self.scratch is None else "disk"


def shelved_model(
    folder: str,
    named: Any,
    config: Any,
    options: dict[str, Any],
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    how: Shelving,
) -> Any:
    """The model of a folder or hub id, with its matrices on a shelf.

    Args:
        folder: a folder or hub id, checked by `untrusted`.
        named: `transformers_weights` of its config.json, or None.
        config: its transformers config.
        options: those of its loading.
        name: the model's name for messages.
        dtype: the format of a weight while it is at hand.
        device: of all weights.
        how: where the weights lie.

    Raises:
        UsageError: its files name the weights otherwise than its class does.
        RunError: a file is damaged, or does not fit the config.
    """
    with _without_numbers():
        model = random_model(config, options, dtype=dtype)
        model.tie_weights()
    stored: dict[str, InFile] = {}
    for path in weight_files(folder, named):
        stored |= places(path)
    if not stored:
        raise UsageError(f"{name} has no model.safetensors; only safetensors weights are read, convert others first")
    names: dict[nn.Parameter, list[str]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(full)
    shelf = Shelf(
        lambda: list(decoder_layers(model)), scratch=how.scratch, ahead=how.scratch is not None or device.type == "cuda"
    )
    for parameter, known in names.items():
        found = [stored.pop(full) for full in known if full in stored]
        place = found[0] if found else None
        if place is not None and any(not torch.equal(place.read(), other.read()) for other in found[1:]):
            raise UsageError(
                f"the files of {name} have {' and '.join(known)} apart, and its config.json ties them, so its weights cannot be read one by "
                "one; set offload=none"
            )
        if place is None:
            raise UsageError(
                f"the files of {name} have no tensor {known[0]!r}, so its weights cannot be read one by one; set offload=none, or save the "
                "model with transformers' save_pretrained first"
            )
        if place.shape != tuple(parameter.shape):
            raise RunError(
                f"the weights of {name} do not fit its config: {known[0]!r} is {' × '.join(map(str, place.shape))} in the file and "
                f"{' × '.join(map(str, parameter.shape))} in config.json; get the right files"
            )
        if not place.dtype.is_floating_point:
            raise UsageError(
                f"the weights of {name} are no plain numbers: {known[0]!r} is stored as {place.dtype}; name the dense model"
            )
        if parameter.dim() < 2:
            new = nn.Parameter(place.read().to(device, dtype), requires_grad=True)
        else:
            where = place if how.scratch is not None else InMemory(place.read().to(device))
            new = Shelved.of(where, shelf, parameter.shape, dtype=dtype, device=device)
        for full in known:
            owner, _, leaf = full.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
    _fill_buffers(model, stored, name)
    if model.can_generate():
        with suppress(OSError):  # there is no such file
            model.generation_config = GenerationConfig.from_pretrained(folder)
    inside = {module for layer in decoder_layers(model) for module in layer.modules()}
    outside = (module for module in model.modules() if module not in inside and on_shelf(module, recurse=False))
    for module in (*decoder_layers(model), *outside):
        fetch_on_call(module)
    return model


def lay_over(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint in the place of a model's own; biases that a repair added are added again.

    The checkpoint may be removed afterwards: its files stay open.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for file in weight_files(str(folder), None):
        for name, place in places(file).items():
            weight = parameters.get(name)
            if isinstance(weight, Shelved):
                weight.stored, weight.changed = place, True
            elif weight is not None:
                weight.data.copy_(place.read())
            else:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(place.read().to(model.device)))
                model.config.output_bias = True


def _fill_buffers(model: Any, stored: dict[str, InFile], name: str) -> None:
    """Read the persistent buffers, in place; refuse tensors that are left."""
    for full, buffer in model.named_buffers():
        if full in stored and (place := stored.pop(full)).dtype.is_floating_point:  # numbers of positions are made anew
            buffer.copy_(place.read())
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    left = [full for full in stored if not any(pattern in full for pattern in ignored)]
    if left:
        raise RunError(
            f"the weights of {name} exceed its config by {counted(len(left), 'tensor')}, for example {min(left)!r}; get the right files"
        )


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Modules that are made in this context have parameters without numbers; buffers are as usual."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter.data = absent(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        register(module, name, parameter)

    try:
        nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def places(path: Path) -> dict[str, InFile]:
    """Where each tensor of a safetensors file lies; only the header is read.

    Raises:
        RunError: the file is cut short, or its header does not fit it.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header has {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        source, found = Source(path), {}
        for name, about in header.items():
            dtype, shape = getattr(torch, FORMATS.get(about["dtype"], ""), torch.int8), tuple(map(int, about["shape"]))
            begin, end = map(int, about["data_offsets"])
            if about["dtype"] in FORMATS and end - begin != torch.Size(shape).numel() * dtype.itemsize:
                raise ValueError(f"{name!r} has {end - begin:,} bytes for {' × '.join(map(str, shape))} numbers")
            if begin < 0 or 8 + length + end > size:
                raise ValueError(f"{name!r} ends at byte {8 + length + end:,} of {size:,}")
            found[name] = InFile(source, 8 + length + begin, dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); get the file again") from error
    return found
