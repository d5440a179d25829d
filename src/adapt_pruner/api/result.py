"""The result of `prune`, `run` and `shrink`: a smaller model in a folder, with the figures of how it was made."""

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from adapt_pruner.api.arguments import Keeper, Spec, as_place, in_python
from adapt_pruner.api.exporting import export
from adapt_pruner.api.measuring import Evaluation, chat, evaluate
from adapt_pruner.checkpoint.load import Loaded, load, pick_device
from adapt_pruner.checkpoint.save import check_target, whole_or_nothing
from adapt_pruner.core.events import Event
from adapt_pruner.core.events.words import measured_text, millions, span
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.recipe import Recipe
from adapt_pruner.report.page import check_page, page, write_page
from adapt_pruner.report.record import read_record, record_of_result

__all__ = ["Result"]


class Result:
    """A pruned model.

    The model lies in a folder, and every method but `model` and `tokenizer` works on that folder. Without an `output` the folder is a
    temporary one, which lives as long as this object; `save` keeps it.

    Attributes:
        path: the folder of the model.
        recipe: the recipe that was run.
        figures: what was measured on the way: `params_before`, `params_after`, `calibration_losses`, `seconds`, …
        history: a note on each step of pruning.
        mask: which units of the model at the start stayed.
    """

    def __init__(
        self, path: Path, recipe: Recipe, figures: Mapping[str, Any], *, history: Sequence[Mapping[str, Any]] = (), mask: Mask | None = None,
        run_dir: Path | None = None, events: Sequence[Event] = (), trust_remote_code: bool = False, keeper: Keeper | None = None,
    ) -> None:  # fmt: skip
        self.path, self.recipe, self.figures, self.history = path, recipe, dict(figures), list(history)
        self._mask, self._run_dir, self._events, self._trust, self._keeper = mask, run_dir, events, trust_remote_code, keeper

    @cached_property
    def loaded(self) -> Loaded:
        """The model with everything that belongs to it, in float32; loaded at first use."""
        return load(str(self.path), device=pick_device(self.recipe.device), trust_remote_code=self._trust)

    @property
    def model(self) -> Any:
        """The model as a transformers model, in float32, on the recipe's device."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self.loaded.tokenizer

    @property
    def mask(self) -> Mask:
        """Which units of the model at the start stayed; for a run that was finished before, of the dense model."""
        return self._mask if self._mask is not None else self.loaded.mask or Mask()

    @in_python
    def save(self, output: str | Path) -> Path:
        """Copy the model to a new or empty folder; if it was in a temporary folder, it lies there from now on.

        Raises:
            UsageError: `output` is not empty.
            RunError: the copy could not be written; nothing is left there.
        """
        place = as_place("output", output)
        check_target(place)
        with whole_or_nothing(place) as folder:
            shutil.copytree(self.path, folder, dirs_exist_ok=True)
        if self._keeper is not None:
            self.path = place
        return place

    def evaluate(
        self, text: Spec | None = None, *, window: int | None = None, max_windows: int | None = None, tasks: str | Sequence[str] | None = None,
        progress: bool = False,
    ) -> Evaluation:  # fmt: skip
        """Measure perplexity and speed on a text, scores on tasks, or both, as `adapt_pruner.evaluate` does."""
        return evaluate(
            self, text=text, window=window, max_windows=max_windows, tasks=tasks, device=self.recipe.device, trust_remote_code=self._trust,
            progress=progress,
        )  # fmt: skip

    def export(
        self, to: str, output: str | Path, *, quant: str | None = None, pad: int | None = None, progress: bool = False
    ) -> Path:
        """Write the model in the form of another tool, as `adapt_pruner.export` does."""
        return export(self, to, output, quant=quant, pad=pad, trust_remote_code=self._trust, progress=progress)

    def chat(self, prompt: str, *, system: str | None = None, max_new_tokens: int = 200, temperature: float = 0.0) -> str:
        """What the model answers, as `adapt_pruner.chat` gives it."""
        return chat(
            self, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, device=self.recipe.device,
            trust_remote_code=self._trust,
        )  # fmt: skip

    @in_python
    def report(self, output: str | Path | None = None) -> Path:
        """Write the run as one HTML page: before and after, anatomy, reasons, cost.

        Args:
            output: the page; by default report.html in a run's folder, else FOLDER.html beside the model's folder.

        Returns:
            Where it was written.

        Raises:
            UsageError: a file that is not a page of ours would be overwritten.
            RunError: the page could not be written.
        """
        if self._run_dir is not None:
            record, place = read_record(self._run_dir), self._run_dir / "report.html"
        else:
            record, place = record_of_result(self.path, self._events), self.path.with_name(f"{self.path.name}.html")
        place = place if output is None else as_place("output", output)
        check_page(place, self._run_dir or self.path)
        return write_page(place, page(record))

    def __repr__(self) -> str:
        """Five lines: kind, size, loss, cost, place."""
        figures = self.figures
        before, after = figures["params_before"], figures["params_after"]
        inside = figures["decoder_params_before"], figures["decoder_params_after"]
        trained = f", trained on {figures['trained_tokens']:,} tokens" if figures.get("trained_tokens") else ""
        memory = f", {figures['peak_rss_bytes'] / 2**30:.1f} GiB at the peak" if "peak_rss_bytes" in figures else ""
        temporary = self._keeper is not None and self.path.is_relative_to(self._keeper.name)
        kept = ", which is temporary: .save(folder) keeps the model" if temporary else ""
        return "\n".join(
            [
                f"{Path(self.recipe.model).name} pruned by {self.recipe.method}{trained}",
                f"parameters  {before:,} → {after:,} ({after / before:.1%}; of the decoder {inside[1] / inside[0]:.1%})",
                f"loss        {self._said_loss()}",
                f"time        {span(figures['seconds'])}{memory}",
                f"folder      {self.path}{kept}",
            ]
        )

    def _said_loss(self) -> str:
        """The loss before and after, if known; of held-out text if there is some."""
        measured = [value for value in self.figures.get("perplexities") or [] if value is not None]
        if len(measured) > 1:
            return f"perplexity {measured[0]:.2f} → {measured[-1]:.2f} on {measured_text(self.figures)}"
        losses = [value for value in self.figures.get("calibration_losses") or [] if value is not None]
        if len(losses) > 1:
            return f"{losses[0]:.3f} → {losses[-1]:.3f} nats a token on the calibration text"
        return f"not measured; .evaluate(text) measures it, with {millions(self.figures['params_after'])} parameters"
