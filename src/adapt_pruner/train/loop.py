"""The training loop of one stage, on a learning-rate curve that spans all stages.

`steps` is a generator. It yields after each backward pass, when the gradients are there, and before the optimiser's step:

    for step in steps(model, feed, optimizer, progress, how, until=stop):
        ...            # look at gradients, change them, take units away
        step.take()    # the optimiser's step; progress moves on
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adapt_pruner.core.model.feed import Feed, Goal, Taken
from adapt_pruner.core.model.hooks import attached
from adapt_pruner.core.model.precision import precision
from adapt_pruner.core.model.task import CAUSAL_LM, Task
from adapt_pruner.core.system import world
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError, of_all
from adapt_pruner.train.objectives import BesideNll

MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}  # tokens in one forward and backward; a larger batch is accumulated
_STEPS = 32  # the pace is that of the last so many steps, since on a shared machine it changes
_SMOOTHING = 0.9  # of the loss that the divergence guard watches

Objective = Callable[..., Tensor]
"""(model, ids, predicted) -> the sum of a loss over the predicted tokens, differentiable."""


@dataclass
class TrainState:
    """Where training stands, over all stages. With model and optimiser, this decides the next step.

    It holds no random state: each step has a seed made of the run's seed, the step's number and the process.
    """

    tokens: int = 0
    steps: int = 0
    rows: int = 0
    smoothed: float | None = None  # the loss of this stage, and the lowest it has been; for the divergence guard
    lowest: float = math.inf

    def forget_losses(self) -> None:
        """Forget, in place, the losses so far: of the stage before, or of a model that had more units."""
        self.smoothed, self.lowest = None, math.inf


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, the same in all its stages.

    Attributes:
        objective: a function of `train.objectives`.
        heard: where the objective's last call left the loss that the feed hears; None if the feed hears the objective.
        schedule: share of the run done → share of `lr`.
        lr: peak learning rate.
        batch_rows: rows of one optimiser step, of all processes together; the last of a stage may have fewer.
        micro_tokens: tokens in one forward and backward of a process; by default 2,048 on a CPU, 16,384 on a GPU.
        clip: largest global norm of the gradient of the model's parameters; infinite clips nothing.
        in_backward: whether a parameter takes its step as soon as its gradient is there. Then no gradient is left when a step is
            yielded, and the loss is guarded after it.
        max_rise: nats by which the smoothed loss may exceed its lowest in this stage.
        dtype: precision of matrix products (see `core.model.precision.precision`); weights and moments stay float32.
        seed: of dropout, where there is any.
        task: what the model learns; it says how many predictions of a batch count.
        seconds_left: how many seconds training may still take; None for no deadline. With a deadline training may end early, and
            the learning-rate curve with it: the share of the run done is then a share of the tokens that fit.
        stage_seconds_left: how many of these are left to the stage that trains now; None for all.
        expected: tokens of the whole run that should fit, as long as the pace is not known; infinite if nobody can say.
        towards: the objective of rows that have a goal (see `core.model.feed.Goal`); None if no row has one.
    """

    objective: Objective
    schedule: Callable[[float], float]
    lr: float
    batch_rows: int
    micro_tokens: int | None = None
    clip: float = 1.0
    in_backward: bool = False
    max_rise: float = math.inf
    heard: BesideNll | None = None
    dtype: str = "auto"
    seed: int = 0
    task: Task = CAUSAL_LM
    seconds_left: Callable[[], float] | None = None
    stage_seconds_left: Callable[[], float] | None = None
    expected: float = math.inf
    towards: Callable[[Goal], Objective] | None = None


@dataclass
class Step:
    """One optimiser step, after its backward pass: gradients are clipped and in place until `take` is called.

    Attributes:
        step: its number, over all stages, from 1.
        tokens: tokens read over all stages, this step included.
        loss: mean of the objective over the predicted tokens of all processes, in nats.
        lr: learning rate of the step.
        gradient_norm: global norm of the gradient before clipping.
        reach: tokens that will have been read when the time is up, even if the text has fewer; infinite without a deadline or
            before the pace is known.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    gradient_norm: float
    reach: float = math.inf
    _take: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
    _taken: bool = field(default=False, repr=False, compare=False)
    _then: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def take(self) -> None:
        """Take the step, in place, and free the gradients. The loop calls this if its caller has not."""
        if not self._taken:
            self._taken = True
            self._take()
            self._then()

    def afterwards(self, do: Callable[[], None]) -> None:
        """Call `do` as soon as the step has been taken."""
        self._then = do


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    bits: int = 32,
    torchao: str | None = None,
    compiled: bool = False,
) -> Optimizer:
    """AdamW, by default as in the authors' scripts: eps 1e-8; decay on matrices only, frozen parameters left out.

    Args:
        model: its parameters are trained.
        lr: learning rate.
        weight_decay: of matrices.
        betas: shares of the past in the running means of the gradient and of its square.
        bits: of a moment: 32, 8 or 4.
        torchao: the setting for which torchao's arithmetic is needed; None for torch's own AdamW.
        compiled: whether torchao's arithmetic is compiled.

    Raises:
        UsageError: torchao is needed and not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if torchao is None:
        return AdamW(groups, lr=lr, betas=betas, fused=True)
    try:
        from adapt_pruner.train.lowbit import LowBitAdamW
    except ImportError as error:
        raise UsageError(f"{torchao} needs the package torchao; {to_install('torchao')}") from error
    return LowBitAdamW(groups, lr=lr, betas=betas, bits=bits, compiled=compiled)


def whole_batches(ends: Sequence[int], *, batch_rows: int) -> list[int]:
    """The rows at which stages end, each but the last rounded to the nearest whole batch, halves up.

    So no stage but the last takes a step of fewer rows, which would have the same learning rate and a noisier gradient. The last
    stage still ends with the last row: the run reads as many tokens as it was asked to. If a stage is shorter than a batch, no
    end moves.
    """
    rows = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    if any(0 < each < batch_rows for each in rows):
        return list(ends)
    return [(end + batch_rows // 2) // batch_rows * batch_rows for end in ends[:-1]] + list(ends[-1:])


def steps(
    model: nn.Module, feed: Feed, optimizer: Optimizer, progress: TrainState, how: TrainConfig, *, until: int
) -> Iterator[Step]:
    """Train, in place, on the next rows of `feed` until `until` rows have been read or time is up; `progress` moves along.

    A step takes `how.batch_rows` rows, spread over the processes, and minimises the mean of the objective over all their
    predicted tokens. Its learning rate is lr · schedule(tokens at its middle / tokens of the run). With a deadline, the tokens of
    the run are those that fit in the time.

    The optimiser may also hold groups of other parameters on which the objective depends (masks, multipliers). A
    group with `maximize` ascends; one with `scale` has its rate multiplied by that. Only the model's gradients are clipped.

    Args:
        model: causal LM, float32 weights; plain on every process, or as `train.spread` shards it.
        feed: gives the training text.
        optimizer: over the model's parameters that train, and any others.
        progress: where training stands.
        how: everything else.
        until: number of rows, over all stages, after which to stop.

    Yields:
        Each step, after its backward pass and before it is taken.

    Raises:
        RunError: the loss or the gradient is not finite, or the loss has exploded. The weights are those after the last step.
    """
    device = next(model.parameters()).device
    was_training, random_state = model.training, torch.get_rng_state()
    model.train()
    pace = Pace(how.seconds_left, of_stage=how.stage_seconds_left, expected=how.expected)
    try:
        while progress.rows < until and not pace.is_up():
            reach = pace.reach(progress.tokens)
            rows = feed.take(min(how.batch_rows, until - progress.rows))
            torch.manual_seed(_seed(how, progress, process=world.rank()))
            optimizer.zero_grad(set_to_none=True)
            batch = _Batch(rows, how, device=device, by_domain=feed.wants_losses)
            assert len(batch.parts) == 1 or not how.in_backward
            of_model = {id(parameter) for parameter in model.parameters()}  # a cut between two steps may replace them
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            others = [parameter for parameter in held if id(parameter) not in of_model]
            # The rate is taken in the middle of the step, so that no step of a run is at an end of the curve.
            tokens = progress.tokens + rows.num_tokens
            reach = max(tokens, reach)
            rate = how.lr * how.schedule(min(1.0, (progress.tokens + rows.num_tokens / 2) / min(feed.num_tokens, reach)))
            with _stepping(model, optimizer, rate) if how.in_backward else nullcontext(None) as squares:
                loss = _accumulate(model, batch, how, others, device=device)
            if squares is None:
                norm = _full(torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip))
            else:
                norm = torch.tensor(math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan)
            _guard(float(loss), float(norm), progress, max_rise=how.max_rise, lr=how.lr)

            def take(rows: Taken = rows, batch: _Batch = batch, rate: float = rate) -> None:
                if not how.in_backward:
                    torch.manual_seed(_seed(how, progress, process=-1))  # the same on all processes, which round weights alike
                    _set_rate(optimizer, rate)
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.tokens += rows.num_tokens
                progress.steps, progress.rows = progress.steps + 1, progress.rows + len(rows)
                pace.taken(progress.tokens)
                if feed.wants_losses:
                    feed.tell(batch.losses)

            step = Step(progress.steps + 1, tokens, float(loss), rate, float(norm), reach, take)
            yield step
            step.take()
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
        torch.set_rng_state(random_state)


def _seed(how: TrainConfig, progress: TrainState, *, process: int) -> int:
    return (how.seed * 1_000_003 + progress.steps) * 4099 + process % 4099


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        rate_of_group = rate * group.get("scale", 1.0)
        if isinstance(group["lr"], Tensor):  # torchao's, whose compiled code would be made anew for each number
            group["lr"].fill_(rate_of_group)
        else:
            group["lr"] = rate_of_group


@contextmanager
def _stepping(model: nn.Module, optimizer: Optimizer, rate: float) -> Iterator[list[float]]:
    """Within this context each parameter takes its step in the backward pass, and its gradient is freed.

    Yields the squared norms of the gradients so far. A parameter whose gradient is not finite takes no step.
    """
    squares: list[float] = []

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares.append(float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)) ** 2)
        if math.isfinite(squares[-1]):
            optimizer.step()  # no other parameter has a gradient
        parameter.grad = None

    _set_rate(optimizer, rate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with attached(parameter.register_post_accumulate_grad_hook(step) for parameter in trained):
        yield squares


@dataclass(frozen=True)
class _Part:
    """Some rows of a step, for one forward and backward pass.

    Attributes:
        ids: int64 [rows, width].
        predicted: bool, the same shape; None if all tokens are predicted.
        domain: the text that they come from; empty if nobody asks.
        goal: of the predicted tokens; None for rows that are learnt by the recipe's objective.
    """

    ids: Tensor
    predicted: Tensor | None
    domain: str
    goal: Goal | None = None


class _Batch:
    """This process's part of the rows of a step, in parts of at most `micro_tokens`.

    Every process makes the same number of passes, since the processes of a sharded model communicate in each pass. A process
    with fewer rows reads a row again and predicts nothing of it. With `by_domain` all rows of a part come from one text. Either all
    rows of a part have a goal or none has.

    Attributes:
        parts: what is passed forward and backward at a time.
        num_predicted: tokens predicted by all processes.
        losses: text -> the sum of its losses over all processes, and the tokens predicted; filled as gradients are computed.
    """

    def __init__(self, rows: Taken, how: TrainConfig, *, device: torch.device, by_domain: bool = False) -> None:
        each = -(-len(rows) // world.size())
        first = world.rank() * each
        looked_at = min(len(rows) - 1, first)
        stop = min(len(rows), looked_at + each)
        ids, predicted = rows.batch(looked_at, stop)
        if first >= len(rows):
            predicted = torch.zeros_like(ids, dtype=torch.bool)
        micro_tokens = how.micro_tokens or MICRO_TOKENS["cpu" if device.type == "cpu" else "cuda"]
        micro = max(1, micro_tokens // ids.shape[1])
        micro = -world.most_of(-micro)  # chat rows differ in width from process to process
        domains = list(rows.domains(looked_at, stop)) if by_domain else [""] * len(ids)
        goals = [None] * len(ids) if how.towards is None or first >= len(rows) else list(rows.goals(looked_at, stop))
        self.losses: dict[str, tuple[float, float]] = {}
        self.domains = sorted(set(rows.domains(0, len(rows)))) if by_domain else [""]
        self.parts: list[_Part] = []
        for domain in self.domains:
            of_domain = [row for row, name in enumerate(domains) if name == domain]
            without = [row for row in of_domain if goals[row] is None]
            width, at_once = ids.shape[1], micro
            if len(without) < len(of_domain) and without and predicted is not None:  # those with a goal may be wider
                width = int(predicted[without].any(0).nonzero().max()) + 1
                at_once = max(1, micro_tokens // width)
            for start in range(0, len(without), at_once):
                chosen = without[start : start + at_once]
                counts = None if predicted is None else predicted[chosen, :width].to(device)
                self.parts.append(_Part(ids[chosen, :width].to(device), counts, domain))
            if predicted is not None:
                self._add_goals(ids, predicted, {row: goals[row] for row in of_domain}, domain, micro_tokens, device)
        nothing = _Part(ids[:1].to(device), torch.zeros_like(ids[:1], dtype=torch.bool, device=device), self.domains[0])
        uneven = by_domain or how.towards is not None
        self.parts += [nothing] * (self._most(-(-each // micro), uneven=uneven) - len(self.parts))
        count = torch.tensor(sum(how.task.num_predicted([part.ids], part.predicted) for part in self.parts), dtype=torch.float64)
        world.sum_in_place(count)
        self.num_predicted = max(1.0, float(count))

    def _add_goals(
        self,
        ids: Tensor,
        predicted: Tensor,
        goals: Mapping[int, Goal | None],
        domain: str,
        micro_tokens: int,
        device: torch.device,
    ) -> None:
        """Add parts of the rows that have a goal: rows of about equal length together, without what follows the last prediction."""
        widths = {row: int(predicted[row].nonzero().max()) + 1 for row, goal in goals.items() if goal is not None}
        chosen: list[int] = []
        for row in [*sorted(widths, key=lambda row: widths[row]), None]:
            if chosen and (row is None or (len(chosen) + 1) * widths[row] > micro_tokens):
                width = widths[chosen[-1]]
                those = [goal for goal in map(goals.get, chosen) if goal is not None]
                goal = Goal(torch.cat([goal.tokens for goal in those]), torch.cat([goal.logs for goal in those]))
                part = _Part(ids[chosen, :width].to(device), predicted[chosen, :width].to(device), domain, goal)
                self.parts.append(part)
                chosen = []
            if row is not None:
                chosen.append(row)

    def _most(self, at_least: int, *, uneven: bool) -> int:
        """How many passes every process makes."""
        return world.most_of(len(self.parts)) if uneven else at_least


def _accumulate(model: Any, batch: _Batch, how: TrainConfig, others: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """Add, in place, the gradient of the batch's mean loss over all processes; returns that loss."""
    task = how.task
    loss = torch.zeros((), dtype=torch.float64)
    of_domain = torch.zeros(len(batch.domains), 2, dtype=torch.float64)
    sharded = hasattr(model, "as_forward")  # then reduce-scatter takes the mean over the processes
    scale = (world.size() if sharded else 1) / batch.num_predicted
    with precision(device, how.dtype):  # around all parts, so that weights are cast to bfloat16 once per step
        for part in batch.parts:
            objective = how.objective if part.goal is None or how.towards is None else how.towards(part.goal)
            nats = (
                model.as_forward(objective, part.ids, part.predicted) if sharded else objective(model, part.ids, part.predicted)
            )
            loss += nats.detach().double().cpu()
            heard = float(nats.detach()) if how.heard is None else how.heard.nll
            where = of_domain[batch.domains.index(part.domain)]
            where += torch.tensor([heard, task.num_predicted([part.ids], part.predicted)], dtype=torch.float64)
            with torch.autocast(device.type, enabled=False):
                (nats * scale).backward()
    for other in others if sharded else ():
        if other.grad is not None:
            other.grad /= world.size()
    summed = others if sharded else [*model.parameters(), *others]
    world.sum_in_place(*(parameter.grad for parameter in summed if parameter.grad is not None))
    world.sum_in_place(loss, of_domain)
    batch.losses = {domain: (float(nats), float(count)) for domain, (nats, count) in zip(batch.domains, of_domain, strict=True)}
    return loss / batch.num_predicted


def _full(norm: Any) -> Tensor:
    full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full


def _guard(loss: float, norm: float, progress: TrainState, *, max_rise: float, lr: float) -> None:
    """Raise before a step with a bad gradient would spoil the weights."""
    at = (
        f"at step {progress.steps + 1}; lower training.lr (now {lr:g}) or check the training text, then start in another folder, or "
        "remove the checkpoints written since the loss went wrong and continue with --force-recipe"
    )
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise of_all(RunError(f"the training loss became {loss} (gradient norm {norm}) {at}"))
    smoothed = loss if progress.smoothed is None else _SMOOTHING * progress.smoothed + (1 - _SMOOTHING) * loss
    if smoothed > progress.lowest + max_rise:
        raise of_all(
            RunError(
                f"the training loss has exploded: {smoothed:.2f} (smoothed) is more than training.max_rise {max_rise:g} "
                f"above {progress.lowest:.2f}, the lowest of this stage, {at}"
            )
        )
    progress.smoothed, progress.lowest = smoothed, min(progress.lowest, smoothed)


class Pace:
    """How many tokens fit before a deadline; the slower the pace, the earlier the learning-rate curve ends.

    The pace is measured by the time left, so it includes all that happens between two steps (saving, the caller's work). The
    first step does not count, since it includes preparation. Every process uses the clock of the main process.
    """

    def __init__(
        self,
        seconds_left: Callable[[], float] | None,
        *,
        of_stage: Callable[[], float] | None = None,
        expected: float = math.inf,
    ) -> None:
        """Start the clock.

        Args:
            seconds_left: how many seconds training may still take; None stands for no deadline.
            of_stage: how many of these are left to the present stage; None stands for all.
            expected: tokens of the whole run that should be read by then, as long as the pace is not known.
        """
        self._seconds_left, self._of_stage, self._expected = seconds_left, of_stage or seconds_left, expected
        self._marks: deque[tuple[float, int]] = deque(maxlen=_STEPS + 1)  # (seconds left, tokens read) after each step

    def taken(self, tokens: int) -> None:
        """Note that a step was taken; `tokens` of the whole run are now read."""
        if self._seconds_left is not None:
            self._marks.append((self._left(), tokens))

    def reach(self, tokens: int) -> float:
        """The tokens of the whole run that will have been read when the time is up, at the pace so far; `tokens` are read now.

        Infinite without a deadline; before there is a pace it is what was expected.
        """
        if self._seconds_left is None:
            return math.inf
        if len(self._marks) < 2:
            return self._expected
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return tokens + (after - before) / max(first - last, 1e-9) * max(0.0, self._left())

    def is_up(self) -> bool:
        """Whether the stage has no time for another step: less than half of what each of the last steps took, on average."""
        if self._of_stage is None:
            return False
        each = (self._marks[0][0] - self._marks[-1][0]) / (len(self._marks) - 1) if len(self._marks) > 1 else 0.0
        return world.agreed(self._of_stage()) <= each / 2

    def _left(self) -> float:
        assert self._seconds_left is not None
        return world.agreed(self._seconds_left())
