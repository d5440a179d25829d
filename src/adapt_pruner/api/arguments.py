"""Turn the arguments of Python callers into the form that the rest of the package takes; wrong ones are refused in a sentence."""

import copy
import functools
import inspect
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from adapt_pruner import families
from adapt_pruner.checkpoint.save import save, save_unchecked
from adapt_pruner.core.events import Event, Warned
from adapt_pruner.core.system import world
from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.core.system.strict_yaml import value_of
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.report.screen import screen

__all__ = [
    "Keeper", "Listener", "Name", "Saved", "Spec", "Text", "as_count", "as_overrides", "as_place", "as_size", "as_source", "as_spec", "as_words", "heard", "in_python",
    "named", "of_kind",
]  # fmt: skip

Name = str | Path
"""A folder, .gguf file, hub id or packaged model."""
Spec = str | Path
"""One text: a file, a folder, a glob, hub:NAME, … (docs/data.md)."""
Text = Spec | Sequence[Spec] | Mapping[str, float]
"""One text, several in equal shares, or several with their weights."""
Listener = Callable[[dict[str, Any]], None]
"""A function of the user that is told of every event, as plain data."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)(?: ([^\s;()]+))?")
_ANY_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
_PACKAGE = Path(families.__file__).parents[1]
_SHOWN = 60  # the most characters of a value in a sentence


@runtime_checkable
class Saved(Protocol):
    """Something that lies in a folder, such as a result of `prune`."""

    @property
    def path(self) -> Path: ...  # noqa: D102


class Keeper:
    """A temporary folder that lives as long as this object."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="adapt-pruner-")
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


def in_python(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function's errors name its arguments instead of options: `--params 80%` becomes `params="80%"`."""
    given = inspect.signature(function).parameters
    names = {f"--{name.replace('_', '-')}": name for name in given}
    if "calibration" not in given:
        names["--calibration"] = "text"
    flags = {name for name, one in given.items() if one.default is False}

    @functools.wraps(function)
    def spoken(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (UsageError, RunError) as error:
            error.args = (_respelled(str(error), names, flags),)
            raise

    return spoken


def _respelled(sentence: str, names: Mapping[str, str], flags: set[str]) -> str:
    def one(found: re.Match[str]) -> str:
        option, behind = found[1], found[2] or ""
        value = behind.rstrip(".,:")
        rest = behind[len(value) :]
        if not re.search(r"[A-Z\d%=]", value):  # not a value but the next word of the sentence
            value, rest = "", behind
        after = f" {rest}" if rest and not value else rest
        if option == "--set":
            key, equals, written = value.partition("=")
            return ("settings" if not equals else f"settings={{{_quoted(key)}: {_literal(written)}}}") + after
        if option not in names:
            return found[0]
        name = names[option]
        if name in flags:
            return f"{name}=True" + (f" {behind}" if behind else "")
        return (f"{name}={_literal(value)}" if value else name) + after

    parts = re.split(r"(`[^`]*`)", sentence)  # commands of a shell stay as they are
    return "".join(part if part.startswith("`") else _OPTION.sub(one, part) for part in parts)


def _quoted(value: str) -> str:
    return f'"{value}"'


def _literal(written: str) -> str:
    try:
        value = value_of(written, "a value")
    except ValueError:
        value = written
    return _quoted(value) if isinstance(value, str) else repr(value)


def of_kind(name: str, value: Any, kinds: type | tuple[type, ...], remedy: str) -> Any:
    """The value, if it is of one of these kinds.

    Raises:
        UsageError: it is of another kind; the sentence names the value, its type and the remedy.
    """
    if isinstance(value, kinds) and (not isinstance(value, bool) or bool in (kinds if isinstance(kinds, tuple) else (kinds,))):
        return value
    raise UsageError(f"{name} {_shown(value)} is {_a(value)}; give {remedy}")


def _shown(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= _SHOWN and "\n" not in written else f"{written.partition(chr(10))[0][:_SHOWN]}…"


def _a(value: Any) -> str:
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def as_place(name: str, value: Any) -> Path:
    """The path of a folder or file to be written."""
    return expanded(of_kind(name, value, (str, Path), "a path, as str or Path"))


def as_size(name: str, value: Any) -> str:
    """A number of parameters, or a share of them, in the form of the command line."""
    return str(of_kind(name, value, (str, int), 'a share such as "80%", or a number of parameters such as "110M" or 110_000_000'))


def as_count(name: str, value: Any) -> str:
    """A count, in the form of the command line."""
    return str(of_kind(name, value, (str, int), 'a number such as 2_000_000 or "2M"'))


def as_words(name: str, value: Any, one: Callable[[str, Any], str]) -> tuple[str, ...]:
    """One value or several; a string may hold several, separated by commas."""
    several = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(one(name, each) for each in several)


def as_spec(name: str, value: Any) -> str:
    """One text."""
    return str(of_kind(name, value, (str, Path), "one text, as str or Path: a file, a folder, a glob, or python-docs:heldout"))


def as_source(name: str, value: Any) -> str | dict[str, float]:
    """One text, or several with the weight of each."""
    if isinstance(value, Mapping):
        return {as_spec(name, spec): weight for spec, weight in value.items()}
    if isinstance(value, list | tuple):
        return {as_spec(name, spec): 1.0 for spec in value}
    return str(
        of_kind(name, value, (str, Path), "a file, a folder or another text as str or Path, a list of them, or {text: weight}")
    )


def as_overrides(settings: Any) -> list[str]:
    """Further keys of a recipe, in the form of `--set`."""
    given = of_kind("settings", {} if settings is None else settings, Mapping, 'a dict such as {"training.lr": 1e-4}')
    return [
        f"{of_kind('the key', key, str, 'a key of a recipe as text')}={to_json(_as_data(key, value))}"
        for key, value in given.items()
    ]


def _as_data(key: str, value: Any) -> Any:
    """A value of a recipe as plain data; paths become text, and numbers of numpy Python's."""
    if isinstance(value, Mapping):
        return {str(name) if isinstance(name, Path) else name: _as_data(key, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_data(key, inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str | int | float | None) and callable(item := getattr(value, "item", None)):
        value = item()
    return of_kind(
        f"settings[{key!r}]", value, (str, int, float, bool, type(None)), "text, a number, true or false, a list or a table"
    )


def _as_argument(found: re.Match[str]) -> str:
    return found[1].replace("-", "_")


def _outside() -> int:
    """The number of frames between the caller and the user's code, to which a warning should point."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def heard(listen: Listener | None, *, progress: bool) -> Iterator[Callable[[Event], None]]:
    """A listener that shows progress, or turns warnings into Python's, and tells `listen`; transformers is quiet meanwhile."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with screen(quiet=not (progress and world.is_main())) as shown:

            def tell(event: Event) -> None:
                if progress:
                    shown(event)
                elif listen is None and isinstance(event, Warned):
                    warnings.warn(_ANY_OPTION.sub(_as_argument, event.message), stacklevel=_outside())
                if listen is not None:
                    listen(event.to_dict())

            yield tell
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def named(model: Any, tokenizer: Any = None, *, any_family: bool = False) -> Iterator[str]:
    """The name of a model; a model in memory is written to a temporary folder that lasts until the end of the context.

    Args:
        model: a name, something saved, or a model of transformers, which is left as it is.
        tokenizer: needed only for a model in memory.
        any_family: whether a model in memory may be of no known family.

    Raises:
        UsageError: it is none of these, or a model in memory lacks its tokenizer or cannot be written as it is.
    """
    if isinstance(model, str | Path) or (isinstance(model, Saved) and not isinstance(model, nn.Module)):
        if tokenizer is not None:
            raise UsageError(f"tokenizer belongs to a model in memory, and {_shown(model)} has its own; leave tokenizer out")
        yield str(model.path) if isinstance(model, Saved) else str(model)
        return
    if not (isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "save_pretrained")):
        raise UsageError(
            f"model {_shown(model)} is {_a(model)}; give a folder, a .gguf file, a hub id or a packaged model as str or Path, a result, or a model of "
            "transformers with tokenizer="
        )
    dtype = _check_in_memory(model, tokenizer, any_family=any_family)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as place:
        called = Path(str(getattr(model.config, "_name_or_path", "") or "")).name or "model"
        folder = Path(place) / called
        twin: Any = copy.copy(model)  # because saving changes config and generation_config
        twin.config, twin.generation_config = (
            copy.deepcopy(model.config),
            copy.deepcopy(getattr(model, "generation_config", None)),
        )
        if families.is_known(model.config):
            save(twin, tokenizer, folder, dtype=dtype)
        else:
            save_unchecked(twin, folder)
            tokenizer.save_pretrained(folder)
        yield str(folder)


def _check_in_memory(model: Any, tokenizer: Any, *, any_family: bool) -> torch.dtype:
    """Refuse a model in memory that would not survive saving and loading; returns a number format that holds all its weights.

    Raises:
        UsageError: the model is refused.
    """
    kind = type(model).__name__
    if not (callable(tokenizer) and hasattr(tokenizer, "save_pretrained")):
        lacks = "without its tokenizer" if tokenizer is None else f"with {_a(tokenizer)} as tokenizer"
        raise UsageError(
            f"model is a {kind} {lacks}; give tokenizer=AutoTokenizer.from_pretrained(…), or the model's name instead of the model"
        )
    if hasattr(model, "peft_config"):
        raise UsageError(
            f"model is a {kind}, with an adapter beside its weights; merge it first: model = model.merge_and_unload()"
        )
    if getattr(model.config, "quantization_config", None):
        raise UsageError(
            f"model is a quantised {kind}, and only unquantised weights can be used; load the model it was made from"
        )
    if not (any_family or families.is_known(model.config)):
        raise UsageError(f"model is a {kind} that cannot be pruned: {families.why_unknown(model.config)}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError(f"model is a {kind} with weights on the device meta, which stores no values; load it on a real device")
    formats: list[torch.dtype] = [one.dtype for one in model.parameters() if one.is_floating_point()]
    return functools.reduce(torch.promote_types, formats)
