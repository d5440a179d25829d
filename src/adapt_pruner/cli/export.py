"""`adapt-pruner export`: a checkpoint in a form that another tool loads."""

from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from adapt_pruner.api import exporting
from adapt_pruner.cli.options import Json, options_of

__all__ = ["export"]


@options_of(exporting.export)
def export(
    *,
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The checkpoint to export: folder, .gguf file, hub id or packaged model.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="New folder for the result; for gguf a new file FILE.gguf.")
    ],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Export a checkpoint for another tool.

    `gguf` is for llama.cpp, Ollama and LM Studio; `padded` for any tool that knows the stock class; `uniform` the same, if all layers
    are equal; `decilm` for vLLM, with unequal layers; `onnx` for ONNX Runtime.

    Examples:

        adapt-pruner export small --to gguf -o small.gguf --quant q8_0

        adapt-pruner export small --to padded -o small-plain
    """
    notes: list[str] = []

    def note(event: dict[str, Any]) -> None:
        notes.extend([event["message"]] if event["event"] == "warning" else [])

    unwrap(exporting.export)(model, output=output, progress=True, listen=note, **options)
    from adapt_pruner.core.events.words import typed
    from adapt_pruner.core.system.strict_json import to_json

    size = sum(file.stat().st_size for file in output.rglob("*")) if output.is_dir() else output.stat().st_size
    if as_json:
        print(to_json({"path": str(output), "to": options["to"], "quant": options["quant"], "bytes": size, "notes": notes}))
        return
    trust = ["--trust-remote-code"] if options["trust_remote_code"] or any(output.glob("*.py")) else []
    print(f"saved {output} ({size / 1e6:,.1f} MB); try: {typed('verify', model, output, *trust)}")
