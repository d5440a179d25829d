"""Read a checkpoint's weights from its files one by one, for who needs each of them once and never all of them together."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded, load, locate
from adapt_pruner.checkpoint.untrusted import NUMBERS, tensors_in, weight_files
from adapt_pruner.errors import RunError, first_line


def load_unread(name: str, *, trust_remote_code: bool = False) -> Loaded:
    """Load a model whose weights stay in their files: they are on the meta device, and `weights_of` reads them.

    The weights are loaded as `load` does it if they do not lie in the files as the model has them: in a GGUF file, under other names,
    or with a head that the config ties to the embedding.

    Raises:
        UsageError: there is no such model, or it is not a causal LM of a known family.
        RunError: its files are damaged.
    """
    if locate(name)[1] is not None:
        return load(name, trust_remote_code=trust_remote_code)
    unread = load(name, device=torch.device("meta"), trust_remote_code=trust_remote_code)
    model = unread.model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied == model.config.tie_word_embeddings and dict(model.named_parameters()).keys() <= _files(unread).keys():
        return unread
    return load(name, trust_remote_code=trust_remote_code)


def weights_of(loaded: Loaded) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The weights of a model without their values, by name, and the function that reads the one of a name.

    Where the model holds its weights, they are these; where `load_unread` left them in files, each is read there when it is asked for, in
    the number format that it is stored in, and held by nobody else.

    Raises:
        RunError: (by the function) the file cannot be read.
    """
    state: dict[str, Tensor] = loaded.model.state_dict()
    if loaded.model.device.type != "meta":
        return {name: weight.to("meta") for name, weight in state.items()}, state.__getitem__
    files = _files(loaded)

    def read(name: str) -> Tensor:
        path, _ = files[name]
        try:
            with safe_open(path, framework="pt") as file:  # kept open, it would keep all that was read in memory
                weight: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} cannot be read any more ({first_line(error)}); get the file again") from error
        return weight

    return {name: files[name][1] for name in state if name in files}, read


def _files(loaded: Loaded) -> dict[str, tuple[Path, Tensor]]:
    """The file of each stored weight, and the weight without its values."""
    folder, _ = locate(loaded.source)
    named = getattr(loaded.model.config, "transformers_weights", None)
    return {
        name: (path, torch.empty(shape, dtype=getattr(torch, NUMBERS[kind]), device="meta"))
        for path in weight_files(folder, named)
        for name, kind, shape in tensors_in(path)
        if kind in NUMBERS
    }
