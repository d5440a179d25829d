"""Where a run stands: with weights, moments and text, everything that decides what it does next."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from adapt_pruner.core.axes import Axis, Mask
from adapt_pruner.core.memory import give_back
from adapt_pruner.data.rows import Rows, stage_spans
from adapt_pruner.reduce.allocate import Debt
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
        began: axis name -> units the model had when the run began.
        spent: seconds by phase, of all processes that have worked on the run one after another; phases do not overlap.

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
    began: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(
        default_factory=lambda: {
            "score": 0.0,
            "repair": 0.0,
            "cut": 0.0,
            "train": 0.0,
            "save": 0.0,
            "evaluate": 0.0,
            "other": 0.0,
        }
    )
    _phase: str | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Count what passes meanwhile to a phase, in place, not to the one around it, which goes on afterwards; its memory is given back."""
        around = self._turn_to(phase)
        try:
            yield
        finally:
            give_back()
            self._turn_to(around)

    @property
    def seconds(self) -> float:
        """Seconds of all phases together, up to now."""
        self._turn_to(self._phase)
        return sum(self.spent.values())

    def counted(self, batches: list[Tensor]) -> list[Tensor]:
        """These batches of calibration text, once their tokens are counted among the figures, in place."""
        self.figures["calibration_tokens"] = self.figures.get("calibration_tokens", 0) + sum(batch.numel() for batch in batches)
        return batches

    def _turn_to(self, phase: str | None) -> str | None:
        now, before = time.perf_counter(), self._phase
        if before is not None:
            self.spent[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def fit(self, axes: Sequence[Axis], rows: Rows | None) -> None:
        """Fit, in place, another recipe: axes that are new to it owe nothing, and the row comes after as many tokens."""
        none = Debt.none(axes)
        self.debt = Debt({**none.start, **self.debt.start}, {**none.sparsity, **self.debt.sparsity})
        if rows is not None:
            there = rows.num_tokens(0, len(rows))
            done = min(there, self.progress.tokens)
            self.progress.rows = stage_spans(rows, [done, there - done])[0].stop

    @property
    def layers_left(self) -> list[int] | None:
        """The numbers, in the model at the start, of the layers that are left; None where none has gone."""
        return self.mask["layers"].nonzero().flatten().tolist() if "layers" in self.mask else None

    def to_json(self) -> dict[str, Any]:
        """As plain data; floats come back as they were."""
        self._turn_to(self._phase)
        return {
            "stage": self.stage, "pruned": self.pruned, "progress": asdict(self.progress), "mask": self.mask.to_json(),
            "debt": {"start": dict(self.debt.start), "sparsity": dict(self.debt.sparsity)},
            "figures": self.figures, "history": self.history, "began": self.began,
            "spent": self.spent,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Position":
        """What `to_json` wrote; other keys are not looked at."""
        progress = dict(data["progress"])
        progress["lowest"] = float("inf") if progress["lowest"] is None else progress["lowest"]
        return cls(
            Debt(**data["debt"]), data["stage"], data["pruned"], Progress(**progress), Mask.from_json(data["mask"]),
            data["figures"], data["history"], data.get("began", {}), data["spent"],
        )  # fmt: skip
