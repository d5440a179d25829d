"""`reduce: hard_concrete`: masks learnt together with the weights until the model has a given shape (Sheared LLaMA).

    z            one number for each channel, KV head, neuron and layer; drawn anew for each pass
    L            the training loss with units multiplied by z, plus a Lagrangian that holds the expected sizes to the target
    weights and z descend, the multipliers ascend; the target sizes fall to those of the shape over the first rows

At the end each row of z keeps as many entries as the shape has, z is multiplied into the weights, and one cut is made.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from adapt_pruner.core.events.run import MasksLearnt
from adapt_pruner.core.model.axes import Axis, Mask
from adapt_pruner.core.model.cut import gated, num_left
from adapt_pruner.core.model.kinds import BLOCKS, kind_of
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.learnt_units import held, put_back
from adapt_pruner.reduce.repair.factors import scale_block, scale_units
from adapt_pruner.work import Change, Reduction, TextUse, Work, check_training

_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_START = (5.0, 0.01)  # mean and standard deviation of log α
_BOUND = math.log(100)  # of |log α|
_OFF = 0.02  # by how much the expected share of units that are gone may miss its target
_TELL = 10  # steps between two reports


def sampled(log_alpha: Tensor) -> Tensor:
    """z = clamp(σ((log u - log(1 - u) + log α) / β) · 1.2 - 0.1, 0, 1), u uniform: 0 and 1 with positive probability."""
    u = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / _TEMPERATURE)
    return (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def expected_open(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of each entry: σ(log α - β log(0.1 / 1.1))."""
    return torch.sigmoid(log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH))


def settled(log_alpha: Tensor, keep: int) -> Tensor:
    """z without noise: σ(0.8 log α / β) for the `keep` highest entries of each row, 0 for the others."""
    best = log_alpha.topk(keep, dim=-1).indices
    soft = torch.sigmoid(0.8 * log_alpha / _TEMPERATURE)
    return torch.zeros_like(soft).scatter(-1, best, soft.gather(-1, best))


@part("reduce", needs={"one stage", "training"}, reads={"axes"})
class HardConcrete(Reduction):
    """Learn masks over width, heads, neurons and layers with the weights, until the model has a given shape (Sheared LLaMA)."""

    fills_zeros = True

    def __init__(
        self,
        *,
        residual: Annotated[int | None, "1 or more"] = None,
        kv_heads: Annotated[int | None, "1 or more"] = None,
        neurons: Annotated[int | None, "1 or more"] = None,
        layers: Annotated[int | None, "1 or more"] = None,
        steps: Annotated[int, "1 or more"] = 400,
        share: Annotated[float, "0 to 1"] = 0.5,
        ramp: Annotated[float, "0 to 1"] = 0.2,
        lr: Annotated[float, "above 0"] = 1.0,
    ) -> None:
        """
        Args:
            residual: width of the residual stream at the end; None keeps it if another size is given.
            kv_heads: KV heads of each layer.
            neurons: neurons of each layer.
            layers: number of layers.
            steps: optimiser steps in which masks are learnt; the rest of the training trains the small model.
            share: share of the training rows that masks take at most, if it has fewer steps.
            ramp: share of those rows over which the target sizes fall to those of the shape.
            lr: peak learning rate of log α and of the multipliers; it follows the schedule of the weights.

        Without any size, the shape follows from the budget: all kinds in `axes` keep the same share of their units, rounded
        up, the largest that meets the budget.

        With e_j the expected share of a row that is gone, t_j its target so far, and multipliers λ of each kind j:

            L = loss + Σ_j mean over rows of [ λ1_j (e_j - t_j) + λ2_j (e_j - t_j)² ]

        Source: arXiv:2310.06694 and its released code: β = 2/3, log α ~ N(5, 0.01) within ±log 100, multipliers from 0 at the
        rate of the masks. Differs: the units are KV heads with their query heads, not query heads. Under the masks a norm takes
        its mean over all channels; the cut rescales it to the channels that stay, so that masked and cut model agree, as
        everywhere here. AdamW's betas are the run's. Masks and multipliers are outside the clipping of the gradient's norm. Their
        rate follows the run's schedule, so at the cut it is at its peak, where the authors' falls to a tenth along a cosine. They
        take 3,200 steps; 400 end as near to the target, fewer do not.
        """
        self.shape = {"residual": residual, "kv_heads": kv_heads, "neurons": neurons, "layers": layers}
        self.changes_hidden_states = bool(residual or layers)
        self.max_steps, self.share, self.ramp, self.lr = steps, share, ramp, lr
        self._began: dict[str, int] = {}
        self._saved: Mapping[str, Any] = {}
        self._held: dict[str, nn.Parameter] = {}
        self._optimizer: Any = None

    def check(self, work: Work) -> None:
        """Refuse a shape that the model cannot have, layers of unequal size, and training that does not work with masks."""
        check_training(work, "hard_concrete", masks=True)
        for kind, size in self.shape.items():
            if size is None:
                continue
            here = {axis.size for axis in work.axes if axis.kind == kind}
            began = {units for name, units in work.state.began.items() if kind_of(name) == kind}
            if not here | began:
                raise UsageError(
                    f"the shape names {kind}, which this model does not have; leave that out of reduce=hard_concrete(…)"
                )
            if size > min(began or here):
                raise UsageError(
                    f"the shape has {size:,} {kind}, and the model has {min(began or here):,}; give that many or fewer"
                )
        if not any(self.shape.values()) and (others := [kind for kind in work.recipe.axes if kind not in self.shape]):
            raise UsageError(
                f"reduce hard_concrete masks {', '.join(self.shape)}, and axes names {', '.join(others)}; leave that out of axes"
            )

        for kind in self._given(work):
            _rows_of(work.axes, kind)

    def floor(self, work: Work) -> tuple[int, str]:
        """The parameters of the given shape; without one, those that are left when each axis keeps one unit."""
        if any(self.shape.values()):
            return _params(work, self._given(work)), "the model has the shape that reduce=hard_concrete(…) names"
        for kind in self._kinds(work):
            _rows_of(work.axes, kind)  # refuses layers of unequal size
        return _params(work, dict.fromkeys(self._kinds(work), 1)), "every axis has one unit"

    def text_use(self, work: Work) -> TextUse:
        """No calibration text."""
        return TextUse()

    def steps(self, work: Work, target: int) -> Iterator[Change | MasksLearnt]:
        """Train weights and masks and report every ten steps; then yield the cut."""
        named = any(self.shape.values())
        given = self._given(work) if named else {}
        if work.num_params <= target and not given:  # a shape is met whatever the budget
            return
        assert work.training is not None
        assert work.optimizer is not None
        shape = given if named else self._found(work, target)
        progress = work.state.progress
        if not self._began:
            self._began = {"rows": progress.rows}
        span = work.span(self.share, first=self._began["rows"], steps=self.max_steps)
        last = progress.steps + span.steps_left(progress.rows)
        rows = {kind: _rows_of(work.axes, kind) for kind in shape}
        goal = {kind: 1 - size / rows[kind].shape[1] for kind, size in shape.items()}
        self._hold(work, rows)
        try:
            ramp = max(1, round((span.stop - span.first) * self.ramp))
            lagrangian = _Lagrangian(self._held, goal, lambda: (progress.rows - span.first) / ramp)
            untold = 0
            for step in work.training(until=span.stop, around=lambda objective: _masked(work, objective, self._held, lagrangian)):
                step.take()
                progress.forget_losses()  # the loss rises while masks close, which is no divergence
                with torch.no_grad():
                    for kind in shape:
                        self._held[kind].clamp_(-_BOUND, _BOUND)
                untold += 1
                if untold == _TELL or progress.rows >= span.stop:
                    yield MasksLearnt(stage=work.state.stage, done=progress.steps, of=last, sizes=self._expected(work))
                    untold = 0
            self._warn_if_off(work, goal, steps=span.steps_left(span.first))
            z = {kind: settled(self._held[kind].detach(), size) for kind, size in shape.items()}
        finally:
            self._let_go(work)
        fold(work.model, work.axes, z)
        self._began = {}
        yield Change(
            _mask(work.axes, z), told={"sizes": {axis.name: shape[axis.kind] for axis in work.axes if axis.kind in shape}}
        )

    def _warn_if_off(self, work: Work, goal: Mapping[str, float], *, steps: int) -> None:
        """Warn of kinds whose masks do not close the share that is cut: the cut model is then not the one that was trained."""
        gone = {kind: 1 - float(expected_open(self._held[kind].detach()).mean()) for kind in goal}
        if off := [f"{kind} {gone[kind]:.2f} for {share:.2f}" for kind, share in goal.items() if abs(gone[kind] - share) > _OFF]:
            work.warn_of_stage(
                f"after {steps} steps the masks close another share of their units than the cut removes ({', '.join(off)}), so the "
                "cut model computes something else than the masked one; give more training.tokens or a smaller training.batch_tokens, "
                "so that the masks have 400 steps"
            )

    def _kinds(self, work: Work) -> list[str]:
        return [kind for kind in self.shape if kind in work.recipe.axes and any(axis.kind == kind for axis in work.axes)]

    def _given(self, work: Work) -> dict[str, int]:
        """The sizes asked for, for those kinds that have more units now."""
        most = {axis.kind: axis.size for axis in work.axes}
        return {kind: size for kind, size in self.shape.items() if size is not None and size < most.get(kind, 0)}

    def _found(self, work: Work, target: int) -> dict[str, int]:
        """The largest sizes that keep the same share of every kind, rounded up to whole units, and meet the budget."""
        most = {kind: min(axis.size for axis in work.axes if axis.kind == kind) for kind in self._kinds(work)}
        sizes = ({kind: -(-most[kind] * share // 1000) for kind in most} for share in range(1000, 0, -1))
        return next((shape for shape in sizes if _params(work, shape) <= target), dict.fromkeys(most, 1))

    def _hold(self, work: Work, rows: Mapping[str, Tensor]) -> None:
        """Add log α and the multipliers to the optimiser, in place, with their saved or else their first values."""
        device = next(work.model.parameters()).device
        generator = torch.Generator().manual_seed(work.recipe.seed)
        for kind, like in rows.items():
            start = torch.randn(like.shape, generator=generator) * _START[1] + _START[0]
            self._held[kind] = nn.Parameter(start.to(device))
            self._held[f"{kind}.multipliers"] = nn.Parameter(torch.zeros(2, device=device))
        scale = self.lr / work.recipe.training.lr
        for ascend in (False, True):
            those = [held for name, held in self._held.items() if name.endswith(".multipliers") is ascend]
            work.optimizer.add_param_group({"params": those, "weight_decay": 0.0, "scale": scale, "maximize": ascend})  # type: ignore[union-attr]
        self._optimizer = work.optimizer
        put_back(self._held, self._optimizer, self._saved)
        self._saved = {}

    def _let_go(self, work: Work) -> None:
        """Remove log α and the multipliers from the optimiser, in place."""
        held = {id(parameter) for parameter in self._held.values()}
        optimizer: Any = work.optimizer
        optimizer.param_groups[:] = [
            group for group in optimizer.param_groups if not held & {id(parameter) for parameter in group["params"]}
        ]
        for parameter in self._held.values():
            optimizer.state.pop(parameter, None)
        self._held = {}

    def _expected(self, work: Work) -> dict[str, float]:
        """Axis name -> expected number of open units."""
        expected: dict[str, float] = {}
        for kind, log_alpha in self._held.items():
            if not kind.endswith(".multipliers"):
                number = expected_open(log_alpha.detach()).sum(dim=-1).tolist()
                names = [axis.name for axis in work.axes if axis.kind == kind]
                expected |= dict(zip(names, number, strict=True))
        return expected

    def state(self) -> dict[str, Any]:
        """Where learning began, and log α and the multipliers with their moments."""
        return {"began": dict(self._began), "held": held(self._held, self._optimizer)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        if "held" in state:
            self._began, self._saved = dict(state["began"]), state["held"]

    def fit(self, work: Work) -> None:
        """Learn the masks from the start, because the recipe or a text changed."""
        self._began, self._saved = {}, {}


class _Lagrangian:
    """Σ_j mean over rows of λ1 (e - t) + λ2 (e - t)², with the targets t at their present value."""

    def __init__(self, held: Mapping[str, Tensor], goal: Mapping[str, float], fallen: Callable[[], float]) -> None:
        self._held, self._goal, self._fallen = held, goal, fallen

    def __call__(self) -> Tensor:
        fallen = min(1.0, self._fallen())
        terms = []
        for kind, goal in self._goal.items():
            apart = 1 - expected_open(self._held[kind]).mean(dim=-1) - goal * fallen
            linear, quadratic = self._held[f"{kind}.multipliers"]
            terms.append((linear * apart + quadratic * apart.square()).mean())
        return torch.stack(terms).sum()


def _masked(
    work: Work, objective: Callable[..., Tensor], held: Mapping[str, Tensor], lagrangian: _Lagrangian
) -> Callable[..., Tensor]:
    """The objective with units multiplied by freshly drawn z, and the gradient of the Lagrangian."""

    def loss(model: Any, ids: Tensor, predicted: Tensor | None = None) -> Tensor:
        z = {kind: sampled(log_alpha) for kind, log_alpha in held.items() if not kind.endswith(".multipliers")}
        with gated(model, work.axes, _gates(work.axes, z)):
            total: Tensor = objective(model, ids, predicted)
        held_to = lagrangian()
        # Only its gradient is added: the loss that is reported, and watched for divergence, stays that of the text.
        return total + (held_to - held_to.detach()) * work.task.num_predicted([ids], predicted)

    return loss


def _rows_of(axes: Sequence[Axis], kind: str) -> Tensor:
    """Zeros in the shape of the masks of a kind: one row for each axis; the kind `layers` has one row."""
    of_kind = [axis for axis in axes if axis.kind == kind]
    if len({axis.entries for axis in of_kind}) != 1:
        raise UsageError(
            f"reduce hard_concrete needs layers of equal size, and the {kind} of this model differ from layer to layer; start "
            "with the dense model"
        )
    return torch.zeros(len(of_kind), of_kind[0].entries)


def _gates(axes: Sequence[Axis], z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Axis name -> gates. The z of a layer multiplies the outputs of its attention and its MLP."""
    gates: dict[str, Tensor] = {}
    for kind in z.keys() - {"layers"}:
        gates |= dict(zip([axis.name for axis in axes if axis.kind == kind], z[kind], strict=True))
    if "layers" in z:
        gates |= {axis.name: z["layers"][0][axis.layer, None] for axis in axes if axis.kind in BLOCKS}
    return gates


def _mask(axes: Sequence[Axis], z: Mapping[str, Tensor]) -> Mask:
    """What stays: entries whose z is not 0."""
    kept: dict[str, Tensor] = {}
    for kind, values in z.items():
        kept |= dict(zip([axis.name for axis in axes if axis.kind == kind], (values > 0).cpu(), strict=True))
    return Mask(kept)


def _params(work: Work, shape: Mapping[str, int]) -> int:
    """Parameters of the model in this shape."""
    kept = {axis.name: torch.arange(axis.entries) % axis.size < shape[axis.kind] for axis in work.axes if axis.kind in shape}
    return num_left(work.model, work.axes, Mask(kept))


@torch.no_grad()
def fold(model: nn.Module, axes: Sequence[Axis], z: Mapping[str, Tensor]) -> None:
    """Multiply z into the weights, in place, so that the model computes the same without gates; where z is 0 nothing is done.

    Neurons and heads: z multiplies the columns that read them. Layers: z multiplies the outputs of their attention and MLP.
    Channels: z multiplies the embeddings and all weights that write the stream; if the embeddings are also the head, the last
    norm is divided by z.

    Args:
        model: causal LM; afterwards it computes what it computed under `gated` with these values.
        axes: its axes.
        z: kind -> [rows, entries], 0 for entries that the next cut removes.
    """
    for axis in axes:
        if axis.kind not in z:
            continue
        row = [other.name for other in axes if other.kind == axis.kind].index(axis.name)
        values = z[axis.kind][row]
        values = torch.where(values > 0, values, torch.ones_like(values))
        if axis.gate.is_linear:
            scale_units(model, axis, values)
        elif axis.name == "layers":
            for block in axes:
                if block.kind in BLOCKS and block.layer is not None:
                    scale_block(model, axes, block, float(values[block.layer]))
        else:
            _fold_channels(model, axes, axis, values)


def _fold_channels(model: nn.Module, axes: Sequence[Axis], axis: Axis, values: Tensor) -> None:
    """Scale the embeddings, all weights that write the stream and the norms after blocks; see `fold` for tied embeddings."""
    embeddings: Any = CAUSAL_LM.entrance(model)
    head = CAUSAL_LM.head(model)  # a model of another task has none
    last = [block.modules[-1] for block in axes if block.kind in BLOCKS]
    behind = [name for name in last if getattr(model.get_submodule(name), "weight", None) is not None]  # norms after blocks
    for piece in axis.slices:
        parameter = model.get_parameter(piece.parameter)
        if piece.dim == 0 and parameter.dim() == 2:
            parameter.mul_(values.to(parameter)[:, None])
        elif piece.parameter.endswith(".bias"):
            parameter.mul_(values.to(parameter))
        elif piece.parameter.removesuffix(".weight") in behind:
            offset = 1.0 if piece.parameter in axis.one_more else 0.0
            parameter.copy_((parameter + offset) * values.to(parameter) - offset)
    embeddings.weight.mul_(values.to(embeddings.weight))
    if getattr(head, "weight", None) is embeddings.weight:
        name = f"{axis.gate.module}.weight"  # of the last norm
        norm, offset = model.get_parameter(name), 1.0 if name in axis.one_more else 0.0
        norm.copy_((norm + offset) / values.to(norm) - offset)
