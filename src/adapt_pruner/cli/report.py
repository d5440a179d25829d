"""`adapt-pruner report`: the results of a run or a comparison, as one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapt_pruner.cli.options import Json, written_to
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError, first_line

if TYPE_CHECKING:
    from adapt_pruner.report.charts import Chart


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, finished or not, or of a comparison.")],
    output: Annotated[Path | None, written_to("File for the page. [default: report.html or compare.html in the folder]")] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Write the pictures as PNG files too, to PAGE-png/; needs the extra `plot`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the results of RUN_DIR as one HTML page: before and after, anatomy, why, recovery, cost, what to try next.

    The page needs no network. For a run that is in progress, was stopped or is broken, it shows the results so far. `run`,
    `shrink` and `compare` write the page by themselves when they end.

    Examples:

        adapt-pruner report runs/demo

        adapt-pruner report runs/demo -o demo.html --png
    """
    from adapt_pruner.report import paper
    from adapt_pruner.report.page import check_page, page, pictures, write_page

    if output is not None:
        check_page(output, folder)
    if png:
        paper.check_png()
    if (folder / filenames.COMPARISON).is_file():
        target = output or folder / filenames.COMPARISON_PAGE
        text, drawings = _of_comparison(folder)
    else:
        from adapt_pruner.report.figures import figures_of
        from adapt_pruner.report.record import read_record

        record = read_record(folder)
        target = output or folder / filenames.PAGE
        text, drawings = page(record), [*pictures(figures_of(record))] if png else []
    place = target.with_name(f"{target.stem}-png")
    if png:
        paper.check_ours(drawings, place)
    drawn = paper.write_pictures(drawings, place) if png else []
    written = [write_page(target, text), *drawn]
    if as_json:
        print(to_json({"written": [str(path) for path in written]}))
    else:
        print(f"wrote {written[0]}" + (f" and {len(drawn)} pictures in {place}" if drawn else ""))


def _of_comparison(folder: Path) -> "tuple[str, list[Chart]]":
    """The page of a comparison, and its pictures."""
    from adapt_pruner.compare.table import table
    from adapt_pruner.report.comparison import comparison_page, comparison_pictures, read_comparison

    result = read_comparison(folder)
    try:
        zeros = table(result["sparse_rows"]) if result.get("sparse_rows") else None
        page = comparison_page(result, *table(result["rows"]), name=folder.resolve().name, sparse=zeros)
        return page, [*comparison_pictures(result)]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # only the file can be the cause
        raise UsageError(
            f"{folder / 'compare.json'} is damaged ({type(error).__name__}: {first_line(error)}); "
            "run the same `adapt-pruner compare` again, which keeps what is finished"
        ) from error
