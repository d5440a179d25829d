"""`adapt-pruner bench`: how fast a pruned model runs, compared with the dense one in the same engine."""

from typing import Annotated, Any

import typer

from adapt_pruner.api import benching
from adapt_pruner.cli.options import Json, options_of

__all__ = ["bench"]


@options_of(benching.bench)
def bench(
    *,
    model: Annotated[str, typer.Argument(metavar="DIR", help="The pruned model: folder, .gguf file, hub id or packaged model.")],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Measure speed, load time, size and memory of DIR and MODEL in turn, and how much of the ideal speed-up DIR reaches.

    Examples:

        adapt-pruner bench small --against smollm2-135m-instruct

        adapt-pruner bench small --against smollm2-135m-instruct --engine llama.cpp --quant q8_0 --batch 1
    """
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report.screen import screen

    with screen() as listen:
        figures = benching.bench(model, listen=listen, **options)
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
