"""Options that several commands share, spelled once."""

from typing import Annotated

import typer

__all__ = ["Device", "Json", "Precision", "Set", "TrustRemoteCode"]

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[str, typer.Option(help="Of matrix products: auto (bfloat16 where native), float32, bfloat16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that a foreign checkpoint brings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else there.")]
