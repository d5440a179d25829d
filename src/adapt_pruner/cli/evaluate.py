"""`adapt-pruner eval`: perplexity of a model on a text."""

from dataclasses import asdict
from typing import Annotated

import typer

from adapt_pruner.cli.options import Device, Json, Precision, TrustRemoteCode

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id, or packaged name such as smollm2-135m-instruct.")
    ],
    text: Annotated[str, typer.Option(help="Text: file, folder, glob, hub:NAME, python-docs:heldout.")],
    window: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Windows at most; the whole text by default.", min=1)] = None,
    device: Device = "auto",
    dtype: Precision = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text.

    Examples:

        adapt-pruner eval small --text python-docs:heldout

        adapt-pruner eval smollm2-135m-instruct --text wiki.test.txt --max-windows 40 --json
    """
    from adapt_pruner.data.sources import SELF, documents
    from adapt_pruner.errors import UsageError

    if text == SELF:
        raise UsageError("text 'self' would measure the model on its own text; name a file or python-docs:heldout")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"dtype {dtype!r} is not known; known: auto, bfloat16, float32")
    texts = documents(text)

    from adapt_pruner.checkpoint.load import load, pick_device
    from adapt_pruner.cli.screen import millions, quiet_libraries, screen
    from adapt_pruner.cli.tables import print_json
    from adapt_pruner.core.budget import count_parameters
    from adapt_pruner.data.tokens import evaluation_windows
    from adapt_pruner.evaluate.anatomy import decoder_parameters
    from adapt_pruner.evaluate.perplexity import perplexity

    quiet_libraries()
    with screen() as listen:
        listen({"event": "load", "model": model})
        loaded = load(model, device=pick_device(device), trust_remote_code=trust_remote_code)
        windows = evaluation_windows(loaded.tokenizer, texts, window=window, max_windows=max_windows)
        measured = perplexity(
            loaded.model,
            windows,
            dtype=dtype,
            on_window=lambda done, of: listen({"event": "progress", "phase": "evaluate", "done": done, "of": of}),
        )
    params = count_parameters(loaded.model)
    if as_json:
        print_json({"model": model, **asdict(measured), "params": params, "decoder_params": decoder_parameters(loaded.model)})
        return
    print(f"perplexity {measured.perplexity:.3f} ({measured.nll:.4f} nats per token) of {model}, {millions(params)} parameters,")
    print(f"over {measured.tokens:,} tokens in {measured.windows} windows; {measured.tokens / measured.seconds:,.0f} tokens/s")
