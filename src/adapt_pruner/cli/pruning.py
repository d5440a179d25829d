"""`adapt-pruner prune`, `shrink` and `run`: make a smaller model; with training, in a given time or by a whole recipe."""

import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from inspect import unwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from adapt_pruner.api import pruning
from adapt_pruner.cli.options import Json, options_of, written_to
from adapt_pruner.cli.tables import print_table, said_perplexities
from adapt_pruner.core.events.run import chatted
from adapt_pruner.core.events.words import by_model, compact, counted, measured_text, millions, span, typed
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.strict_json import read_json, to_json

if TYPE_CHECKING:
    from adapt_pruner.recipe import Recipe


_SHOWN_BYTES = 2**30 / 200  # anything smaller rounds to 0.00 GiB


@options_of(pruning.prune)
def prune(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder, .gguf file, hub id, packaged model such as smollm2-135m-instruct, or recipe FILE.yaml."
        ),
    ],
    output: Annotated[Path, written_to("Folder for the checkpoint, new or empty.")],
    text: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="SPEC", help="Text to measure importance on: file, folder, glob, hub:NAME, python-docs:train, or `self` "
            "(self-written text, which the model writes first). [default: self]",
        ),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:  # fmt: skip
    """Prune MODEL to a number of parameters, or to a speed on this machine, and write a checkpoint.

    Examples:

        adapt-pruner prune smollm2-135m-instruct -o small --params 110M

        adapt-pruner prune smollm2-135m-instruct -o small --latency 0.7x --set multiple_of=64

        adapt-pruner prune small -o small-2-4 --method wanda --sparsity 2:4

        adapt-pruner prune ./llama -o small --params 80% --calibration 'corpus/*.jsonl.gz' --method adapt-pruner
    """
    from adapt_pruner.core.system import world

    with world.joined(lost=_end):
        result = unwrap(pruning.prune)(model, output, text=text, progress=True, **options)
    if not world.is_main():
        return
    figures, dense = result.figures, result.recipe.model
    if as_json:
        print(to_json(figures | {"path": str(output)}))
        return
    _print_sizes(figures)
    if "reached" in (timing := figures.get("latency") or {}):
        print(
            f"\n{timing['of']} takes {timing['reached']:.2f}x of the dense model's time, which is {timing['dense_seconds']:.2f} s "
            f"(timed in turn; quartiles {timing['reached_low']:.2f}–{timing['reached_high']:.2f}x); asked {timing['asked']:g}x, "
            f"predicted {timing['predicted']:.2f}x"
        )
    if losses := figures.get("calibration_losses"):
        which, each = ("calibration pairs", "pair") if _reads_pictures(output) else ("calibration text", "token")
        print(f"\nloss on the {which}: {' → '.join(f'{loss:.3f}' for loss in losses)} nats a {each}")
    if "answers" in figures:
        answers = {
            stage["stage"] > 0: {each["prompt"]: each["text"] for each in stage["answers"]} for stage in figures["answers"]
        }
        before, after = answers.get(False, {}), answers.get(True, {})
        rows = [[prompt, before.get(prompt, "–"), after.get(prompt, "–")] for prompt in before | after]
        print()
        print_table(["asked", "before", "after"], rows, left=3)
    peak = figures["peak_rss_bytes"] / 2**30
    read = f", weights read {figures['weights_read']:g} times" if "weights_read" in figures else ""
    print(f"\n{counted(figures['iterations'], 'iteration')} in {span(figures['seconds'])}, peak memory {peak:.1f} GiB{read}")
    print(f"saved {output} ({millions(figures['params_after'])} parameters)\n")
    folder = output if "/" in str(output) else f"./{output}"  # so that YAML reads no number
    settings = [f"model={folder}", "budget=100%", "training.source=FILE"]
    following = {
        "measure it": typed("eval", dense, output, "--text", "python-docs:heldout", "--max-windows", 20),
        "ask it": typed("chat", output, "What is the capital of France?", "--against", dense),
        "train it": typed("run", "smollm2-105m", *(word for setting in settings for word in ("--set", setting))),
    }
    if _reads_pictures(output):
        following = {"measure it": typed("eval", dense, output, "--text", "PICTURES")}
    elif _has_gguf(output):
        following["for llama.cpp"] = typed("export", output, "--to", "gguf", "-o", f"{output}.gguf")
    print_table(["next", ""], [*map(list, following.items())], left=2)


def _reads_pictures(folder: Path) -> bool:
    """Whether a model has a tower for pictures."""
    from adapt_pruner.export.loading import towers_of

    return bool(towers_of(read_json(folder / filenames.CONFIG)))


def _has_gguf(folder: Path) -> bool:
    """Whether `export` writes a GGUF file of a model."""
    from adapt_pruner.checkpoint.compatible_names import with_common_names
    from adapt_pruner.export.loading import no_gguf

    return no_gguf(with_common_names(read_json(folder / filenames.CONFIG))) is None


def _print_sizes(figures: Mapping[str, Any]) -> None:
    rows = []
    names = {
        "params": "parameters",
        "active_params": "active",
        "decoder_params": "in the layers",
        "vocabulary": "tokens",
        "nonzero": "not zero",
    }
    for key, name in names.items():
        if f"{key}_after" in figures:
            before, after = figures[f"{key}_before"], figures[f"{key}_after"]
            rows.append([name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"])
    print_table(["", "before", "after", "kept"], rows)


@options_of(pruning.shrink)
def shrink(
    *,
    output: Annotated[Path, written_to("Folder of the run. Name the folder of a stopped one to continue it.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and on stdout its recipe; run nothing.")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Make a smaller model from MODEL in the time that you have. You choose the size, the text and the time.

    It measures this machine, plans what fits the time, prints the plan in five lines and carries it out. DIR/recipe.yaml is the plan,
    which `adapt-pruner run` accepts; DIR/model is the result, DIR/report.html its report. Ctrl-C stops it and keeps the newest checkpoint.

    Examples:

        adapt-pruner shrink smollm2-135m-instruct --params 110M --text 'notes/*.md' --minutes 60 -o small

        adapt-pruner shrink ./llama --params 70% --text corpus.jsonl.gz --hours 8 -o small
    """
    from adapt_pruner.core.system import world

    try:
        with world.joined(lost=_end):
            if dry_run:
                with pruning.in_time(place=output, progress=True, **options) as (recipe, _):
                    if world.is_main():
                        print(to_json(recipe.model_dump(mode="json")) if as_json else recipe.to_yaml().rstrip())
                return
            result = unwrap(pruning.shrink)(output=output, progress=True, **options)
    except KeyboardInterrupt:
        if world.is_main():
            _say_what_there_is(output)
        raise
    if not world.is_main():
        return
    figures, recipe, model = result.figures, result.recipe, output / filenames.RESULT
    if as_json:
        print(to_json(figures | {"path": str(model)}))
        return
    _print_run(figures, f", trained on {compact(figures['trained_tokens'])} tokens,")
    if chats := chatted(figures)[1:]:
        print(f"the small model {chats[-1].verdict}")
        if chats[-1].is_poor:
            print("that is poor for an assistant; more --minutes, or a larger --params, would help")
    print(f"saved {model}; its report is {output / 'report.html'}, its card {model / 'README.md'}")
    print(f"try: {typed('chat', model)}")
    source = recipe.evaluation.source
    measures = ["--text", source] if isinstance(source, str) and by_model(source) is None else []
    if measures := [*measures, *(["--chat", str(recipe.evaluation.chat)] if recipe.evaluation.chat else [])]:
        print(f"     {typed('eval', recipe.model, model, *measures)}")
    if _has_gguf(model):
        print(f"     {typed('export', model, '--to', 'gguf', '-o', output / 'model.gguf')}")
    print(f"     {typed('run', output / 'recipe.yaml', '-o', 'ANOTHER_DIR')}")


def _say_what_there_is(run_dir: Path) -> None:
    """Say what an interrupted run has reached."""
    from adapt_pruner.report.screen import screen
    from adapt_pruner.run.folder import RunFolder

    newest, state, _ = RunFolder(run_dir).newest(thorough=False)
    if newest is None or (run_dir / filenames.RESULT).is_dir():  # nothing is kept yet, or the result is there, which was said
        return
    trained = state["progress"]["tokens"]
    params = (state["history"] or [{"params": state["figures"]["params_before"]}])[-1]["params"]
    whole = "not trained" if newest.name.endswith("-pruned") else "not trained, and not yet as small as you asked"
    if trained:
        whole = f"trained on {compact(trained)} tokens"
        if "-step-" in newest.name:
            whole += "; its learning rate has not come down yet"
    with screen() as listen:
        listen.say(f"the newest checkpoint is {newest}, of {millions(params)} parameters, {whole}")


@options_of(pruning.run)
def run(
    *,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a built-in recipe such as smollm2-demo.")
    ],
    output: Annotated[
        Path | None,
        written_to("Folder of the run. Name the folder of a stopped run to continue it. [default: runs/RECIPE-DATE-TIME]"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan with its time and memory and write nothing. The model's config.json is enough for it.",
        ),
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Run RECIPE: prune the model, train it and save it. With `stages` above 1, prune and train in turn.

    A run that was stopped continues from its newest checkpoint when you give its folder again.

    Examples:

        adapt-pruner run smollm2-demo -o runs/demo

        adapt-pruner run recipe.yaml --set budget=60% --set training.tokens=1M --dry-run

        torchrun --nproc-per-node 8 -m adapt_pruner run recipe.yaml -o runs/mine --set parallel=fsdp
    """
    from adapt_pruner import recipe as recipes

    resolved = recipes.read(recipe, overrides=options.pop("settings") or []).ready()
    from adapt_pruner.core.system import world

    if dry_run:
        _plan(resolved, output, as_json=as_json, **options)
        return
    with world.joined(lost=_end):
        run_dir = output or Path("runs") / world.agreed(f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        page, model = run_dir / filenames.PAGE, run_dir / filenames.RESULT
        before = None if _stamp(model) else _stamp(page)  # a finished run keeps its page
        figures = unwrap(pruning.run)(resolved, run_dir, progress=True, **options).figures
    if not world.is_main():
        return
    if as_json:
        print(to_json(figures | {"path": str(model)}))
        return
    _print_run(figures)
    report = f", the report {page}" if _stamp(page) not in (None, before) else ""  # if it failed, an older one may still be there
    print(f"saved {model}; the log is {run_dir / 'log.jsonl'}{report}")


def _print_run(figures: Mapping[str, Any], trained: str = "") -> None:
    before, after = millions(figures["params_before"]), millions(figures["params_after"])
    print(f"{before} → {after} parameters{trained} in {span(figures['seconds'])}")
    if "active_params_after" in figures:
        print(f"active in a token: {millions(figures['active_params_before'])} → {millions(figures['active_params_after'])}")
    if "nonzero_after" in figures:
        print(f"not zero: {millions(figures['nonzero_before'])} → {millions(figures['nonzero_after'])}")
    if figures.get("perplexities"):
        print(f"perplexity on {measured_text(figures)}: {said_perplexities(figures)}")


def _end(sentence: str) -> NoReturn:
    """End this process, which waits for one that will not answer. All that it has written is complete."""
    from adapt_pruner.core.system import world

    process = "" if world.is_main() else f" in process {world.rank()}"
    with suppress(OSError):
        print(f"error{process}: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Inode and time of a file or folder, which change when it is written again; None where there is none."""
    try:
        status = path.stat()
    except OSError:  # nothing can be there; the code that writes it says so
        return None
    return status.st_ino, status.st_mtime_ns


_PLACES = {"none": "in memory", "cpu": "in memory, as stored", "disk": "on disk"}


def _plan(recipe: "Recipe", output: Path | None, *, as_json: bool, force_recipe: bool, trust_remote_code: bool) -> None:
    """Print the plan of a run."""
    from adapt_pruner.report.screen import screen
    from adapt_pruner.run import folder, forecast
    from adapt_pruner.run.estimate import DISK

    if output is not None:
        folder.check_folder(output, recipe, force=force_recipe)
    with screen() as listen:
        plan = forecast.dry_run(recipe, listen=listen, trust_remote_code=trust_remote_code)
    if as_json:
        print(to_json(plan))
        return
    counts = ("iterations", "tokens", "steps")
    stages = [
        [str(row["stage"]), f"{row['params']:,}", *(f"{row[key]:,}" for key in counts), span(row["seconds"])]
        for row in plan["stages"]
    ]
    print_table(["stage", "parameters", *counts, "time"], stages)
    phases = []
    for phase, needed in plan["memory"].items():
        shares = [f"{what} {size / 2**30:.2f}" for what, size in needed["of"].items() if size >= _SHOWN_BYTES]
        phases.append([phase, f"{needed['bytes'] / 2**30:.2f} GiB", ", ".join(shares)])
    print()
    print_table(["memory while", "at most", "of which"], phases)
    ways = [
        [_PLACES[way["offload"]], str(way["processes"]), f"{way['bytes'] / 2**30:.2f} GiB", span(way["seconds"]), "yes" if way["fits"] else "no"]
        for way in plan["ways"]
    ]  # fmt: skip
    print()
    print_table(["weights, while no pass needs them", "processes", "memory of each", "time", "fits"], ways)
    if plan["offload"] == "disk":
        print(f"weights stay on disk (offload=disk), which is assumed to give {DISK / 1e9:g} GB a second")
    elif plan["offload"] == "cpu":
        print("weights stay in memory as stored (offload=cpu)")
    many = f" on {plan['processes']} processes ({plan['parallel']})" if plan["processes"] > 1 else ""
    seconds, limit = plan["seconds"], 60 * (plan["minutes"] or math.inf)
    ends = f" (`minutes` ends training then; all tokens would take {span(seconds)})" if seconds > limit else ""
    print(
        f"\nin total about {span(min(seconds, limit))}{ends} and {plan['peak_bytes'] / 2**30:.1f} GiB of memory a process{many}; "
        "nothing was written"
    )
    if plan["too_large"]:
        print(f"it does not fit: {plan['too_large']}")
    if plan["active_params_before"] is not None:
        print(f"parameters active in a token: {plan['active_params_before']:,} → about {plan['active_params_after']:,}")
    without = f"; not counted: {', '.join(plan['time_without'])}" if plan["time_without"] else ""
    by = {"assumption": "the time assumes", "probe": "the time is from a probe"}[plan["time_by"]]
    print(f"{by}: {plan['speed']}{without}")
