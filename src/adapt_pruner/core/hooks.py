"""Hooks that are always removed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["attached"]


@contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
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
