"""Check before a run begins whether its disk has room for the files that the run writes in any case."""

from pathlib import Path

from adapt_pruner.checkpoint.save import SHARD_BYTES
from adapt_pruner.core.system.files import check_disk_space, files_in
from adapt_pruner.run.checkpoints import kept
from adapt_pruner.work import Work

__all__ = ["check_result", "check_run"]

_FLOAT = 4  # bytes of a number in a checkpoint


def check_result(work: Work, path: Path) -> None:
    """Refuse a place without room for the resulting model.

    Raises:
        UsageError: there is too little room.
    """
    num_bytes = _result(work)
    check_disk_space(path, num_bytes, largest=min(num_bytes, SHARD_BYTES))


def check_run(work: Work, path: Path, checkpoints: Path) -> None:
    """Refuse a run's folder without room for the result and for all checkpoints that exist at the same time.

    Each stage writes a checkpoint after its cuts if it trains, and one at its end unless it is the last. As many stay as the
    recipe keeps, and one more while the next is written. Checkpoints that lie in the folder already make room for new ones.

    Raises:
        UsageError: there is too little room.
    """
    recipe, state = work.recipe, work.state
    trains = work.data.feed is not None
    with_moments = trains and recipe.training.lora is None
    sizes, largest = [], _result(work)
    for stage in work.stages[state.stage - 1 :]:
        weights = _FLOAT * min(stage.params, work.num_params)
        if trains and not (state.pruned and stage.stage == state.stage):
            carried = with_moments and stage.stage > 1 and recipe.moments == "carry"
            sizes.append(weights * (3 if carried else 1))
        if stage.stage < recipe.stages:
            sizes.append(weights * (3 if with_moments else 1))
            largest = max(largest, 2 * weights if with_moments else weights)
    keep = kept(recipe)
    most = max(sum(together) for together in ([*sizes[-keep:], _result(work)], *_windows(sizes, keep + 1)))
    there = sum(file.stat().st_size for file in files_in(checkpoints).values())
    check_disk_space(path, most, largest=min(largest, SHARD_BYTES) if not with_moments else largest, there=there)


def _result(work: Work) -> int:
    return min(work.budget.keep, work.num_params) * work.loaded.dtype.itemsize


def _windows(sizes: list[int], length: int) -> list[list[int]]:
    """All groups of `length` neighbours; the first groups are shorter."""
    return [sizes[max(0, end - length) : end] for end in range(1, len(sizes) + 1)]
