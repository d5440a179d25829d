"""Plain figures: strict JSON, which has no NaN and no infinity, and the perplexity, which may overflow."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from adapt_pruner.core.system.files import read_plain, write_whole

_T = TypeVar("_T")

MOST = 10**15
"""Larger than anything that is counted, and than seconds since 1970."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that a float can hold; NaN, infinity, True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number_of(value: object) -> float | None:
    """The value as a number; None for anything else, including NaN and infinity."""
    return float(value) if is_number(value) else None


def is_count(value: object) -> bool:
    """Whether it is a number from 0 on that is small enough to count something."""
    return is_number(value) and 0 <= value < MOST


def perplexity_of(nll: float) -> float:
    """exp of a mean loss in nats per token; infinity if that overflows a float."""
    return math.exp(nll) if nll < 700 else math.inf


def of_json(text: str | bytes) -> Any:
    """The data in JSON text.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nests lists too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deeply") from error


def read_json(path: Path) -> Any:
    """The data in a JSON file.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: as `of_json`.
    """
    return of_json(read_plain(path).decode("utf-8"))


def remembered(path: Path, read: Callable[[Any], _T], make: Callable[[], Any]) -> tuple[_T, bool]:
    """What a file of the cache holds, or what is made now and kept there, if that can be written.

    Args:
        path: the file.
        read: turns its data into what is wanted; raises ValueError, KeyError or TypeError if the file is damaged or of another kind.
        make: makes the data.

    Returns:
        What is wanted, and whether it comes from the file.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        return read(read_json(path)), True
    data = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_json(data))
    return read(data), False


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Plain data as strict JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
