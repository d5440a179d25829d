"""The proof, starting from names: load a checkpoint and its text, and compare it with an artefact or count its zeros."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events import Listener, Load, Warned, counting
from adapt_pruner.core.system.chat_template import ChatTemplateError, rendered
from adapt_pruner.data.sources import SELF, texts
from adapt_pruner.data.tokens import text_bytes
from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.errors import UsageError
from adapt_pruner.export.verify import PIECES, opened, verify, zeros_of

__all__ = ["bits_per_byte", "prove"]

_TEXT, _WINDOW, _WINDOWS = "python-docs:heldout", 256, 8


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
    listen(Load(model=model).to_dict())
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
        listen(Warned(message=f"no conversation was compared, because the chat template cannot write one: {error}").to_dict())
        return []


def bits_per_byte(
    model: str, artefacts: Sequence[Path], *, trust_remote_code: bool = False, listen: Listener = lambda event: None
) -> dict[Path, float]:
    """How well each artefact reads 8 windows of 256 tokens of Python's language reference, in its own engine.

    Args:
        model: the checkpoint, whose tokenizer reads the text.
        artefacts: what `export` wrote of it.
        trust_remote_code: run Python code that comes with a foreign folder.
        listen: called with every event.

    Returns:
        Bits per byte of text.

    Raises:
        UsageError: an engine is not installed.
        RunError: its engine cannot open an artefact.
    """
    tokenizer = load(model, trust_remote_code=trust_remote_code).tokenizer
    windows = held_out_windows(tokenizer, source=_TEXT, window=_WINDOW, max_windows=_WINDOWS)
    num_bytes, found, told = text_bytes(tokenizer, windows), {}, counting(listen, "evaluate")
    for done, artefact in enumerate(artefacts, start=1):
        nats = 0.0
        with opened(artefact, context=_WINDOW, trust_remote_code=trust_remote_code) as engine:
            for ids in windows:
                log_p = engine.logits(ids[0].tolist())[:-1].log_softmax(-1)
                nats -= float(log_p.gather(1, ids[0, 1:, None]).double().sum())
        found[artefact] = nats / math.log(2) / num_bytes
        told(done, len(artefacts))
    return found
