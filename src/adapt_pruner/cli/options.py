"""Options that several commands share, spelled once."""

from typing import Annotated

import typer

from adapt_pruner.errors import UsageError, nearest

__all__ = ["Device", "Json", "Precision", "Set", "TrustRemoteCode", "check_precision"]

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[str, typer.Option(help="Of matrix products: auto (bfloat16 where native), float32, bfloat16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that a foreign checkpoint brings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else there.")]


def check_precision(name: str) -> None:
    """Refuse what is no precision, before torch is loaded.

    Raises:
        UsageError: it is none.
    """
    known = ("auto", "float32", "bfloat16")
    if name not in known:
        raise UsageError(f"dtype {name!r} is not known; {nearest(name, known)}")
