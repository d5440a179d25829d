"""Options that several commands share, spelled once."""

from typing import Annotated

import typer

__all__ = ["Device", "Json", "Model", "Precision", "Seed", "Set", "TrustRemoteCode"]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id, or packaged model such as smollm2-135m-instruct.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one recipe key; can be repeated.")]
Device = Annotated[str, typer.Option(help="Device to run on: `auto` (a GPU if there is one), cpu, cuda, cuda:1, …")]
Precision = Annotated[
    str,
    typer.Option(help="Number format of matrix products: float32, bfloat16, or `auto` (bfloat16 if the processor supports it)."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with a model, a task folder, or a task that lm-eval marks as unsafe.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
