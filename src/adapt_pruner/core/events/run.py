"""Further events of a run: its plan, a reduction on its way, a feed that shifts the shares of its texts, answers to prompts."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from typing_extensions import TypedDict

from adapt_pruner.core.events import Count, Event, Seconds
from adapt_pruner.core.events.words import answered, millions

_POOR = 0.5  # of the dense model's right answers


class Item(TypedDict):
    """A phase of a run.

    `phase` is one of `PHASES`; `stage` is 0 before the first stage. `times` is how often the phase comes in that
    stage; it is an estimate if the phase is part of an iteration (`repeats`). `flops` are the operations of one time: 0 where
    they do not matter, None where nobody knows.
    """

    phase: str
    stage: Count
    times: Count
    flops: float | None
    repeats: bool


class PlanLine(Event, kind="plan_line"):
    """A line of the plan that `shrink` has made."""

    logged = False
    text: str

    def line(self, begun: str = "dense") -> str:
        return self.text


class VocabularyCut(Event, kind="vocabulary"):
    """Tokens were removed from the vocabulary; `params` are the parameters left in the whole model."""

    logged = False
    tokens_before: Count
    tokens: Count
    params: Count

    def line(self, begun: str = "dense") -> str:
        return f"{self.tokens:,} of {self.tokens_before:,} tokens stay, which leaves {millions(self.params)} parameters"


class Grew(Event, kind="grew"):
    """The model has grown by copying its weights.

    Attributes:
        params_before: parameters before.
        params: parameters now.
        sizes: kind of what grew -> its size now.
        apart: the largest difference between logits before and now; None after copied layers, which compute something else.
    """

    params_before: Count
    params: Count
    sizes: dict[str, Count]
    apart: float | None = None

    def line(self, begun: str = "dense") -> str:
        sizes = ", ".join(f"{kind} {size:,}" for kind, size in self.sizes.items())
        same = "copied layers compute something else until they are trained"
        if self.apart is not None:
            same = f"its logits differ by {self.apart:.1g} at most"
        return f"grown from {millions(self.params_before)} to {millions(self.params)} parameters ({sizes}); {same}"


class Probe(Event, kind="probe"):
    """The speed of this machine with the model is measured."""

    logged = False

    def line(self, begun: str = "dense") -> str:
        return "measuring this machine (up to a minute)"


class Resumed(Event, kind="resumed"):
    """A run resumes from a checkpoint. `pruned` says whether the cuts of its stage are done; `cuts` counts them so far."""

    path: str = ""
    stage: Count
    step: Count
    pruned: bool
    cuts: Count = 0

    def line(self, begun: str = "dense") -> str:
        cuts = f"after {self.cuts} of its cuts" if self.cuts else "before its cuts"
        return f"continuing from {self.path} (stage {self.stage}, {f'step {self.step}' if self.pruned else cuts})"


class Planned(Event, kind="planned"):
    """A run was planned, and is about to read its text. A resumed run lists only what is still to come.

    Attributes:
        targets: parameters at the end of each stage.
        tokens: tokens still to be trained on in each stage.
        items: the phases in their order.
        seconds_left: until the run must end, if it has a deadline.
    """

    logged = False
    targets: list[Count]
    tokens: list[Count]
    items: list[Item]
    seconds_left: Seconds | None = None


class Within(Event):
    """A reduction is on its way to its next change; the run may write a checkpoint here.

    Attributes:
        stage: counted from 1.
        done: rounds, layers or steps so far.
        of: the total of these.
    """

    stage: Count | None = None
    done: Count
    of: Count

    @property
    def often(self) -> bool:
        return True


class Searched(Within, kind="searched"):
    """A round of a search for what to cut is done.

    Attributes:
        evaluations: how often a candidate's loss was measured so far.
        best: the lowest loss, or KL divergence, in nats per prediction: `search`, of a candidate of all rounds so far on the whole
            text; `policy_gradient`, of a mask since the last report.
        mean: the mean over this round's candidates on the text that all are measured on first, or over those masks.
        sizes: axis name -> units that the search would keep now; where it is undecided, the expected number.
    """

    evaluations: Count = 0
    best: float | None = None
    mean: float | None = None
    sizes: dict[str, float] | None = None

    def line(self, begun: str = "dense") -> str:
        if self.best is None or self.mean is None:
            return f"stage {self.stage}: search, round {self.done} of {self.of}"
        return f"stage {self.stage}: search, round {self.done} of {self.of}: {self.best:.3f} nats at best, {self.mean:.3f} on average"

    def figures(self) -> dict[str, float]:
        return self._those("best", "mean")


class Masked(Within, kind="masked"):
    """The weights of a further decoder layer have become zero; `done` counts layers.

    Attributes:
        zeros: weights that are zero now.
        error: ‖W' Z - W X‖² / ‖W X‖², the mean over the linear layers of the decoder layer; None if it was not computed.
    """

    zeros: Count
    error: float | None = None

    def line(self, begun: str = "dense") -> str:
        text = f"stage {self.stage}: layer {self.done} of {self.of}, {self.zeros:,} weights are zero"
        return text if self.error is None else f"{text}, relative output error {self.error:.1%}"

    def figures(self) -> dict[str, float]:
        return self._those("error")


class MasksLearnt(Within, kind="masks_learnt"):
    """Masks were learnt in some more steps of training; `done` counts these steps. One of `zeros` and `sizes` is given.

    Attributes:
        zeros: weights that the masks remove now.
        flipped: share of the masks' bits that changed since the masks before.
        sizes: axis name -> units that the masks are expected to keep.
    """

    zeros: Count | None = None
    flipped: float | None = None
    sizes: dict[str, float] | None = None

    def line(self, begun: str = "dense") -> str:
        text = f"stage {self.stage}: masks learnt in {self.done} of {self.of} steps"
        text += "" if self.zeros is None else f", {self.zeros:,} weights are masked"
        return text if self.flipped is None else f"{text}, {self.flipped:.2%} of the masks changed"

    def figures(self) -> dict[str, float]:
        return self._those("flipped")


class Mixed(Event, kind="mixed"):
    """A feed has changed the shares of the texts that it mixes.

    Attributes:
        step: its number in the run.
        tokens: read so far.
        shares: SPEC -> share of the rows to come.
        losses: SPEC -> mean loss since the last change, in nats per token, over rows that were read for the first time.
    """

    step: Count
    tokens: Count
    shares: dict[str, float]
    losses: dict[str, float] = Field(default_factory=dict)

    def line(self, begun: str = "dense") -> str:
        most = sorted(self.shares, key=lambda name: -self.shares[name])[:4]
        return f"step {self.step}: next texts " + ", ".join(f"{name} {self.shares[name]:.1%}" for name in most)

    def figures(self) -> dict[str, float]:
        return {f"share/{name}": share for name, share in self.shares.items()}


class PromptAnswer(TypedDict):
    """A prompt and what the model answered, without special tokens."""

    prompt: str
    text: str


class Answered(Event, kind="answered"):
    """The model answered the run's prompts: stage 0 is the model at the start.

    Attributes:
        stage: counted from 1.
        answers: in the order of the prompts.
    """

    stage: Count
    answers: list[PromptAnswer]


class Chatted(Event, kind="chatted"):
    """The model answered prompts of ours that a rule checks: stage 0 is the model at the start.

    Attributes:
        stage: counted from 1.
        asked: number of prompts.
        right: the numbers of those that it answered rightly, from 0.
        ended: answers that it ended by itself.
        looping: answers that repeat something again and again.
        dense: `right` of the model at the start; None at the start.
        kl: KL to the dense model, in nats a token, on held-out conversations that it wrote; None if there are none.
    """

    stage: Count
    asked: Count
    right: list[Count]
    ended: Count
    looping: Count
    dense: list[Count] | None = None
    kl: float | None = None

    @property
    def verdict(self) -> str:
        """How it answers, in words."""
        return answered(right=self.right, asked=self.asked, ended=self.ended, looping=self.looping, dense=self.dense)

    @property
    def is_poor(self) -> bool:
        """Whether it gives fewer than half of the dense model's right answers."""
        return self.dense is not None and len(set(self.right) & set(self.dense)) < _POOR * len(self.dense)

    def line(self, begun: str = "dense") -> str:
        who = f"{begun} model" if self.stage == 0 else "small model"
        return f"{who}: {self.verdict}" + ("" if self.kl is None else f"; {self.kl:.3f} nats from the dense model")

    def figures(self) -> dict[str, float]:
        shares = {"chat/right": len(self.right) / max(1, self.asked), "chat/ended": self.ended / max(1, self.asked)}
        return shares | {"chat/looping": self.looping / max(1, self.asked)} | self._those("kl")


def chatted(figures: Mapping[str, Any]) -> list[Chatted]:
    """How the model answered at the start and at the end of a run, from the run's figures; empty if it was not asked."""
    measured = figures.get("chat") or []
    dense = next((each["right"] for each in measured if each["stage"] == 0), None)
    return [Chatted(**each, dense=dense if each["stage"] else None) for each in measured]
