"""Hooks that are sure to come off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["attached"]


@contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """While it lasts, `hooks` are on; they come off whatever happens, also when a later one cannot be attached.

    Args:
        hooks: what `register_forward_hook` and its like return; give a generator, so that each is attached in here.
    """
    handles = []
    try:
        for handle in hooks:
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()
