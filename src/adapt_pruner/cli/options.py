"""Options of commands. Those of a function of `adapt_pruner` are made from its signature, where name, type, default and bounds stand once.

The help of such an option is the argument's line in the function's docstring. What only a shell has, such as `--json`, is an argument of the
command itself; if it has the name of one of the function's, it takes its place.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_origin

import typer

from adapt_pruner.api.arguments import Takes, takes_of

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id, or packaged model such as smollm2-135m-instruct.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one recipe key; can be repeated.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with a model, a task folder, or a task that lm-eval marks as unsafe.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
_ALIKE = {"model": Model, "settings": Set, "trust_remote_code": TrustRemoteCode}  # what all commands say alike
_OF_PYTHON = {"tokenizer", "progress", "listen"}  # what a shell has no use for


def written_to(words: str) -> Any:
    """The option that names what is written."""
    return typer.Option("--output", "-o", help=words)


def options_of(function: Callable[..., Any], *, without: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `command(*, as_json, …, **options)` the arguments of a function as `options`, but the one named `without`."""
    arguments = inspect.signature(function).parameters
    lines = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(function) or "", re.MULTILINE))

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own_arguments = {
            name: each for name, each in inspect.signature(command).parameters.items() if each.kind is not each.VAR_KEYWORD
        }
        made = {
            name: argument.replace(
                kind=argument.KEYWORD_ONLY, annotation=_ALIKE.get(name) or _option(argument, lines[name], arguments)
            )
            for name, argument in arguments.items()
            if name not in own_arguments and name not in _OF_PYTHON and name != without
        }
        order = dict.fromkeys([*arguments, *own_arguments])
        parameters = [each for name in order if (each := own_arguments.get(name) or made.get(name)) is not None]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorated


def _option(argument: inspect.Parameter, line: str, arguments: Iterable[str]) -> Any:
    """An argument as an option, with its line of the docstring in words of a shell: `--text` for `text`, 80% for "80%"."""
    takes = takes_of(argument.annotation) or Takes("", None, argument.annotation)
    line = re.sub(r"\[(.*?)\]", lambda names: names[1].replace(", ", ","), " ".join(line.split()))
    line = re.sub(r'"([^" ]*)"', r"\1", line).replace('"', "'")
    for name in arguments:
        line = line.replace(f"`{name}`", _spelled(name))
    line += " Can be repeated." if get_origin(takes.option) is list else ""
    line = line[:1].upper() + line[1:]
    option = typer.Option(_spelled(argument.name), metavar=takes.metavar, min=takes.least, max=takes.most, help=line)
    return Annotated[takes.option | None if argument.default is None else takes.option, option]


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")
