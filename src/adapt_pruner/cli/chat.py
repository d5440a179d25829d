"""`adapt-pruner chat`: a model's answer to a prompt, a second model's beside it, or a conversation."""

import sys
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from adapt_pruner.api import measuring
from adapt_pruner.cli.options import Json, Model, options_of
from adapt_pruner.core.events import Load
from adapt_pruner.core.events.words import millions
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.core.system.terminal import console, visible
from adapt_pruner.errors import UsageError

_NARROW = 100  # columns of a terminal below which answers stand below each other


@options_of(measuring.chat)
def chat(
    *,
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="What you ask the model, in quotes. Without it you have a conversation."),
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="Second model, which answers the same prompt.")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Ask MODEL something in its own chat template. With --against DENSE, both models answer side by side.

    Without PROMPT the model answers each line that you write, and remembers the conversation. An empty line or Ctrl-D ends it.

    Examples:

        adapt-pruner chat runs/demo/model

        adapt-pruner chat runs/demo/model "Why is the sky blue?"

        adapt-pruner chat runs/demo/model "Why is the sky blue?" --against smollm2-135m-instruct
    """
    from adapt_pruner.checkpoint.load import Loaded, load, locate, pick_device
    from adapt_pruner.evaluate.answer import answer, check_asked
    from adapt_pruner.recipe import check_precision
    from adapt_pruner.report.screen import screen

    check_precision(options["dtype"])
    if prompt is None and as_json:
        raise UsageError("--json prints the answer to a prompt, and there is none; write a question or an instruction, in quotes")
    check_asked(prompt, temperature=options["temperature"], seed=options["seed"])
    names = [model] if against is None else [model, against]
    for name in names:
        locate(name)  # so that a missing model is reported before the other one answers
    device, trust = pick_device(options.pop("device")), options.pop("trust_remote_code")
    how = options | {"seed": options["seed"] or 0}

    def loaded_of(name: str) -> Loaded:
        with screen() as listen:
            listen(Load(model=name))
            return load(name, device=device, trust_remote_code=trust, any_family=True)

    if prompt is None:
        _converse({name: loaded_of(name) for name in names}, how)
        return
    streams = against is None and not as_json
    answers: list[dict[str, Any]] = []
    for name in names:
        loaded = loaded_of(name)
        reply = answer(loaded.model, loaded.tokenizer, prompt, on_text=_say if streams else None, **how)
        answers.append({"model": name, "params": count_parameters(loaded.model), **asdict(reply)})
    if as_json:
        print(to_json(answers[0] if against is None else {"answers": answers}))
        return
    if streams:
        print()
    _print(answers, with_text=not streams)


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _converse(models: dict[str, Any], how: dict[str, Any]) -> None:
    """Let each model answer stdin line by line. Each remembers its own answers."""
    from adapt_pruner.evaluate.answer import answer

    asks = sys.stdin.isatty()
    notes = console(stderr=True, highlight=False, markup=False)
    if asks:
        notes.print("Write a line to the model. An empty line ends the conversation.", style="dim")
    turns: dict[str, list[tuple[str, str]]] = {name: [] for name in models}
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line.strip():
            print(end="\n" if asks and not line else "")
            return
        for name, loaded in models.items():
            if len(models) > 1:
                notes.print(visible(name), style="dim")
            ask = partial(answer, loaded.model, loaded.tokenizer, line, on_text=_say, **how)
            try:
                text = ask(before=turns[name]).text
            except UsageError as error:  # the conversation is longer than the model can read
                if not turns[name]:
                    raise
                notes.print(f"{error}; the model forgets the conversation so far", style="dim")
                turns[name].clear()
                text = ask(before=[]).text
            print("\n")
            turns[name].append((line, text))


def _print(answers: list[dict[str, Any]], *, with_text: bool) -> None:
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    out = console(highlight=False, markup=False)
    if with_text:
        panels = []
        for shown in answers:
            body = Group(Text(visible(shown["text"]) or "(nothing)"), Text(f"\n{_note(shown)}", style="dim"))
            panels.append(Panel(body, title=Text(visible(shown["model"])), title_align="left"))
        if out.is_terminal and out.width >= _NARROW:
            out.print(Columns(panels, width=out.width // len(panels) - 1))
        else:
            out.print(Group(*panels))
    else:
        console(stderr=True, highlight=False, markup=False).print(_note(answers[0]), style="dim", soft_wrap=True)


def _note(reply: dict[str, Any]) -> str:
    speed = reply["tokens"] / max(reply["seconds"], 1e-9)
    note = f"{millions(reply['params'])} parameters, {reply['tokens']} tokens at {speed:,.1f} a second"
    if not reply["ended"]:
        note += ", cut off"
    return note if reply["templated"] else note + "; no chat template, so the model continues the prompt"
