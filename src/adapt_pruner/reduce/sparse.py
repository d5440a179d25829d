"""`reduce: sparse`: single weights of the linear layers become zero, layer by layer, and the shapes stay as they are.

    sparsity   how many weights become zero, and in which pattern (`core.model.pattern`)
    solver     which they are, and what the others become (`reduce.zeros.solvers`, `reduce.zeros.fista`)

After each decoder layer, its linear layers are added to the model's mask over weights (`Work.weight_mask`). A run may be stopped
after any decoder layer.
"""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from adapt_pruner import families
from adapt_pruner.core.events.run import Masked, Within
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import WeightMask, linear_layers, oriented
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.zeros.layer_inputs import Walk, walked
from adapt_pruner.reduce.zeros.solvers import Inputs
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Change, Passes, Reduction, TextUse, Work


@part("reduce", needs={"sparsity", "one stage"}, reads={"solver"})
class Sparse(Reduction):
    """Make single weights zero by the recipe's solver, a share of them or N of every M, and keep all shapes."""

    def __init__(self) -> None:
        self._done, self._over = 0, False

    def check(self, work: Work) -> None:
        """Refuse a model that has zeros or is sliced, a layer that the pattern does not fit, and a recipe without a solver."""
        solver = work.recipe.solver
        if solver is None:
            solvers = ", ".join(parts.names("solver"))
            raise UsageError(f"reduce sparse needs a solver, and the recipe names none; set solver to one of {solvers}")
        warm = parts.bind("solver", solver).keywords.get("warm_start")
        if warm is not None and "dense" in parts.needs("solver", warm):
            raise UsageError(f"solver {solver} cannot start from {warm}; give warm_start=wanda, sparsegpt or magnitude")
        check_dense(work)
        check_pattern(work)

    def floor(self, work: Work) -> tuple[int, str]:
        """All parameters, since zeros count as parameters."""
        return work.num_params, "weights become zero"

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """One: the text is drawn once."""
        return 1

    def text_use(self, work: Work) -> TextUse:
        """The calibration text, once, where the solver reads any."""
        text = "text" in parts.needs("solver", work.recipe.solver or "")
        return TextUse(text=text, evidence=Evidence.FORWARD if text else Evidence.WEIGHTS)

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """One decoder layer after the other, each run twice if text is read: as it was, then with its zeros.

        Nobody knows before the first layer how long a solver takes that works with the products of the inputs.
        """
        needs, calibration = parts.needs("solver", work.recipe.solver or ""), work.recipe.calibration
        if "gram" in needs:
            return {"layers": Passes(flops=None)}
        return {"layers": Passes(forward=2 * calibration.samples * calibration.length if "text" in needs else 0)}

    def steps(self, work: Work, target: int) -> Iterator[Change | Within]:
        """Solve the decoder layers one after the other and report each; then yield that all are done."""
        if self._over:
            return
        recipe, pattern = work.recipe, Pattern.parse(work.recipe.sparsity)
        assert recipe.solver is not None
        needs, solver = parts.needs("solver", recipe.solver), parts.bind("solver", recipe.solver)

        def solve(weight: Tensor, inputs: Inputs | None) -> tuple[Tensor, Tensor]:
            after, keep = solver(weight, pattern) if inputs is None else solver(weight, pattern, inputs)
            return after, keep

        kept = {} if work.weight_mask is None else dict(work.weight_mask.kept)
        with work.state.clock("score"):
            batches: list[Tensor] = []
            if "text" in needs:  # its tokens are counted once, however often the run is resumed
                batches = work.data.calibration(work.iteration) if self._done else work.batches()
            walk = Walk(work.model, batches, solve, "gram" in needs, self._done, work.task, recipe.dtype)
            depth = len(walk.layers)
            work.begins("layers", stage=work.state.stage)
            for solved in walked(walk, reads=_reads(recipe.solver)):
                kept |= solved.kept
                work.weight_mask = WeightMask(kept, pattern)
                self._done += solved.layers
                error = sum(solved.errors) / len(solved.errors) if solved.errors else None
                yield Masked(stage=work.state.stage, done=self._done, of=depth, error=error, zeros=work.weight_mask.num_zeros)
        self._done, self._over = 0, True
        yield Change(None, told={"zeros": 0 if work.weight_mask is None else work.weight_mask.num_zeros})

    def state(self) -> dict[str, Any]:
        """How many decoder layers are done, and whether that was said of all."""
        return {"done": self._done, "over": self._over}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after those layers."""
        self._done, self._over = state.get("done", 0), state.get("over", False)

    def fit(self, work: Work) -> None:
        """Refuse a change of the recipe while some layers have zeros and others have none, and another sparsity once all have.

        Raises:
            UsageError: some layers have their zeros already.
        """
        if self._over:
            check_same_zeros(work)
        if self._done:
            raise UsageError(
                f"{self._done} decoder layers of this run have their zeros already, from the recipe that it started with; leave "
                "the recipe as it was, or name another folder"
            )


def check_same_zeros(work: Work) -> None:
    """Refuse another sparsity for a run that has all its zeros.

    Raises:
        UsageError: the recipe asks for another one.
    """
    pattern = None if work.weight_mask is None else work.weight_mask.pattern
    if pattern is not None and pattern != Pattern.parse(work.recipe.sparsity):
        raise UsageError(
            f"this run has its zeros already, of sparsity {pattern}, and now the recipe says {work.recipe.sparsity}; leave it as it was, "
            "or name another folder"
        )


def _reads(solver: str) -> str:
    """What the linear layers read under a solver: its option `reads`, if it has one; `sparse` if it does not need the dense model."""
    if "dense" not in parts.needs("solver", solver):
        return "sparse"
    option = signature(parts.bind("solver", solver)).parameters.get("reads")
    return "corrected" if option is None else str(option.default)


def check_dense(work: Work) -> None:
    """Refuse a model that had zeros when the run began, or is sliced.

    Raises:
        UsageError: the model had zeros, or is sliced.
    """
    if (pattern := work.state.figures.get("sparsity_before")) is not None:
        raise UsageError(
            f"{work.recipe.model} has zeros already ({pattern or 'in a pattern that a cut has broken'}), and "
            f"{work.recipe.method} needs dense weights; name the model it was made from"
        )
    if families.is_sliced(work.model.config):
        raise UsageError(
            f"{work.recipe.model} is sliced, and its shortcut matrices cannot be given zeros; name the model that it came from"
        )


def check_pattern(work: Work) -> None:
    """Refuse a layer that the recipe's pattern does not fit.

    Raises:
        UsageError: there is such a layer.
    """
    pattern = Pattern.parse(work.recipe.sparsity)
    for name, module in linear_layers(work.model).items():
        pattern.check_inputs(name, oriented(module).shape[1])
