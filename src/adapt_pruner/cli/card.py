"""`adapt-pruner card`: the model card of a checkpoint, written again."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["card"]


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
