"""`TextTask`: what a run asks of a task beyond scoring and training: how text becomes batches."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from adapt_pruner.core.model.task import Task
from adapt_pruner.data.fixed import Rows
from adapt_pruner.data.sources import Source


class TextTask(Task, Protocol):
    """What a model learns: a class with `@part("task")`, one per file of `data/`. A recipe names it by its file.

    A recipe may name texts that the model writes before the run. Then `calibration`, `rows` and `held_out` get them as `written`, SPEC ->
    `data.store.Store`; a task that takes no such texts has no argument of that name.

    A batch is a tensor whose first dimension counts samples. Only the task knows what its numbers mean.

    Attributes:
        writes_text: whether the model can write text of this task itself (`calibration.source: self`).
    """

    writes_text: bool

    def calibration(
        self,
        model: Any,
        tokenizer: Any,
        *,
        source: Source,
        samples: int,
        length: int,
        ids: str | None,
        seed: int,
        dtype: str,
        on_tokens: Callable[[int, int], None],
    ) -> Callable[[int], list[Tensor]]:
        """A function from the number of an iteration to its batches; see `data.windows.calibration_feed`."""

    def rows(
        self,
        tokenizer: Any,
        source: Source,
        *,
        length: int,
        tokens: int,
        seed: int,
        repeat: bool,
        warn: Callable[[str], None],
        moving: bool = False,
        expected: int | None = None,
    ) -> Rows:
        """All rows of a run's training; see `data.fixed.training_rows`.

        Args:
            moving: the feed changes the shares of a mixture, so take also rows that it may read then.
            expected: tokens that will be read if `minutes` end the run before; a warning of repeats counts these. None: all.
        """

    def held_out(self, tokenizer: Any, *, source: Source, window: int, max_windows: int | None) -> dict[str, list[Tensor]]:
        """The batches that the model is measured on, by the SPEC of their text; see `data.windows.held_out_by_text`."""

    def num_bytes(self, tokenizer: Any, batches: Sequence[Tensor]) -> int | None:
        """Bytes of the predicted text; None if a loss per byte would mean nothing."""
