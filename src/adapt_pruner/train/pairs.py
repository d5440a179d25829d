"""Losses for models of two towers: (model, pairs, predicted pairs) → the sum of a loss over the pairs."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError


@part("objective", needs={"teacher"})
def distil_towers(
    model: Any,
    input_ids: Tensor,
    predicted: Tensor | None = None,
    *,
    teacher: Any,
    task: Any,
    contrast: Annotated[float, "0 or more"] = 1.0,
    similarity: Annotated[float, "0 or more"] = 1.0,
    output: Annotated[float, "0 or more"] = 1.0,
    hidden: Annotated[float, "0 or more"] = 1.0,
) -> Tensor:
    """Distillation of a model of two towers: of similarities, of outputs and of hidden states, beside the task's own loss.

        contrast · L + similarity · KL(S' ‖ S) + output · Σ_t ‖e_t - e'_t‖² + hidden · Σ_t mean_l ‖h_l - h'_m(l)‖² / ‖h'_m(l)‖²

    L is the task's loss. S are the similarities of the batch as logits, with a softmax over pictures for each caption and over captions
    for each picture, half of each. e_t is what tower t makes of a picture or caption, of length 1; h_l are its hidden states after layer l,
    whose distance is the mean over positions. Of n layers that are left, layer l stands for layer m(l) = round(l · N / n) of the teacher's
    N. Everything is summed over the pairs.

    Args:
        input_ids: a batch of the task `contrastive`.
        predicted: bool, of the batch's shape; rows without any do not count.
        teacher: a model of two towers with outputs, and for `hidden` streams, of the same width.
        task: the task `contrastive`.
        contrast: weight of L.
        similarity: weight of the similarities.
        output: weight of the outputs.
        hidden: weight of the hidden states.

    Returns:
        float32 scalar, differentiable in the student.

    Raises:
        UsageError: teacher and student differ in width.

    Source: the three parts of MoPE-CLIP, arXiv:2403.07839; the weights there are not known to us, and neither is which layer stands for which.
    """
    batch = input_ids if predicted is None else input_ids[predicted.any(1)]
    outputs: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
    ours, theirs = [], []
    total = torch.zeros((), device=batch.device)
    for tower in task.towers:
        student, own = task.seen(model, batch, tower, **outputs)
        with torch.no_grad():
            taught, goal = task.seen(teacher, batch, tower, **outputs)
        if own.shape != goal.shape:
            raise UsageError(
                f"the outputs of the teacher have {goal.shape[1]} dimensions and the model's {own.shape[1]}; name another teacher"
            )
        ours.append(own)
        theirs.append(goal)
        total = total + output * (own - goal).square().sum()
        if hidden:
            total = total + hidden * _hidden_distance(student.hidden_states[1:], taught.hidden_states[1:])
    similar = ours[0] @ ours[1].T
    if contrast:
        total = total + contrast * task.of_similarities(model, similar)
    logits, goals = similar * model.logit_scale.float().exp(), (theirs[0] @ theirs[1].T) * teacher.logit_scale.float().exp()
    return total + similarity * (_kl(goals, logits) + _kl(goals.T, logits.T)) / 2


def _kl(goals: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(goals, -1), reduction="sum", log_target=True)


def _hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over the pairs of the mean distance over layers and positions."""
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise UsageError(
            f"the stream of the teacher is {teacher[0].shape[-1]} wide and the model's {student[0].shape[-1]}; set hidden=0 in pairs.distil_towers"
        )
    total = torch.zeros((), device=student[0].device)
    for number, state in enumerate(student, start=1):
        goal = teacher[max(1, round(number * len(teacher) / len(student))) - 1].float()
        distance = (state.float() - goal).square().sum(-1) / goal.square().sum(-1).clamp_min(1e-12)
        total = total + distance.mean(-1).sum()
    return total / len(student)
