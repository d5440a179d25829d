"""Losses that training minimises: (model, ids, predicted tokens) → the sum of a loss over the predicted tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_pruner.core.model.feed import Goal
from adapt_pruner.core.model.loss import LogitLoss, log_softmax_, logit_map, nll_of_logits
from adapt_pruner.core.model.task import CAUSAL_LM, CausalLM, Task
from adapt_pruner.core.system.parts import part
from adapt_pruner.errors import UsageError

_LEAST = 1e-6  # of the probability beside the likeliest tokens: kept ones are rounded


@part("objective")
def lm(
    model: Any,
    input_ids: Tensor,
    predicted: Tensor | None = None,
    *,
    task: Task = CAUSAL_LM,
    balance: Annotated[float, "0 or more"] = 0.0,
) -> Tensor:
    """Next-token cross-entropy: -log p(token | what precedes it), nats, summed over the predicted tokens.

    With `balance` b, routers learn to use all experts: each predicted token also counts b · E · Σ_j f_j · p_j, with E the experts of a
    layer, f_j the share of the tokens that are sent to expert j and p_j the mean probability that routers give it, over the tokens of
    the batch in all layers.

    Args:
        input_ids: int64 [batch, length].
        predicted: bool [batch, length]; None for every token but the first.
        task: what the model learns, if it is something other than the next token.
        balance: b, transformers' `router_aux_loss_coef`; of no effect on a model without routers.

    Returns:
        float32 scalar, differentiable.

    Source of the second term: Switch Transformer, arXiv:2101.03961, as transformers computes it.
    """
    per_token = getattr(model.config, "num_experts_per_tok", None)
    if not (balance and per_token and isinstance(task, CausalLM)):
        return task.loss(model, input_ids, predicted=predicted)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    read = task.read(model, input_ids, output_router_logits=True)
    hidden, targets = task.predicting(read.last_hidden_state, input_ids, predicted)
    logits = tuple(read.router_logits)
    unbalanced: Tensor = load_balancing_loss_func(logits, logits[0].shape[-1], per_token)
    return task.of_logits(model, hidden, nll_of_logits(targets)) + balance * len(targets) * unbalanced


@part("objective", needs={"teacher"})
def distil(
    model: Any,
    input_ids: Tensor,
    predicted: Tensor | None = None,
    *,
    teacher: Any,
    task: CausalLM = CAUSAL_LM,
    temperature: Annotated[float, "above 0"] = 2.0,
    alpha: Annotated[float, "0 to 1"] = 1.0,
    hidden: Annotated[float, "0 or more"] = 0.0,
) -> Tensor:
    """Distillation: (1 - α) · cross-entropy + α · T² · KL(teacher ‖ student) [+ hidden · distance of hidden states].

    In the KL both sides have a softmax at temperature T. All terms are per token, summed over the predicted tokens. Position t
    counts if token t + 1, which it predicts, counts. The distance is ‖h - h'‖² / ‖h'‖², the mean over the outputs of all layers,
    the last one after the final norm. Logits of teacher and student exist for a few tokens at a time only.

    Args:
        input_ids: int64 [batch, length].
        predicted: bool [batch, length]; None for every token but the first.
        task: what the model learns; one that predicts by logits.
        teacher: causal LM of the same vocabulary; for `hidden` also of the same width and number of layers.
        temperature: T.
        alpha: α in [0, 1]; 1 is distillation alone.
        hidden: weight of the hidden-state term; 0 leaves it out.

    Returns:
        float32 scalar, differentiable in the student.

    Raises:
        UsageError: `hidden` is above 0, and teacher and student differ in width or number of layers.

    Source: arXiv:1503.02531; T = 2 and α = 1 are the defaults of Adapt-Pruner's `use_distill`. Differs: there position t is
    masked by its own label. The hidden-state term is SquareHead's (arXiv:2310.06927), taken per token.
    """
    student = task.read(model, input_ids, output_hidden_states=hidden > 0)
    with torch.no_grad():
        taught = task.read(teacher, input_ids, output_hidden_states=hidden > 0)
    entering, targets = task.predicting(student.last_hidden_state, input_ids, predicted)
    goal, _ = task.predicting(taught.last_hidden_state, input_ids, predicted)
    loss = kl_of_logits(targets, goal, teacher, task, temperature=temperature, alpha=alpha)
    total = task.of_logits(model, entering, loss)
    if hidden > 0:
        total = total + hidden * _hidden_distance(student.hidden_states, taught.hidden_states, task, input_ids, predicted)
    return total


@dataclass
class BesideNll:
    """An objective, called as it is, that also measures the task's own loss: what a feed hears while another loss is trained.

    Each call makes one forward pass more, without gradients, under the same gates and masks.

    Attributes:
        objective: the function that is trained.
        task: what the model learns.
        nll: the sum of the task's loss in the last call, in nats.
    """

    objective: Callable[..., Tensor]
    task: Task
    nll: float = 0.0

    def __call__(self, model: nn.Module, input_ids: Tensor, predicted: Tensor | None = None) -> Tensor:
        """The objective's value; `nll` is measured first."""
        return self.beside(self.objective)(model, input_ids, predicted)

    def beside(self, objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Another objective, for rows that have one of their own; `nll` is measured first."""

        def both(model: nn.Module, input_ids: Tensor, predicted: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                self.nll = float(self.task.loss(model, input_ids, predicted=predicted))
            return objective(model, input_ids, predicted)

        return both


def kl_to_goal(
    model: nn.Module, input_ids: Tensor, predicted: Tensor | None = None, *, goal: Goal, task: CausalLM = CAUSAL_LM
) -> Tensor:
    """KL(goal ‖ model), nats, summed over the predicted tokens, with all tokens beside the k likeliest of the goal as one.

    Σ_i p_i · (log p_i - log q_i) + r · (log r - log(1 - Σ_i q_i))        with i over the k tokens and r = 1 - Σ_i p_i

    It is at most the KL over the whole vocabulary. For rows that the dense model wrote; that model itself is not needed.

    Args:
        input_ids: int64 [batch, length].
        predicted: bool [batch, length]; None for every token but the first.
        goal: of the predicted tokens, row by row.
        task: what the model learns; one that predicts by logits.

    Returns:
        float32 scalar, differentiable.
    """
    hidden, _ = task.predicting(task.read(model, input_ids).last_hidden_state, input_ids, predicted)
    return task.of_logits(model, hidden, _kl_to_likeliest(goal))


def _kl_to_likeliest(goal: Goal) -> LogitLoss:
    def loss(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        tokens = goal.tokens[rows].to(logits.device)
        log_p = goal.logs[rows].to(logits)
        p = log_p.exp()
        rest = (1 - p.sum(-1)).clamp_min(_LEAST)
        log_q = log_softmax_(logits)
        ours = log_q.gather(1, tokens)
        rest_of_ours = (1 - ours.exp().sum(-1)).clamp_min(_LEAST)
        total = torch.dot(p.flatten(), (log_p - ours).flatten()) + torch.dot(rest, (rest.log() - rest_of_ours.log()))
        if gradient:
            q = log_q.exp_()
            at = q.gather(1, tokens)
            q.mul_((1 - rest / rest_of_ours)[:, None]).scatter_(1, tokens, at - p)
        return total

    return loss


def named_loss(
    objective: Callable[..., Tensor], options: Mapping[str, Any], *, teacher: str, answers: bool = False
) -> str | None:
    """What a loss is, in words that stand behind its value; None for the cross-entropy, which needs no word.

    Args:
        objective: the function; one that is not of this module is named as it is.
        options: those that the recipe gives it.
        teacher: whom `distil` learns from, in words.
        answers: whether some rows are learnt by `kl_to_goal` instead.
    """
    if answers:
        name = named_loss(objective, options, teacher=teacher) or "cross-entropy"
        return f"{name} (of what the dense model wrote, KL to it)"
    if objective is lm:
        return "cross-entropy + balance of experts" if options.get("balance") else None
    if objective is not distil:
        return objective.__name__
    alpha, hidden = float(options.get("alpha", 1.0)), float(options.get("hidden", 0.0))
    terms = {f"KL to {teacher}": alpha, "cross-entropy": 1 - alpha, "distance of hidden states": hidden}
    return " + ".join(name for name, weight in terms.items() if weight)


def kl_of_logits(
    targets: Tensor, goal: Tensor, teacher: Any, task: CausalLM = CAUSAL_LM, *, temperature: float = 1.0, alpha: float = 1.0
) -> LogitLoss:
    """α · T² · KL(teacher ‖ logits), both at temperature T, + (1 - α) · cross-entropy with `targets`, in nats.

    Args:
        targets: int64 [n].
        goal: hidden states of the teacher before its head, [n, width].
        teacher: the model with that head.
        task: finds the teacher's head.
    """
    nll, t = nll_of_logits(targets), temperature
    head, logits_of = task.head(teacher), logit_map(teacher)

    def loss(logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        teachers = logits_of.apply_(F.linear(goal[rows].to(head.weight.dtype), head.weight, head.bias).to(logits.dtype))
        ours = logits if t == 1 and alpha == 1 else logits / t  # the logits themselves may be overwritten
        log_p, log_q = log_softmax_(teachers if t == 1 else teachers.div_(t)), log_softmax_(ours)
        p = log_p.exp()
        total = alpha * t**2 * torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
        if alpha < 1:
            total = total + (1 - alpha) * nll(logits, rows, gradient)
        if gradient:
            slope = log_q.exp_().sub_(p).mul_(alpha * t)
            if alpha < 1:
                logits.mul_(1 - alpha).add_(slope)
            elif slope is not logits:
                logits.copy_(slope)
        return total

    return loss


def _hidden_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], task: CausalLM, input_ids: Tensor, predicted: Tensor | None
) -> Tensor:
    if len(student) != len(teacher) or student[0].shape != teacher[0].shape:
        raise UsageError(
            f"hidden states cannot be compared: the model has {len(student) - 1} layers of width {student[0].shape[-1]}, "
            f"the teacher {len(teacher) - 1} of {teacher[0].shape[-1]}; leave out the option hidden of objectives.distil"
        )
    total = torch.zeros((), device=input_ids.device)
    for pair in zip(student[1:], teacher[1:], strict=True):
        state, goal = (task.predicting(hidden.float(), input_ids, predicted)[0] for hidden in pair)
        total = total + ((state - goal).square().sum(-1) / goal.square().sum(-1).clamp_min(1e-12)).sum()
    return total / (len(student) - 1)
