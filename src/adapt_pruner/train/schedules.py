"""The learning rate over the whole run, all stages together, as a share of the peak: progress in [0, 1] → [0, 1]."""

import math

from adapt_pruner.core.system.parts import part


@part("schedule")
def wsd(progress: float, *, warmup: float, decay: float, floor: float) -> float:
    """Warm-up, stable, decay: linear up over the first `warmup`, constant, linear down to `floor` over the last `decay`.

    Args:
        progress: tokens seen by all stages so far / tokens of all stages.
        warmup: share of the run spent rising from 0 (0.05 in the authors' scripts).
        decay: share of the run spent falling (0.10 in the authors' scripts).
        floor: the rate at the end, as a share of the peak.

    Source: Adapt-Pruner, arXiv:2502.03460, the released schedule.
    """
    if progress < warmup:
        return progress / warmup
    if progress > 1 - decay:
        return 1 - (1 - floor) * (progress - (1 - decay)) / decay
    return 1.0


@part("schedule")
def cosine(progress: float, *, warmup: float, floor: float) -> float:
    """Linear warm-up, then half a cosine down to `floor` at the end of the run.

    Args:
        progress: tokens seen by all stages so far / tokens of all stages.
        warmup: share of the run spent rising from 0.
        floor: the rate at the end, as a share of the peak.

    Source: SGDR, arXiv:1608.03983, one cycle; the alternative in Adapt-Pruner's code.
    """
    if progress < warmup:
        return progress / warmup
    fallen = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, fallen))) / 2
