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
    """What models are measured on, and how: the options of `api.measuring.evaluate`; None leaves out, or takes the default."""

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
