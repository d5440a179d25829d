"""The story of a run: load, plan; for each stage reduce, train, measure; save.

    prune   one pass without checkpoints; writes the result
    run     the same in a run folder, which a stopped run goes on from (see `run.resume`)

A listener is told of every event. The library itself prints nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path

from adapt_pruner.checkpoint.save import check_target
from adapt_pruner.core.events import Cut, Event, Finished, Listener, Saved
from adapt_pruner.core.events.run import Within
from adapt_pruner.core.system import world
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.run import results
from adapt_pruner.run.checkpoints import called
from adapt_pruner.run.folder import open_run_folder
from adapt_pruner.run.plan import check_result
from adapt_pruner.run.probe import fit_threads, kept_threads
from adapt_pruner.run.results import Outcome
from adapt_pruner.run.resume import interrupted, resumed
from adapt_pruner.run.start import begin, prepare, tell_start
from adapt_pruner.run.training import Trainer
from adapt_pruner.work import Stage, Work


def prune(
    recipe: Recipe,
    out: str | Path,
    *,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Outcome:
    """Run the recipe and write its result to the folder `out`; no checkpoints are saved before that.

    `write_more` writes more files into the folder before the folder gets its final name.

    Raises:
        UsageError: the budget or a text does not fit the model, or `out` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    started, out = time.perf_counter(), Path(out)
    world.on_main(lambda: check_target(out))
    tell = listen if world.is_main() else (lambda event: None)
    work = begin(recipe.ready(), tell, trust_remote_code=trust_remote_code, scratch=out.absolute().parent)
    work.started = started
    prepare(work)
    world.on_main(lambda: check_result(work, out))
    trainer = Trainer(work)
    tell_start(work, training_tokens=trainer.expected_tokens)
    with work.state.clock("other"):
        outcome = run_stages(work, trainer)
    world.on_main(lambda: results.write(work, out, write_more=write_more))
    work.tell(Saved(path=str(out), **outcome.figures))
    return outcome


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
    force_recipe: bool = False,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Outcome | None:
    """Run the recipe in a run folder (see `run.folder`); an unfinished run in that folder continues where it stopped.

    Args:
        recipe: the run.
        run_dir: a new or empty folder, or that of a run.
        listen: called with every event.
        trust_remote_code: whether code that comes with the model may run.
        force_recipe: continue with this recipe although the run began with another.
        write_more: writes more files into the result before the result gets its final name.

    Returns:
        The result; None if the run there was already finished.

    Raises:
        UsageError: the recipe does not fit the model or the folder; nothing has been changed.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    started = time.perf_counter()
    with kept_threads(), open_run_folder(Path(run_dir)) as folder:
        recipe = folder.as_begun(recipe)
        changed = world.on_main(lambda: folder.check(recipe.ready(), force=force_recipe))
        if world.agreed(folder.is_finished):
            world.on_main(lambda: folder.tidy_at_end(recipe))
            listen(Finished(path=str(folder.result)))
            return None
        try:

            def tell(event: Event) -> None:
                if world.is_main():
                    folder.log(event)
                    folder.write_progress(event)
                    listen(event)

            work, trainer = resumed(recipe.ready(), folder, tell, trust_remote_code, changed=changed, force=force_recipe)
            work.started = started
            if recipe.minutes is not None:
                fit_threads(work)
            tell_start(work, training_tokens=trainer.expected_tokens)
            with trainer.rescued():
                with work.state.clock("other"):
                    outcome = run_stages(work, trainer)
                world.on_main(folder.check_here)
                world.on_main(lambda: results.write(work, folder.result, write_more=write_more))
            work.tell(Saved(path=str(folder.result), **outcome.figures))
            world.on_main(lambda: folder.tidy_at_end(recipe))
        except UsageError:
            raise
        except (Exception, KeyboardInterrupt) as error:  # out of memory, too
            trouble = interrupted(error, folder, listen)
            if trouble is error:
                raise
            raise trouble from error
        return outcome


def run_stages(work: Work, trainer: Trainer) -> Outcome:
    """Prune, train and measure the model, in place, through all stages that are left.

    Raises:
        RunError: a loss is not finite or explodes, or a checkpoint cannot be written.
    """
    state, recipe = work.state, work.recipe
    if "params_before" not in state.figures:
        results.measure_start(work)
    for stage in work.stages[state.stage - 1 :]:
        state.stage = stage.stage
        is_last = stage.stage == recipe.stages
        was_pruned, steps_before = state.pruned, state.progress.steps
        if not state.pruned:
            reduce(work, stage, trainer)
            if stage.tokens:
                results.measure_text(work, stage=stage.stage, after_cuts=True)
            state.pruned = True
            trainer.begin_stage()
        trainer.train(until=work.data.ends[stage.stage - 1] if work.data.ends else 0)
        if not was_pruned or state.progress.steps > steps_before:  # else the run resumed from a checkpoint that has this training
            trainer.note_trained(called(stage.stage))
            if is_last and recipe.evaluation.tasks is not None:
                trainer.save(called(stage.stage))  # scoring tasks may take hours
        results.measure_text(work, stage=stage.stage)
        if is_last:
            results.measure_tasks(work, stage=stage.stage)
            results.measure_answers(work, stage=stage.stage)
            results.measure_chat(work, stage=stage.stage)
        state.stage, state.pruned = stage.stage + 1, False
        if not is_last:
            trainer.save(called(stage.stage))
    results.measure_end(work)
    return Outcome(work.loaded, state.mask, state.figures, state.history)


def reduce(work: Work, stage: Stage, trainer: Trainer) -> None:
    """Bring the model, in place, to the stage's budget: the reduction yields each step, and this function carries it out.

    Raises:
        RunError: the reduction stopped above the budget.
    """
    state = work.state
    trainer.before_cuts()
    work.forget_warnings()
    for change in work.reduction.steps(work, stage.params):
        if isinstance(change, Within):
            work.tell(change)
            trainer.save_if_due(called(stage.stage, cut=work.iteration - 1, search=change.done))
            continue
        work.begins("cut", stage=stage.stage, iteration=work.iteration)
        with state.clock("cut"):
            work.apply(change)
        layers = {} if change.mask is None else {"layers_left": state.layers_left}
        figures = {**state.history[-1], **change.told, **layers, "read": state.figures.get("calibration_tokens", 0)}
        work.tell(Cut(**figures))
        trainer.save_if_due(called(stage.stage, cut=work.iteration - 1))
    results.warn_of_pattern(work)
    if work.num_params > stage.params and not work.recipe.makes_zeros:
        raise RunError(
            f"reduce {work.recipe.reduce!r} finds nothing more to remove at {work.num_params:,} parameters, above the target "
            f"{stage.params:,}; raise the budget, or add to axes"
        )
