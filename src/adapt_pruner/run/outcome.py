"""What comes of a run, and the checkpoint that is made of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.origin import origin
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.axes import Mask
from adapt_pruner.core.provenance import made_by
from adapt_pruner.errors import first_line
from adapt_pruner.recipe import Recipe
from adapt_pruner.run import latency
from adapt_pruner.run.prepare import Listener

__all__ = ["Outcome"]


@dataclass
class Outcome:
    """What came of a run: the pruned model, its mask against the model at the start, and the figures."""

    loaded: Loaded
    mask: Mask
    figures: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)

    def whole_mask(self) -> Mask:
        """The mask against the dense model, also where the run began with one already pruned."""
        before = self.loaded.mask
        return self.mask if before is None else before.then(self.mask)

    def facts(self, recipe: Recipe) -> dict[str, Any]:
        """What pruning.json tells of how the model was made."""
        loaded = self.loaded
        return {
            "dense_params": self.figures["params_before"] if loaded.mask is None else loaded.dense_params,
            "made_by": made_by(),
            "recipe": recipe.model_dump(mode="json"),
            "figures": self.figures,
            "history": self.history,
        }

    def write(
        self, recipe: Recipe, path: Path, *, listen: Listener, trust_remote_code: bool, beside: Callable[[Path], None]
    ) -> None:
        """Measure the latency that was reached, where one was asked for, and write the checkpoint with all that is known of it.

        Where it cannot be measured, or somebody interrupts that, the checkpoint is written all the same.

        Raises:
            RunError: it cannot be written.
        """
        loaded = self.loaded
        interrupted = False
        try:
            self.figures |= latency.reach(loaded, recipe, self.figures, trust_remote_code=trust_remote_code, listen=listen)
        except Exception as error:  # out of memory, too
            listen({"event": "warning", "message": f"the latency that was reached could not be measured: {first_line(error)}"})
        except KeyboardInterrupt:
            interrupted = True  # not the error itself, which would hold the models that were timed
        save(
            loaded.model,
            loaded.tokenizer,
            path,
            mask=self.whole_mask(),
            pruning=self.facts(recipe) | {"base": origin(recipe.model)},
            dtype=loaded.dtype,
            beside=beside,
        )
        if interrupted:
            raise KeyboardInterrupt
