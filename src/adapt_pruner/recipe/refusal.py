"""Why a recipe was refused, as a sentence."""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from adapt_pruner.errors import nearest

__all__ = ["sentence"]

_LONGEST_SHOWN = 200  # characters


def sentence(error: ValidationError, recipe: type[BaseModel]) -> str:
    """What is wrong with a recipe, in one sentence: its key, its value and the limit, or the key that was meant."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        model = _model_at(recipe, first["loc"][:-1])
        return f"recipe key {key!r} is not known; {nearest(str(first['loc'][-1]), model.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return message if key.rpartition(".")[2] in message else f"recipe key {key!r}: {message}"
    return f"recipe key {key!r} is {_shown(first['input'])}: {message[0].lower() + message[1:]}"


def _shown(value: Any) -> str:
    """A value as a sentence shows it, shortened if it is long."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # a number of many thousand digits, a list in lists in lists
        return f"a {type(value).__name__} that is too long to show"
    return written if len(written) <= _LONGEST_SHOWN else f"{written[:_LONGEST_SHOWN]}…"


def _model_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    for key in path:
        annotation = model.model_fields[str(key)].annotation
        for kind in get_args(annotation) or (annotation,):  # a table may be optional
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return model
