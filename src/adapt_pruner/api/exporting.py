"""`export`: a checkpoint in a form that another tool loads."""

from pathlib import Path
from typing import Annotated, Any

from adapt_pruner.api.arguments import Listener, Model, Place, Takes, heard, in_python, named
from adapt_pruner.core.system.files import expanded
from adapt_pruner.export import check_form, forms


@in_python
def export(
    model: Model,
    to: Annotated[str, Takes(f"one of {', '.join(forms())}")],
    output: Place,
    *,
    tokenizer: Any = None,
    quant: Annotated[str, Takes("text", "TYPE")] | None = None,
    pad: Annotated[int, Takes("32 or 256", "32|256", int)] | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
    listen: Listener | None = None,
) -> Path:
    """Write a model in the form of another tool: llama.cpp, stock transformers, vLLM or ONNX Runtime.

    Anything to know about the result comes as a Python warning, with `progress` as a line, with `listen` as an event.

    Args:
        model: name, folder, result, or a model of transformers with its tokenizer.
        to: form to export to: decilm, gguf, onnx, padded or uniform.
        output: a new folder; for gguf a new file FILE.gguf.
        tokenizer: needed only for a model in memory.
        quant: for gguf: number format, f32, f16, bf16 or q8_0; with llama-cpp-python also q6_k, q5_k_m, q4_k_m, …; as stored by default.
        pad: for gguf: zero-pad MLPs to a multiple, so that a float file can be quantised later with your own importance matrix; 256 for
            k-quants, else 32.
        trust_remote_code: run Python code that comes with the model.
        progress: show what is done.
        listen: called with every event.

    Returns:
        The path of the result.

    Raises:
        UsageError: there is no such form or model, the form cannot hold the model, or `output` is taken.
        RunError: the result could not be written.
    """
    check_form(to, quant=quant, pad=pad)
    from adapt_pruner.report import with_card

    place = expanded(output)
    with named(model, tokenizer) as name, heard(listen, progress=progress) as tell:
        with_card.export(name, place, to=to, quant=quant, pad=pad, trust_remote_code=trust_remote_code, listen=tell)
    return place
