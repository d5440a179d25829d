"""`adapt-pruner export`: a checkpoint in a form that another tool loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
            metavar="TYPES",
            help="For gguf: number format, f32, f16 or bf16; with llama-cpp-python also q8_0, q6_k, q5_k_m, q4_k_m, … "
            "Several with commas write a file each. [default: as stored]",
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

        adapt-pruner export small --to gguf -o small.gguf --quant q8_0,q4_k_m

        adapt-pruner export small --to padded -o small-plain
    """
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.export import check_form

    quants = [None] if quant is None else list(dict.fromkeys(quant.replace(" ", "").split(",")))
    for name in quants:
        check_form(to, quant=name, pad=pad)
    if len(quants) > 1:
        _export_each(model, out, to=to, quants=quants, pad=pad, trust_remote_code=trust_remote_code, as_json=as_json)
        return
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


def _export_each(
    model: str, out: Path, *, to: str, quants: Sequence[str | None], pad: int | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Write a file for each number format, and a table of their sizes and of how well each reads Python's language reference."""
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.errors import UsageError
    from adapt_pruner.export import llama_cpp
    from adapt_pruner.export.proof import bits_per_byte
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    llama_cpp.library()  # fails before anything is written
    files = {name: out.with_name(f"{out.stem}-{name}{out.suffix}") for name in quants if name}
    if there := next((path for path in files.values() if path.exists()), None):
        raise UsageError(f"{there} exists; name another file or remove it first")
    with screen() as listen:
        for name, path in files.items():
            with_card.export(model, path, to=to, quant=name, pad=pad, trust_remote_code=trust_remote_code, listen=listen)
        bits = bits_per_byte(model, list(files.values()), trust_remote_code=trust_remote_code, listen=listen)
    rows: list[dict[str, Any]] = [
        {"path": str(path), "to": to, "quant": name, "bytes": path.stat().st_size, "bits_per_byte": bits[path]}
        for name, path in files.items()
    ]
    if as_json:
        print(to_json({"files": rows}))
        return
    lines = [[row["path"], f"{row['bytes'] / 1e6:,.1f} MB", f"{row['bits_per_byte']:.4f}"] for row in rows]
    print_table(["file", "on disk", "bits/byte"], lines)
    print("\nbits a byte of 8 windows of python-docs:heldout, read by llama.cpp from the file itself")
