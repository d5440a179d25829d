"""`export`: a checkpoint in a form that another tool loads."""

from pathlib import Path
from typing import Any

from adapt_pruner.api.arguments import Listener, Name, Saved, as_place, heard, in_python, named, of_kind
from adapt_pruner.export import forms
from adapt_pruner.report import with_card

__all__ = ["export"]


@in_python
def export(
    model: Name | Saved | Any,
    to: str,
    output: str | Path,
    *,
    tokenizer: Any = None,
    quant: str | None = None,
    pad: int | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Path:
    """Write a model in the form of another tool: llama.cpp, stock transformers, vLLM or ONNX Runtime.

    Anything to know about the result comes as a Python warning, with `progress` as a line, with `listen` as an event.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer.
        to: the form, as in `adapt-pruner export --to`: gguf, onnx, padded, uniform, decilm, …
        output: a new folder; for gguf a new file FILE.gguf.
        tokenizer: needed only for a model in memory.
        quant: for gguf: f32, f16 or bf16; with llama-cpp-python also q8_0, q4_k_m, …; None keeps the checkpoint's.
        pad: for gguf: 32 or 256, zero-pads MLPs to a multiple.
        trust_remote_code: run Python code that comes with the model.
        progress: show what is done.
        listen: called with every event.

    Returns:
        The path of the result.

    Raises:
        UsageError: there is no such form or model, the form cannot hold the model, or `output` is taken.
        RunError: the result could not be written.
    """
    of_kind("to", to, str, f"one of {', '.join(forms())}")
    place = as_place("output", output)
    with named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        with_card.export(name, place, to=to, quant=quant, pad=pad, trust_remote_code=trust_remote_code, listen=tell)
    return place
