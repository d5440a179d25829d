"""`adapt-pruner push` and `card`: a checkpoint to the Hugging Face hub, and its model card written again."""

from pathlib import Path
from typing import Annotated

import typer

from adapt_pruner.cli.options import Json

__all__ = ["card", "push"]


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
    import sys

    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.system.strict_json import to_json
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
