"""`adapt-pruner compare`: several pruning methods at equal parameters, measured alike."""

from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from adapt_pruner.api import measuring
from adapt_pruner.cli.options import Json, options_of

__all__ = ["compare"]


@options_of(measuring.compare)
def compare(
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for figures, table and picture. Name it again to continue a comparison."),
    ],
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
    result = unwrap(measuring.compare)(output=output, progress=True, **options).figures
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.compare.table import table
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.errors import RunError
    from adapt_pruner.report.comparison import texts_in_words, tokens_note

    if as_json:
        print(to_json(result | {"path": str(output)}))
    else:
        shown = [rows for rows in (result["rows"], result["sparse_rows"]) if len(rows) > 1] or [result["rows"]]
        for number, rows in enumerate(shown):
            print("\n" * (number > 0), end="")
            print_table(*table(rows))
        note = tokens_note(result)
        print(
            f"\n{note}" if note else "",
            f"perplexity on {texts_in_words(result)}, {result['precision']}; written to {output}, its page is {output / 'compare.html'}",
            sep="\n",
        )
    failed = sum("error" in cell for cell in result["cells"])
    if failed:
        raise RunError(f"{failed} of {len(result['cells'])} cells failed; the table and {output / 'compare.md'} say why")
