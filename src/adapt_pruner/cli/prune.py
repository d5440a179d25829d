"""`adapt-pruner prune`: one model in, one smaller checkpoint out, no training."""

from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from adapt_pruner.api import pruning
from adapt_pruner.cli.options import Json, options_of

__all__ = ["prune"]


@options_of(pruning.prune)
def prune(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder, .gguf file, hub id, or packaged model such as smollm2-135m-instruct; or a recipe, FILE.yaml.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint, new or empty.")],
    text: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="SPEC",
            help="Text to measure importance on: file, folder, glob, hub:NAME, python-docs:train, or `self` (self-written text, "
            "which the model writes first). [default: self]",
        ),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Prune MODEL to a number of parameters, or to a speed on this machine, and write a checkpoint.

    Examples:

        adapt-pruner prune smollm2-135m-instruct -o small --params 110M

        adapt-pruner prune smollm2-135m-instruct -o small --latency 0.7x --set multiple_of=64

        adapt-pruner prune small -o small-2-4 --method wanda --sparsity 2:4

        adapt-pruner prune ./llama -o small --params 80% --calibration 'corpus/*.jsonl.gz' --method adapt-pruner
    """
    figures = unwrap(pruning.prune)(model, output, text=text, progress=True, **options).figures
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.events.words import counted, millions, span, typed
    from adapt_pruner.core.system.strict_json import to_json

    if as_json:
        print(to_json(figures | {"path": str(output)}))
        return
    rows = []
    for name, key in {
        "parameters": "params",
        "in the layers": "decoder_params",
        "tokens": "vocabulary",
        "not zero": "nonzero",
    }.items():
        if f"{key}_after" in figures:
            before, after = figures[f"{key}_before"], figures[f"{key}_after"]
            rows.append([name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"])
    print_table(["", "before", "after", "kept"], rows)
    if "reached" in (timing := figures.get("latency") or {}):
        print(
            f"\n{timing['of']} takes {timing['reached']:.2f}x of the dense model's time, which is {timing['dense_seconds']:.2f} s "
            f"(timed in turn; quartiles {timing['reached_low']:.2f}–{timing['reached_high']:.2f}x); asked {timing['asked']:g}x, "
            f"predicted {timing['predicted']:.2f}x"
        )
    if losses := figures.get("calibration_losses"):
        print(f"\nloss on the calibration text: {' → '.join(f'{loss:.3f}' for loss in losses)} nats a token")
    if "answers" in figures:
        answers = {
            stage["stage"] > 0: {each["prompt"]: each["text"] for each in stage["answers"]} for stage in figures["answers"]
        }
        first, last = answers.get(False, {}), answers.get(True, {})
        print()
        print_table(
            ["asked", "before", "after"],
            [[prompt, first.get(prompt, "–"), last.get(prompt, "–")] for prompt in first | last],
            left=3,
        )
    peak = figures["peak_rss_bytes"] / 2**30
    print(f"\n{counted(figures['iterations'], 'iteration')} in {span(figures['seconds'])}, peak memory {peak:.1f} GiB")
    print(f"saved {output} ({millions(figures['params_after'])} parameters)\n")
    folder = output if "/" in str(output) else f"./{output}"  # so that YAML reads no number
    print_table(
        ["next", ""],
        [
            ["measure it", typed("eval", model, output, "--text", "python-docs:heldout", "--max-windows", 20)],
            ["ask it", typed("chat", output, "What is the capital of France?", "--against", model)],
            [
                "train it",
                typed("run", "smollm2-105m", "--set", f"model={folder}", "--set", "budget=100%", "--set", "training.source=FILE"),
            ],
            ["for llama.cpp", typed("export", output, "--to", "gguf", "-o", f"{output}.gguf")],
        ],
        left=2,
    )
