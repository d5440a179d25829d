"""How a run's training tokens are divided among its stages, and how people write that. Needs no torch."""

import math
import re
from collections.abc import Sequence

from adapt_pruner.errors import UsageError

_RULES = ("linear", "constant", "cosine")

Shards = str | tuple[float, ...]
"""`linear`, `constant`, `cosine`, `last=SHARE`, or a share for each stage, in any unit."""


def checked_shards(written: object) -> Shards:
    """Shards as people write them, in the spelling that `stage_tokens` reads.

    Raises:
        UsageError: they are none.
    """
    if isinstance(written, list | tuple):
        for share in written:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
                raise UsageError(
                    f"training.shards {list(written)} has a share of {share!r}; write numbers of 0 or more, the last above 0"
                )
        if not written or not written[-1]:
            raise UsageError(
                f"training.shards {list(written)} gives the last stage nothing; write numbers of 0 or more, the last above 0"
            )
        return tuple(written)
    if written in _RULES:
        return str(written)
    if isinstance(written, str) and (match := re.fullmatch(r"\s*last\s*=\s*(.*?)\s*", written)):
        share = float(match[1]) if re.fullmatch(r"\d*\.?\d+", match[1]) else 0.0
        if not 0 < share < 1:
            raise UsageError(f"training.shards {written!r} has no share; write a number above 0 and below 1, like last=0.8")
        return f"last={share:g}"
    raise UsageError(
        f"training.shards {written!r} is not known; write {', '.join(_RULES)}, last=0.8 for the share of the last stage, or a list with a "
        "share for each stage, like [5, 5, 5, 5, 80]"
    )


def stage_tokens(total: int, *, stages: int, shards: str | Sequence[float]) -> list[int]:
    """Tokens of each of T stages k; the last stage takes what rounding leaves.

        linear       2k / (T(T+1)) of the total
        constant     1 / T
        cosine       cos((k - 1)π / 2T) - cos(kπ / 2T)
        last=S       S for the last stage, and the rest in equal shares for the others
        numbers      in proportion to them

    Args:
        total: tokens of all stages.
        stages: T.
        shards: which of these, as `checked_shards` writes it; as many numbers as stages.

    Source: Adapt-Pruner, arXiv:2502.03460, the released `seperate_strategy`; `last` and numbers are ours.
    """
    t = stages
    if shards == "linear":
        shares = [2 * k / (t * (t + 1)) for k in range(1, t + 1)]
    elif shards == "constant":
        shares = [1 / t] * t
    elif shards == "cosine":
        shares = [math.cos((k - 1) * math.pi / (2 * t)) - math.cos(k * math.pi / (2 * t)) for k in range(1, t + 1)]
    elif isinstance(shards, str):
        last = float(shards.removeprefix("last="))
        shares = [(1 - last) / max(1, t - 1)] * (t - 1) + [last]
    else:
        shares = [share / sum(shards) for share in shards]
    tokens = [int(round(total * share, 6)) for share in shares]
    return tokens[:-1] + [total - sum(tokens[:-1])]
