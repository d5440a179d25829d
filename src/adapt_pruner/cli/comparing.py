"""`adapt-pruner compare` and `bench`: pruning methods at equal parameters, and the speed of a pruned and a dense model in one engine."""

from collections.abc import Mapping
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from adapt_pruner.api import benching, measuring
from adapt_pruner.cli.options import Json, options_of, written_to
from adapt_pruner.cli.tables import print_table
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import RunError


@options_of(measuring.compare)
def compare(
    *,
    output: Annotated[Path, written_to("Folder for figures, table and picture. Name it again to continue a comparison.")],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Prune MODEL by several methods to the same sizes, measure the results alike, and write a table and a picture.

    Give the same command again to continue a comparison that was stopped. You may add methods, sizes or draws.

    `--set vocabulary.source=SPEC --set vocabulary.keep=16384` lets every method remove tokens too, within the same sizes.

    Examples:

        adapt-pruner compare smollm2-135m-instruct --methods magnitude,random --params 113.3M --text python-docs:heldout -o compared

        adapt-pruner compare ./llama --methods wanda,sparsegpt --sparsity 50%,2:4 --text wiki.test.txt -o zeros

        adapt-pruner compare ./llama --methods adapt-pruner,uniform --params 80%,60% --text wiki.test.txt --text books/ --draws 5 -o compared
    """
    comparison = unwrap(measuring.compare)(output=output, progress=True, **options)
    from adapt_pruner.compare.table import table
    from adapt_pruner.report.comparison import texts_in_words, tokens_note

    result = comparison.figures
    if as_json:
        print(to_json(result | {"path": str(output)}))
    else:
        tables = [rows for rows in (result["rows"], result["sparse_rows"]) if len(rows) > 1] or [result["rows"]]
        for number, rows in enumerate(tables):
            print("\n" * (number > 0), end="")
            print_table(*table(rows))
        note = tokens_note(result)
        print(f"\n{note}" if note else "")
        written = f"written to {output}, its page is {comparison.page}"
        print(f"perplexity on {texts_in_words(result)}, {result['precision']}; {written}")
    failed = sum("error" in cell for cell in result["cells"])
    if failed:
        raise RunError(f"{failed} of {len(result['cells'])} cells failed; the table and {output / 'compare.md'} say why")


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
    from adapt_pruner.report.screen import screen

    with screen() as listen:
        figures = benching.bench(model, listen=listen, **options)
    if as_json:
        print(to_json(figures))
        return
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


def _spread(figure: Mapping[str, float], form: str) -> str:
    return f"{figure['median']:{form}} ({figure['low']:{form}}–{figure['high']:{form}})"
