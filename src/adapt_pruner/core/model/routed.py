"""Shutting experts: the router of a layer with experts gives them -inf, so that no token chooses them.

Stock routers compute their logits by one linear map, inside their own forward. So while a router runs, what that map gives gets the
logarithm of the gates. Some routers choose by scores with a bias and weigh by scores without; that bias gets it too.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from adapt_pruner.core.model.axes import Gate
from adapt_pruner.core.model.hooks import Removable


def routed(model: nn.Module, gate: Gate, log: Tensor) -> Iterator[Removable]:
    """The hooks that add `log`, [experts], to the logits of the router at a gate; each is attached as it is yielded."""
    router = model.get_submodule(gate.module)
    running: list[ExitStack] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(ExitStack())
        running[-1].enter_context(_WithLog(log))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop().close()

    yield router.register_forward_pre_hook(enter)
    yield router.register_forward_hook(leave, always_call=True)
    for name in gate.also:
        owner, _, leaf = name.rpartition(".")
        yield _Added(model.get_submodule(owner), leaf, log)


class _WithLog(TorchFunctionMode):
    """Within this context a linear map to as many numbers as there are experts also adds the logarithm of their gates."""

    def __init__(self, log: Tensor) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        return output + self.log.to(output) if function is linear and output.shape[-1] == len(self.log) else output


class _Added:
    """A parameter or buffer with the logarithm of the gates added, until this is removed."""

    def __init__(self, owner: nn.Module, leaf: str, log: Tensor) -> None:
        self.owner, self.leaf, self.old = owner, leaf, getattr(owner, leaf)
        with torch.no_grad():
            new = self.old + log.to(self.old)
        setattr(owner, leaf, nn.Parameter(new, requires_grad=False) if isinstance(self.old, nn.Parameter) else new)

    def remove(self) -> None:
        """Put back what was there."""
        setattr(self.owner, self.leaf, self.old)
