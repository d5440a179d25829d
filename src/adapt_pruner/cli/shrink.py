"""`adapt-pruner shrink`: a smaller model in a given time. It measures the machine and writes its plan as a recipe."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapt_pruner.cli.options import Device, Json, Model, Precision, Seed, Set, TrustRemoteCode

if TYPE_CHECKING:
    from adapt_pruner.recipe import Recipe

__all__ = ["shrink"]


def shrink(
    model: Model,
    params: Annotated[str, typer.Option(help="Parameters to keep: 110M, 110_000_000, 80% of the model, or '80% of decoder'.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run. Name the folder of a stopped one to continue it.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Your text, for training and calibration: file, folder, glob or hub:NAME; a part is held out to measure on. "
            "[default: what the model writes]",
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes that the whole run may take.")] = None,
    hours: Annotated[float | None, typer.Option(help="Instead of --minutes: hours.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Instead of --minutes: tokens to train on, such as 2M.")] = None,
    overrides: Set = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and on stdout its recipe; run nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
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

    long = how_long(minutes, hours, tokens)
    from adapt_pruner.core.system.strict_json import to_json
    from adapt_pruner.report import with_card
    from adapt_pruner.report.screen import quiet_libraries, screen
    from adapt_pruner.run.folder import figures_of
    from adapt_pruner.run.in_time import recipe_in_time

    quiet_libraries()
    common = {"model": model, "budget": params, "seed": seed, "device": device, "dtype": dtype}
    with screen() as listen:
        recipe = recipe_in_time(
            common, out, text=text, long=long, overrides=overrides or [], started=started, listen=listen,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        try:
            if not dry_run:
                outcome = with_card.run(recipe, out, listen=listen, trust_remote_code=trust_remote_code)
        except KeyboardInterrupt:
            _say_what_there_is(out, listen)
            raise
    if dry_run:
        print(to_json(recipe.model_dump(mode="json")) if as_json else recipe.to_yaml().rstrip())
        return
    figures = outcome.figures if outcome is not None else figures_of(out)
    if as_json:
        print(to_json(figures | {"path": str(out / "model")}))
    else:
        _tell(figures, out, recipe)


def _say_what_there_is(out: Path, listen: Any) -> None:
    """Say what an interrupted run has reached."""
    from adapt_pruner.core.events.words import compact, millions
    from adapt_pruner.run.checkpoints import is_within_training
    from adapt_pruner.run.folder import RunFolder

    newest, state, _ = RunFolder(out).newest(thorough=False)
    if newest is None or (out / "model").is_dir():  # nothing is kept yet, or the result is there, which was said
        return
    trained, params = (
        state["progress"]["tokens"],
        (state["history"] or [{"params": state["figures"]["params_before"]}])[-1]["params"],
    )
    if trained:
        whole = f"trained on {compact(trained)} tokens"
        if is_within_training(newest.name):
            whole += "; its learning rate has not come down yet"
    else:
        whole = "not trained" if newest.name.endswith("-pruned") else "not trained, and not yet as small as you asked"
    listen.say(f"the newest checkpoint is {newest}, of {millions(params)} parameters, {whole}")


def _tell(figures: dict[str, Any], out: Path, recipe: "Recipe") -> None:
    from adapt_pruner.cli.tables import said_perplexities
    from adapt_pruner.core.events.run import chatted
    from adapt_pruner.core.events.words import by_model, compact, measured_text, millions, span, typed

    model = out / "model"
    print(
        f"{millions(figures['params_before'])} → {millions(figures['params_after'])} parameters, trained on "
        f"{compact(figures['trained_tokens'])} tokens, in {span(figures['seconds'])}"
    )
    if figures.get("perplexities"):
        print(f"perplexity on {measured_text(figures)}: {said_perplexities(figures)}")
    if chats := chatted(figures)[1:]:
        print(f"the small model {chats[-1].verdict}")
        if chats[-1].is_poor:
            print("that is poor for an assistant; more --minutes, or a larger --params, would help")
    print(f"saved {model}; its report is {out / 'report.html'}, its card {model / 'README.md'}")
    print(f"try: {typed('chat', model)}")
    source = recipe.evaluation.source
    measures = ["--text", source] if isinstance(source, str) and by_model(source) is None else []
    if measures := [*measures, *(["--chat", str(recipe.evaluation.chat)] if recipe.evaluation.chat else [])]:
        print(f"     {typed('eval', recipe.model, model, *measures)}")
    print(f"     {typed('export', model, '--to', 'gguf', '-o', out / 'model.gguf')}")
    print(f"     {typed('run', out / 'recipe.yaml', '-o', 'ANOTHER_DIR')}")
