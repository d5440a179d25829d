"""`adapt-pruner export`: a checkpoint in a form that another tool loads."""

from pathlib import Path
from typing import Annotated

import typer

from adapt_pruner.cli.options import Json, TrustRemoteCode
from adapt_pruner.export import forms

__all__ = ["export"]


def export(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The checkpoint to export: folder, .gguf file, hub id or packaged model.")
    ],
    to: Annotated[str, typer.Option("--to", help=f"Form to export to: {', '.join(forms()[:-1])} or {forms()[-1]}.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="New folder for the result; for gguf a new file FILE.gguf.")
    ],
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="For gguf: number format, f32, f16 or bf16; with llama-cpp-python also q8_0, q6_k, q5_k_m, q4_k_m, … "
            "[default: as stored]",
        ),
    ] = None,
    pad: Annotated[
        int | None,
        typer.Option(
            metavar="32|256",
            help="For gguf: zero-pad MLPs to a multiple, so that a float file can be quantised later with your own importance matrix; "
            "256 for k-quants.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint for another tool.

    `gguf` is for llama.cpp, Ollama and LM Studio; `padded` for any tool that knows the stock class; `uniform` the same, if all layers
    are equal; `decilm` for vLLM, with unequal layers; `onnx` for ONNX Runtime.

    Examples:

        adapt-pruner export small --to gguf -o small.gguf --quant q8_0

        adapt-pruner export small --to padded -o small-plain
    """
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.export import check_form

    check_form(to, quant=quant, pad=pad)
    from adapt_pruner.core.events.words import typed
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    with screen() as listen:
        notes = with_card.export(model, out, to=to, quant=quant, pad=pad, trust_remote_code=trust_remote_code, listen=listen)
    size = sum(file.stat().st_size for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
    if as_json:
        print(to_json({"path": str(out), "to": to, "quant": quant, "bytes": size, "notes": notes}))
        return
    trust = ["--trust-remote-code"] if trust_remote_code or any(out.glob("*.py")) else []
    print(f"saved {out} ({size / 1e6:,.1f} MB); try: {typed('verify', model, out, *trust)}")
