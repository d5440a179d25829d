"""`adapt-pruner shrink`: a smaller model in a given time. It measures the machine and writes its plan as a recipe."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapt_pruner.api import pruning
from adapt_pruner.cli.options import Json, options_of

if TYPE_CHECKING:
    from adapt_pruner.recipe import Recipe

__all__ = ["shrink"]


@options_of(pruning.shrink)
def shrink(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run. Name the folder of a stopped one to continue it.")
    ],
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
    started = time.perf_counter()
    from adapt_pruner.run.rules import how_long

    long = how_long(options["minutes"], options["hours"], options["tokens"])
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import quiet_libraries, screen
    from adapt_pruner.run.folder import figures_of
    from adapt_pruner.run.in_time import recipe_in_time

    quiet_libraries()
    trust: bool = options["trust_remote_code"]
    common = {"budget": options["params"], **{key: options[key] for key in ("model", "seed", "device", "dtype")}}
    with screen() as listen:
        recipe = recipe_in_time(
            common, output, text=options["text"], long=long, overrides=options["settings"] or [], started=started, listen=listen,
            trust_remote_code=trust,
        )  # fmt: skip
        if dry_run:
            print(to_json(recipe.model_dump(mode="json")) if as_json else recipe.to_yaml().rstrip())
            return
        try:
            outcome = with_card.run(recipe, output, listen=listen, trust_remote_code=trust)
        except KeyboardInterrupt:
            _say_what_there_is(output, listen)
            raise
    figures = outcome.figures if outcome is not None else figures_of(output)
    print(to_json(figures | {"path": str(output / "model")})) if as_json else _tell(figures, output, recipe)


def _say_what_there_is(out: Path, listen: Any) -> None:
    """Say what an interrupted run has reached."""
    from adapt_pruner.core.events.words import compact, millions
    from adapt_pruner.run.checkpoints import is_within_training
    from adapt_pruner.run.folder import RunFolder

    newest, state, _ = RunFolder(out).newest(thorough=False)
    if newest is None or (out / "model").is_dir():  # nothing is kept yet, or the result is there, which was said
        return
    trained = state["progress"]["tokens"]
    params = (state["history"] or [{"params": state["figures"]["params_before"]}])[-1]["params"]
    if trained:
        whole = f"trained on {compact(trained)} tokens"
        if is_within_training(newest.name):
            whole += "; its learning rate has not come down yet"
    else:
        whole = "not trained" if newest.name.endswith("-pruned") else "not trained, and not yet as small as you asked"
    listen.say(f"the newest checkpoint is {newest}, of {millions(params)} parameters, {whole}")


def _tell(figures: dict[str, Any], out: Path, recipe: "Recipe") -> None:
    from adapt_pruner.cli.tables import said_perplexities
    from adapt_pruner.core.events.words import compact, measured_text, millions, span, typed

    model = out / "model"
    print(
        f"{millions(figures['params_before'])} → {millions(figures['params_after'])} parameters, trained on "
        f"{compact(figures['trained_tokens'])} tokens, in {span(figures['seconds'])}"
    )
    if figures.get("perplexities"):
        print(f"perplexity on {measured_text(figures)}: {said_perplexities(figures)}")
    print(f"saved {model}; its report is {out / 'report.html'}, its card {model / 'README.md'}")
    print(f"try: {typed('chat', model)}")
    if isinstance(recipe.evaluation.source, str):
        print(f"     {typed('eval', recipe.model, model, '--text', recipe.evaluation.source)}")
    print(f"     {typed('export', model, '--to', 'gguf', '-o', out / 'model.gguf')}")
    print(f"     {typed('run', out / 'recipe.yaml', '-o', 'ANOTHER_DIR')}")
