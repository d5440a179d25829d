"""Where a run stands: with weights, moments and text, everything that decides what it does next."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from adapt_pruner.choose.allocate import Debt
from adapt_pruner.core.axes import Mask
from adapt_pruner.train.loop import Progress

__all__ = ["Position"]


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        debt: what the chooser carries.
        stage: the stage it is in, from 1.
        pruned: whether that stage's cuts are done, and what is left of it is training.
        progress: of training, over all stages; the row it names is the position in the text.
        mask: what has stayed, against the model at the start of the run.
        figures: measured so far.
        history: a note on every iteration of pruning.
        spent: seconds by phase.

    The text needs no more than its row, calibration no more than the number of the iteration, and random numbers no
    more than the step: all three are functions of those and the seed.
    """

    debt: Debt
    stage: int = 1
    pruned: bool = False
    progress: Progress = field(default_factory=Progress)
    mask: Mask = field(default_factory=Mask)
    figures: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    spent: dict[str, float] = field(
        default_factory=lambda: {"score": 0.0, "cut": 0.0, "train": 0.0, "save": 0.0, "evaluate": 0.0}
    )

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add what passes meanwhile to the seconds of a phase, in place."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[phase] += time.perf_counter() - began

    def to_json(self) -> dict[str, Any]:
        """As plain data; floats come back as they were."""
        return {
            "stage": self.stage, "pruned": self.pruned, "progress": asdict(self.progress), "mask": self.mask.to_json(),
            "debt": {"start": dict(self.debt.start), "sparsity": dict(self.debt.sparsity)},
            "figures": self.figures, "history": self.history, "spent": self.spent,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Position":
        """What `to_json` wrote; other keys are not looked at."""
        progress = dict(data["progress"])
        progress["lowest"] = float("inf") if progress["lowest"] is None else progress["lowest"]
        return cls(
            Debt(**data["debt"]), data["stage"], data["pruned"], Progress(**progress), Mask.from_json(data["mask"]),
            data["figures"], data["history"], data["spent"],
        )  # fmt: skip
