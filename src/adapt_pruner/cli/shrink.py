"""`adapt-pruner shrink`: a smaller model in a given time; the machine is probed, a plan is made of it, and the plan is a recipe."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapt_pruner.cli.options import Device, Json, Precision, Set, TrustRemoteCode

if TYPE_CHECKING:
    from adapt_pruner.recipe import Recipe

__all__ = ["shrink"]


def shrink(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id, or packaged model such as smollm2-135m-instruct.")
    ],
    params: Annotated[str, typer.Option(help="Parameters to keep: 110M, 110_000_000, 80% of the model, or '80% of decoder'.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run. Name the folder of a stopped one to continue it.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Your text: it is trained and calibrated on, and a part is held out. [default: Python's language reference]",
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes that it may take.")] = None,
    hours: Annotated[float | None, typer.Option(help="Instead of --minutes: hours.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Instead of --minutes: tokens to train on, 2M say.")] = None,
    overrides: Set = None,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make a smaller model of MODEL in the time that you have: choose nothing but the size.

    It probes this machine, plans what fits the time, says the plan in five lines and carries it out. DIR/recipe.yaml is the plan,
    which `adapt-pruner run` takes; DIR/model is the result, DIR/report.html its page. Ctrl-C keeps the best so far.

    Examples:

        adapt-pruner shrink smollm2-135m-instruct --params 110M --text 'notes/*.md' --minutes 60 -o small

        adapt-pruner shrink ./llama --params 70% --text corpus.jsonl.gz --hours 8 -o small
    """
    started = time.perf_counter()
    asked_minutes, asked_tokens = _how_long(minutes, hours, tokens)
    from adapt_pruner.core.strict_json import to_json
    from adapt_pruner.report import documented
    from adapt_pruner.report.screen import quiet_libraries, screen
    from adapt_pruner.run.folder import figures_of

    quiet_libraries()
    common = {"model": model, "budget": params, "seed": seed, "device": device, "dtype": dtype}
    with screen() as listen:
        recipe = _begun(out, overrides, common, text=text)
        if recipe is None:
            recipe = _planned(
                common, text, asked_minutes, asked_tokens, overrides, started=started, listen=listen,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        if dry_run:
            return
        try:
            outcome = documented.run(recipe, out, listen=listen, trust_remote_code=trust_remote_code)
        except KeyboardInterrupt:
            _say_what_there_is(out, listen)
            raise
    figures = outcome.figures if outcome is not None else figures_of(out)
    if as_json:
        print(to_json(figures | {"path": str(out / "model")}))
    else:
        _tell(figures, out, recipe)


def _how_long(minutes: float | None, hours: float | None, tokens: str | None) -> tuple[float | None, int | None]:
    """Minutes, or tokens.

    Raises:
        UsageError: none of the three is given or more than one, or it is no time.
    """
    from adapt_pruner.core.budget import parse_count
    from adapt_pruner.errors import UsageError

    given = {"--minutes": minutes, "--hours": hours, "--tokens": tokens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        said = f"{' and '.join(named)} all say how long it may take" if named else "shrink needs to know how long it may take"
        raise UsageError(f"{said}; give one of --minutes 60, --hours 1 and --tokens 2M")
    if tokens is not None:
        return None, parse_count(tokens)
    asked = float(minutes if minutes is not None else 60 * (hours or 0.0))
    if not 0 < asked <= 10**6:
        raise UsageError(f"{named[0]} {given[named[0]]:g} is no time for this; give minutes above 0 and up to 1,000,000")
    return asked, None


def _planned(
    common: dict[str, Any], text: str | None, minutes: float | None, tokens: int | None, overrides: list[str] | None, *,
    started: float, listen: Any, trust_remote_code: bool,
) -> "Recipe":  # fmt: skip
    """The recipe that fits the time, by a probe; what the probe took is off its minutes."""
    from adapt_pruner import recipe as recipes
    from adapt_pruner.core.events import EVERYWHERE
    from adapt_pruner.data.apart import apart
    from adapt_pruner.plan.rules import Asked, planned
    from adapt_pruner.run.probe import probed

    train, held_out, characters = apart(text or EVERYWHERE)
    plain = recipes.read({}, values=common, overrides=overrides or [])
    machine, its, work = probed(plain, listen=listen, trust_remote_code=trust_remote_code)
    text_tokens = characters * _tokens_a_character(work.tokenizer, train)
    del work
    spent = (time.perf_counter() - started) / 60
    left = None if minutes is None else max(1e-3, minutes - spent)
    plan = planned(machine, its, Asked(train, held_out, round(text_tokens), text is not None, left, tokens, gone=spent))
    for line in plan.lines:
        listen.say(line)
    return recipes.read({}, values=common | dict(plan.settings), overrides=overrides or [])


def _tokens_a_character(tokenizer: Any, spec: str) -> float:
    """How many tokens a character of a text is, by the beginning of its first document."""
    from adapt_pruner.data.sources import texts

    sample = next(iter(texts(spec)))[:100_000]
    return len(tokenizer(sample, add_special_tokens=False)["input_ids"]) / len(sample)


def _begun(out: Path, overrides: list[str] | None, common: dict[str, Any], *, text: str | None) -> "Recipe | None":
    """The recipe of a run that was begun in this folder, with what is overridden; None where none was.

    Raises:
        UsageError: that run is of another model, size, text, seed or number format, or the folder holds something else.
    """
    from adapt_pruner import recipe as recipes
    from adapt_pruner.core.budget import parse_count
    from adapt_pruner.core.events import EVERYWHERE
    from adapt_pruner.data.apart import apart
    from adapt_pruner.errors import UsageError
    from adapt_pruner.run.folder import check_folder

    if not (out / "recipe.yaml").exists():
        check_folder(out, recipes.read({}, values=common), force=False)  # before the probe
        return None
    recipe = recipes.read(str(out / "recipe.yaml"), overrides=overrides or [])
    others = {"MODEL": recipe.model != common["model"], "--text": apart(text or EVERYWHERE)[0] != recipe.training.source}
    params = common["budget"]
    others["--params"] = "%" not in params and str(parse_count(params)) != recipe.budget
    others |= {f"--{key}": common[key] != getattr(recipe, key) for key in ("seed", "dtype")}
    if wrong := [name for name, differs in others.items() if differs]:
        raise UsageError(f"{out} was begun with another {' and another '.join(wrong)}; name another folder, or go on as it began")
    return recipe


def _say_what_there_is(out: Path, listen: Any) -> None:
    """Say what an interrupted run has come to."""
    from adapt_pruner.core.words import compact, millions
    from adapt_pruner.run.folder import RunFolder

    newest, state, _ = RunFolder(out).newest(thorough=False)
    if newest is None:
        return
    trained, params = (
        state["progress"]["tokens"],
        (state["history"] or [{"params": state["figures"]["params_before"]}])[-1]["params"],
    )
    whole = f"trained on {compact(trained)} tokens, its learning rate not yet down" if trained else "not trained"
    listen.say(f"the best so far is {newest}, a model of {millions(params)} parameters, {whole}")


def _tell(figures: dict[str, Any], out: Path, recipe: "Recipe") -> None:
    from adapt_pruner.core.words import compact, millions, span

    model = out / "model"
    print(
        f"{millions(figures['params_before'])} → {millions(figures['params_after'])} parameters, trained on "
        f"{compact(figures['trained_tokens'])} tokens, in {span(figures['seconds'])}"
    )
    measured = ["–" if value is None else f"{value:.2f}" for value in figures.get("perplexities") or []]
    if measured:
        print(f"perplexity on held-out text: {' → '.join(measured)}")
    print(f"saved {model}; its page is {out / 'report.html'}, its card {model / 'README.md'}")
    print(f"try: adapt-pruner chat {model}")
    if isinstance(recipe.evaluation.source, str):
        print(f"     adapt-pruner eval {recipe.model} {model} --text {shlex.quote(recipe.evaluation.source)}")
    print(f"     adapt-pruner export {model} --to gguf -o {out / 'model.gguf'}")
    print(f"     adapt-pruner run {out / 'recipe.yaml'} -o ANOTHER_DIR")
