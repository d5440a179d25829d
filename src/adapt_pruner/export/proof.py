"""The proof, starting from names: load a checkpoint and its text, and compare it with an artefact or count its zeros."""

import itertools
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events import Listener, Load, Warned, counting
from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.data.sources import SELF, texts
from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.errors import UsageError
from adapt_pruner.export.verify import PIECES, verify, zeros_of

__all__ = ["prove"]


def prove(
    model: str,
    artefact: Path | None,
    *,
    text: str,
    window: int = 256,
    max_windows: int = 8,
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Compare an artefact, in its own engine, with its checkpoint; without one, check the zeros of the checkpoint.

    Args:
        model: the checkpoint, as `checkpoint.load` takes it.
        artefact: what `export` wrote.
        text: SPEC of the text to compare on.
        window: tokens in a window.
        max_windows: the most windows that are read.
        trust_remote_code: run Python code that comes with a foreign folder.
        listen: called with every event.

    Returns:
        Plain data: the result of `verify`, and for a sparse model also `sparsity`, the result of `zeros_of`. Without an artefact
        only `model`, `sparsity` and `passed`.

    Raises:
        UsageError: there is no such model, artefact or text, an engine is not installed, or there is nothing to prove.
        RunError: files are damaged, or the artefact is of another model.
    """
    if artefact is None:
        loaded = load(model, trust_remote_code=trust_remote_code)
        zeros = zeros_of(loaded)
        if zeros is None:
            lacks = "no mask over weights" if loaded.weight_mask is None else "a mask over weights that makes none of them zero"
            raise UsageError(
                f"{model} has {lacks}, so there is nothing to verify without an artefact; name the file or folder "
                "that `export` wrote"
            )
        return {"model": model, "sparsity": zeros, "passed": not zeros["failures"]}
    if text == SELF:
        raise UsageError("text 'self' would measure the model on its own text; name a file or python-docs:heldout")
    if not artefact.exists():
        raise UsageError(f"{artefact} does not exist; name a .gguf file, a folder with model.onnx, or a Hugging Face folder")
    written = (line for document in texts(text) for line in document.splitlines() if line.strip())
    lines = list(itertools.islice(written, PIECES))
    listen(Load(model=model))
    loaded = load(model, trust_remote_code=trust_remote_code)
    windows = held_out_windows(loaded.tokenizer, source=text, window=window, max_windows=max_windows)

    pieces = [*_chat(loaded.tokenizer, listen), *lines]
    figures = verify(
        loaded, artefact, windows, pieces=pieces, trust_remote_code=trust_remote_code, on_window=counting(listen, "evaluate")
    )
    zeros = zeros_of(loaded)
    return figures if zeros is None else figures | {"sparsity": zeros, "passed": figures["passed"] and not zeros["failures"]}


def _chat(tokenizer: Any, listen: Listener) -> list[str]:
    """A conversation in the chat template, so that special tokens are compared too; none if there is no template or it fails."""
    if not tokenizer.chat_template:
        return []
    try:
        return [
            rendered(tokenizer, [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]).text
        ]
    except ChatTemplateError as error:
        listen(Warned(message=f"no conversation was compared, because the chat template cannot write one: {error}"))
        return []
