"""Plain figures: strict JSON, which has no NaN and no infinity, and the one figure that overflows."""

import json
import math
from typing import Any

__all__ = ["perplexity_of", "to_json"]


def perplexity_of(nll: float) -> float:
    """exp of a mean loss in nats a token; infinity where that is no float."""
    return math.exp(nll) if nll < 700 else math.inf


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Plain data as strict JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
