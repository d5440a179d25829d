"""Which checkpoints a run has, by their names.

stage-K-cut-N    within the cuts of stage K, after the run's cut N; with -search-M after round M of the search for the next cut,
                 with -step-M after step M of training between cuts
stage-K-pruned   after the cuts of stage K
stage-K-step-N   within the training of stage K, after the run's step N
stage-K          after stage K
"""

import re
from pathlib import Path

from adapt_pruner.recipe import Recipe

_NAME = re.compile(r"stage-(\d+)(?:-cut-(\d+)(?:-(?:search|step)-(\d+))?|-(pruned)|-step-(\d+))?")


def called(
    stage: int, *, cut: int | None = None, search: int | None = None, step: int | None = None, pruned: bool = False
) -> str:
    """The name of a checkpoint at a place in a run; see the top of this file."""
    parts = {"cut": cut, "search": search, "step": step}
    within = [f"{what}-{number}" for what, number in parts.items() if number is not None]
    return "-".join([f"stage-{stage}", *within, *(["pruned"] if pruned else [])])


def of_stage(name: str) -> str:
    """The name of the checkpoint after the stage that another lies in."""
    return re.sub(r"(stage-\d+).*", r"\1", name)


def kept(recipe: Recipe) -> int:
    """The number of checkpoints that stay on disk while a run works."""
    return recipe.keep_checkpoints or 2


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, in the order in which the run writes them, the last first."""
    checkpoints = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            stage, cut, after, pruned, step = match.groups()
            phases = (cut, pruned, step, True)  # in the order of a stage; the last is its end
            phase = next(number for number, is_in in enumerate(phases) if is_in)
            checkpoints.append((int(stage), phase, int(cut or step or 0), int(after or 0), path))
    return [path for *_, path in sorted(checkpoints, reverse=True)]
