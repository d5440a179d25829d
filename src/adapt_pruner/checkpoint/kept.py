"""Folders of models that take long to make: the cache keeps them, and one process at a time makes each."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.system.files import cache_folder
from adapt_pruner.errors import RunError

__all__ = ["alone", "dequantised_folder", "keep", "models_folder"]

_MOST_KEPT = 2**32  # the most bytes of dequantised weights that the cache keeps of one file


def models_folder() -> Path:
    """The folder of the cache in which these folders lie."""
    return cache_folder() / "models"


def dequantised_folder(gguf: Path) -> Path:
    """The folder for the dequantised model of a GGUF file; its name depends on the file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    return models_folder() / f"{gguf.stem[:80]}-{digest}"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within this context no other process makes `folder`. Another one that wants to make it waits, and then looks for it.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Keep a dequantised model as `folder` if it is small and there is room; else the next load reads the GGUF file again."""
    num_bytes = count_parameters(model) * 4
    if model.dtype != torch.float32 or num_bytes > _MOST_KEPT:
        return
    try:
        with alone(folder):
            if not folder.is_dir() and shutil.disk_usage(folder.parent).free > 2 * num_bytes:
                save(model, tokenizer, folder, dtype=torch.float32)
    except (OSError, RunError):  # the cache is full or not writable
        pass
