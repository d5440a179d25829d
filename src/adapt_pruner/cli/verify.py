"""`adapt-pruner verify`: whether an exported artefact computes what the checkpoint computes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from adapt_pruner.cli.options import Json, TrustRemoteCode

__all__ = ["verify"]


def verify(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The checkpoint that was exported: folder, .gguf file, hub id or packaged model.")
    ],
    artefact: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ARTEFACT]",
            help="What `export` wrote: a .gguf file or a folder. Without it the zeros of a sparse DIR are verified.",
        ),
    ] = None,
    text: Annotated[str, typer.Option(metavar="SPEC", help="Text to compare on: file, folder, glob, hub:NAME, …")] = (
        "python-docs:heldout"
    ),
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.", min=2)] = 256,
    max_windows: Annotated[int, typer.Option(help="Most windows to read.", min=1)] = 8,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Check that ARTEFACT, in its own engine, computes what DIR computes in torch.

    The exit status is 1 if a difference exceeds its tolerance, or if a sparse DIR does not have the zeros that its mask over
    weights promises. A .gguf file runs in llama.cpp, a folder with model.onnx in ONNX Runtime. Any other folder runs in stock
    transformers, in a process without adapt-pruner.

    Examples:

        adapt-pruner verify small small.gguf

        adapt-pruner verify small small-plain --text wiki.test.txt --json

        adapt-pruner verify small-2-4
    """
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.errors import RunError
    from adapt_pruner.export.verify import prove
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    with screen() as listen:
        figures = prove(
            model, artefact, text=text, window=window, max_windows=max_windows, trust_remote_code=trust_remote_code, listen=listen
        )
    zeros = figures.get("sparsity")
    failures = [] if zeros is None else zeros["failures"]
    if as_json:
        print(to_json(figures))
    else:
        if artefact is not None:
            _print(figures)
        if zeros is not None and not failures:
            _print_zeros(model, zeros)
    if failures:
        more = f" (and {len(failures) - 1} more; --json lists all)" if len(failures) > 1 else ""
        raise RunError(f"{model} does not have the zeros that its mask over weights promises: {failures[0]}{more}; make it again")
    if not figures["passed"]:
        raise RunError(
            f"{artefact} does not compute what {model} computes: {'; '.join(figures['failures'])}; export it again, or with more bits if it is quantised"
        )


def _print_zeros(model: str, zeros: dict[str, Any]) -> None:
    if zeros["pattern"] is None:
        held = f"these hold the {zeros['masked']:,} that the mask names; it has no pattern, so it promises no others"
    elif ":" in zeros["pattern"]:
        n, m = zeros["pattern"].split(":")
        held = f"in each, every group of {m} inputs has at most {n} weights that are not zero"
    else:
        held = f"each has as many as {zeros['pattern']} asks for, rounded down for each output"
    print(
        f"{model}: {zeros['zeros']:,} of {zeros['weights']:,} weights in {zeros['layers']} linear layers are zero "
        f"({zeros['zeros'] / zeros['weights']:.2%}); {held}"
    )


def _print(figures: dict[str, Any]) -> None:
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.events.words import counted

    tolerance, greedy, encoding = figures["tolerance"], figures["greedy"], figures["encoding"]
    deviation, perplexity = figures["deviation"] or 1.0, figures["perplexity"]
    most = "" if tolerance["difference"] is None else f"at most {tolerance['difference']:g}"
    change = perplexity["artefact"] / perplexity["model"] - 1
    rows = [
        ["largest difference of a logit, in standard deviations", f"{figures['max_difference'] / deviation:.2g}", most],
        ["mean difference of a logit, in standard deviations", f"{figures['mean_difference'] / deviation:.2g}", ""],
        ["same token on top", f"{figures['agreement']:.2%}", f"at least {tolerance['agreement']:.0%}"],
        ["perplexity of the model", f"{perplexity['model']:.3f}", ""],
        [
            "perplexity of the artefact",
            f"{perplexity['artefact']:.3f} ({change:+.2%})",
            f"at most {tolerance['perplexity']:.1%} off",
        ],
        ["greedy text, tokens until it differs", f"{greedy['same_tokens']} of {greedy['of']}", ""],
    ]
    if encoding:
        rows.append(
            ["text with the same token ids", f"{encoding['same']} of {encoding['of']}", f"at least {tolerance['encoding']:.0%}"]
        )
    print_table(["", "found", "tolerance"], rows)
    print(
        f"\n{figures['artefact']} ({figures['stored']}) in {figures['engine']}, on {figures['tokens']:,} tokens in {counted(figures['windows'], 'window')}"
    )
    if figures["passed"]:
        print("it computes what the model computes")
