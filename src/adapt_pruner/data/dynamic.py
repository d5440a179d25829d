"""`feed: dynamic`: the shares of the texts of a mixture follow the model's losses on them (Sheared LLaMA's dynamic batch loading)."""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from adapt_pruner.core.events import Event
from adapt_pruner.core.events.run import Mixed
from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.system.files import expanded
from adapt_pruner.core.system.parts import part
from adapt_pruner.core.system.strict_json import is_number, read_json, to_json
from adapt_pruner.data.fixed import Fixed, Rows, Span
from adapt_pruner.errors import UsageError


@dataclass(frozen=True)
class _Drawn(Span):
    """Rows that were drawn. Those that the model was trained on before have no text, so `Dynamic.tell` hears no loss on them."""

    again: tuple[bool, ...] = ()

    def domains(self, start: int, stop: int) -> list[str]:
        names = super().domains(start, stop)
        return ["" if again else name for name, again in zip(names, self.again[start:stop], strict=True)]


@part("feed")
class Dynamic(Fixed):
    """Texts on which the model is far above a reference loss are read more often; shares move every few steps."""

    wants_losses = True

    def __init__(
        self,
        rows: Rows,
        *,
        references: str = "",
        size: str = "",
        every: Annotated[int, "1 or more"] = 50,
        eta: Annotated[float, "above 0"] = 1.0,
        floor: Annotated[float, "0 to 1"] = 1e-4,
        seed: int = 0,
    ) -> None:
        """
        Args:
            rows: all rows of the run; the run begins with their mixture.
            references: a JSON file {SPEC of a text: loss}, one for each text of `training.source`. The loss, in nats per token,
                is what a model of the target size reaches; `adapt-pruner eval MODEL --text SPEC --json` measures it. Instead of a
                loss there may be losses of several sizes, {SPEC: {"30M": loss, "135M": loss}}; then `size` says which size is
                wanted.
            size: parameters of the model, such as 105M. Losses of two sizes N are fitted by L = A N^-α, those of three or more by
                L = E + A N^-α, with E, A and α ≥ 0 by least squares.
            every: m, steps between two changes of the shares.
            eta: η, how fast the shares change.
            floor: c, the part of the shares that is split evenly among all texts.
            seed: seed of the draws; each row's draw depends on it and on the number of the row.

        With l_i the mean cross-entropy on text i over the last m steps (of rows that the model had not been trained on before) and r_i its
        reference; if no row of the text was read in these steps, l_i - r_i is as it was, or at first the mean over the other texts:

            w_i ← w_i · exp(η (l_i - r_i)), normalised to sum 1;  w_i ← (1 - c) w_i + c / n, normalised to sum 1

        The text of each row is drawn with the weights w. No row of a text is read twice before all its rows have been read once.
        A text has more rows than its first share asks for, if it is long enough.

        Raises:
            UsageError: there is only one text, or the references are not one number for each text.

        Source: arXiv:2310.06694 and its released code, which takes the signed difference. Differs: l_i is the loss on training
        rows just before they are trained on, not on a held-out set. If another loss is trained (distillation), each step makes one
        forward pass more to measure l_i.
        """
        super().__init__(rows)
        self._every, self._eta, self._floor, self._seed = every, eta, floor, seed
        self._numbers = rows.by_text()
        self._again: dict[str, tuple[int, NDArray[np.int64]]] = {}  # for a text read again: number of the pass, and its order
        if len(self._numbers) < 2:
            raise UsageError(
                "feed dynamic moves shares between texts, and training.source has only one; name a mixture like {a.jsonl: 1, b.jsonl: 1}"
            )
        self._references = _references(references, sorted(self._numbers), size)
        self._steps = self._given = 0
        self._mean_tokens = {name: rows.mean_tokens(numbers) for name, numbers in self._numbers.items()}
        self._taken = dict.fromkeys(self._numbers, 0)
        begun = Counter(rows.domains(0, len(rows)))
        self._weights = {name: begun[name] / len(rows) for name in self._numbers}
        self._sums = {name: [0.0, 0.0] for name in self._numbers}
        self._excess: dict[str, float] = {}  # l_i - r_i of each text, when it was last read
        self._news: list[Event] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows so far, and of those still to come by the present shares, if texts have rows of other lengths."""
        row = sum(share * self._mean_tokens[name] for name, share in self._weights.items())
        return self._given + round((len(self._rows) - self._next) * row)

    def take(self, num_rows: int) -> Span:
        """The next rows; the text of each is drawn by the present shares."""
        stop = min(len(self._rows), self._next + num_rows)
        names = list(self._weights)
        chosen, again = [], []
        for number in range(self._next, stop):
            name = random.Random(f"{self._seed} {number}").choices(names, weights=list(self._weights.values()))[0]
            again.append(self._taken[name] >= len(self._numbers[name]))
            chosen.append(self._number(name))
            self._taken[name] += 1
        self._next = stop
        drawn = _Drawn(self._rows.picked(chosen), 0, len(chosen), tuple(again))
        self._given += drawn.num_tokens
        return drawn

    def _number(self, name: str) -> int:
        """The number of a text's next row; once all rows have been read, their order is shuffled again."""
        time, index = divmod(self._taken[name], len(self._numbers[name]))
        if not time:
            return int(self._numbers[name][index])
        if self._again.get(name, (0,))[0] != time:
            draw = np.random.default_rng([self._seed, list(self._numbers).index(name), time])
            self._again[name] = (time, draw.permutation(self._numbers[name]))
        return int(self._again[name][1][index])

    def tell(self, losses: Mapping[str, tuple[float, float]]) -> None:
        """Add up the losses of a step, and change the shares every m steps."""
        for name, (nats, count) in losses.items():
            if name in self._sums:
                self._sums[name][0] += nats
                self._sums[name][1] += count
        self._steps += 1
        if self._steps % self._every:
            return
        means = {name: nats / count for name, (nats, count) in self._sums.items() if count and math.isfinite(nats)}
        self._excess |= {name: means[name] - self._references[name] for name in means}
        highest = max(self._excess.values(), default=0.0)  # so that exp does not overflow
        unread = sum(self._excess.values()) / max(1, len(self._excess))
        moved = {
            name: weight * math.exp(self._eta * (self._excess.get(name, unread) - highest))
            for name, weight in self._weights.items()
        }
        self._weights = _shares(
            {name: (1 - self._floor) * share + self._floor / len(moved) for name, share in _shares(moved).items()}
        )
        self._news.append(Mixed(step=self._steps, tokens=self._given, shares=dict(self._weights), losses=means))
        self._sums = {name: [0.0, 0.0] for name in self._numbers}

    def news(self) -> list[Event]:
        """The changes of the shares since this was last asked."""
        news, self._news = self._news, []
        return news

    def inputs(self) -> dict[str, str]:
        """The reference losses."""
        return {"file of reference losses": hashlib.sha256(to_json(self._references).encode()).hexdigest()}

    def state(self) -> dict[str, Any]:
        """Position, shares, the last excess of each text, and the losses since the last change of shares."""
        return {
            **super().state(), "steps": self._steps, "given": self._given, "taken": dict(self._taken), "weights": dict(self._weights),
            "sums": {name: list(both) for name, both in self._sums.items()}, "excess": dict(self._excess),
        }  # fmt: skip

    def skip_to(self, num_tokens: int) -> int:
        """Continue after the row that reaches `num_tokens` tokens by the initial shares."""
        super().skip_to(num_tokens)
        self._given = num_tokens
        return self._next

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave. If the run began with another feed, continue at its row with the initial shares."""
        super().restore(state)
        self._given = int(state.get("given", self._rows.num_tokens(0, self._next)))
        if "weights" in state:
            self._steps, self._taken, self._weights = state["steps"], dict(state["taken"]), dict(state["weights"])
            self._sums = {name: list(both) for name, both in state["sums"].items()}
            self._excess = dict(state.get("excess", {}))


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def fitted(losses: Mapping[int, float], size: int) -> float:
    """The loss at `size` parameters, from a power law fitted to the losses of two or more other sizes: E + A N^-α; E = 0 for two.

    400 values of E are tried, from 0 to just below the lowest loss. For each, α and A come from a straight line through the
    logarithms.
    """
    x = np.log(np.array(list(losses), dtype=np.float64))
    y = np.array(list(losses.values()), dtype=np.float64)

    def tried(floor: float) -> tuple[float, float]:
        slope, start = np.polyfit(x, np.log(y - floor), 1)
        slope = min(slope, 0.0)
        if slope == 0:
            start = np.log(y - floor).mean()
        off = floor + np.exp(start + slope * x) - y
        return float(off @ off), float(floor + np.exp(start + slope * math.log(size)))

    floors = np.linspace(0, y.min(), 401)[:-1] if len(losses) > 2 else [0.0]
    return min(tried(float(floor)) for floor in floors)[1]


def _loss(value: Any, size: str, *, path: str, name: str) -> float:
    """A reference loss: the number in the file, or the fit to the losses of several sizes."""
    if not isinstance(value, dict):
        return _positive(value, path=path, name=name)
    losses = {parse_count(params): _positive(loss, path=path, name=name) for params, loss in value.items()}
    if not size:
        raise UsageError(
            f"{path} has losses of several sizes for {name}; choose one of the sizes: dynamic(references=FILE, size=105M)"
        )
    if len(losses) < 2:
        raise UsageError(f"{path} has no losses of two or more sizes for {name} to fit a power law to; add some, in nats")
    return fitted(losses, parse_count(size))


def _positive(value: Any, *, path: str, name: str) -> float:
    if not (is_number(value) and value > 0):
        raise UsageError(f"{path} gives {value!r} as reference loss of {name}; a loss is a positive number of nats")
    return float(value)


def _references(path: str, names: Sequence[str], size: str) -> dict[str, float]:
    """The reference loss of each text.

    Raises:
        UsageError: the file is not such JSON, lacks a text, or names an unknown one.
    """
    if not path:
        raise UsageError(
            "feed dynamic needs reference losses; name a JSON file, {SPEC: nats}, as training.feed=dynamic(references=FILE) with the "
            f"texts {', '.join(names)}"
        )
    try:
        data = read_json(expanded(path))
        losses = {str(name): _loss(value, size, path=path, name=name) for name, value in data.items()}
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"the file of reference losses {path!r} does not exist; write it as {{SPEC: nats}}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} does not contain reference losses ({error}); write them as JSON, {{SPEC of a text: nats per token}}"
        ) from error
    if lacking := sorted(set(names) - losses.keys()):
        raise UsageError(f"{path} has no reference loss for {', '.join(lacking)}; add it, in nats per token")
    if others := sorted(losses.keys() - set(names)):
        raise UsageError(
            f"{path} has a reference loss for {', '.join(others)}, which is not a text of training.source; leave it out"
        )
    return losses
