"""How the scores of what went and of what stayed lie about the cut line: counts that fit in a line of the log."""

from collections.abc import Iterable
from typing import Any

import torch

from adapt_pruner.core.axes import Axis, Mask, Scores

__all__ = ["QUARTER_OCTAVES", "cut_line"]

QUARTER_OCTAVES = 64
"""Bins of `cut_line`; the middle one begins at the cut line, and the ends take in what lies beyond."""


def cut_line(axes: Iterable[Axis], scores: Scores, mask: Mask) -> dict[str, dict[str, list[int]]]:
    """Entries by their score over that of the lowest entry that stays, of each kind of axis.

    Scores compare within a block of an axis only; as shares of the block's own cut line they can be counted together. Bin i
    holds the scores s with floor(4 log2(s / line)) = i - 32, `line` being the lowest score that stays; 0 lies in bin 0.

    Args:
        axes: those that `mask` is of.
        scores: what it was chosen by, axis name -> float32 [axis.entries].
        mask: what stays.

    Returns:
        kind -> `kept` and `removed`, `QUARTER_OCTAVES` counts each, as plain data. A block that loses nothing has no line, nor
        has one whose lowest score that stays is not above 0: they are not counted, nor is a kind that has no others.
    """
    by_kind: dict[str, dict[str, Any]] = {}
    for axis in axes:
        if axis.name not in mask or axis.name not in scores:
            continue
        score, keep = scores[axis.name].view(axis.blocks, -1), mask[axis.name].view(axis.blocks, -1)
        line = score.masked_fill(~keep, torch.inf).amin(dim=1, keepdim=True)
        counted = ((line > 0) & torch.isfinite(line) & ~keep.all(dim=1, keepdim=True)).expand_as(keep)
        bins = (4 * (score.clamp(min=0) / line).log2()).floor().clamp(-QUARTER_OCTAVES // 2, QUARTER_OCTAVES // 2 - 1)
        for which, chosen in (("kept", keep & counted), ("removed", ~keep & counted)):
            counts = torch.bincount(bins[chosen].long() + QUARTER_OCTAVES // 2, minlength=QUARTER_OCTAVES)
            kind = by_kind.setdefault(axis.kind, {})
            kind[which] = kind.get(which, 0) + counts
    return {
        kind: {which: counts.tolist() for which, counts in both.items()}
        for kind, both in by_kind.items()
        if bool(both["removed"].any())
    }
