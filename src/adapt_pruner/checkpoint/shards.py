"""Write the weights of a model as safetensors files, one tensor after the other, so that one of them is in memory at a time.

The library safetensors wants all tensors of a file at once.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from adapt_pruner.checkpoint.untrusted import FORMATS
from adapt_pruner.core.model.shelf import Shelved
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import to_json

_SHARD_BYTES = 5_000_000_000  # of a file, as is usual on the hub


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name, tied ones once; those on a shelf are without numbers."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: tensor for name, tensor in model.state_dict().items() if name not in again}


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, *, dtype: torch.dtype, check: Callable[[str, Tensor], None]
) -> None:
    """Write the weights as safetensors files of at most 5 GB with an index, one tensor after the other.

    Args:
        tensors: by name; those on a shelf are read one by one.
        folder: where the files go.
        dtype: the format of floating-point numbers in them.
        check: called with the name and numbers of each tensor before it is written.
    """
    formats = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    split = split_state_dict_into_shards_factory(
        {name: tensor.numel() * formats[name].itemsize for name, tensor in tensors.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / filenames.WEIGHTS_INDEX).write_text(to_json(index, indent=2) + "\n", encoding="utf-8")
    for file, names in split.filename_to_tensors.items():
        write_file({name: tensors[name] for name in names}, folder / file, formats, check=check)


_CALLED = {getattr(torch, torch_name): name for name, torch_name in FORMATS.items()} | {
    torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_file(
    tensors: Mapping[str, Tensor],
    path: Path,
    formats: Mapping[str, torch.dtype],
    *,
    check: Callable[[str, Tensor], None] = lambda name, numbers: None,
) -> None:
    """Write one safetensors file, one tensor after the other; for the arguments see `write_shards`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.numel() * formats[name].itemsize]
        header[name] = {"dtype": _CALLED[formats[name]], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            numbers = tensor.stored.read() if isinstance(tensor, Shelved) else tensor.detach()
            check(name, numbers)
            numbers = numbers.to("cpu", formats[name]).contiguous()
            out.write(numbers.view(-1).view(torch.uint8).numpy().data)
