"""`adapt-pruner export`, `card` and `push`: a checkpoint for other tools, its model card, and the way to the Hugging Face hub."""

import sys
from collections.abc import Sequence
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from adapt_pruner.api import exporting
from adapt_pruner.cli.options import Json, options_of, written_to
from adapt_pruner.cli.tables import print_table
from adapt_pruner.core.events.words import typed
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError


@options_of(exporting.export)
def export(
    *,
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The checkpoint to export: folder, .gguf file, hub id or packaged model.")
    ],
    output: Annotated[Path, written_to("New folder for the result; for gguf a new file FILE.gguf.")],
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="TYPES",
            help="For gguf: number format, f32, f16, bf16 or q8_0; with llama-cpp-python also q6_k, q5_k_m, q4_k_m, … "
            "Several with commas write a file each. [default: as stored]",
        ),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Export a checkpoint for another tool.

    `gguf` is for llama.cpp, Ollama and LM Studio; `padded` for any tool that knows the stock class; `uniform` the same, if all layers
    are equal; `decilm` for vLLM, with unequal layers; `onnx` for ONNX Runtime.

    Examples:

        adapt-pruner export small --to gguf -o small.gguf --quant q8_0,q4_k_m

        adapt-pruner export small --to padded -o small-plain
    """
    notes: list[str] = []

    def note(event: dict[str, Any]) -> None:
        notes.extend([event["message"]] if event["event"] == "warning" else [])

    quants = [None] if quant is None else list(dict.fromkeys(quant.replace(" ", "").split(",")))
    if len(quants) > 1:
        _export_each(model, output, quants=quants, as_json=as_json, **options)
        return
    unwrap(exporting.export)(model, output=output, quant=quants[0], progress=True, listen=note, **options)
    size = sum(file.stat().st_size for file in output.rglob("*")) if output.is_dir() else output.stat().st_size
    if as_json:
        print(to_json({"path": str(output), "to": options["to"], "quant": quants[0], "bytes": size, "notes": notes}))
        return
    trust = ["--trust-remote-code"] if options["trust_remote_code"] or any(output.glob("*.py")) else []
    towers = (output / "vision_model.onnx").is_file()  # the embeddings of these were compared as they were written
    print(f"saved {output} ({size / 1e6:,.1f} MB)" + ("" if towers else f"; try: {typed('verify', model, output, *trust)}"))


def _export_each(
    model: str, output: Path, *, to: str, quants: Sequence[str | None], pad: int | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Write a file for each number format, and a table of their sizes and of how well each reads Python's language reference."""
    from adapt_pruner.export import check_form

    for name in quants:
        check_form(to, quant=name, pad=pad)
    from adapt_pruner.export import llama_cpp
    from adapt_pruner.export.verify import bits_per_byte
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import screen

    llama_cpp.library()  # fails before anything is written
    files = {name: output.with_name(f"{output.stem}-{name}{output.suffix}") for name in quants if name}
    if existing := next((path for path in files.values() if path.exists()), None):
        raise UsageError(f"{existing} exists; name another file or remove it first")
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


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Checkpoint that `shrink`, `prune` or `run` wrote, or a folder that `export` made of one."
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the hub; created if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository visible to you and your organisation only.")
    ] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to send to; created if it does not exist. [default: main]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent and send nothing; needs neither network nor login.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send DIR with its model card to the Hugging Face hub, in one commit. GGUF files in DIR are sent with it.

    Examples:

        adapt-pruner push small me/smollm2-110m --dry-run

        adapt-pruner push small me/smollm2-110m --private
    """
    from adapt_pruner.report import hub

    packed = hub.plan_upload(folder, repo)
    for note in packed.notes:
        print(f"warning: {note}", file=sys.stderr)
    size = sum(packed.files.values())
    summary = {"repo": repo, "branch": branch or "main", "private": private, "bytes": size, "files": packed.files}
    if dry_run:
        if as_json:
            print(to_json({**summary, "notes": packed.notes, "sent": None}))
            return
        print_table(["file", "bytes"], [[name, f"{count:,}"] for name, count in packed.files.items()])
        made = "a private repository" if private else "a public repository"
        print(f"\nwould send {len(packed.files)} files, {size / 1e6:,.1f} MB, to {repo} on the hub, branch {branch or 'main'},")
        print(f"and create {made} of that name if there is none{'; README.md would be written first' if packed.new_card else ''}")
        return
    sent = hub.push(packed, private=private, branch=branch)
    print(to_json({**summary, "notes": packed.notes, "sent": sent}) if as_json else f"sent {len(packed.files)} files to {sent}")


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that `shrink`, `prune` or `run` wrote.")],
    show: Annotated[bool, typer.Option("--show", help="Print the card and write nothing.")] = False,
) -> None:
    """Write the model card of DIR (its README.md) again, from the JSON files in DIR.

    `shrink`, `prune` and `run` write a first card by themselves.

    Example:

        adapt-pruner card small
    """
    from adapt_pruner.report.card import card_of, write_card

    if show:
        print(card_of(folder), end="")
        return
    write_card(folder)
    print(f"wrote {folder / 'README.md'}")
