"""The number format in which the weights of a model lie on disk."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapt_pruner.checkpoint.untrusted import found, shards_in

__all__ = ["stored_dtype"]

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
        path = _first_file(folder, named)
        if path is None:
            return None
        with safe_open(path, framework="np") as file:  # which reads the header only
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_slice(name)
                if (dtype := _FORMATS.get(tensor.get_dtype())) is not None:
                    numbers[dtype] += math.prod(tensor.get_shape())
    except (SafetensorError, OSError, ValueError):
        return None
    return max(numbers, key=numbers.__getitem__, default=None)


def _first_file(folder: str, named: Any) -> Path | None:
    """The file of the weights, or the first that their index names; None if there is none."""
    for name in ("model.safetensors", "model.safetensors.index.json") if named is None else (str(named),):
        if (path := found(folder, name)) is not None:
            return found(folder, min(shards_in(path))) if name.endswith(".json") else path
    return None
