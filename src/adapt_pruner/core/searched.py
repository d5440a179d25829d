"""Events of what looks for something on its way: a search for what to cut, and a feed that moves the shares of its texts."""

from typing import Literal

from pydantic import Field

from adapt_pruner.core.events import Count, Event

__all__ = ["Mixed", "Searched"]


class Searched(Event):
    """A round of a search for what to cut is done.

    Attributes:
        stage: counted from 1.
        done: rounds so far in this search.
        of: rounds of this search.
        evaluations: times that a candidate's loss was measured, so far.
        best: lowest loss of a candidate of this round, in nats per prediction.
        mean: mean over the candidates of this round.
        sizes: axis name -> units that the search would keep now; of a share in doubt, the expected number.
    """

    event: Literal["searched"] = "searched"
    stage: Count | None = None
    done: Count
    of: Count
    evaluations: Count = 0
    best: float | None = None
    mean: float | None = None
    sizes: dict[str, float] | None = None

    @property
    def often(self) -> bool:
        return True

    def line(self, begun: str = "dense") -> str:
        if self.best is None or self.mean is None:
            return f"stage {self.stage}: search, round {self.done} of {self.of}"
        return f"stage {self.stage}: search, round {self.done} of {self.of}: loss {self.best:.3f} at best, {self.mean:.3f} on average"

    def figures(self) -> dict[str, float]:
        return self._those("best", "mean")


class Mixed(Event):
    """A feed has moved the shares of the texts that it mixes.

    Attributes:
        step: of the run.
        tokens: read so far.
        shares: SPEC -> share of the rows to come.
        losses: SPEC -> mean loss since the last move, in nats per token, of rows that were read for the first time.
    """

    event: Literal["mixed"] = "mixed"
    step: Count
    tokens: Count
    shares: dict[str, float]
    losses: dict[str, float] = Field(default_factory=dict)

    def line(self, begun: str = "dense") -> str:
        most = sorted(self.shares, key=lambda name: -self.shares[name])[:4]
        return f"step {self.step}: next texts " + ", ".join(f"{name} {self.shares[name]:.1%}" for name in most)

    def figures(self) -> dict[str, float]:
        return {f"share/{name}": share for name, share in self.shares.items()}
