"""What a run still has to do: its phases in order, with the operations of each, so that its end can be predicted."""

from dataclasses import replace

from adapt_pruner.core.events.run import Item, Planned
from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.system import world
from adapt_pruner.recipe import parts
from adapt_pruner.run.estimate import Setup, Shapes, operations, setup_of, shapes
from adapt_pruner.work import Stage, Work

__all__ = ["ahead", "setup_here", "shapes_in_training"]


def ahead(work: Work, how: Setup, *, writes: tuple[int, ...] = (), reads: int | None = None) -> Planned:
    """The phases that a run has before it; of a resumed run, those that are left.

    A run follows its progress by this list, and a dry run computes its time from it.

    Args:
        work: the run, with its stages.
        how: how the run trains, and where.
        writes: number of sequences in each text that the model writes first.
        reads: tokens of held-out text. None, before that text is read, counts `evaluation.max_windows` windows, or 64 if that
            is null.
    """
    recipe, state, now = work.recipe, work.state, shapes(work.model)
    items: list[Item] = []

    def add(phase: str, stage: int, flops: float | None = 0.0, *, times: int = 1, repeats: bool = False) -> None:
        items.append(Item(phase=phase, stage=stage, times=times, flops=flops, repeats=repeats))

    held_out = reads
    if held_out is None:
        held_out = 0 if recipe.evaluation.source is None else recipe.evaluation.window * (recipe.evaluation.max_windows or 64)
    tasks = recipe.evaluation.tasks is not None
    asked = recipe.calibration
    read = replace(how, length=recipe.evaluation.window)
    for samples in writes:  # on a GPU the time of a token depends on its kernels, not on its operations
        slow = how.device == "cuda"
        flops = None if slow else samples * asked.length * operations(now, replace(how, length=asked.length), kind="read")
        add("write", 0, flops)
    if "params_before" not in state.figures:
        if held_out:
            add("evaluate", 0, held_out * operations(now, read, kind="read"))
        if tasks:
            add("task", 0, None)
    trained = state.progress.tokens
    tokens = []
    for stage in work.stages:
        done = stage.stage < state.stage
        left = 0 if done else min(stage.tokens, sum(one.tokens for one in work.stages[: stage.stage]) - trained)
        tokens.append(max(0, left))
        if done:
            continue
        if stage.stage > 1:
            add("save", stage.stage)
        of = now.cut_to(min(now.params, stage.params))
        if not (state.pruned and stage.stage == state.stage):
            for phase, once, times in _reducing(work, stage, now, how):
                add(phase, stage.stage, once, times=times, repeats=True)
            if held_out and stage.tokens:
                add("evaluate", stage.stage, held_out * operations(of, read, kind="read"))
        if stage.tokens:
            add("save", stage.stage)
            add("train", stage.stage, left * operations(shapes_in_training(work, stage, now), how, kind="train"))
        if held_out:
            add("evaluate", stage.stage, held_out * operations(of, read, kind="read"))
        if tasks and stage.stage == recipe.stages:
            add("task", stage.stage, None)
    add("finish", 0)
    return Planned(targets=[stage.params for stage in work.stages], tokens=tokens, items=items)


def shapes_in_training(work: Work, stage: Stage, now: Shapes) -> Shapes:
    """The shapes of the model while a stage trains. If the stage cuts while it trains, those halfway between its start and end.

    Args:
        work: the run, with its stages.
        stage: one of these.
        now: the shapes of the model at this moment.
    """
    if "training" not in parts.needs("reduce", work.recipe.reduce):
        return now.cut_to(min(now.params, stage.params))
    begins = min((one.params for one in work.stages if one.stage < stage.stage), default=now.params)
    begins = min(now.params, begins)
    return now.cut_to((begins + min(begins, stage.params)) // 2)


def setup_here(work: Work) -> Setup:
    """How the run trains, seen from one of its processes. A teacher counts as one of the model's shapes, since none is loaded yet."""
    recipe, device = work.recipe, work.model.device
    taught = recipe.training.source is not None and recipe.training.needs_teacher
    return setup_of(
        recipe, device="cpu" if device.type == "cpu" else "cuda", narrow=uses_bfloat16(device, recipe.dtype),
        teacher=shapes(work.model) if taught else None, processes=world.size(),
    )  # fmt: skip


def _reducing(work: Work, stage: Stage, now: Shapes, how: Setup) -> list[tuple[str, float | None, int]]:
    """Each phase of an iteration: its name, its operations, and how often it runs in the stage."""
    start = work.state.figures.get("params_after_vocabulary", work.dense_params)
    before = [one.params for one in work.stages if one.stage < stage.stage]
    planned = min(before, default=start)
    begin = min(now.params, planned)
    of = now.cut_to((begin + min(begin, stage.params)) // 2)
    how = replace(how, length=work.recipe.calibration.length, teacher=None)
    goes_on = begin < planned  # some of its cuts are done
    iterations = work.reduction.num_steps(work, start=start, reached=begin, target=stage.params) if goes_on else stage.iterations
    found: list[tuple[str, float | None, int]] = []
    for phase, passes in work.reduction.phases(work, stage.params).items():
        read, both = operations(of, how, kind="read"), operations(of, how, kind="score")
        flops = None if passes.flops is None else passes.forward * read + passes.both * both + passes.flops
        found.append((phase, flops, iterations if passes.times is None else passes.times))
    return [*found, ("cut", 0.0, iterations)]
