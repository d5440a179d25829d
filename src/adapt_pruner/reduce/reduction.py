"""The interface of a reduction: `Reduction` itself, the steps that it yields, and what it tells a dry run about its work."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from adapt_pruner.core.axes import Mask
from adapt_pruner.core.run_events import Within
from adapt_pruner.errors import UsageError
from adapt_pruner.score.calibrate import Evidence

if TYPE_CHECKING:
    from adapt_pruner.reduce.work import Work

__all__ = ["Change", "Passes", "Reduction", "TextUse", "check_training"]


@dataclass(frozen=True)
class Change:
    """One step of a reduction.

    Attributes:
        mask: the units of the present model that stay; None if the reduction has changed the model itself.
        loss: on the calibration text before the step, nats per token; NaN if no text was run.
        told: further values for the event `cut`: sizes, distances, scores, … (see `core.events.Cut`).
    """

    mask: Mask | None
    loss: float = float("nan")
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """The work of a phase in one iteration, for an estimate of its time.

    Attributes:
        forward: tokens of forward passes.
        both: tokens of forward and backward passes, as in scoring.
        flops: further operations; None if nobody knows how many.
        times: how often the phase runs in a stage; None for once per iteration.
    """

    forward: float = 0.0
    both: float = 0.0
    flops: float | None = 0.0
    times: int | None = None


@dataclass(frozen=True)
class TextUse:
    """What a reduction reads; a dry run computes its memory from it.

    Attributes:
        text: whether the reduction reads the calibration text.
        evidence: the most that it needs from the model in one pass over the text.
        forward: whether it also makes passes without gradients.
        streams: whether it also takes gradients of hidden states, for every second sequence.
    """

    text: bool = False
    evidence: Evidence = Evidence.WEIGHTS
    forward: bool = False
    streams: bool = False


class Reduction:
    """A way to bring a model to a stage's budget: a class with `@part("reduce")`, one per file of `reduce/`.

    A recipe names it by its file. The keyword arguments of its `__init__` are options. One object serves a whole run.

    Attributes:
        fills_zeros: whether it changes or replaces weights, so that the zeros of a sparse model would be lost.
        changes_hidden_states: whether it narrows the residual stream or removes layers beside what the recipe's axes name, so that
            hidden states cannot be compared with the dense model's.
    """

    fills_zeros: ClassVar[bool] = False
    changes_hidden_states: bool = False

    def check(self, work: "Work") -> None:
        """Refuse, before any work is done, a recipe that this reduction cannot carry out.

        Raises:
            UsageError: the recipe asks for something that this reduction cannot do.
        """

    def floor(self, work: "Work") -> tuple[int, str]:
        """The fewest parameters that it can leave in `work.model`, and WORDS that complete the sentence `… remain when WORDS`."""
        raise NotImplementedError(f"{type(self).__name__} has no method floor")

    def num_steps(self, work: "Work", *, start: int, reached: int, target: int) -> int:
        """Estimate of the steps from `reached` parameters to `target`, in a run that began with `start` parameters."""
        return int(reached > target)

    def text_use(self, work: "Work") -> TextUse:
        """What this reduction reads."""
        return TextUse()

    def phases(self, work: "Work", target: int) -> dict[str, Passes]:
        """Phase of an iteration (see `core.events.Progress`) -> its work on the way to `target` parameters; in order."""
        calibration = work.recipe.calibration
        return {"score": Passes(both=calibration.samples * calibration.length)} if self.text_use(work).text else {}

    def steps(self, work: "Work", target: int) -> Iterator[Change | Within]:
        """Yield each step on the way to `target` parameters. The caller carries out a step before it asks for the next.

        A reduction that takes long yields a `Within` now and then: `Searched` if only its state has changed, `Masked` if weights
        have changed, too, `MasksLearnt` if it trains. The run then reports how far it is, and may write a checkpoint.

        Yields nothing if the model is small enough already. A run that was killed continues from a checkpoint: with the model
        after a change, and with `state` as it was when that change was yielded. So bring the state up to date before the
        `yield`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method steps")

    def state(self) -> dict[str, Any]:
        """Everything but the model that the next step depends on, as plain data."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the state, in place, to what `state` returned."""

    def fit(self, work: "Work") -> None:
        """Adapt the state, in place, to a recipe or a text that was changed during the run."""


def check_training(work: "Work", way: str, *, masks: bool = False) -> None:
    """Refuse training that does not work with a reduction which changes the model between the steps of its training.

    Args:
        work: the run.
        way: name of the reduction.
        masks: whether it learns masks.

    Raises:
        UsageError: the recipe asks for such training.
    """
    recipe, training = work.recipe, work.recipe.training
    unfit = {
        "training.lora": training.lora is not None,
        "training.compile": training.compile,
        "training.gradient_checkpointing": training.gradient_checkpointing and masks,
        "parallel=fsdp": recipe.parallel == "fsdp",
        "moments=reset": recipe.moments == "reset",  # a run that goes on would forget moments in the middle of its training
    }
    if wrong := [key for key, given in unfit.items() if given]:
        raise UsageError(
            f"reduce {way} does not work with {' and '.join(wrong)}; leave {'it' if len(wrong) == 1 else 'them'} out"
        )
