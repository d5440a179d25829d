"""What models are measured on, and how; knows no torch, so that a wrong option is refused at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from adapt_pruner.errors import UsageError, nearest, option
from adapt_pruner.recipe import check_precision

Place = Literal["auto", "none", "cpu", "disk"]
WINDOW = 512
"""Tokens in an evaluation window, unless the user gives another number."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What models are measured on, and how.

    Attributes:
        text: SPEC of the text for perplexity and speed; None measures neither.
        window: tokens in an evaluation window; None for `WINDOW`.
        max_windows: the most windows that are read; None for all.
        chat: number of our prompts that the models are asked, whose answers a rule checks; None asks none.
        tasks: names of tasks, with commas; None scores none.
        num_fewshot: examples before each item; None for what the task says.
        limit: the most items of each task; None for all.
        task_dir: folder of lm-eval YAML files.
        cache_dir: folder that keeps scores; None for the usual one.
        device: as in a recipe.
        dtype: precision of the matrix products.
        offload: where weights lie while no pass needs them, as in a recipe; of experts on disk only those that a router chooses are read.
        trust_remote_code: whether Python code may run that comes with a model, a task folder, or a task that lm-eval marks as unsafe.
    """

    text: str | None = None
    window: int | None = None
    max_windows: int | None = None
    chat: int | None = None
    tasks: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    task_dir: Path | None = None
    cache_dir: Path | None = None
    device: str
    dtype: str
    offload: str = "auto"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse options without what they apply to.

        Raises:
            UsageError: neither text, tasks nor chat are given, an option applies to the one that is not, or there is no such number format.
        """
        if self.text is None and self.tasks is None and self.chat is None:
            raise UsageError(
                f"nothing to measure; give {option('text')} for perplexity, {option('chat')} for answers, {option('tasks')} for scores, or "
                "several of them"
            )
        check_precision(self.dtype)
        if self.offload not in (places := get_args(Place)):
            raise UsageError(f"{option('offload')} {self.offload!r} is not known; {nearest(self.offload, places)}")
        for subject, options, what in (
            (self.tasks, ("num_fewshot", "limit", "task_dir", "cache_dir"), f"tasks; name them with {option('tasks')}"),
            (self.text, ("window", "max_windows"), f"a text; name it with {option('text')}"),
        ):
            idle = [name for name in options if subject is None and getattr(self, name) is not None]
            if idle:
                raise UsageError(f"{option(idle[0])} applies only to {what}")
