"""`adapt-pruner card`: the README.md of a checkpoint, written anew."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["card"]


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that prune or run wrote.")],
    show: Annotated[bool, typer.Option("--show", help="Print it and write nothing.")] = False,
) -> None:
    """Write the model card, README.md, of DIR anew from its own JSON; prune and run write one by themselves.

    Example:

        adapt-pruner card small
    """
    from adapt_pruner.report.card import card_of, write_card

    if show:
        print(card_of(folder), end="")
        return
    write_card(folder)
    print(f"wrote {folder / 'README.md'}")
