"""A checkpoint in the form that another tool loads, one file a form, and the proof that it computes the same.

A form has a file `NAME.py` with

    write(loaded, path, *, quant) -> list[str]    the sentences that a user should read about what came out

It is found by being in this folder under a name of `FORMS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapt_pruner.errors import UsageError, nearest

if TYPE_CHECKING:  # a form that is not known is said before torch is loaded
    from adapt_pruner.checkpoint.load import Loaded

__all__ = ["FORMS", "check_form", "export"]

FORMS = ("gguf", "uniform", "padded", "decilm", "onnx")


def export(loaded: Loaded, path: Path, *, to: str, quant: str | None = None) -> list[str]:
    """Write a model in the form `to`; whole or not at all.

    Args:
        loaded: the model in float32; left as found.
        path: a folder that does not exist or is empty; of `gguf` a file that does not exist.
        to: a name of `FORMS`.
        quant: of `gguf`, the type its matrices are stored in; None keeps the checkpoint's.

    Returns:
        Sentences about what came out that a user should read; often none.

    Raises:
        UsageError: the form cannot hold the model, or `path` is taken; the message says why and what can be done.
        RunError: it could not be written.
    """
    check_form(to, quant=quant)
    write: Callable[..., list[str]] = importlib.import_module(f"{__name__}.{to}").write
    return write(loaded, path, quant=quant)


def check_form(to: str, *, quant: str | None) -> None:
    """Refuse a form that is not known, or one that knows no `quant`.

    Raises:
        UsageError: it is.
    """
    if to not in FORMS:
        raise UsageError(f"form {to!r} is not known; {nearest(to, FORMS)}")
    if quant is not None and to != "gguf":
        raise UsageError(f"--quant {quant} is of --to gguf; a {to} export keeps the precision of the checkpoint, so leave it out")
