"""`reduce: search`: find by search how many units each layer keeps, under an exact budget (Self-Pruner, EvoPress).

    sizes        units that each axis keeps; the start is what the recipe's chooser keeps if all scores are equal
    a swap       one axis of a kind a level up, another of that kind a level down, so that the budget stays as it is
    a round      `proposals` gives candidates; their loss on a little text says which are measured on more; the best stay
    a draw       sequences of the calibration text; with `redraw` each round has two of its own, a little one and a larger one

A candidate is measured with its units shut, not cut. With `repaired` it is measured with the weights that the recipe's repair
would give it. Only the best candidate is cut, at the end.
"""

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor

from adapt_pruner.checkpoint.load import load, locate
from adapt_pruner.core.events.run import Searched
from adapt_pruner.core.model.axes import Axis, Mask, Scores
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.layers import HIDDEN_BYTES, decoder_layers, loss_above, read_above, streams
from adapt_pruner.core.model.precision import casting_once, computed_in, precision
from adapt_pruner.core.model.shelf import fetched, is_shelved
from adapt_pruner.core.model.task import CausalLM
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.data.tokens import batches_of
from adapt_pruner.data.windows import MICRO_TOKENS
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import parts
from adapt_pruner.reduce.propose.proposals import Candidate, Space
from adapt_pruner.reduce.units import (
    Units,
    evidence_of,
    params_of,
    prunable,
    refuse_limits,
    repair_parameters,
    repaired,
    scores_of,
    sizes_alike,
    with_forward,
)
from adapt_pruner.score.calibrate import Evidence, as_found
from adapt_pruner.train.objectives import kl_of_logits
from adapt_pruner.work import Change, Passes, TextUse, Work


@part(
    "reduce",
    needs={"chosen", "text", "all its time"},
    reads={"axes", "metric", "chooser", "repair", "multiple_of"},
)
class Search(Units):
    """Search how many units each layer keeps, by the loss of candidates that are shut but not cut (Self-Pruner, EvoPress)."""

    def __init__(
        self,
        *,
        proposals: str = "evolution",
        model: str = "",
        starts: Annotated[int, "0 or more"] = 0,
        population: Annotated[int, "1 or more"] = 30,
        offspring: Annotated[int, "1 or more"] = 20,
        rounds: Annotated[int, "0 or more"] = 20,
        level: Annotated[float, "0 to 1"] = 0.1,
        fitness: Literal["loss", "kl"] = "loss",
        tokens: Annotated[int, "2 or more"] = 2048,
        finalists: Annotated[int, "1 or more"] = 5,
        final_tokens: Annotated[int, "0 or more"] = 0,
        redraw: bool = False,
        repaired: bool = False,
    ) -> None:
        """
        Args:
            proposals: what makes candidates: `evolution`; `mutation`, without crossings; `random`, their control, which draws all of
                them anew; or `language_model`.
            model: the chat model of `language_model`: an address like http://localhost:8000/v1#NAME, or a model on this machine.
            starts: number of random candidates in the first round. 0 begins with the chooser's sizes and `population` - 1 candidates
                up to four swaps away from them.
            population: number of best candidates that stay after a round.
            offspring: number of new candidates in a round.
            rounds: number of rounds after the first. 0, for blocks: k (n - k) / 1.5, where k of n attentions or MLPs go, whichever
                is more.
            level: neurons that a swap moves, as a share of the widest layer's; of heads and whole blocks a swap moves one.
            fitness: `loss` on text, or `kl`, KL(model before the search ‖ candidate) of its predictions in nats.
            tokens: number of tokens on which all candidates are measured first.
            finalists: how many of a round are then measured on more; only these may join the population.
            final_tokens: number of tokens on which finalists are measured; 0 for the whole draw of calibration text.
            redraw: draw the sequences of both measurements anew in every round, and measure the population again beside its
                finalists. Else a round measures on the first sequences, which are the same in all.
            repaired: measure candidates with repaired weights. The recipe's repair runs once for each level, for all layers at
                once, so it must repair each layer by itself; its factors are left out. The weights of every level stay in memory.

        Candidates are measured on the calibration text of the next iteration, not on the text that the scores read.

        Source: arXiv:2502.14413 (population 30, 10 + 10 offspring, 20 rounds) and EvoPress, arXiv:2410.14649, with its released code
        (swaps, growing text; `starts`, `mutation`, `redraw`, `rounds=0`). Differs from the first: sizes are found under an exact
        number of parameters, by swaps rather than by rates that a language model writes, and fitness does not read WikiText.
        Differs from the second: parameters are given, not a number of blocks, and the first candidates have finalists, too.
        """
        super().__init__()
        self.model, self.proposals, self.population, self.offspring, self.rounds = model, proposals, population, offspring, rounds
        self.level, self.fitness, self.starts = level, fitness, starts
        self.tokens, self.finalists, self.final_tokens, self.redraw = tokens, finalists, final_tokens, redraw
        self.on_repaired = repaired
        self.goes_by_layer = not repaired  # the weights of every level stay in memory
        self._found = _Found()

    def check(self, work: Work) -> None:
        """Refuse unknown proposals, `repaired` without a repair, and axes that the search cannot change."""
        if single := [kind for kind in work.recipe.axes if sum(axis.kind == kind for axis in work.axes) == 1]:
            raise UsageError(
                f"reduce search moves units from one layer to another, and the model has only one axis of {', '.join(single)}; "
                "leave that out of axes"
            )
        super().check(work)
        if not self.rounds and not {"attentions", "mlps"} & set(work.recipe.axes):
            raise UsageError(
                "reduce search(rounds=0) counts the attentions and mlps that go, and axes names neither; give a number, such as rounds=20"
            )
        parts.check("proposal", self.proposals)
        if parts.takes("proposal", self.proposals, "model") is not bool(self.model):
            raise UsageError(
                f"reduce search has proposals={self.proposals} and model={self.model or 'none'}; language_model needs a model, "
                "and no other takes one: write search(proposals=language_model, model=http://localhost:8000/v1#NAME), or a "
                "model on this machine"
            )
        if self._is_here:
            locate(self.model)
        if self.on_repaired and (work.recipe.repair is None or repair_parameters(work)):
            raise UsageError(
                "reduce search(repaired=true) measures candidates with repaired weights, and the recipe has no repair that leaves the "
                "number of parameters as it is; set repair=closed_form.least_squares, or leave repaired out"
            )
        refuse_limits(work, "reduce search moves units from any layer to another")
        if "query_heads" in work.recipe.axes and self.on_repaired:
            raise UsageError(
                "reduce search(repaired=true) works only on neurons and kv_heads, and axes names query_heads; leave that out of "
                "axes"
            )

    @property
    def _is_here(self) -> bool:
        """Whether a chat model on this machine writes candidates."""
        return bool(self.model) and not self.model.startswith(("http://", "https://"))

    def text_use(self, work: Work) -> TextUse:
        """What the metric reads, and forward passes."""
        return with_forward(super().text_use(work))

    def phases(self, work: Work, target: int) -> dict[str, Passes]:
        """Scoring once, the rounds, and the repair of the result; the time of a round is known only after the first."""
        levels = {"levels": Passes(flops=None, times=1)} if self.on_repaired else {}
        phases = {
            name: replace(passes, times=1)
            for name, passes in super().phases(work, target).items()
            if name in ("score", "blocks", "repair")
        }
        last = {"repair": phases.pop("repair")} if "repair" in phases else {}
        rounds = self._num_rounds(prunable(work), sizes_alike(work, keep=target))
        return {**phases, **levels, "search": Passes(flops=None, times=rounds + 1), **last}

    def _num_rounds(self, axes: Sequence[Axis], base: Mapping[str, int]) -> int:
        """Rounds after the first."""
        if self.rounds:
            return self.rounds
        kinds = [[base[axis.name] for axis in axes if axis.kind == kind] for kind in ("attentions", "mlps")]
        return max(1, *(int(sizes.count(0) * (len(sizes) - sizes.count(0)) / 1.5) for sizes in kinds))

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """Draws of calibration text: one for the scores, one to measure candidates on."""
        return 2 if reached > target else 0

    def steps(self, work: Work, target: int) -> Iterator[Change | Searched]:
        """Search and report after every round; then yield one cut."""
        if work.num_params <= target:
            return
        axes, where = prunable(work), {"stage": work.state.stage, "iteration": work.iteration}
        with work.state.clock("score"):
            batches = work.batches()
            scores, loss = scores_of(work, batches, **where)
            text = work.batches(ahead=1)
            same = all(torch.equal(batch, other) for batch, other in zip(batches, text, strict=True))
            if same and evidence_of(work) is not Evidence.WEIGHTS:
                work.warn_of_stage(
                    "the search measures candidates on the text that the scores have read, since there is no other; name a text as "
                    "calibration.source, and leave calibration.ids out"
                )
            keep = target - repair_parameters(work)
            base = sizes_alike(work, keep=keep)
            space = Space.around(axes, base, level=self.level, multiple=work.multiple_of)
            weights = _repaired_weights(work, axes, scores, space, batches) if self.on_repaired else {}
            judge = _Judge(work, axes, scores, text, self, weights)
            if self._found.stage != work.state.stage:
                self._found = _Found(work.state.stage)
            yield from self._search(work, axes, space, judge, keep)
        best = self._found.population[0].sizes
        mask = Mask.of_sizes(axes, scores, best)
        if not math.isfinite(loss):  # the metric reads no text
            loss = work.loss({}, text)
        repaired(work, mask, batches, **where)
        self._found = _Found()
        yield Change(mask, loss, {"sizes": dict(best)})

    def _search(self, work: Work, axes: Sequence[Axis], space: Space, judge: "_Judge", keep: int) -> Iterator[Searched]:
        so_far = self._found
        chat = functools.cache(lambda: load(self.model, device=work.model.device, any_family=True))
        propose = parts.bind("proposal", self.proposals, model=chat if self._is_here else self.model, warn=work.warn)
        rounds = self._num_rounds(axes, space.base)
        while so_far.done <= rounds:
            draw = random.Random((work.recipe.seed * 1_000_003 + work.state.stage) * 100_003 + so_far.done)
            if self.redraw:
                judge.draw(draw)
            if so_far.done == 0 and self.starts:
                candidates = [space.drawn(draw) for _ in range(self.starts)]
            elif so_far.done == 0:  # the start and its neighbours
                candidates = [space.base, *(space.swapped(space.base, draw, 4) for _ in range(self.population - 1))]
            else:
                candidates = world.on_main(lambda: propose(so_far.population, space, draw, self.offspring))  # noqa: B023
            measured_before = {tuple(candidate.sizes.values()) for candidate in so_far.population}
            distinct = {tuple(sizes.values()): sizes for sizes in reversed(candidates)}  # of equal ones the first
            candidates = [sizes for key, sizes in reversed(distinct.items()) if key not in measured_before]
            small = [sizes for sizes in candidates if params_of(work, axes, sizes) <= keep]
            measured = judge.little(small, work.progress("search", stage=work.state.stage))
            staying = so_far.population
            again = [*_best(measured)[: self.finalists], *(staying if self.redraw else [])]
            whole = judge.whole([candidate.sizes for candidate in again])
            so_far.evaluations += len(measured) + len(whole)
            so_far.population = _best([*([] if self.redraw else staying), *whole])[: self.population]
            if not so_far.population:
                raise RunError(
                    f"none of {len(measured)} candidates has a finite loss; set dtype=float32, or keep more of the model"
                )
            so_far.done += 1
            finite = [candidate.loss for candidate in measured if math.isfinite(candidate.loss)]
            losses = finite or [so_far.population[0].loss]
            yield Searched(
                stage=work.state.stage, done=so_far.done, of=rounds + 1, evaluations=so_far.evaluations,
                best=so_far.population[0].loss, mean=sum(losses) / len(losses),
                sizes={name: float(size) for name, size in so_far.population[0].sizes.items()},
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The stage, the rounds and evaluations done, and the population."""
        return self._found.to_json() if self._found.stage else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        if "population" in state:
            self._found = _Found.from_json(state)

    def fit(self, work: Work) -> None:
        """Restart the stage's search, because the recipe or a text changed."""
        self._found = _Found()


@dataclass
class _Found:
    """How far a search is: rounds done, and the best candidates by their fitness on the whole text, best first."""

    stage: int = 0
    done: int = 0
    evaluations: int = 0
    population: list[Candidate] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        population = [{"sizes": dict(candidate.sizes), "loss": candidate.loss} for candidate in self.population]
        return {"stage": self.stage, "done": self.done, "evaluations": self.evaluations, "population": population}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "_Found":
        population = [Candidate(candidate["sizes"], candidate["loss"]) for candidate in data["population"]]
        return cls(data["stage"], data["done"], data["evaluations"], population)


_Piece = tuple[Tensor, Tensor | None]
"""Token ids, [batch, length]; with `fitness=kl` also the input of the unpruned model's head for them, [batch, length, width]."""
Sizes = Mapping[str, int]


class _Judge:
    """Measures candidates: their loss on the text, or how far their predictions are from those of the unpruned model.

    The text goes through one layer after the other, once for all candidates that are alike up to there.
    """

    def __init__(
        self, work: Work, axes: Sequence[Axis], scores: Scores, text: Sequence[Tensor], how: Search, weights: "_Weights"
    ) -> None:
        self._work, self._axes, self._scores, self._weights, self._how = work, axes, scores, weights, how
        self._task = cast(CausalLM, work.task)
        self._width = self._task.head(work.model).in_features
        self._text: list[_Piece] = [(batch, None) for batch in text]
        if how.fitness == "kl":
            with as_found(work.model, set()):
                ((_, leaving),) = self._leaving([{}], text)
            self._text = [(batch, self._predicting(batch, hidden)) for batch, hidden in zip(text, leaving, strict=True)]
        self._little, self._more = _first(self._text, how.tokens), _first(self._text, how.final_tokens)

    def draw(self, draw: random.Random) -> None:
        """Draw the sequences that candidates are measured on, and those for the finalists."""
        rows: list[_Piece] = []
        for batch, goal in self._text:
            goals = [None] * len(batch) if goal is None else goal.split(1)
            rows += zip(batch.split(1), goals, strict=True)
        for_all, for_finalists = (draw.sample(rows, len(rows)) for _ in range(2))
        self._little = _joined(_first(for_all, self._how.tokens))
        self._more = _joined(_first(for_finalists, self._how.final_tokens))

    def little(self, candidates: Sequence[Sizes], tell: Callable[[int, int], None]) -> list[Candidate]:
        """Fitness on the first `tokens` tokens, rounded up to whole batches or, if drawn, to whole sequences."""
        return self._measured(candidates, self._little, tell)

    def whole(self, candidates: Sequence[Sizes]) -> list[Candidate]:
        """Fitness on `final_tokens` tokens, or on the whole draw of text."""
        return self._measured(candidates, self._more, lambda done, of: None)

    def _measured(self, candidates: Sequence[Sizes], text: Sequence[_Piece], tell: Callable[[int, int], None]) -> list[Candidate]:
        work, pieces, measured = self._work, world.share(text), list[Candidate]()
        predicted = work.task.num_predicted([batch for batch, _ in text])
        room = HIDDEN_BYTES // (2 if is_shelved(work.model) else 16)  # before a layer, and as much after it
        most = max(1, room // (4 * self._width * max(1, sum(batch.numel() for batch, _ in text))))
        narrow = computed_in(work.model.device, work.recipe.dtype)
        with as_found(work.model, set()):
            for first in range(0, len(candidates), most):
                together = candidates[first : first + most]
                leaving = self._leaving(together, [batch for batch, _ in pieces])
                with fetched(work.task.head(work.model), narrow=narrow):
                    for sizes, hidden in leaving:
                        total = torch.zeros((), dtype=torch.float64)
                        for (batch, goal), left in zip(pieces, hidden, strict=True):
                            total += self._loss(batch, left, goal)
                        world.sum_in_place(total)
                        measured.append(Candidate(dict(sizes), float(total) / predicted))
                        tell(len(measured), len(candidates))
        return measured

    @torch.no_grad()
    def _leaving(self, candidates: Sequence[Sizes], batches: Sequence[Tensor]) -> list[tuple[Sizes, list[Tensor]]]:
        """The hidden states of each batch after the last layer, for each candidate; {} stands for the unpruned model."""
        work, task, dtype = self._work, self._work.task, self._work.recipe.dtype
        flows = streams(work.model, batches, task=task, dtype=dtype)
        states: dict[tuple[Any, ...], list[Tensor]] = {(): [flow.hidden for flow in flows]}
        of_candidate: list[tuple[Any, ...]] = [()] * len(candidates)
        for index, layer in enumerate(decoder_layers(work.model)):
            axes = [axis for axis in self._axes if axis.layer == index]
            above: dict[tuple[Any, ...], list[Tensor]] = {}
            with fetched(layer):
                for number, sizes in enumerate(candidates):
                    below = of_candidate[number]
                    here = {axis.name: sizes[axis.name] for axis in axes if axis.name in sizes}
                    of_candidate[number] = alike = (*below, *here.values())
                    if alike in above:
                        continue
                    mask = Mask.of_sizes([axis for axis in axes if axis.name in here], self._scores, here)
                    with (
                        _standing_in(work.model, self._weights, here),
                        gated(work.model, work.axes, mask),
                        casting_once(layer),
                    ):
                        above[alike] = [flow.run(layer, index, hidden) for flow, hidden in zip(flows, states[below], strict=True)]
            states = above
        return [(sizes, states[alike]) for sizes, alike in zip(candidates, of_candidate, strict=True)]

    def _predicting(self, batch: Tensor, leaving: Tensor) -> Tensor:
        """What enters the head, [batch, length, width], of a batch whose hidden states after the last layer are `leaving`."""
        work = self._work
        return read_above(work.model, batch, leaving, task=work.task, dtype=work.recipe.dtype)

    @torch.no_grad()
    def _loss(self, batch: Tensor, leaving: Tensor, goal: Tensor | None) -> Tensor:
        """The sum over predictions of the loss, or of KL(unpruned model ‖ candidate)."""
        work, task, dtype = self._work, self._task, self._work.recipe.dtype
        if goal is None:
            return loss_above(work.model, batch, leaving, task=task, dtype=dtype).double().cpu()
        batch = batch.to(work.model.device)
        with precision(work.model.device, dtype):
            entering, targets = task.predicting(self._predicting(batch, leaving), batch, None)
            aim, _ = task.predicting(goal, batch, None)
            total = task.of_logits(work.model, entering, kl_of_logits(targets, aim, work.model, task))
        return total.double().cpu()


def _first(text: Sequence[_Piece], tokens: int) -> list[_Piece]:
    """The first pieces, until they have so many tokens; all for 0."""
    before = accumulate((ids.numel() for ids, _ in text), initial=0)
    return [piece for piece, read in zip(text, before, strict=False) if not tokens or read < tokens]


def _joined(rows: Sequence[_Piece]) -> list[_Piece]:
    """The same rows in batches."""
    joined: list[_Piece] = []
    for batch in batches_of([ids for ids, _ in rows], max_tokens=MICRO_TOKENS):
        done = sum(len(ids) for ids, _ in joined)
        goals = [goal for _, goal in rows[done : done + len(batch)] if goal is not None]
        joined.append((batch, torch.cat(goals) if goals else None))
    return joined


_Weights = dict[str, tuple[str, dict[int, Tensor]]]
"""Axis name -> (name of the weight at its gate, {units kept: the repaired weight})."""


def _repaired_weights(work: Work, axes: Sequence[Axis], scores: Scores, space: Space, batches: Sequence[Tensor]) -> _Weights:
    """The weights that the recipe's repair gives the layers at gates, for every size that a candidate may have."""
    repair = parts.bind("repair", work.recipe.repair or "", task=work.task, dtype=work.recipe.dtype, warn=work.warn_of_stage)
    if "factors" in repair.keywords:
        repair.keywords["factors"] = 0
    inside = [axis for axis in axes if axis.gate.is_linear]
    weights: _Weights = {axis.name: (f"{axis.gate.module}.weight", {}) for axis in inside}
    whole = {name: work.model.get_parameter(name).detach().clone() for name, _ in weights.values()}
    levels = list(zip(*(space.levels(axis.name) for axis in inside), strict=True))
    tell = work.progress("levels", stage=work.state.stage)
    for number, level in enumerate(levels, start=1):
        sizes = {axis.name: size for axis, size in zip(inside, level, strict=True)}
        repair(work.model, work.axes, Mask.of_sizes(inside, scores, sizes), batches)
        for axis_name, (name, of_size) in weights.items():
            parameter = work.model.get_parameter(name)
            of_size.setdefault(sizes[axis_name], parameter.detach().clone())
            parameter.data.copy_(whole[name])
        tell(number, len(levels))
    return weights


@contextmanager
def _standing_in(model: Any, weights: _Weights, sizes: Mapping[str, int]) -> Iterator[None]:
    """While the context lasts, the layers at the gates of these axes have the weights that were repaired for their sizes."""
    here = {weights[axis_name][0]: weights[axis_name][1][size] for axis_name, size in sizes.items() if axis_name in weights}
    kept = {name: model.get_parameter(name).data for name in here}
    try:
        for name, numbers in here.items():
            model.get_parameter(name).data = numbers
        yield
    finally:
        for name, data in kept.items():
            model.get_parameter(name).data = data


def _best(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with a finite loss, the lowest first."""
    return sorted((candidate for candidate in candidates if math.isfinite(candidate.loss)), key=lambda candidate: candidate.loss)
