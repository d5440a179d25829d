"""The public surface, pinned in surface.txt: commands with their options, `ap.*` with its arguments, recipe keys, fields of events.

A change of it shows in review as a change of that file. To write it anew: python tests/test_surface.py
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import typer
from pydantic import BaseModel

import adapt_pruner as ap
from adapt_pruner import cli
from adapt_pruner.core.events import Event
from adapt_pruner.recipe import Recipe

PINNED = Path(__file__).with_name("surface.txt")


def surface() -> Iterator[str]:
    for name, command in sorted(typer.main.get_command(cli.app).commands.items()):  # type: ignore[attr-defined]
        parameters = sorted(" ".join([*parameter.opts, *parameter.secondary_opts]) for parameter in command.params)
        yield f"command {name}: {', '.join(parameters)}"
    for name in ap.__all__:
        value = getattr(ap, name)
        if inspect.isclass(value):
            ours = [base for base in value.__mro__ if base.__module__.startswith("adapt_pruner")]
            names = {attribute for base in ours for attribute in [*vars(base), *inspect.get_annotations(base)]}
            public = sorted(attribute for attribute in names if not attribute.startswith(("_", "model_")))
            yield f"ap.{name}: {', '.join(public)}"
        elif inspect.isfunction(value):
            yield f"ap.{name}({', '.join(_written(parameter) for parameter in inspect.signature(value).parameters.values())})"
        else:
            yield f"ap.{name}"
    yield from _keys(Recipe)
    for module in ("comparison", "run"):  # which have events of their own
        importlib.import_module(f"adapt_pruner.core.events.{module}")
    events = {kind: event for kind, event in Event._kinds.items() if event.__module__.startswith("adapt_pruner")}
    for kind, event in sorted(events.items()):
        yield f"event {kind}: {', '.join(event.model_fields)}"


def _written(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
    if callable(parameter.default) and parameter.default is not inspect.Parameter.empty:
        default = "=…"
    return f"{parameter.name}{default}"


def _keys(model: type[BaseModel], table: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{key}.")
        else:
            yield f"recipe {table}{key} = {field.get_default(call_default_factory=True)!r}"


def test_the_public_surface_is_as_pinned() -> None:
    assert list(surface()) == PINNED.read_text(encoding="utf-8").splitlines(), "meant? then run: python tests/test_surface.py"


if __name__ == "__main__":
    PINNED.write_text("".join(f"{line}\n" for line in surface()), encoding="utf-8")
