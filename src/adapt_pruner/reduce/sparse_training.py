"""`reduce: sparse_training`: train under masks over the weights, which are chosen anew as the model learns (AST).

    forward    with W ⊙ M; M keeps what the recipe's sparsity says
    backward   the gradient of W ⊙ M is used as that of W, so that masked weights go on learning (straight-through)
    step       for masked weights the gradient g becomes g + λ W; λ rises from 0, so that masked weights settle at zero
    every ten steps M is chosen anew, by |W| or |W| ‖x‖

At the end W ⊙ M replaces W, and the rest of the training keeps the last masks. With `slorb` each linear layer also adds B s,
where s are the sums of k consecutive inputs each. B stays in the checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from adapt_pruner.core.events.run import MasksLearnt, Within
from adapt_pruner.core.model.hooks import watching_inputs
from adapt_pruner.core.model.layers import decoder_layers, streams
from adapt_pruner.core.model.modeling_pruned import add_block_sums
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.precision import casting_once
from adapt_pruner.core.model.weight_mask import WeightMask, largest, linear_layers, oriented, stored
from adapt_pruner.core.system import world
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.sparse import check_dense, check_pattern, check_same_zeros
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Change, Reduction, TextUse, Work, check_training


@part("reduce", needs={"sparsity", "one stage", "training"}, reads={"calibration"})
class SparseTraining(Reduction):
    """Train under masks over the weights, choose the masks anew as the model learns, and keep all shapes (AST)."""

    def __init__(
        self,
        *,
        scores: Literal["magnitude", "wanda"] = "magnitude",
        every: Annotated[int, "1 or more"] = 10,
        decay: Annotated[float, "0 or more"] = 6e-5,
        ramp: Annotated[float, "0 to 1"] = 0.2,
        share: Annotated[float, "0 to 1"] = 1.0,
        slorb: Annotated[int, "0 or more"] = 0,
    ) -> None:
        """
        Args:
            scores: what ranks the weights to keep: `magnitude`, |W_ij|, or `wanda`, |W_ij| ‖x_j‖ within each output. The norms
                are those of the last step's inputs; for the first masks, those of calibration text.
            every: steps between two choices of the masks.
            decay: λ at its highest.
            ramp: share of the rows with changing masks over which λ rises linearly from 0.
            share: share of the stage's rows during which masks change.
            slorb: k, inputs in a block; 0 leaves B out. B is [outputs, inputs / k] and is trained. An entry starts as the mean of
                (1 - M) ⊙ W over its block, which comes nearest to the masked weights. B adds 1 / k of a layer's weights; they are
                not zero and count as parameters.

        The optimiser's step is AdamW's, on g + λ (1 - M) ⊙ W.

        Source: AST, arXiv:2407.20584 and its released code: every = 10, λ = 6e-5 and a rise over a fifth of the steps are those
        of its LLaMA runs. Differs: masks are bool, so that decay acts on masked weights alone (the authors' GPT-2 code takes `~`
        of an int mask, which does not); their GPT-2 optimiser averages the loss gradient alone and adds the decay after that;
        their Wanda norms come from one calibration of the dense model; the last choice of masks is not trained unless `share` is
        below 1; the projection P of SLoRB is the sums of blocks and is not trained.
        """
        self.scores, self.every, self.decay, self.ramp, self.share, self.slorb = scores, every, decay, ramp, share, slorb
        self._began: dict[str, int] = {}
        self._over = False

    def check(self, work: Work) -> None:
        """Refuse training that does not work with masks, and a model that has zeros."""
        check_training(work, "sparse_training", masks=True)
        check_dense(work)
        check_pattern(work)
        for name, module in linear_layers(work.model).items() if self.slorb else ():
            if (inputs := oriented(module).shape[1]) % self.slorb:
                raise UsageError(
                    f"{name} has {inputs:,} inputs, which is not a multiple of slorb={self.slorb}; give a divisor, such as 16, "
                    "or 0"
                )

    def floor(self, work: Work) -> tuple[int, str]:
        """All parameters, since zeros count as parameters."""
        return work.num_params, "weights become zero"

    def num_steps(self, work: Work, *, start: int, reached: int, target: int) -> int:
        """One draw of text at most."""
        return int(self.scores == "wanda")

    def text_use(self, work: Work) -> TextUse:
        """The calibration text, once, for the first masks by Wanda."""
        text = self.scores == "wanda"
        return TextUse(text=text, evidence=Evidence.FORWARD if text else Evidence.WEIGHTS)

    def steps(self, work: Work, target: int) -> Iterator[Change | Within]:
        """Train under masks and report each new choice of masks; then make the masked weights zero."""
        if self._over:
            return
        assert work.training is not None
        progress = work.state.progress
        if not self._began:
            self._began = {"rows": progress.rows, "steps": progress.steps}
        if work.weight_mask is None:
            with work.state.clock("score"):
                work.weight_mask = self._chosen(work, _squares_of_text(work) if self.scores == "wanda" else {})
            if self.slorb:
                _add_block_sums(work, self.slorb)
        span = work.span(self.share, first=self._began["rows"])
        squares: dict[str, Tensor] = {}
        here = work.weight_mask.to(work.model.device)

        def around(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def loss(model: Any, ids: Tensor, predicted: Tensor | None = None) -> Tensor:
                with masked(model, here), _watched(model, squares if self.scores == "wanda" else None):
                    total: Tensor = objective(model, ids, predicted)
                return total

            return loss

        for step in work.training(until=span.stop, around=around):
            _draw_to_zero(work.model, here, self._strength(span.share_read(progress.rows)))
            step.take()
            done = progress.steps - self._began["steps"]
            if done % self.every == 0 or progress.rows >= span.stop:
                before, work.weight_mask = work.weight_mask, self._chosen(work, squares)
                here = work.weight_mask.to(work.model.device)
                differing = sum(int((keep != work.weight_mask.kept[name]).sum()) for name, keep in before.kept.items())
                yield MasksLearnt(
                    stage=work.state.stage, done=done, of=span.steps_left(span.first), zeros=work.weight_mask.num_zeros,
                    flipped=differing / sum(keep.numel() for keep in before.kept.values()),
                )  # fmt: skip
            squares.clear()
        work.weight_mask.apply(work.model, optimizer=work.optimizer)
        self._began, self._over = {}, True
        yield Change(None, told={"zeros": work.weight_mask.num_zeros})

    def _strength(self, read: float) -> float:
        """λ after this share of the rows."""
        return self.decay * min(1.0, read / self.ramp) if self.ramp else self.decay

    def _chosen(self, work: Work, squares: Mapping[str, Tensor]) -> WeightMask:
        """The masks that fit the weights as they are now; `squares` are ‖x_j‖² of this process's inputs, by layer."""
        pattern, kept = Pattern.parse(work.recipe.sparsity), {}
        for name, module in linear_layers(work.model).items():
            scores = oriented(module).abs()
            if self.scores == "wanda":
                norms = squares[name].clone()
                world.sum_in_place(norms)
                scores = scores * norms.sqrt().to(scores.dtype)
            kept[name] = largest(scores, pattern, per_row=self.scores == "wanda").cpu()
        return WeightMask(kept, pattern)

    def state(self) -> dict[str, Any]:
        """Where the training under masks began, and whether it is over; the masks themselves are in the checkpoint."""
        return {"began": dict(self._began), "over": self._over}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._began, self._over = dict(state.get("began", {})), state.get("over", False)

    def fit(self, work: Work) -> None:
        """Count rows and steps from the start, unless all masks are chosen, because the recipe or a text changed.

        Raises:
            UsageError: the recipe changes the sparsity of masks that are chosen, or it changes `slorb`, but the run has its sums of blocks, or its masks without them, already.
        """
        self._began = {}
        if self._over:
            check_same_zeros(work)
        slorb = getattr(work.model.config, "block_sums", 0)
        if work.weight_mask is not None and self.slorb != slorb:
            raise UsageError(
                f"this run began with slorb={slorb}, and now the recipe says slorb={self.slorb}; leave it as it was, or name another "
                "folder"
            )


@torch.no_grad()
def _add_block_sums(work: Work, size: int) -> None:
    """Add B (`block_sums`) beside each linear layer and to the optimiser's matrices, in place."""
    assert work.weight_mask is not None
    assert work.optimizer is not None
    for layer in decoder_layers(work.model):
        add_block_sums(layer, size)
    work.model.config.block_sums = size
    for name, keep in work.weight_mask.kept.items():
        module: Any = work.model.get_submodule(name)
        block, _, layer = name.rpartition(".")
        sums = work.model.get_parameter(f"{block}.block_sums.{layer}")
        gone = module.weight.masked_fill(keep.to(module.weight.device), 0)
        sums.copy_(gone.unflatten(-1, (-1, size)).mean(dim=-1))
        work.optimizer.param_groups[0]["params"].append(sums)


@contextmanager
def masked(model: nn.Module, mask: WeightMask) -> Iterator[None]:
    """While the context lasts, linear layers multiply by W ⊙ M, and its gradient is used as that of W.

    W ⊙ M is put into the module's `__dict__`, where it hides the parameter of the same name.
    """
    modules: list[Any] = []
    try:
        for name, keep in mask.kept.items():
            module: Any = model.get_submodule(name)
            weight = module.weight
            here = stored(module, keep)
            module.__dict__["weight"] = torch.where(here, weight, weight - weight.detach())
            modules.append(module)
        yield
    finally:
        for module in modules:
            del module.__dict__["weight"]


@torch.no_grad()
def _draw_to_zero(model: nn.Module, mask: WeightMask, strength: float) -> None:
    """Add λ W to the gradients of masked weights, in place."""
    for name, keep in mask.kept.items():
        module: Any = model.get_submodule(name)
        weight = module.weight
        if weight.grad is not None:
            here = stored(module, keep)
            weight.grad.addcmul_(weight, (~here).to(weight.dtype), value=strength)


@contextmanager
def _watched(model: nn.Module, squares: dict[str, Tensor] | None) -> Iterator[None]:
    """While the context lasts, add ‖x_j‖² of each linear layer's inputs to `squares`, in place; if it is None, do nothing."""
    if squares is None:
        yield
        return

    def look(name: str, given: Tensor) -> None:
        added = given.detach().float().flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
        squares[name] = squares[name] + added if name in squares else added

    with watching_inputs(linear_layers(model), look):
        yield


@torch.no_grad()
def _squares_of_text(work: Work) -> dict[str, Tensor]:
    """‖x_j‖² of each linear layer's inputs in the model as it is, on this process's share of the calibration text."""
    model = work.model
    squares = {
        name: torch.zeros(oriented(module).shape[1], dtype=torch.float64, device=module.weight.device)  # type: ignore[arg-type]
        for name, module in linear_layers(model).items()
    }
    flows = streams(model, world.share(work.batches()), task=work.task, dtype=work.recipe.dtype)
    with _watched(model, squares):
        for index, layer in enumerate(decoder_layers(model)):
            with casting_once(layer):
                for flow in flows:
                    flow.hidden = flow.through(layer, index)
    return squares
