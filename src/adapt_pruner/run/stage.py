"""The training of a stage, and what surrounds it: optimiser, teacher, adapters, shards, kernels, checkpoints."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.core import world
from adapt_pruner.core.memory import peak_bytes
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.run.position import Position
from adapt_pruner.run.prepare import Listener, Prepared
from adapt_pruner.train.adapters import adapted
from adapt_pruner.train.kernels import kernels
from adapt_pruner.train.loop import Step, make_optimizer, train
from adapt_pruner.train.spread import full_state, load_moments, spread

__all__ = ["Save", "Trainer"]

Save = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""(name of the checkpoint, weights, moments), both by name and whole, on the main process."""


class Trainer:
    """Trains the model of a run between its cuts and saves it on the way; does nothing where the recipe does not train."""

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        *,
        ready: Prepared,
        at: Position,
        listen: Listener,
        save: Save | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take up where the run stands.

        Args:
            loaded: the model as it is now.
            recipe: what is asked for.
            ready: what `prepare` made of it.
            at: where the run stands; moved along.
            listen: told of every step.
            save: writes a checkpoint; None where nothing is saved on the way.
            tensors: moments, and low-rank additions, from the checkpoint that the run goes on from.
        """
        self._model, self._recipe, self._ready, self._at = loaded.model, recipe, ready, at
        self._listen, self._save, self._tensors = listen, save, dict(tensors or {})
        self._saved = time.monotonic()
        self.optimizer: AdamW | None = None
        """Over all weights, for `cut` to keep in step; None where low-rank additions are trained, or nothing."""
        if ready.rows is not None and recipe.training.lora is None:
            self.optimizer = self._new_optimizer()
            self._tensors = {}  # which would take as much memory again
        self._working: tuple[Any, AdamW | None] = (self._model, self.optimizer)

    def before_cuts(self) -> None:
        """Forget the moments that the recipe does not carry through cuts, so that they take no memory while the model is scored."""
        if self.optimizer is not None and self._recipe.moments == "reset":
            self.optimizer.state.clear()

    def begin_stage(self) -> None:
        """Start a stage's training after its cuts, and save."""
        self._at.progress.begin_stage()
        if self.optimizer is not None and self._recipe.rotate is not None:  # every parameter is another one
            self.optimizer = self._new_optimizer()
            self._working = (self._model, self.optimizer)
        if self.optimizer is not None:
            self._join(self.optimizer)
        if self._ready.rows is not None:
            self.save(f"stage-{self._at.stage}-pruned")

    def train(self, *, until: int) -> None:
        """Train, in place, up to a row of the text."""
        rows, asked, at = self._ready.rows, self._recipe.training, self._at
        unmerged = asked.lora is not None and bool(self._tensors)  # saved after the last step of the stage
        if rows is None or (at.progress.rows >= until and not unmerged):
            return
        with at.clock("train"), self._at_work() as (model, optimizer):
            self._began = (time.perf_counter(), at.progress.tokens)
            train(
                model, rows, until=until, optimizer=optimizer, progress=at.progress,
                objective=parts.bind("objective", asked.objective, teacher=self._ready.teacher),
                schedule=parts.bind("schedule", asked.schedule, **asked.model_dump()),
                lr=asked.lr, total_tokens=rows.num_tokens(0, len(rows)), batch_rows=asked.batch_tokens // asked.length,
                micro_tokens=asked.micro_batch_tokens, clip=asked.clip, max_rise=asked.max_rise,
                dtype=self._recipe.dtype, seed=self._recipe.seed, on_step=self._on_step,
            )  # fmt: skip

    def save(self, name: str) -> None:
        """Write a checkpoint of that name."""
        if self._save is None:
            return
        with self._at.clock("save"):
            weights, moments = full_state(*self._working)
            write = self._save
            world.on_main(lambda: write(name, weights, moments))
        self._saved = time.monotonic()

    def _new_optimizer(self) -> AdamW:
        optimizer = make_optimizer(self._model, lr=self._recipe.training.lr, weight_decay=self._recipe.training.weight_decay)
        load_moments(self._model, optimizer, self._tensors)
        return optimizer

    def _join(self, optimizer: AdamW) -> None:
        """Let parameters that a repair has made join the optimiser, in place, where nothing decays."""
        there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        optimizer.param_groups[-1]["params"] += [one for one in self._model.parameters() if id(one) not in there]

    @contextmanager
    def _at_work(self) -> Iterator[tuple[Any, AdamW]]:
        """The model as it trains: adapted, sharded, with the kernels asked for; plain again afterwards."""
        asked = self._recipe.training
        with ExitStack() as stack:
            optimizer = self.optimizer
            if asked.lora is not None:
                seed = self._recipe.seed * 1009 + self._at.stage
                stack.enter_context(adapted(self._model, **asked.lora.model_dump(), seed=seed))
                _fill(self._model, self._tensors)
                optimizer = self._new_optimizer()
            self._tensors = {}  # of the checkpoint; later stages begin anew
            assert optimizer is not None
            model: Any = self._model
            if self._recipe.parallel == "fsdp":
                model, optimizer = stack.enter_context(spread(model, optimizer, dtype=self._recipe.dtype))
            how = {"gradient_checkpointing": asked.gradient_checkpointing, "compiled": asked.compile, "liger": asked.liger}
            stack.enter_context(kernels(model, **how))
            self._working = (model, optimizer)
            try:
                yield model, optimizer
            finally:
                self._working = (self._model, self.optimizer)

    def _on_step(self, step: Step) -> None:
        began, tokens = self._began
        speed = (step.tokens - tokens) / (time.perf_counter() - began)
        memory = peak_bytes(self._working[0])
        self._listen({"event": "step", "stage": self._at.stage, **asdict(step), "tokens_per_second": speed, "peak_bytes": memory})
        due = time.monotonic() - self._saved >= self._recipe.checkpoint_minutes * 60
        if self._save is not None and world.agreed(due):
            self.save(f"stage-{self._at.stage}-step-{step.step}")


def _fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters, in place, the values that `tensors` has for them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
