"""The number format in which the weights of a model lie on disk."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapt_pruner.checkpoint.untrusted import found, shards_in
from adapt_pruner.errors import UsageError

__all__ = ["check_plain", "stored_dtype"]

_FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors calls them


def stored_dtype(folder: str, named: Any) -> torch.dtype | None:
    """The format of most numbers in the weights of a model, or in the first of several files.

    A config.json may name no format, or another one. The first tensor would not do, because safetensors writes the widest first,
    and these may be few: frequencies of a rope in an old checkpoint.

    Args:
        folder: a folder or hub id whose weights `check_weights` has passed.
        named: `transformers_weights` of its config.json, a file to read instead of model.safetensors; None if it names none.

    Returns:
        The format; None if there are no weights, or they cannot be read, which whoever loads them reports.
    """
    numbers: Counter[torch.dtype] = Counter()
    try:
        for path in _files(folder, named)[:1]:
            for _, kind, shape in _tensors(path):
                if kind in _FORMATS:
                    numbers[_FORMATS[kind]] += math.prod(shape)
    except (SafetensorError, OSError, ValueError):
        return None
    return max(numbers, key=numbers.__getitem__, default=None)


def check_plain(model: Any, folder: str, named: Any, name: str) -> None:
    """Refuse weights that are stored as integers or truth values: those of a quantised model, which no config declares.

    Args:
        model: the model that was loaded.
        folder: a folder or hub id.
        named: as for `stored_dtype`.
        name: the model's name for messages.

    Raises:
        UsageError: a parameter of the model is stored so.
    """
    parameters = {key for full, _ in model.named_parameters() for key in (full, full.removeprefix(f"{model.base_model_prefix}."))}
    for path in _files(folder, named):
        for key, kind, _ in _tensors(path):
            if kind.startswith(("I", "U", "BOOL")) and key in parameters:
                raise UsageError(
                    f"the weights of {name} are no plain numbers: {key} is stored as {kind}, and its config.json has no "
                    "quantization_config; name the model that it was made from"
                )


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, format and shape of each tensor in a file, of which only the header is read."""
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = file.get_slice(name)
            yield name, tensor.get_dtype(), tensor.get_shape()


def _files(folder: str, named: Any) -> list[Path]:
    """The file of the weights, or those that their index names; empty if there is none."""
    for name in ("model.safetensors", "model.safetensors.index.json") if named is None else (str(named),):
        if (path := found(folder, name)) is not None:
            shards = [found(folder, shard) for shard in sorted(shards_in(path))] if name.endswith(".json") else [path]
            return [shard for shard in shards if shard is not None]
    return []
