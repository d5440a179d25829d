"""Hooks that are always removed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn


class Removable(Protocol):
    """What can be taken off a module again, such as a hook."""

    def remove(self) -> None:
        """Take it off."""


@contextmanager
def attached(hooks: Iterable[Removable]) -> Iterator[None]:
    """Within this context `hooks` are attached. They are removed whatever happens, also if a later one cannot be attached.

    Args:
        hooks: results of `register_forward_hook` and its like; pass a generator, so that each hook is attached inside the
            context.
    """
    handles = []
    try:
        for handle in hooks:
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context, call `look` with the name and the input of each module whenever it is called.

    Args:
        modules: name -> module.
        look: takes the name and the first argument of the call, as it was given.
    """

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        look(name, args[0])

    with attached(module.register_forward_pre_hook(partial(hook, name)) for name, module in modules.items()):
        yield
