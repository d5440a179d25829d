"""The display of a notebook while work goes on: one output of the cell, replaced as it changes, without widgets."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType

__all__ = ["WIDTH", "displayed"]

WIDTH = 100
"""Width of the output in columns."""
_EVERY = 0.5  # seconds between two updates
_FORM = '<pre style="white-space:pre-wrap;line-height:1.3;margin:0">{code}</pre>'


@contextmanager
def displayed(lines: io.StringIO, moving: Callable[[], RenderableType]) -> Iterator[None]:
    """Within this context show the `lines` so far, and the result of `moving` below them."""
    from IPython.display import display  # every notebook has it

    def drawn(*, last: bool) -> dict[str, str]:
        page = Console(
            file=io.StringIO(),
            record=True,
            width=WIDTH,
            force_jupyter=False,
            force_terminal=True,
            color_system="standard",
            legacy_windows=False,
        )
        page.print(lines.getvalue(), end="", markup=False, highlight=False, soft_wrap=True)
        if not last:
            page.print(moving())
        html = page.export_html(inline_styles=True, code_format=_FORM, clear=False)
        return {"text/plain": page.export_text(), "text/html": html}

    shown = drawn(last=False)
    handle = display(shown, raw=True, display_id=True)
    over = threading.Event()

    def follow() -> None:
        before = shown
        while not over.wait(_EVERY):
            now = drawn(last=False)
            if now != before:
                handle.update(now, raw=True)
            before = now

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        handle.update(drawn(last=True), raw=True)
