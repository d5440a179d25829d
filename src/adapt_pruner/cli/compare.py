"""`adapt-pruner compare`: several pruning methods at equal parameters, measured alike."""

from pathlib import Path
from typing import Annotated

import typer

from adapt_pruner.cli.options import Device, Json, Model, Precision, Set, TrustRemoteCode

__all__ = ["compare"]


def compare(
    model: Model,
    out: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for figures, table and picture. Name it again to continue a comparison."),
    ],
    methods: Annotated[str, typer.Option(help="Names from `adapt-pruner methods`, with commas: magnitude,random.")],
    text: Annotated[list[str], typer.Option(metavar="SPEC", help="Text to measure on: file, folder, glob, …; can be repeated.")],
    params: Annotated[str | None, typer.Option(help="Parameters to keep, with commas: 113.3M,92M or 80%,60%.")] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="50%,2:4", help="For methods that make zeros, such as wanda: shares or patterns, with commas."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to measure importance on, for every method. [default: each method's own]")
    ] = None,
    calibration_ids: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="JSON file with input_ids, instead of --calibration. Can be repeated: each file is one draw."
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Calibration sequences per iteration. [default: each method's own, mostly 64]", min=1)
    ] = None,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens per calibration sequence. [default: each method's own, mostly 128]", min=1)
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Seeds per method and size, counted from 0. [default: 3]", min=1, max=1000)
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.", min=2)] = 512,
    max_windows: Annotated[int, typer.Option(help="Most windows to read of each text.", min=1)] = 40,
    overrides: Set = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pruned checkpoints, in models/ of the folder.")] = False,
    device: Device = "auto",
    dtype: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL by several methods to the same sizes, measure the results alike, and write a table and a picture.

    Give the same command again to continue a comparison that was stopped. You may add methods, sizes or draws.

    `--set vocabulary.source=SPEC --set vocabulary.keep=16384` lets every method remove tokens too, within the same sizes.

    Examples:

        adapt-pruner compare smollm2-135m-instruct --methods magnitude,random --params 113.3M --text python-docs:heldout -o compared

        adapt-pruner compare ./llama --methods wanda,sparsegpt --sparsity 50%,2:4 --text wiki.test.txt -o zeros

        adapt-pruner compare ./llama --methods adapt-pruner,uniform --params 80%,60% --text wiki.test.txt --text books/ --draws 5 -o compared
    """
    from adapt_pruner.compare.request import Request
    from adapt_pruner.errors import RunError

    asked = Request(
        model=model, methods=tuple(methods.split(",")), params=tuple(params.split(",")) if params is not None else (),
        sparsity=tuple(sparsity.split(",")) if sparsity is not None else (), texts=tuple(text), calibration=calibration,
        calibration_ids=tuple(map(str, calibration_ids or [])), calibration_samples=calibration_samples,
        calibration_length=calibration_length, draws=draws, window=window,
        max_windows=max_windows, overrides=tuple(overrides or []), device=device, dtype=dtype, trust_remote_code=trust_remote_code,
    ).checked()  # fmt: skip
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.compare.comparison import compare as run
    from adapt_pruner.compare.table import table
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report.comparison import texts_in_words, tokens_note
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    with screen() as listen:
        result = run(asked, out, listen=listen, keep=keep)
    if as_json:
        print(to_json(result | {"path": str(out)}))
    else:
        shown = [rows for rows in (result["rows"], result["sparse_rows"]) if len(rows) > 1] or [result["rows"]]
        for number, rows in enumerate(shown):
            print("\n" * (number > 0), end="")
            print_table(*table(rows))
        note = tokens_note(result)
        print(
            f"\n{note}" if note else "",
            f"perplexity on {texts_in_words(result)}, {result['precision']}; written to {out}, its page is {out / 'compare.html'}",
            sep="\n",
        )
    failed = sum("error" in cell for cell in result["cells"])
    if failed:
        raise RunError(f"{failed} of {len(result['cells'])} cells failed; the table and {out / 'compare.md'} say why")
