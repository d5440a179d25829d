"""Turn the arguments of Python callers into the form that the rest of the package takes; wrong ones are refused in a sentence."""

import copy
import functools
import importlib
import inspect
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, Protocol, TypeVar, get_args, runtime_checkable

from pydantic import ConfigDict, TypeAdapter, ValidationError

from adapt_pruner.core.events import Event, Warned
from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.errors import UsageError, spelled_for_python

if TYPE_CHECKING:
    import torch


Listener = Callable[[dict[str, Any]], None]
"""A function of the user that is told of every event, as plain data."""


@dataclass(frozen=True)
class Takes:
    """What an argument takes, beside its type. Python callers and the command line are held to it alike.

    Attributes:
        words: the end of a sentence that refuses another value: "give …".
        metavar: what stands for the value in --help.
        option: the type of its option.
        least: the smallest number.
        most: the largest number.
    """

    words: str
    metavar: str | None = None
    option: Any = str
    least: int | None = None
    most: int | None = None


@runtime_checkable
class Saved(Protocol):
    """Something that lies in a folder, such as a result of `prune`."""

    @property
    def path(self) -> Path: ...  # noqa: D102


Name = str | Path
"""A folder, .gguf file, hub id or packaged model."""
Model = Name | Saved | Any
"""A name, something saved, or a model of transformers with its tokenizer."""
Place = Annotated[str | Path, Takes("a path, as str or Path", "PATH", Path)]
Count = Annotated[int, Takes("a whole number of at least 1", None, int, least=1)]
Window = Annotated[int, Takes("a whole number of at least 2", None, int, least=2)]
Size = Annotated[str | int, Takes('a share such as "80%", or a number of parameters such as "110M" or 110_000_000')]
Spec = Annotated[str | Path, Takes("one text, as str or Path: a file, a folder, a glob, or python-docs:heldout", "SPEC")]
"""One text: a file, a folder, a glob, hub:NAME, … (docs/data.md)."""
Text = Annotated[
    str | Path | Sequence[str | Path] | Mapping[str, float],
    Takes("a file, a folder or another text as str or Path, a list of them, or {text: weight}", "SPEC"),
]
"""One text, several in equal shares, or several with their weights."""
Settings = Annotated[Mapping[str, Any], Takes('a dict such as {"training.lr": 1e-4}')]
"""Further keys of a recipe."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_PACKAGE = Path(__file__).parents[1]
_SHOWN = 60  # the most characters of a value in a sentence


class Keeper:
    """A temporary folder that lives as long as this object."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="adapt-pruner-")
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


def placed(output: str | Path | None, name: str = "run") -> tuple[Keeper | None, Path]:
    """The path of the result, and the keeper of a temporary folder if it lies in one.

    Raises:
        UsageError: it is missing although several processes work together.
    """
    if output is not None:
        return None, expanded(output)
    from adapt_pruner.core.system import world

    if world.size() > 1:
        raise UsageError("several processes work together and need one shared folder; give output=")
    temporary = Keeper()
    return temporary, Path(temporary.name) / name


def takes_of(annotation: Any) -> Takes | None:
    """What an argument with this annotation takes; None if the annotation does not say."""
    kinds = (annotation, *get_args(annotation))  # of `Size | None` it is said in Size
    return next((takes for kind in kinds for takes in getattr(kind, "__metadata__", ()) if isinstance(takes, Takes)), None)


def _check(name: str, value: Any, annotation: Any) -> None:
    takes = takes_of(annotation)
    if takes is None:
        return
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise _refused(name, max(error.errors(), key=lambda each: len(each["loc"]))["input"], takes.words) from None
    if value is None:
        return
    if takes.least is not None and value < takes.least:
        raise UsageError(f"{name} {value} is too small; give {takes.words}")
    if takes.most is not None and value > takes.most:
        raise UsageError(f"{name} {value} is too large; give {takes.words}")


def in_python(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check a function's arguments by their annotations, and let its errors name them and no options: `params="80%"`, not `--params 80%`.

    The command line calls the function inside (`inspect.unwrap`): its parser has checked the same annotations.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        _import_tqdm()
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(name, value, signature.parameters[name].annotation)
        with spelled_for_python():
            return function(*args, **kwargs)

    return checked


@functools.cache
def _import_tqdm() -> None:
    """Import what transformers imports, without its request for notebook widgets, which nothing here needs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        importlib.import_module("tqdm.auto")


def _refused(name: str, value: Any, words: str) -> UsageError:
    return UsageError(f"{name} {_shown(value)} is {_a(value)}; give {words}")


def _shown(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= _SHOWN and "\n" not in written else f"{written.partition(chr(10))[0][:_SHOWN]}…"


def _a(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def as_overrides(settings: Mapping[str, Any] | list[str] | None) -> list[str]:
    """Further keys of a recipe, in the form of `--set`; those of the command line have it already."""
    if isinstance(settings, list):
        return settings
    return [f"{key}={to_json(_as_data(key, value))}" for key, value in (settings or {}).items()]


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
    if not isinstance(value, str | int | float | None):
        raise _refused(f"settings[{key!r}]", value, "text, a number, true or false, a list or a table")
    return value


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

    from adapt_pruner.core.system import world
    from adapt_pruner.report.screen import screen

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with screen(quiet=not (progress and world.is_main())) as shown:

            def tell(event: Event) -> None:
                if progress:
                    shown(event)
                elif listen is None and isinstance(event, Warned):
                    warnings.warn(event.message, stacklevel=_outside())
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
    in_memory = hasattr(model, "config") and hasattr(model, "save_pretrained")
    if not in_memory and isinstance(model, str | Path | Saved):
        if tokenizer is not None:
            raise UsageError(f"tokenizer belongs to a model in memory, and {_shown(model)} has its own; leave tokenizer out")
        yield str(model.path) if isinstance(model, Saved) else str(model)
        return
    if not in_memory:
        raise _refused(
            "model", model, "a folder, a .gguf file, a hub id or a packaged model as str or Path, a result, or a model of "
            "transformers with tokenizer="
        )  # fmt: skip
    from adapt_pruner import families
    from adapt_pruner.checkpoint.save import save, save_unchecked

    dtype = _check_in_memory(model, tokenizer, any_family=any_family)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as place:
        folder = Path(place) / (Path(str(getattr(model.config, "_name_or_path", "") or "")).name or "model")
        twin: Any = copy.copy(model)  # because saving changes config and generation_config
        twin.config = copy.deepcopy(model.config)
        twin.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        if families.is_known(model.config):
            save(twin, tokenizer, folder, dtype=dtype)
        else:
            save_unchecked(twin, folder)
            tokenizer.save_pretrained(folder)
        yield str(folder)


def _check_in_memory(model: Any, tokenizer: Any, *, any_family: bool) -> "torch.dtype":
    """Refuse a model in memory that would not survive saving and loading; returns a number format that holds all its weights.

    Raises:
        UsageError: the model is refused.
    """
    import torch

    from adapt_pruner import families

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
    formats = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    dtype: torch.dtype = functools.reduce(torch.promote_types, formats)
    return dtype
