"""Rows of token ids on disk: written once, under a fingerprint of all that they are made from, read as memory-mapped files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt_pruner.core.system.files import cache_folder, folder_beside, named, remove, why
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import RunError

__all__ = ["Chunk", "Store", "stored"]

_FORMAT = 3  # of the rows too: a new rule for making rows needs a new number
_FILES = {"ids": "ids.bin", "offsets": "offsets.bin", "mask": "mask.bin"}


@dataclass(frozen=True)
class Chunk:
    """Some rows on their way to disk.

    Attributes:
        ids: unsigned ints [tokens], the rows one after another.
        lengths: int64 [rows], tokens of each.
        mask: bool [tokens], which tokens are predicted; None for all.
        left_out: number of documents that gave no row.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Store:
    """Rows of token ids, in memory-mapped files.

    Attributes:
        ids: uint16 or uint32 [tokens], the rows one after another.
        offsets: int64 [rows + 1], where each row starts; the last is the number of tokens.
        mask: bool [tokens], which tokens are predicted; None for all.
        digest: SHA-256 of all of these.
        left_out: number of documents that gave no row.
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    mask: NDArray[np.bool_] | None
    digest: str
    left_out: int


def stored(
    made_from: Mapping[str, Any],
    make: Callable[[], Iterable[Chunk]],
    *,
    dtype: str,
    cache: Path | None,
    warn: Callable[[str], None],
) -> Store:
    """The store that `made_from` describes: from disk, or made by `make` and kept for the next time.

    It is written beside its place and renamed. If two processes make it at once, the first to finish keeps its own.

    Args:
        made_from: everything that decides the rows, as JSON data.
        make: gives the rows; called only if they are not on disk.
        dtype: number format of the ids, for example "<u2".
        cache: folder of the stores; by default `cache_folder()`.

    Raises:
        RunError: the store cannot be written.
    """
    inputs = {"format": _FORMAT, "dtype": dtype, **made_from}
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
    root = cache or cache_folder()
    folder = root / "tokens" / fingerprint
    store, damage = _opened(folder)
    if store is not None:
        return store
    if damage:
        warn(f"the tokens in {folder} are damaged ({damage}), so they are made again")
    try:
        with folder_beside(folder) as beside:
            _write(beside, make(), inputs, dtype)
            written, _ = _opened(beside)  # stays readable even if the folder is renamed or removed
            assert written is not None
            return _settled(beside, folder) or written
    except OSError as error:
        raise RunError(
            f"tokens cannot be stored in {root} ({why(error)}); make room there or name another folder: ADAPT_PRUNER_CACHE=DIR"
        ) from error


def _write(folder: Path, chunks: Iterable[Chunk], inputs: Mapping[str, Any], dtype: str) -> None:
    """Write the rows and their index into `folder`, one chunk at a time."""
    total = left_out = 0
    masked = False
    paths = {name: folder / file for name, file in _FILES.items()}
    with paths["ids"].open("wb") as ids, paths["offsets"].open("wb") as offsets, paths["mask"].open("wb") as mask:
        offsets.write(np.zeros(1, "<i8").tobytes())
        for chunk in chunks:
            ids.write(chunk.ids.astype(dtype).tobytes())
            offsets.write((total + chunk.lengths.cumsum()).astype("<i8").tobytes())
            if chunk.mask is not None:
                masked = True
                mask.write(chunk.mask.astype(np.bool_).tobytes())
            total += int(chunk.lengths.sum())
            left_out += chunk.left_out
    if not masked:
        paths.pop("mask").unlink()
    digest = hashlib.sha256()
    for path in paths.values():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    index = {
        "made_from": inputs,
        "bytes": {path.name: path.stat().st_size for path in paths.values()},
        "tokens": total,
        "left_out": left_out,
        "digest": digest.hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _opened(folder: Path) -> tuple[Store | None, str]:
    """The store in `folder` if it exists and is whole; and what is wrong with it, if anything."""
    if not folder.is_dir():
        return None, ""
    try:
        index = read_json(folder / "index.json")
        for name, size in index["bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return None, f"{name} has {found:,} of {size:,} bytes"
        arrays = {}
        for name, dtype in (("ids", index["made_from"]["dtype"]), ("offsets", "<i8"), ("mask", "?")):
            if size := index["bytes"].get(_FILES[name]):
                arrays[name] = np.asarray(np.memmap(folder / _FILES[name], dtype=dtype, mode="r"))
            elif size == 0:  # an empty file cannot be mapped
                arrays[name] = np.zeros(0, dtype)
        return Store(arrays["ids"], arrays["offsets"], arrays.get("mask"), index["digest"], index["left_out"]), ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, str(error)


def _settled(beside: Path, folder: Path) -> Store | None:
    """Rename `beside` to `folder`, or keep what another process has finished there; a damaged store is replaced."""
    for _ in range(3):
        try:
            named(beside, folder)
        except OSError:
            winner, damage = _opened(folder)
            if winner is not None:
                return winner
            if damage:
                remove(folder)
        else:
            return None
    return None
