"""Train a run's model between its cuts, with teacher, optimiser, adapters, shards, kernels and checkpoints."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load, tokens_of
from adapt_pruner.checkpoint.vocabulary import smaller_tokenizer
from adapt_pruner.core import events
from adapt_pruner.core.events.words import compact
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.feed import Goal
from adapt_pruner.core.model.kinds import OF_THE_MODEL
from adapt_pruner.core.model.layers import decoder_layers
from adapt_pruner.core.model.precision import cast_weights, uses_bfloat16
from adapt_pruner.core.system import world
from adapt_pruner.core.system.memory import keeping_freed, peak_bytes
from adapt_pruner.core.system.processes import deferred
from adapt_pruner.errors import UsageError
from adapt_pruner.grow import grown
from adapt_pruner.recipe import parts
from adapt_pruner.run.checkpoints import called
from adapt_pruner.train.adapters import adapted
from adapt_pruner.train.kernels import kernels, stored_as
from adapt_pruner.train.loop import Objective, Step, TrainConfig, make_optimizer, steps
from adapt_pruner.train.objectives import BesideNll, kl_to_goal, lm, named_loss
from adapt_pruner.train.spread import full_state, gathering, load_moments, spread, widen
from adapt_pruner.work import Work

_SLOW = 2 / 3  # share of the tokens asked for: a warning says if less than this fits in the time
_AFTERWARDS = 3.0  # seconds for the model card and the page, which read no text

Around = Callable[[Objective], Objective]


class Save(Protocol):
    """What writes a checkpoint; called on the main process."""

    def __call__(
        self, name: str, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, log_size: int | None = None
    ) -> None:
        """Write it.

        Args:
            name: of the checkpoint.
            weights: whole tensors by name.
            moments: the same.
            log_size: bytes of the run's log that a run which continues from here keeps; None for all of it.
        """


class Trainer:
    """Trains the model of a run between its cuts and saves checkpoints; trains nothing if the recipe has no training.

    Masked weights (`Work.weight_mask`) stay zero, except while a reduction still learns which weights to mask.
    """

    def __init__(
        self,
        work: Work,
        *,
        save: Save | None = None,
        log_size: Callable[[], int] = lambda: 0,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start where the run stands.

        Args:
            work: the run; changed in place.
            save: writes a checkpoint; None if none are saved during the run.
            log_size: bytes of the run's log at this moment.
            tensors: moments and LoRA adapters of the checkpoint that the run continues.
        """
        self._work, self._save, self._log_size, self._tensors = work, save, log_size, dict(tensors or {})
        self._saved, self._last_save = time.monotonic(), 0.0
        self._loss_is: dict[str, Any] = {}  # a field of the events of steps; none for the cross-entropy
        self._unsaved: tuple[str, int, dict[str, Any], int] | None = None  # see `note_trained`
        feed, training = work.data.feed, work.recipe.training
        if feed is not None and training.step_in_backward and (feed.wants_losses or work.data.has_goals):
            what = "answers that the dense model wrote" if work.data.has_goals else f"feed {training.feed!r}"
            raise UsageError(
                f"training.step_in_backward needs a batch in one pass, and {what} take several; set step_in_backward to false"
            )
        if feed is not None and training.lora is None:
            work.optimizer = self._new_optimizer()
            self._tensors = {}  # they would take as much memory again
        self._working: tuple[Any, Any] = (work.model, work.optimizer)
        work.training = self.train_steps

    def before_cuts(self) -> None:
        """Free the optimiser's moments if the recipe does not carry them through cuts; scoring can then use their memory."""
        if self._work.optimizer is not None and self._work.recipe.moments == "reset":
            self._work.optimizer.state.clear()
        elif self._work.optimizer is not None:
            widen(self._work.model, self._work.optimizer)

    def begin_stage(self) -> None:
        """Prepare a stage's training after its cuts, and save a checkpoint. New biases are trained without weight decay."""
        work = self._work
        work.state.progress.forget_losses()
        if work.optimizer is not None:
            trained = {id(parameter) for group in work.optimizer.param_groups for parameter in group["params"]}
            if not trained & {id(parameter) for parameter in work.model.parameters()}:  # a reduction has replaced all parameters
                work.optimizer = self._new_optimizer()
                self._working = (work.model, work.optimizer)
            else:
                work.train_new_parameters()
        if work.data.feed is not None:
            self.save(called(work.state.stage, pruned=True))

    def train(self, *, until: int) -> None:
        """Train the model, in place, up to row `until` of the text, or until only the time for the rest of the run is left."""
        work, progress = self._work, self._work.state.progress
        unmerged = work.recipe.training.lora is not None and bool(self._tensors)  # saved after the stage's last step
        if work.data.feed is None or (progress.rows >= until and not unmerged):
            return
        tokens = min(work.recipe.training.tokens, work.expected or work.recipe.training.tokens)
        in_time = work.recipe.minutes is not None
        for step in self.train_steps(until=until, in_time=in_time):
            if step.reach < _SLOW * tokens:
                work.warn_of_stage(
                    f"at this machine's speed there is time for about {compact(step.reach)} of the {compact(tokens)} tokens; the "
                    "learning rate comes down by then"
                )
        if in_time and progress.tokens == 0:
            work.warn(
                f"the {work.recipe.minutes:g} minutes were over before training began; give more minutes, or prune in fewer cuts (a larger step)"
            )

    def _seconds_left(self) -> float:
        """Seconds that this stage and all later ones may train.

        Time is kept to measure again, as at the start, and to write the result; and for what later stages do besides training.
        """
        work = self._work
        after = self._measured_at_start + self._last_save + _AFTERWARDS
        return 60 * (work.recipe.minutes or math.inf) - work.elapsed - after - self._besides_training()

    def _stage_seconds_left(self) -> float:
        """Seconds that this stage may train: by its end its share of the run's training has to be done, by tokens as planned."""
        work, left = self._work, self._seconds_left()
        tokens = [stage.tokens for stage in work.stages]
        share = sum(tokens[: work.state.stage]) / max(1, sum(tokens))
        if share == 1:
            return left
        _ = work.state.seconds  # brings `spent` up to now
        trained = work.state.spent["train"]
        return share * (trained + left) - trained

    @property
    def _measured_at_start(self) -> float:
        return float(self._work.state.figures.get("measuring_seconds", self._work.state.spent["evaluate"]))

    def _besides_training(self) -> float:
        """Seconds that later stages will prune, measure and save, if they go on as those so far."""
        work, state = self._work, self._work.state
        later = len(work.stages) - state.stage
        if later <= 0:
            return 0.0
        reached, spent = work.stages[state.stage - 1].params, state.spent
        removed = max(1, work.budget.total - reached)
        pruned = (spent["score"] + spent["repair"] + spent["cut"]) / removed * (reached - work.stages[-1].params)
        measured = max(0.0, spent["evaluate"] - self._measured_at_start) / (
            2 * state.stage - 1
        )  # after the cuts and the training
        return pruned + 2 * later * (measured + self._last_save)

    @property
    def expected_tokens(self) -> int:
        """Training tokens of the whole run: all of the feed, or about as many as are read by the end of its time."""
        feed = self._work.data.feed
        if feed is None:
            return 0
        in_time = math.inf if self._work.recipe.minutes is None else self._expected(self._seconds_left())
        return round(min(feed.num_tokens, in_time))

    def _expected(self, seconds_left: float) -> float:
        """Tokens of the whole run by the end of the time: by the pace of its training so far, else as the recipe expects."""
        read, took = self._work.state.progress.tokens, self._work.state.spent["train"]
        if read and took:
            return read + read / took * max(0.0, seconds_left)
        return self._work.expected or math.inf

    def train_steps(self, *, until: int, around: Around = lambda objective: objective, in_time: bool = False) -> Iterator[Step]:
        """Yield each step up to row `until` before it is taken; then take it, tell of it, and save a checkpoint if one is due.

        An interrupt (Ctrl-C, SIGTERM, SIGHUP) waits until the step is taken, and a checkpoint is written first.

        A reduction that removes units between steps, or trains more than weights, has this as `work.training`. `around` turns the
        recipe's objective into the one to train with. With `in_time` training ends when the stage has no more time left.
        """
        work, progress = self._work, self._work.state.progress
        assert work.data.feed is not None
        work.begins("train", stage=work.state.stage)
        with work.state.clock("train"), deferred(when=self._save is not None) as interrupts:
            began, tokens = time.perf_counter(), progress.tokens
            for step in self._steps(until=until, around=around, in_time=in_time):
                step.afterwards(partial(self._tell, step, began, tokens))
                yield step
                step.take()
                name = called(work.state.stage, cut=None if work.state.pruned else work.iteration - 1, step=step.step)
                if self._save is not None and world.most_of(interrupts.pending):
                    self.save(name)
                    interrupts.deliver()
                self.save_if_due(name)
            if work.state.pruned:  # while interrupts still wait: one that comes now finds something to rescue
                self.note_trained(called(work.state.stage))

    def _tell(self, step: Step, began: float, tokens: int) -> None:
        """Tell of a step that was taken; `began` is when this training began, and `tokens` how many had been read by then."""
        work = self._work
        speed = (step.tokens - tokens) / (time.perf_counter() - began)
        work.tell(events.Step(
            stage=work.state.stage, step=step.step, tokens=step.tokens, loss=step.loss, **self._loss_is, lr=step.lr,
            gradient_norm=step.gradient_norm, tokens_per_second=speed, peak_bytes=peak_bytes(self._working[0]),
        ))  # fmt: skip
        for event in work.data.feed.news() if work.data.feed is not None else ():
            work.tell(event)

    def _steps(self, *, until: int, around: Around, in_time: bool) -> Iterator[Step]:
        """Yield each step of the stage after its backward pass and before it is taken (see `train.loop.steps`)."""
        work, training, feed = self._work, self._work.recipe.training, self._work.data.feed
        assert feed is not None
        objective = parts.bind("objective", training.objective, teacher=work.data.teacher, task=work.task)
        goals = work.data.has_goals
        teacher = "the dense model" if training.teacher is None else "the teacher"
        heard = BesideNll(objective, work.task) if feed.wants_losses and (objective.func is not lm or goals) else None
        if name := named_loss(objective.func, objective.keywords, teacher=teacher, answers=goals):
            self._loss_is = {"loss_is": name}
        task: Any = work.task

        def towards(goal: Goal) -> Objective:
            objective = partial(kl_to_goal, goal=goal, task=task)
            return around(objective if heard is None else heard.beside(objective))

        how = TrainConfig(
            objective=around(heard or objective), heard=heard,
            schedule=parts.bind("schedule", training.schedule, **training.model_dump()),
            lr=training.lr, batch_rows=training.batch_rows, micro_tokens=work.pass_tokens,
            clip=math.inf if training.clip is None else training.clip, in_backward=training.step_in_backward,
            max_rise=training.max_rise, dtype="bfloat16" if training.weights == "bfloat16" else work.recipe.dtype, seed=work.recipe.seed, task=work.task,
            seconds_left=self._seconds_left if in_time else None, stage_seconds_left=self._stage_seconds_left if in_time else None,
            expected=world.agreed(self._expected(self._seconds_left())) if in_time else math.inf,
            towards=towards if goals else None,
        )  # fmt: skip
        with keeping_freed(), self._at_work() as (model, optimizer):
            yield from steps(model, feed, optimizer, work.state.progress, how, until=until)

    def save(self, name: str, *, log_size: int | None = None) -> None:
        """Write a checkpoint called `name`; a run that continues from it keeps `log_size` bytes of the log, or all."""
        if self._save is None:
            return
        work, began = self._work, time.monotonic()
        work.begins("save", stage=work.state.stage)
        with work.state.clock("save"):
            work.state.reduction = work.reduction.state()
            if work.data.feed is not None:
                work.state.feed = work.data.feed.state()
            weights, moments = full_state(*self._working)
            write = self._save
            world.on_main(lambda: write(name, weights, moments, log_size=log_size), helped=gathering(weights, moments))
        self._unsaved = None
        self._saved = time.monotonic()
        self._last_save = self._saved - began

    def note_trained(self, name: str) -> None:
        """Note that a stage is trained and that no checkpoint has this yet: if what follows fails, `rescued` writes `name`."""
        state = self._work.state
        self._unsaved = name, state.stage, copy.deepcopy(state.figures), self._log_size()

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """Within this context, an error or interrupt after training first writes a checkpoint from right after the training.

        One of several processes cannot: a checkpoint takes all of them, and the others may not have failed.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt):
            if self._unsaved is not None and self._save is not None and world.size() == 1:
                name, stage, figures, log_size = self._unsaved
                state = self._work.state
                state.stage, state.pruned = stage, True
                state.figures.clear()
                state.figures.update(figures)
                with suppress(Exception):  # the first error says more
                    self.save(name, log_size=log_size)  # what was measured since is measured again
            raise

    def save_if_due(self, name: str) -> None:
        """Write a checkpoint called `name` if `checkpoint_minutes` have passed since the last one."""
        due = time.monotonic() - self._saved >= self._work.recipe.checkpoint_minutes * 60
        if self._save is not None and world.agreed(due):
            self.save(name)

    def _new_optimizer(self) -> Optimizer:
        training = self._work.recipe.training
        optimizer = make_optimizer(
            self._work.model, lr=training.lr, weight_decay=training.weight_decay, betas=training.betas, bits=training.moment_bits,
            torchao=training.needs_torchao, compiled=training.compile,
        )  # fmt: skip
        load_moments(self._work.model, optimizer, self._tensors, stay=self._shares)
        return optimizer

    @property
    def _shares(self) -> bool:
        """Whether each process holds a share of the model while it trains."""
        return self._work.recipe.parallel == "fsdp" and world.size() > 1

    @contextmanager
    def _at_work(self) -> Iterator[tuple[Any, Any]]:
        """The model and the optimiser as they train: adapted, sharded, with the recipe's kernels; plain again afterwards."""
        work, training = self._work, self._work.recipe.training
        with ExitStack() as stack:
            optimizer: Any = work.optimizer
            weights = getattr(torch, training.weights)
            if not self._shares:
                stack.enter_context(stored_as(work.model, weights))
            if training.lora is not None:
                seed = work.recipe.seed * 1009 + work.state.stage
                stack.enter_context(adapted(work.model, **training.lora.model_dump(), seed=seed))
                with torch.no_grad():
                    for name, parameter in work.model.named_parameters():
                        if name in self._tensors:
                            parameter.copy_(self._tensors[name])
                optimizer = self._new_optimizer()
            self._tensors = {}  # the checkpoint's are used up; later stages begin with new additions
            assert optimizer is not None
            model: Any = work.model
            if self._shares:
                moments = training.lora is None and work.recipe.moments == "carry" and work.state.stage < work.recipe.stages
                model, optimizer = stack.enter_context(
                    spread(model, optimizer, dtype=work.recipe.dtype, weights=weights, moments=moments)
                )
            if work.weight_mask is not None and (work.state.pruned or not work.recipe.makes_zeros):
                stack.enter_context(work.weight_mask.keeping_zeros(model))
            again = training.gradient_checkpointing
            stack.enter_context(kernels(model, gradient_checkpointing=again, compiled=training.compile, liger=training.liger))
            self._working = (model, optimizer)
            try:
                yield model, optimizer
            finally:
                self._working = (work.model, work.optimizer)


def teacher_of(work: Work, *, begun: bool) -> Any:
    """The model to distil from, frozen, in the precision of matrix products; None if the objective needs none.

    If the run removed tokens from the vocabulary, the teacher loses the same tokens. Its distribution is then renormalised over
    those that stay.

    Raises:
        UsageError: the teacher has another vocabulary than the model.
    """
    loaded, recipe = work.loaded, work.recipe
    if recipe.training.source is None or not recipe.training.needs_teacher:
        return None
    device = next(loaded.model.parameters()).device
    name = recipe.training.teacher or recipe.model
    if recipe.training.teacher is None and not begun:
        teacher = copy.deepcopy(loaded.model)
    else:
        other = load(name, device=device, trust_remote_code=work.trust_remote_code, any_task=True)
        if recipe.training.teacher is None:
            other = grown(other, recipe.grow, seed=recipe.seed)
        other = _with_same_tokens(other, work)
        theirs, ours = tokens_of(other.tokenizer), tokens_of(loaded.tokenizer)
        if theirs.get_vocab() != ours.get_vocab():
            raise UsageError(
                f"teacher {name} ({len(theirs):,} tokens) and {recipe.model} ({len(ours):,}) have different "
                "tokenizers; distillation compares token by token, so name a teacher of the same vocabulary"
            )
        teacher = other.model
    if families.task_of(teacher.config) != families.task_of(work.model.config):
        raise UsageError(
            f"teacher {name} learns {families.task_of(teacher.config)}, and {recipe.model} something else; name another"
        )
    heads = [model.get_output_embeddings() for model in (teacher, loaded.model)]
    sizes = [0 if head is None else head.weight.shape[0] for head in heads]  # models of two towers have none
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"teacher {name} has {sizes[0]:,} logits and {recipe.model} has {sizes[1]:,}; name a teacher of the same vocabulary"
        )
    if heads[0] is not None and parts.bind("objective", recipe.training.objective).keywords.get("hidden"):
        _check_hidden(work, teacher)
    cast_weights(teacher, torch.bfloat16 if uses_bfloat16(device, recipe.dtype) else torch.float32)
    return teacher.eval().requires_grad_(False)


def _check_hidden(work: Work, teacher: Any) -> None:
    """Refuse to compare hidden states of models whose layers are not as many, or not as wide, once the student is pruned.

    Raises:
        UsageError: they are not.
    """
    recipe = work.recipe
    changed = [kind for kind in recipe.axes if kind in OF_THE_MODEL]
    if changed or work.reduction.changes_hidden_states:
        what = f"axes names {' and '.join(changed)}" if changed else f"reduce {recipe.reduce} changes their width or number"
        raise UsageError(
            f"objectives.distil(hidden=…) compares hidden states with those of the teacher, layer by layer, but {what}; leave out hidden"
        )
    student_size, teacher_size = (
        (len(decoder_layers(model)), model.get_input_embeddings().weight.shape[1]) for model in (work.model, teacher)
    )
    if student_size != teacher_size:
        raise UsageError(
            f"objectives.distil(hidden=…) compares hidden states layer by layer, but {recipe.model} has {student_size[0]} layers of width {student_size[1]} and "
            f"the teacher {teacher_size[0]} of {teacher_size[1]}; leave out hidden"
        )


def _with_same_tokens(teacher: Loaded, work: Work) -> Loaded:
    """A teacher without the tokens that the run removed, if it had the run's tokens before; any other teacher as it is."""
    keep = work.state.mask.kept.get("vocabulary")
    axes = families.axes(teacher.model)
    if keep is None or not any(axis.kind == "vocabulary" and axis.size == keep.numel() for axis in axes):
        return teacher
    smaller = smaller_tokenizer(teacher.tokenizer, keep)
    if smaller.get_vocab() != work.tokenizer.get_vocab():
        return teacher
    cut(teacher.model, axes, Mask({"vocabulary": keep}))
    return replace(teacher, tokenizer=smaller)
