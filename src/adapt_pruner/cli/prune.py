"""`adapt-pruner prune`: one model in, one smaller checkpoint out, no training."""

from pathlib import Path
from typing import Annotated

import typer

from adapt_pruner.cli.options import Device, Json, Model, Precision, Seed, Set, TrustRemoteCode

__all__ = ["prune"]


def prune(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint, new or empty.")],
    params: Annotated[
        str | None, typer.Option(help="Parameters to keep: 110M, 110_000_000, 80% of the model, or '80% of decoder'.")
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="0.7x",
            help="Instead of --params: time that the pruned model may take, as a share of the dense model's. Measured on this "
            "machine.",
        ),
    ] = None,
    latency_of: Annotated[
        str | None,
        typer.Option(help="What --latency times: prefill (reading a prompt) or decode (writing the answer). [default: prefill]"),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="50%|2:4",
            help="Instead of --params, with a method that makes zeros (wanda, sparsegpt, fistapruner, magnitude-sparse): share of the weights "
            "of linear layers that become zero, or N of every M that stay.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Pruning method; `adapt-pruner methods` lists them. [default: adaptive-ls-v1]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to measure importance on: file, folder, glob, hub:NAME, python-docs:train, or `self` (self-written text, "
            "which the model writes first). [default: self]"
        ),
    ] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Calibration sequences per iteration. [default: 64]")] = None,
    calibration_length: Annotated[int | None, typer.Option(help="Tokens per calibration sequence. [default: 128]")] = None,
    calibration_ids: Annotated[
        Path | None, typer.Option(help="JSON file with input_ids: calibrate on exactly these tokens instead of a text.")
    ] = None,
    overrides: Set = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL to a number of parameters, or to a speed on this machine, and write a checkpoint.

    Examples:

        adapt-pruner prune smollm2-135m-instruct -o small --params 110M

        adapt-pruner prune smollm2-135m-instruct -o small --latency 0.7x --set multiple_of=64

        adapt-pruner prune small -o small-2-4 --method wanda --sparsity 2:4

        adapt-pruner prune ./llama -o small --params 80% --calibration 'corpus/*.jsonl.gz' --method adapt-pruner
    """
    from adapt_pruner.recipe.prune_recipe import to_prune

    recipe = to_prune(
        {
            "model": model, "budget": params, "latency": latency, "latency_of": latency_of, "sparsity": sparsity, "method": method,
            "calibration.source": calibration, "calibration.samples": calibration_samples, "calibration.length": calibration_length,
            "calibration.ids": None if calibration_ids is None else str(calibration_ids), "seed": seed, "device": device,
            "dtype": dtype,
        },
        overrides=overrides or [],
    )  # fmt: skip
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.events.words import counted, millions, span, typed
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    with screen() as listen:
        figures = with_card.prune(recipe, out, listen=listen, trust_remote_code=trust_remote_code).figures
    if as_json:
        print(to_json(figures | {"path": str(out)}))
        return
    kept = figures["params_after"] / figures["params_before"]
    kept_in_layers = figures["decoder_params_after"] / figures["decoder_params_before"]
    tokens = []
    if "vocabulary_after" in figures:
        before, after = figures["vocabulary_before"], figures["vocabulary_after"]
        tokens = [["tokens", f"{before:,}", f"{after:,}", f"{after / before:.1%}"]]
    zeros = []
    if "nonzero_after" in figures:
        before, after = figures["nonzero_before"], figures["nonzero_after"]
        zeros = [["not zero", f"{before:,}", f"{after:,}", f"{after / before:.1%}"]]
    print_table(
        ["", "before", "after", "kept"],
        [
            ["parameters", f"{figures['params_before']:,}", f"{figures['params_after']:,}", f"{kept:.1%}"],
            [
                "in the layers",
                f"{figures['decoder_params_before']:,}",
                f"{figures['decoder_params_after']:,}",
                f"{kept_in_layers:.1%}",
            ],
            *tokens,
            *zeros,
        ],
    )
    if "reached" in (timing := figures.get("latency") or {}):
        print(
            f"\n{timing['of']} takes {timing['reached']:.2f}x of the dense model's time, which is {timing['dense_seconds']:.2f} s "
            f"(timed in turn; quartiles {timing['reached_low']:.2f}–{timing['reached_high']:.2f}x); asked {timing['asked']:g}x, "
            f"predicted {timing['predicted']:.2f}x"
        )
    if losses := figures.get("calibration_losses"):
        print(f"\nloss on the calibration text: {' → '.join(f'{loss:.3f}' for loss in losses)} nats a token")
    if "answers" in figures:
        said = {one["stage"] > 0: {each["prompt"]: each["text"] for each in one["answers"]} for one in figures["answers"]}
        before, after = said.get(False, {}), said.get(True, {})
        print()
        rows = [[prompt, before.get(prompt, "–"), after.get(prompt, "–")] for prompt in before | after]
        print_table(["asked", "before", "after"], rows, left=3)
    peak = figures["peak_rss_bytes"] / 2**30
    print(f"\n{counted(figures['iterations'], 'iteration')} in {span(figures['seconds'])}, peak memory {peak:.1f} GiB")
    print(f"saved {out} ({millions(figures['params_after'])} parameters)\n")
    named = out if "/" in str(out) else f"./{out}"  # so that YAML reads no number
    print_table(
        ["next", ""],
        [
            ["measure it", typed("eval", model, out, "--text", "python-docs:heldout", "--max-windows", 20)],
            ["ask it", typed("chat", out, "What is the capital of France?", "--against", model)],
            [
                "train it",
                typed("run", "smollm2-105m", "--set", f"model={named}", "--set", "budget=100%", "--set", "training.source=FILE"),
            ],
            ["for llama.cpp", typed("export", out, "--to", "gguf", "-o", f"{out}.gguf")],
        ],
        left=2,
    )
