"""What a run is going to do, stage by stage, in parameters, iterations, tokens and steps: arithmetic, before any work."""

from adapt_pruner import families
from adapt_pruner.core.budget import Budget
from adapt_pruner.errors import UsageError
from adapt_pruner.reduce.work import Stage, Work
from adapt_pruner.run import latency
from adapt_pruner.train.loop import stage_tokens

__all__ = ["plan", "stage_targets"]


def stage_targets(start: int, end: int, stages: int) -> list[int]:
    """Parameters after each of T stages, linear: N_k = N_0 - (N_0 - N_T) · k / T, in whole numbers."""
    return [start - (start - end) * k // stages for k in range(1, stages + 1)]


def plan(work: Work) -> tuple[list[Stage], Budget]:
    """The stages and the budget of a run, once it is known that the budget can be met.

    Raises:
        UsageError: it cannot, or the reduction cannot do what the recipe asks for.
    """
    recipe, figures = work.recipe, work.state.figures
    work.reduction.check(work)
    keep = latency.kept(recipe, figures)
    budget = Budget.parse(recipe.budget if keep is None else keep, dense=work.dense)
    total = work.num_params
    if total > budget.keep and families.is_sliced(work.model.config):
        raise UsageError(
            f"the model is sliced and has {total:,} parameters, more than the budget {budget.keep:,}, and a sliced model cannot be "
            "cut further; prune the dense model it came from"
        )
    if total > budget.keep:
        floor, when = work.reduction.floor(work)
        budget.check_reachable(floor, when=when)
    start = figures.get("params_after_vocabulary", work.dense)
    return _stages(work, start=start, end=min(start, budget.keep)), budget


def _stages(work: Work, *, start: int, end: int) -> list[Stage]:
    """The stages from `start` parameters, where the run began, to `end`."""
    recipe, planned, reached = work.recipe, [], start
    tokens = stage_tokens(recipe.training.tokens, stages=recipe.stages, shards=recipe.training.shards)
    for k, target in enumerate(stage_targets(start, end, recipe.stages), start=1):
        iterations = work.reduction.num_steps(work, start=start, reached=reached, target=target)
        looked_at = iterations * recipe.calibration.samples * recipe.calibration.length
        trained = tokens[k - 1]
        planned.append(Stage(k, target, iterations, looked_at, trained, -(-trained // recipe.training.batch_tokens)))
        reached = target
    return planned
