"""Rows of token ids on disk: written once, under a fingerprint of all that they are made from, read as memory-mapped files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt_pruner.core.system.files import cache_folder, folder_beside, named, remove, why
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import RunError

_FORMAT = 3  # of the rows too: a new rule for making rows needs a new number
_FILES = {"ids": "ids.bin", "offsets": "offsets.bin", "mask": "mask.bin", "tokens": "kept-tokens.bin", "logs": "kept-logs.bin"}


@dataclass(frozen=True)
class Kept:
    """The likeliest tokens at each predicted token of some rows, by the model that wrote them.

    Attributes:
        tokens: ids [predicted tokens, k].
        logs: float16, the same shape: log p of each.
    """

    tokens: NDArray[Any]
    logs: NDArray[np.float16]


@dataclass(frozen=True)
class Chunk:
    """Some rows on their way to disk.

    Attributes:
        ids: unsigned ints [tokens], the rows one after another.
        lengths: int64 [rows], tokens of each.
        mask: bool [tokens], which tokens are predicted; None for all.
        left_out: number of documents that gave no row.
        kept: of each token of the mask; None if no model wrote the rows.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None
    left_out: int = 0
    kept: Kept | None = None


@dataclass(frozen=True)
class Store:
    """Rows of token ids, in memory-mapped files.

    Attributes:
        ids: uint16 or uint32 [tokens], the rows one after another.
        offsets: int64 [rows + 1], where each row starts; the last is the number of tokens.
        mask: bool [tokens], which tokens are predicted; None for all.
        digest: SHA-256 of all of these.
        left_out: number of documents that gave no row.
        kept: of each token of the mask; None if no model wrote the rows.
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    mask: NDArray[np.bool_] | None
    digest: str
    left_out: int
    kept: Kept | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def tokens_of(self, row: int) -> slice:
        """Where the tokens of a row lie."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def kept_of(self, row: int) -> Kept | None:
        """What is kept of a row; None if no model wrote it."""
        if self.kept is None:
            return None
        first, last = self._predicted[self.offsets[[row, row + 1]]]
        of_row = slice(int(first), int(last))
        return Kept(self.kept.tokens[of_row], self.kept.logs[of_row])

    @cached_property
    def _predicted(self) -> NDArray[np.int64]:
        """The number of predicted tokens before each token."""
        assert self.mask is not None, "tokens are kept of predicted ones"
        return np.concatenate([[0], np.cumsum(self.mask)])


def joined(stores: Sequence[Store], *, chosen: Callable[[int], bool] = lambda row: True) -> Store:
    """The chosen rows of stores whose rows a model wrote, in one store in memory; rows are numbered through all stores."""
    ids, lengths, masks, tokens, logs = [], [], [], [], []
    number = 0
    for store in stores:
        if store.mask is None or store.kept is None:  # no conversation of this batch came to its end
            continue
        for row in range(len(store)):
            if chosen(number) and (kept := store.kept_of(row)) is not None:
                span = store.tokens_of(row)
                ids.append(store.ids[span])
                masks.append(store.mask[span])
                lengths.append(span.stop - span.start)
                tokens.append(kept.tokens)
                logs.append(kept.logs)
            number += 1
    digest = hashlib.sha256("".join(store.digest for store in stores).encode())
    digest.update(np.array(lengths, "<i8").tobytes())
    if not ids:
        return Store(np.zeros(0, "<u4"), np.zeros(1, np.int64), None, digest.hexdigest(), 0)
    both = Kept(np.concatenate(tokens), np.concatenate(logs))
    return Store(np.concatenate(ids), np.cumsum([0, *lengths]), np.concatenate(masks), digest.hexdigest(), 0, both)


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
    total = left_out = width = 0
    written = {"ids", "offsets"}
    paths = {name: folder / file for name, file in _FILES.items()}
    with ExitStack() as opened:
        files = {name: opened.enter_context(path.open("wb")) for name, path in paths.items()}
        files["offsets"].write(np.zeros(1, "<i8").tobytes())
        for chunk in chunks:
            arrays = {"ids": chunk.ids.astype(dtype), "offsets": (total + chunk.lengths.cumsum()).astype("<i8")}
            if chunk.mask is not None:
                arrays["mask"] = chunk.mask.astype(np.bool_)
            if chunk.kept is not None:
                arrays |= {"tokens": chunk.kept.tokens.astype(dtype), "logs": chunk.kept.logs.astype("<f2")}
                width = chunk.kept.tokens.shape[1]
            for name, array in arrays.items():
                files[name].write(array.tobytes())
            written |= arrays.keys()
            total += int(chunk.lengths.sum())
            left_out += chunk.left_out
    for name in _FILES.keys() - written:
        paths.pop(name).unlink()
    digest = hashlib.sha256()
    for path in paths.values():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    index = {
        "made_from": inputs,
        "bytes": {path.name: path.stat().st_size for path in paths.values()},
        "tokens": total,
        "left_out": left_out,
        "kept": width,
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
            actual = (folder / name).stat().st_size
            if actual != size:
                return None, f"{name} has {actual:,} of {size:,} bytes"
        arrays = {}
        of_ids = index["made_from"]["dtype"]
        for name, dtype in {"ids": of_ids, "offsets": "<i8", "mask": "?", "tokens": of_ids, "logs": "<f2"}.items():
            if size := index["bytes"].get(_FILES[name]):
                arrays[name] = np.asarray(np.memmap(folder / _FILES[name], dtype=dtype, mode="r"))
            elif size == 0:  # an empty file cannot be mapped
                arrays[name] = np.zeros(0, dtype)
        width = index.get("kept")  # stores of earlier versions have no such figure
        kept = Kept(*(arrays[name].reshape(-1, width) for name in ("tokens", "logs"))) if width else None
        return Store(arrays["ids"], arrays["offsets"], arrays.get("mask"), index["digest"], index["left_out"], kept), ""
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
