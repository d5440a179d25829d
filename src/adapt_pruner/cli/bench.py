"""`adapt-pruner bench`: how fast a pruned model runs, compared with the dense one in the same engine."""

from typing import Annotated, Any

import typer

from adapt_pruner.cli.options import Device, Json, TrustRemoteCode
from adapt_pruner.errors import UsageError

__all__ = ["bench"]

_MOST_ROWS = 2**16


def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The pruned model: folder, .gguf file, hub id or packaged model.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The dense model, in any of the same forms.")],
    engine: Annotated[
        str, typer.Option(help="torch or llama.cpp. llama.cpp runs GGUF files; a folder is exported to one first.")
    ] = "torch",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Batch sizes to measure, with commas.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.", min=1, max=2**17)] = 512,
    generate: Annotated[int, typer.Option(help="Tokens to write after the prompt.", min=1, max=2**17)] = 64,
    rounds: Annotated[int, typer.Option(help="Measurements of each model, in turn, after one warm-up.", min=1, max=1000)] = 5,
    quant: Annotated[
        str | None, typer.Option(metavar="TYPE", help="For llama.cpp: number format to export folders in. [default: as stored]")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format of weights in torch: float32, bfloat16, or `auto` (bfloat16 if the processor supports it)."
        ),
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure speed, load time, size and memory of DIR and MODEL in turn, and how much of the ideal speed-up DIR reaches.

    Examples:

        adapt-pruner bench small --against smollm2-135m-instruct

        adapt-pruner bench small --against smollm2-135m-instruct --engine llama.cpp --quant q8_0 --batch 1
    """
    from adapt_pruner.recipe import check_precision

    check_precision(dtype)
    batches = [int(number) if number.strip().isdecimal() and len(number) < 20 else 0 for number in batch.split(",")]
    if not all(1 <= count <= _MOST_ROWS for count in batches):
        raise UsageError(f"--batch {batch!r} is not a list of batch sizes from 1 to {_MOST_ROWS:,}; write it like 1,8")
    from adapt_pruner.compare.turns import bench as measure
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report.screen import quiet_libraries, screen

    quiet_libraries()
    with screen() as listen:
        figures = measure(
            model, against, engine=engine, batches=batches, prompt=prompt, generate=generate, rounds=rounds, device=device,
            dtype=dtype, quant=quant, trust_remote_code=trust_remote_code, listen=listen,
        )  # fmt: skip
    print(to_json(figures)) if as_json else _print(figures)


def _print(figures: dict[str, Any]) -> None:
    from adapt_pruner.cli.tables import print_table

    print_table(
        ["", "batch", "dense, tokens/s", "pruned, tokens/s", "speed-up", "ideal", "of the ideal"],
        [
            [
                row["phase"], str(row["batch"]), _spread(row["dense"], ",.0f"), _spread(row["pruned"], ",.0f"),
                _spread(row["speed_up"], ".2f"), f"{row['ideal']:.2f}", f"{row['share']:.0%}",
            ]
            for row in figures["speeds"]
        ],
    )  # fmt: skip
    print()
    print_table(
        ["model", "parameters", "held in", "on disk", "load", "peak memory"],
        [
            [
                row["model"], f"{row['params']:,}", row["stored"], f"{row['disk_bytes'] / 1e6:,.1f} MB",
                _spread(row["load_seconds"], ".2f") + " s", f"{row['peak_bytes'] / 1e6:,.0f} MB",
            ]
            for row in reversed(figures["models"])
        ],
    )  # fmt: skip
    print(
        f"\nmedian (quartiles) of {figures['rounds']} rounds, pruned and dense in turn; prompts of {figures['prompt']} tokens, "
        f"{figures['generate']} written after each; {figures['engine']} on {figures['device']}, threads: {figures['threads']}"
    )


def _spread(figure: dict[str, float], form: str) -> str:
    return f"{figure['median']:{form}} ({figure['low']:{form}}–{figure['high']:{form}})"
