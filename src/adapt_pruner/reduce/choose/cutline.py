"""How far the scores of removed and kept entries lie from the cut line, as counts that fit in a line of the log."""

from collections.abc import Iterable
from typing import Any

import torch

from adapt_pruner.core.model.axes import Axis, Mask, Scores

QUARTER_OCTAVES = 64
"""Number of bins of `cut_line`. The middle bin begins at the cut line; the first and last also take everything beyond."""


def cut_line(axes: Iterable[Axis], scores: Scores, mask: Mask) -> dict[str, dict[str, list[int]]]:
    """Count entries of each kind of axis by their score relative to the lowest score that stays.

    Scores compare within a group of an axis only. Divided by the cut line of their group, they can be counted together. Bin i
    holds the scores s with floor(4 log2(s / line)) = i - 32, where `line` is the lowest score that stays; a score of 0 goes to
    bin 0.

    Args:
        axes: the axes of `mask`.
        scores: the scores that the mask was chosen by, axis name -> float32 [axis.entries].
        mask: what stays.

    Returns:
        kind -> `kept` and `removed`, each a list of `QUARTER_OCTAVES` counts, as plain data. A group is not counted if it loses
        nothing or if its lowest score that stays is not above 0. A kind without counted groups is left out.
    """
    by_kind: dict[str, dict[str, Any]] = {}
    for axis in axes:
        if axis.name not in mask or axis.name not in scores:
            continue
        score, keep = scores[axis.name].view(axis.groups, -1), mask[axis.name].view(axis.groups, -1)
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
