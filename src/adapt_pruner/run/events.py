"""Which lines of a log are events: JSON objects of a kind, with what the page needs of that kind, in the form that it needs."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

__all__ = ["event_of", "is_count", "is_number", "number_of"]

_MOST = 10**15  # of whatever is counted, and of seconds since 1970


def event_of(line: str | bytes) -> dict[str, Any] | None:
    """The event in a line of a log; None where it is none, lacks what its kind has, or has it in another form."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str) or not _OPTIONAL(event.get("time")):
        return None
    forms = _KINDS.get(event["event"], {})
    return event if all(fits(event.get(key)) for key, fits in forms.items()) else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that a float can hold; NaN, infinity and truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number_of(value: object) -> float | None:
    """A number; None for what is none, NaN and infinity among it."""
    return float(value) if is_number(value) else None


def is_count(value: object) -> bool:
    """Whether it is a number from 0 on, and small enough to count something."""
    return is_number(value) and 0 <= value < _MOST


def _is_size(value: object) -> bool:
    return isinstance(value, int) and is_count(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _maybe(form: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or form(value)


def _list_of(form: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(form, value))


def _dict_of(form: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(form, value.values()))


def _with(**forms: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(fits(value.get(key)) for key, fits in forms.items())


_OPTIONAL = _maybe(is_count)
_FIGURE = _maybe(is_number)
_SIZES = _maybe(_dict_of(_is_size))
_LAYERS = _maybe(_list_of(is_count))
_SCORE = _with(
    task=_is_text, metric=_is_text, value=is_number, stderr=_FIGURE, accuracy=_is_truth, items=is_count, chance=_FIGURE, shots=is_count,
)  # fmt: skip

_KINDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "start": {
        "params": _OPTIONAL, "now": _OPTIONAL, "target": _OPTIONAL, "dense": _maybe(_is_truth), "began": _SIZES, "sizes": _SIZES,
        "layers_left": _LAYERS,
    },
    "cut": {
        "params": is_count, "read": _OPTIONAL, "stage": _OPTIONAL, "iteration": _OPTIONAL, "target": _OPTIONAL, "loss": _FIGURE, "sizes": _SIZES,
        "layers_left": _LAYERS, "distances": _maybe(_list_of(_FIGURE)),
        "scores": _maybe(_dict_of(_with(kept=_LAYERS, removed=_LAYERS))),
    },
    "step": {
        "tokens": is_count, "stage": _OPTIONAL, "loss": _FIGURE, "lr": _FIGURE, "tokens_per_second": _FIGURE, "peak_bytes": _OPTIONAL,
    },
    "evaluation": {
        "stage": is_count, "perplexity": _FIGURE, "bits_per_byte": _FIGURE, "tokens": _OPTIONAL, "seconds": _OPTIONAL,
        "tokens_per_second": _FIGURE, "params": _OPTIONAL,
    },
    "tasks": {"stage": is_count, "scores": _list_of(_SCORE), "average": _FIGURE, "stderr": _FIGURE},
}  # fmt: skip
