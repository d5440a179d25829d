"""A checkpoint in the middle of a run: a float32 model folder from `checkpoint.save`, and everything that decides the next step.

Of a model on a shelf (`core.model.shelf`) the folder has only the weights that are not as in the model's own files.

optimizer.safetensors   AdamW's moments, `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`; only if there are any. Moments of 8 or 4 bits
                        are `exp_avg.codes.NAME` and `exp_avg.scale.NAME`
lora.safetensors        the LoRA adapters in training; only if there are any, and then `load` refuses the folder
state.json              the run's state, the size and SHA-256 of every other file, and the SHA-256 of all this
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import check_fits, save
from adapt_pruner.checkpoint.shards import tensors_of
from adapt_pruner.checkpoint.shelved import Offload, Shelving, lay_over
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.shelf import is_shelved
from adapt_pruner.core.model.weight_mask import WeightMask
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import expanded, files_in
from adapt_pruner.core.system.strict_json import read_json, to_json
from adapt_pruner.errors import RunError
from adapt_pruner.train.adapters import base_name

_PIECES, _PIECE = 64, 2**16  # pieces of a large file that are hashed, and bytes of each


def save_state(
    loaded: Loaded,
    path: Path,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    mask: Mask,
    pruning: dict[str, Any],
    state: dict[str, Any],
    weight_mask: WeightMask | None = None,
) -> None:
    """Write a checkpoint to `path`, whole or not at all.

    Args:
        loaded: the model being made; its config and tokenizer are written, with `weights` as its weights.
        weights: by name, float32, whole; LoRA adapters included.
        moments: by name, see the top of this file.
        mask: against the dense model.
        pruning: how the model was made so far; plain data.
        state: plain data; its `start` comes from `start_of`.
        weight_mask: over the weights so far. While masks are learnt, weights that it masks may not be zero yet.

    Raises:
        RunError: the checkpoint could not be written; nothing is left under `path`.
    """
    if is_shelved(loaded.model):
        weights = tensors_of(loaded.model, changed=True)
    base = {inner: tensor for name, tensor in weights.items() if (inner := base_name(name)) is not None}
    additions = {name: tensor for name, tensor in weights.items() if base_name(name) is None}
    check_fits(path, base, moments, additions, dtype=torch.float32)

    def write_more(folder: Path) -> None:
        for name, tensors in ((filenames.MOMENTS, moments), (filenames.ADAPTERS, additions)):
            if tensors:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        files = {name: [file.stat().st_size, _digest(file)] for name, file in files_in(folder).items()}
        whole = {**state, "files": files}
        (folder / filenames.STATE).write_text(to_json({**whole, "sha256": _fingerprint(whole)}) + "\n", encoding="utf-8")

    save(
        loaded.model, loaded.tokenizer, path,
        mask=mask, pruning=pruning, dtype=torch.float32, weights=base, weight_mask=weight_mask, write_more=write_more,
    )  # fmt: skip


def read_state(path: Path, *, thorough: bool = True) -> dict[str, Any]:
    """The state in a checkpoint, after a check that all its files are whole.

    Args:
        path: the checkpoint.
        thorough: whether to read the files; if not, only their sizes are checked.

    Raises:
        RunError: a file is missing, cut short or changed.
    """
    try:
        state: dict[str, Any] = read_json(path / filenames.STATE)
        if state.pop("sha256") != _fingerprint(state):
            raise RunError(f"{path / 'state.json'} is not what was written")
        for name, (size, digest) in state["files"].items():
            file = path / name
            if not file.is_file():
                raise RunError(f"{file} is missing")
            if file.stat().st_size != size:
                raise RunError(f"{file} has {file.stat().st_size:,} bytes instead of {size:,}")
            if thorough and _digest(file) != digest:
                raise RunError(f"{file} is not what was written")
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path / 'state.json'} is damaged ({type(error).__name__}: {error})") from error
    return state


def load_state(
    path: Path,
    state: Mapping[str, Any],
    *,
    device: torch.device,
    offload: Offload | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> tuple[Loaded, dict[str, Tensor]]:
    """The model of a checkpoint that `read_state` has checked, and its moments and additions by name.

    Args:
        path: the checkpoint.
        state: what `read_state` returned; its `start` describes the model at the start of the run (see `start_of`).
        device: for the model; moments and additions lie on the CPU.
        offload: where weights of a model on a shelf lie from now on, as a recipe names it; otherwise where they lay.
        trust_remote_code: run Python code that comes with the model of the run.
    """
    place: Offload = state["start"].get("offload", "none")
    if place == "none":
        loaded = load(str(path), device=device, unmerged=True, any_task=True)
    else:
        beside = path.parent.parent
        shelving = Shelving.at(place if offload == "auto" else offload, beside) or Shelving.at(place, beside)
        loaded = load(state["model"], device=device, trust_remote_code=trust_remote_code, shelving=shelving, any_task=True)
        cut(loaded.model, families.axes(loaded.model), Mask.from_json(state["mask"]))
        lay_over(loaded.model, path)
    extras: dict[str, Tensor] = {}
    for name in (filenames.MOMENTS, filenames.ADAPTERS):
        file = path / name
        if file.is_file():  # copied to aligned memory, because products with unaligned tensors may round differently
            extras |= {key: tensor.clone() for key, tensor in load_file(file).items()}
    start = state["start"]
    loaded = replace(
        loaded,
        dtype=getattr(torch, start["dtype"]),
        mask=None if start["mask"] is None else Mask.from_json(start["mask"]),
        dense_params=start["dense_params"],
        source=start["source"],
        weight_bytes=start["weight_bytes"],
    )
    return loaded, extras


def start_of(loaded: Loaded) -> dict[str, Any]:
    """What a checkpoint records about the model at the start of the run, as plain data."""
    return {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "mask": None if loaded.mask is None else loaded.mask.to_json(),
        "dense_params": loaded.dense_params,
        "source": loaded.source,
        "weight_bytes": loaded.weight_bytes,
        "offload": loaded.offload,
    }


def identity(name: str) -> str:
    """A string that shows whether a model is still the same, without loading it. For a hub or packaged model it is the name.

    For a folder it depends on config and weights, for a file on the file itself. A large file counts by its size and by pieces
    spread evenly over it, which further training would change. This takes 20 ms for any model.
    """
    path = expanded(name)
    if path.is_file():
        return _sampled(path)
    if not (path / filenames.CONFIG).is_file():
        return name
    return " ".join(_sampled(file) for file in [path / filenames.CONFIG, *sorted(path.glob("*.safetensors"))])


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _fingerprint(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(state).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
