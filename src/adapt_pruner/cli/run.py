"""`adapt-pruner run`: a whole recipe, with training between cuts."""

import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from adapt_pruner.cli.options import Json, Set, TrustRemoteCode

__all__ = ["run"]

_SHOWN_BYTES = 2**30 / 200  # anything smaller rounds to 0.00 GiB


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a built-in recipe such as smollm2-demo.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the run. Name the folder of a stopped run to continue it. [default: runs/RECIPE-DATE-TIME]",
        ),
    ] = None,
    overrides: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan with its time and memory and write nothing. The model's config.json is enough for it.",
        ),
    ] = False,
    force_recipe: Annotated[
        bool, typer.Option("--force-recipe", help="Continue a run with this recipe although it began with another one.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Run RECIPE: prune the model, train it and save it. With `stages` above 1, prune and train in turn.

    A run that was stopped continues from its newest checkpoint when you give its folder again.

    Examples:

        adapt-pruner run smollm2-demo -o runs/demo

        adapt-pruner run recipe.yaml --set budget=60% --set training.tokens=1M --dry-run

        torchrun --nproc-per-node 8 -m adapt_pruner run recipe.yaml -o runs/mine --set parallel=fsdp
    """
    from adapt_pruner import recipe as recipes

    resolved = recipes.read(recipe, overrides=overrides or []).ready()
    from adapt_pruner.cli.tables import said_perplexities
    from adapt_pruner.core.events.words import measured_text, millions, span
    from adapt_pruner.core.system import world
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import quiet_libraries, screen
    from adapt_pruner.run import folder

    quiet_libraries()
    if dry_run:
        from adapt_pruner.run import forecast

        if out is not None:
            folder.check_folder(out, resolved, force=force_recipe)
        with screen() as listen:
            planned = forecast.dry_run(resolved, listen=listen, trust_remote_code=trust_remote_code)
        print(to_json(planned)) if as_json else _print_plan(planned)
        return
    with world.joined(lost=_end):
        run_dir = out or Path("runs") / world.agreed(f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        page = run_dir / "report.html"
        before = _stamp(page)
        with screen(quiet=not world.is_main()) as listen:
            outcome = with_card.run(
                resolved, run_dir, listen=listen, trust_remote_code=trust_remote_code, force_recipe=force_recipe
            )
    if not world.is_main():
        return
    figures = outcome.figures if outcome is not None else folder.figures_of(run_dir)
    if as_json:
        print(to_json(figures | {"path": str(run_dir / "model")}))
        return
    print(f"{millions(figures['params_before'])} → {millions(figures['params_after'])} parameters in {span(figures['seconds'])}")
    if "nonzero_after" in figures:
        print(f"not zero: {millions(figures['nonzero_before'])} → {millions(figures['nonzero_after'])}")
    if figures.get("perplexities"):
        print(f"perplexity on {measured_text(figures)}: {said_perplexities(figures)}")
    stale = (None,) if outcome is None else (None, before)  # if the report failed, an older one may still be there
    report = f", the report {page}" if _stamp(page) not in stale else ""
    print(f"saved {run_dir / 'model'}; the log is {run_dir / 'log.jsonl'}{report}")


def _end(sentence: str) -> NoReturn:
    """End this process, which waits for one that will not answer. All that it has written is complete."""
    from adapt_pruner.core.system import world

    with suppress(OSError):
        print(
            "error: " if world.is_main() else f"error in process {world.rank()}: ", sentence, sep="", file=sys.stderr, flush=True
        )
    os._exit(1)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Inode and time of a file, which change when it is written again; None where there is no file."""
    try:
        status = path.stat()
    except OSError:  # no file can be there; the code that writes it says so
        return None
    return status.st_ino, status.st_mtime_ns


def _print_plan(planned: dict[str, Any]) -> None:
    from adapt_pruner.cli.tables import print_table
    from adapt_pruner.core.events.words import span

    rows = [
        [
            str(row["stage"]),
            f"{row['params']:,}",
            str(row["iterations"]),
            f"{row['tokens']:,}",
            str(row["steps"]),
            span(row["seconds"]),
        ]
        for row in planned["stages"]
    ]
    print_table(["stage", "parameters", "iterations", "tokens", "steps", "time"], rows)
    phases = [
        [
            phase,
            f"{needed['bytes'] / 2**30:.2f} GiB",
            ", ".join(f"{what} {size / 2**30:.2f}" for what, size in needed["of"].items() if size >= _SHOWN_BYTES),
        ]
        for phase, needed in planned["memory"].items()
    ]
    print()
    print_table(["memory while", "at most", "of which"], phases)
    many = f" on {planned['processes']} processes ({planned['parallel']})" if planned["processes"] > 1 else ""
    seconds, limit = planned["seconds"], 60 * (planned["minutes"] or math.inf)
    ends = f" (`minutes` ends training then; all tokens would take {span(seconds)})" if seconds > limit else ""
    print(
        f"\nin total about {span(min(seconds, limit))}{ends} and {planned['peak_bytes'] / 2**30:.1f} GiB of memory a process{many}; "
        "nothing was written"
    )
    if planned["too_large"]:
        print(f"it does not fit: {planned['too_large']}")
    without = f"; not counted: {', '.join(planned['time_without'])}" if planned["time_without"] else ""
    by = {"assumption": "the time assumes", "probe": "the time is from a probe"}[planned["time_by"]]
    print(f"{by}: {planned['speed']}{without}")
