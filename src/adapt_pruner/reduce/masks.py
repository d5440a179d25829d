"""`reduce: masks`: cut a model, once, to the units that another run of it ended with.

So it can be asked whether a run gained by the units that it chose, or by the way it took to them: cut the same model to its units at
once, and train on as many tokens.
"""

from collections.abc import Iterator
from typing import Any

from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import num_left
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.parts import part
from adapt_pruner.core.system.strict_json import read_json
from adapt_pruner.errors import UsageError, first_line
from adapt_pruner.work import Change, Reduction, TextUse, Work


@part("reduce", needs={"one stage"})
class Masks(Reduction):
    """Cut the model once to the units that another run of the same model kept; nothing is scored or repaired."""

    def __init__(self, *, run: str = "") -> None:
        """
        Args:
            run: folder of a run, or of a pruned model; its mask.json says which units of the unpruned model stayed.

        The budget has to leave room for these units. The weights are those of the recipe's model.
        """
        self.run = run

    def check(self, work: Work) -> None:
        """Refuse a folder without a mask, and a mask of another model."""
        mask = self._mask()
        if work.state.history:  # a run that goes on; its model has been cut already
            return
        axes = {axis.name: axis for axis in work.axes}
        strange = sorted(name for name in mask if name not in axes or mask[name].numel() != axes[name].entries)
        if strange:
            units = f"{axes[strange[0]].entries:,} units" if strange[0] in axes else "none of that name"
            raise UsageError(
                f"the mask of {self.run} is of another model: it has {mask[strange[0]].numel():,} units along {strange[0]}, and "
                f"{work.recipe.model} has {units}; set model to the one that this run began with"
            )
        if "vocabulary" in mask:
            raise UsageError(
                f"the mask of {self.run} removes tokens, and reduce masks leaves the tokenizer as it is; name a run without vocabulary"
            )
        self.changes_hidden_states = "residual" in mask or "layers" in mask

    def floor(self, work: Work) -> tuple[int, str]:
        """The parameters that the mask leaves."""
        return num_left(work.model, work.axes, self._mask()), f"the units of {self.run} stay"

    def text_use(self, work: Work) -> TextUse:
        """No text."""
        return TextUse()

    def steps(self, work: Work, target: int) -> Iterator[Change]:
        """Yield the one cut."""
        if work.state.history:
            return
        mask = self._mask()
        yield Change(mask, told={"sizes": {name: int(mask[name].sum()) for name in mask}})

    def _mask(self) -> Mask:
        """The mask in the folder.

        Raises:
            UsageError: there is none, or it cannot be read.
        """
        if not self.run:
            raise UsageError("reduce masks takes its units from another run; name its folder: reduce=masks(run=runs/first)")
        folder = expanded(self.run)
        path = next(
            (path for path in (folder / filenames.MASK, folder / filenames.RESULT / filenames.MASK) if path.exists()), None
        )
        if path is None:
            raise UsageError(
                f"{self.run} has no mask.json, nor has its model/; name the folder of a run that has ended, or of a pruned model"
            )
        try:
            data: Any = read_json(path)
            return Mask.from_json(data)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path} is no mask ({first_line(error)}); name another run") from error
