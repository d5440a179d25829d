"""A checkpoint's weights one by one, for who needs each of them once and never all of them together."""

from collections.abc import Callable

import torch
from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.shelved import Shelving
from adapt_pruner.core.model.shelf import Shelved
from adapt_pruner.errors import UsageError


def load_unread(name: str, *, trust_remote_code: bool = False) -> Loaded:
    """Load a model whose matrices stay in their files, if these have them as the model names them; else like `load`.

    Raises:
        UsageError: there is no such model, or it is not a causal LM of a known family.
        RunError: its files are damaged.
    """
    try:
        return load(name, trust_remote_code=trust_remote_code, shelving=Shelving.at("disk"))
    except UsageError:  # of a model that cannot be loaded at all, this tells, too
        return load(name, trust_remote_code=trust_remote_code)


def weights_of(loaded: Loaded) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The weights of a model without their values, by name, and the function that reads the one of a name.

    What lies in files is read when it is asked for, in the format that it is stored in, and held by nobody else.
    """
    state: dict[str, Tensor] = loaded.model.state_dict()
    parameters = loaded.model.named_parameters(remove_duplicate=False)
    stored = {name: weight.stored for name, weight in parameters if isinstance(weight, Shelved)}

    def read(name: str) -> Tensor:
        return stored[name].read() if name in stored else state[name]

    def unread(name: str, weight: Tensor) -> Tensor:
        return torch.empty(weight.shape, dtype=stored[name].dtype if name in stored else weight.dtype, device="meta")

    return {name: unread(name, weight) for name, weight in state.items()}, read
