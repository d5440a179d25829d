"""A checkpoint in the form that another tool loads, one file per form, and the proof that it computes the same.

A form is a file `NAME.py` of this folder, found because it is there, with the names

    ABOUT                                          what it is, in half a sentence; its card says so
    write(loaded, path, *, quant) -> list[str]     writes it; returns sentences about the result that a user should read
    loading(config) -> Iterator[str]               commands that load it, for the card of a folder whose config.json is `config`
    holds(artefact) -> bool                        whether a path is of this form
    opened(artefact, *, context, trust_remote_code)    opens it in the engine that proves it: a context with an `engines.Engine`

It also has `LAZY` if its `write` reads the weights one by one (`checkpoint.stored`), so that nobody has to hold them. It has `QUANTS` if its `write` can store weights in several types. It has `PADS` if its `write` takes `pad`: MLPs are then
zero-padded to multiples of that number of neurons. It has `LIBRARY`, the hub's name of the library that loads it, if that is not
transformers. A form that is a folder for transformers takes the last three functions above
from `plain.py`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from adapt_pruner.errors import UsageError, nearest, option

if TYPE_CHECKING:  # an unknown form is reported before torch is loaded
    from adapt_pruner.checkpoint.load import Loaded
    from adapt_pruner.export.engines import Engine


_MOVES_ZERO = ("q5_k_m", "q5_k_s", "q5_1", "q4_k_m", "q4_k_s", "q4_1", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
"""GGUF types of which zero need not be a value: blocks of a minimum and steps, or, in some matrices or in rows that are no multiple of
256, types that llama.cpp takes in their place."""


class Form(Protocol):
    """The names in the file of a form; the top of this file explains each."""

    ABOUT: str

    def write(self, loaded: Loaded, path: Path, *, quant: str | None) -> list[str]: ...  # noqa: D102
    def loading(self, config: Mapping[str, Any]) -> Iterator[str]: ...  # noqa: D102
    def holds(self, artefact: Path) -> bool: ...  # noqa: D102
    def opened(self, artefact: Path, *, context: int, trust_remote_code: bool) -> AbstractContextManager[Engine]: ...  # noqa: D102


def forms() -> list[str]:
    """The names of all forms, sorted; imports none of them."""
    return sorted(_that_set("ABOUT"))


def form_of(name: str) -> Form:
    """A form by its name, one of `forms()`."""
    form = importlib.import_module(f"{__name__}.{name}")
    lacking = [what for what in ("loading", "write", "holds", "opened") if not hasattr(form, what)]
    assert not lacking, f"the form {name!r} has no {', '.join(lacking)}; the top of export/__init__.py says what a form has"
    return cast(Form, form)


def is_lazy(name: str) -> bool:
    """Whether the form `name` is written without all weights in memory, from what `checkpoint.stored.load_unread` gives."""
    return name in _that_set("LAZY")


def export(loaded: Loaded, path: Path, *, to: str, quant: str | None = None, pad: int | None = None) -> list[str]:
    """Write a model in the form `to`; whole or not at all.

    Args:
        loaded: the model in float32, or for a lazy form without its weights; left as found.
        path: a folder that does not exist or is empty; for `gguf` a file that does not exist.
        to: a name of `forms()`.
        quant: for `gguf`, the type of the stored matrices; None keeps the checkpoint's.
        pad: for `gguf`, 32 or 256: MLPs are zero-padded to multiples of it, for people who quantise the file later.

    Returns:
        Sentences about the result that a user should read; often none.

    Raises:
        UsageError: the form cannot hold the model, or `path` is taken; the message says why and what can be done.
        RunError: the result could not be written.
    """
    check_form(to, quant=quant, pad=pad)
    write: Any = form_of(to).write
    notes: list[str] = write(loaded, path, quant=quant, **({} if pad is None else {"pad": pad}))
    if loaded.weight_mask is not None:
        pattern = "" if loaded.weight_mask.pattern is None else f"{loaded.weight_mask.pattern} "
        moved = quant is not None and quant.lower() in _MOVES_ZERO
        notes.append(
            f"the {pattern}zeros of {loaded.source} are stored as numbers, and an engine that reads a {to} export multiplies by them; the zeros "
            "make it neither smaller nor faster"
            + (f"; {quant} stores blocks in which zero need not be a value, so many of them are no longer zero" if moved else "")
        )
    return notes


def check_form(to: str, *, quant: str | None, pad: int | None = None) -> None:
    """Refuse an unknown form, `quant` for a form without types, and `pad` for a form without padding.

    Raises:
        UsageError: the request is refused.
    """
    every_form = forms()
    if to not in every_form:
        raise UsageError(f"form {to!r} is not known; {nearest(to, every_form)}")
    for name, value, names, what in (("quant", quant, "QUANTS", "number format"), ("pad", pad, "PADS", "widths")):
        if value is not None and to not in (forms_with := _that_set(names)):
            able = " and ".join(option("to", form) for form in sorted(forms_with))
            raise UsageError(
                f"{option(name, value)} works only with {able}; the form {to} sets its {what} itself, so leave it out"
            )


def _that_set(name: str) -> set[str]:
    """The forms whose file sets a name; imports none of them."""
    files = (path for folder in __path__ for path in Path(folder).glob("[!_]*.py"))
    return {path.stem for path in files if re.search(rf"^{name} = ", path.read_text(encoding="utf-8"), re.MULTILINE)}
