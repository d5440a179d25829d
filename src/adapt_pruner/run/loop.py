"""The loop of a run: for each stage, reduce the model to the stage's budget, then train it, then measure it.

    run_stages(work)  the loop
    prune, run        load the model, call the loop and write the result

A run that was stopped continues from its newest checkpoint. Checkpoints are written after a stage's reduction, after its
training, and within both whenever `checkpoint_minutes` have passed. A listener is told of every event as a plain dict with the
key `event`. The library itself prints nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import pick_device
from adapt_pruner.checkpoint.save import check_target
from adapt_pruner.checkpoint.state import identity, load_state, save_state, start_of
from adapt_pruner.core import world
from adapt_pruner.core.events import Cut, Finished, Interrupted, Listener, Resumed, Saved, Start
from adapt_pruner.core.memory import peak_bytes, peak_rss_bytes
from adapt_pruner.core.precision import uses_bfloat16
from adapt_pruner.core.provenance import made_by
from adapt_pruner.core.run_events import Within
from adapt_pruner.core.weight_mask import count_nonzero
from adapt_pruner.core.words import counted, typed
from adapt_pruner.data.sources import domains
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.recipe import Recipe
from adapt_pruner.reduce.work import RunState, Stage, Work
from adapt_pruner.run import results
from adapt_pruner.run.checkpoints import called, kept
from adapt_pruner.run.disk_space import check_result, check_run
from adapt_pruner.run.folder import RunFolder, open_run_folder
from adapt_pruner.run.results import Outcome, measure_answers, measure_calibration, measure_tasks, measure_text
from adapt_pruner.run.start import begin, prepare, sizes_begun
from adapt_pruner.run.threads import fit_threads, kept_threads
from adapt_pruner.run.training import Trainer
from adapt_pruner.train.adapters import base_name

__all__ = ["prune", "run", "run_stages"]


def run_stages(work: Work, trainer: Trainer) -> Outcome:
    """Prune, train and measure the model, in place, through all stages that are left.

    Raises:
        RunError: a loss is not finite or explodes, or a checkpoint cannot be written.
    """
    state, recipe = work.state, work.recipe
    if "params_before" not in state.figures:
        state.figures |= {"params_before": work.budget.total, "decoder_params_before": decoder_parameters(work.model)}
        if recipe.makes_zeros or work.weight_mask is not None:
            state.figures["nonzero_before"] = count_nonzero(work.model)
        measure_calibration(work)
        measure_text(work, stage=0)
        cached = measure_tasks(work, stage=0)
        measure_answers(work, stage=0)
        latency = state.figures.get("measuring_seconds", 0.0)  # see `run.latency.budget_for`
        state.figures["measuring_seconds"] = latency + cached + state.spent["evaluate"]
    for stage in work.stages[state.stage - 1 :]:
        state.stage = stage.stage
        went_on, steps = state.pruned, state.progress.steps
        if not state.pruned:
            reduce(work, stage, trainer)
            if stage.tokens:
                measure_text(work, stage=stage.stage, after_cuts=True)
            state.pruned = True
            trainer.begin_stage()
        trainer.train(until=work.data.ends[stage.stage - 1] if work.data.ends else 0)
        scores_tasks = stage.stage == recipe.stages and recipe.evaluation.tasks is not None
        already_saved = went_on and state.progress.steps == steps  # the run resumed from a checkpoint that has this training
        if not already_saved:
            trainer.note_trained(called(stage.stage))
            if scores_tasks:
                trainer.save(called(stage.stage))  # what follows may take hours
        measure_text(work, stage=stage.stage)
        if scores_tasks:
            measure_tasks(work, stage=stage.stage)
        if stage.stage == recipe.stages:
            measure_answers(work, stage=stage.stage)
        state.stage, state.pruned = stage.stage + 1, False
        if stage.stage < recipe.stages:
            trainer.save(called(stage.stage))

    if "calibration_losses" in state.figures:
        measure_calibration(work)
    state.figures |= {
        "params_after": work.num_params,
        "decoder_params_after": decoder_parameters(work.model),
        "budget": work.budget.keep,
        "iterations": len(state.history),
        "trained_tokens": state.progress.tokens,
        "seconds": state.seconds,
        **{f"seconds_{phase}": seconds for phase, seconds in state.spent.items()},
        "peak_bytes": peak_bytes(work.model),
        "peak_rss_bytes": peak_rss_bytes(),
        "method": recipe.method,
        "seed": recipe.seed,
    }
    if work.weight_mask is not None:
        pattern = work.weight_mask.pattern
        state.figures |= {"nonzero_after": count_nonzero(work.model), "sparsity_after": None if pattern is None else str(pattern)}
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
        told = {**state.history[-1], **change.told, **layers, "read": state.figures.get("calibration_tokens", 0)}
        work.tell(Cut(**told))
        trainer.save_if_due(called(stage.stage, cut=work.iteration - 1))
    if work.num_params > stage.params and not work.recipe.makes_zeros:
        raise RunError(
            f"reduce {work.recipe.reduce!r} finds nothing more to remove at {work.num_params:,} parameters, above the target "
            f"{stage.params:,}; raise the budget, or add to axes"
        )


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
        UsageError: the budget or a text does not fit the model, `out` is not empty, or several processes were started.
        RunError: a loss is not finite, or the result cannot be written.
    """
    started, out = time.perf_counter(), Path(out)
    world.check_alone("prune")
    check_target(out)
    work = begin(recipe.ready(), listen, trust_remote_code=trust_remote_code, check=True)
    work.started = started
    prepare(work)
    check_result(work, out)
    trainer = Trainer(work)
    _tell_start(work, trainer)
    with work.state.clock("other"):
        outcome = run_stages(work, trainer)
    results.write(work, out, write_more=write_more)
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
    """Run the recipe in a run folder (see `run.folder`); for arguments, result and errors see `report.with_card.run`.

    `write_more` writes more files into the result before the result gets its final name.
    """
    started = time.perf_counter()
    with kept_threads(), open_run_folder(Path(run_dir)) as folder:
        recipe = folder.as_begun(recipe)
        changed = world.on_main(lambda: folder.check(recipe.ready(), force=force_recipe))
        if world.agreed(folder.is_finished):
            world.on_main(lambda: _tidy_at_end(recipe, folder))
            listen(Finished(path=str(folder.result)).to_dict())
            return None
        tell = _logged(listen, folder)
        try:
            work, trainer = _resumed(recipe.ready(), folder, tell, trust_remote_code, changed=changed, force=force_recipe)
            work.started = started
            if recipe.minutes is not None:
                fit_threads(work)
            _tell_start(work, trainer)
            with trainer.rescued():
                with work.state.clock("other"):
                    outcome = run_stages(work, trainer)
                world.on_main(lambda: results.write(work, folder.result, write_more=write_more))
            work.tell(Saved(path=str(folder.result), **outcome.figures))
            world.on_main(lambda: _tidy_at_end(recipe, folder))
        except UsageError:
            raise
        except (Exception, KeyboardInterrupt) as error:  # out of memory, too
            trouble = _interrupted(error, folder, listen)
            if trouble is error:
                raise
            raise trouble from error
        return outcome


def _tidy_at_end(recipe: Recipe, folder: RunFolder) -> None:
    """Remove the checkpoints of a run that has ended, in place, if the recipe keeps none."""
    if recipe.keep_checkpoints == 0:
        folder.tidy(keep=0)


def _interrupted(error: BaseException, folder: RunFolder, listen: Listener) -> BaseException:
    """Tell where an interrupted run would continue; returns the error to raise."""
    if world.is_main():
        folder.tidy()
    if folder.is_finished:  # the interrupt came after the model was written
        message = f"the result is complete in {folder.result}"
        listen(Interrupted(message=message, path=str(folder.result)).to_dict())
        return error
    newest, _, _ = folder.newest(thorough=False)  # a quick check: people who interrupt do not wait long
    where = f"the last complete checkpoint is {newest}" if newest else "no checkpoint was complete yet"
    if isinstance(error, RunError):
        return RunError(f"{error}; {where}")
    then = "continues from there" if newest else "starts again"
    listen(Interrupted(message=f"{where}; the same command with -o {folder.path} {then}").to_dict())
    return error


def _resumed(
    recipe: Recipe, folder: RunFolder, tell: Listener, trust_remote_code: bool, *, changed: list[str], force: bool
) -> tuple[Work, Trainer]:
    """The run of a folder, ready to go on: from its newest whole checkpoint, or from its start if there is none.

    Raises:
        UsageError: the recipe, its texts or its teacher are not those that the run began with.
    """
    path, saved, damaged = world.on_main(folder.newest)
    origin = identity(recipe.model)
    tensors: Mapping[str, Tensor] = {}
    if path is None:
        work = begin(recipe, tell, trust_remote_code=trust_remote_code, check=True)
    else:
        _check_origin(path, saved, recipe, origin)
        loaded, tensors = load_state(path, saved, device=pick_device(recipe.device))
        state = RunState.from_json(saved)
        _check_changes(path, state, recipe, changed, tensors)
        work = Work(loaded, recipe, tell, trust_remote_code, state, dense_params=state.figures["params_before"])
        if saved.get("reduce", recipe.reduce) == recipe.reduce:
            work.reduction.restore(state.reduction)
    prepare(work, begun=path is not None, folder=folder.path)
    before = {} if path is None else saved["digests"]
    replaced = [what for what, digest in work.data.digests.items() if digest != before.get(what, digest)]
    if replaced and not force:
        raise UsageError(
            f"the {' and the '.join(replaced)} changed after {path} was written; restore the old version, start again in another "
            f"folder, or continue with the new version by `{typed('run', folder.path / 'recipe.yaml', '-o', folder.path, '--force-recipe')}`"
        )

    def write_down() -> None:
        check_run(work, folder.path, folder.checkpoints)
        folder.begin(recipe, made_by())
        folder.rewind(log_size=saved.get("log_size", 0), damaged=damaged)
        folder.tidy(keep=kept(recipe))

    world.on_main(write_down)
    for sentence in _sentences(path, damaged=damaged, changed=changed, replaced=replaced):
        work.warn(sentence)
    if changed or replaced:
        work.reduction.fit(work)
    _restore_feed(work, anew="training text" in replaced)
    if path is not None:
        state = work.state
        cuts = sum(note["stage"] == state.stage for note in state.history)
        work.tell(Resumed(path=str(path), stage=state.stage, step=state.progress.steps, pruned=state.pruned, cuts=cuts))

    def keep(name: str, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, log_size: int | None = None) -> None:
        if folder.is_finished:  # what came after the model was written needs no checkpoint
            return
        folder.reopen(name, step=work.state.progress.steps)
        target = folder.checkpoints / name
        if target.exists():  # of the same place in the run: it was interrupted between there and here, and has gone on
            return
        facts = {
            **work.state.to_json(), "start": start_of(work.loaded), "model": recipe.model, "identity": origin, "reduce": recipe.reduce,
            "digests": work.data.digests, "log_size": folder.log_size if log_size is None else log_size,
        }  # fmt: skip
        save_state(
            work.loaded,
            target,
            weights=weights,
            moments=moments,
            mask=results.whole_mask(work),
            pruning=results.facts(work),
            state=facts,
            weight_mask=work.weight_mask,
        )
        work.tell(Saved(path=str(target), stage=work.state.stage))
        folder.tidy(keep=kept(recipe))

    return work, Trainer(work, save=keep, log_size=lambda: folder.log_size, tensors=tensors)


def _restore_feed(work: Work, *, anew: bool) -> None:
    """Bring the feed, in place, to where the run stands; `anew` if the text is another one."""
    feed, state = work.data.feed, work.state
    if feed is None:
        return
    if anew:
        state.progress.rows = feed.skip_to(state.progress.tokens)
    else:
        feed.restore(state.feed)


def _check_origin(path: Path, saved: Mapping[str, Any], recipe: Recipe, origin: str) -> None:
    if saved["identity"] != origin:  # the same files may lie at another path now
        raise UsageError(
            f"{path} is a checkpoint of the model {saved['model']} as it was when the run began, not of {recipe.model} as it "
            "is now; "
            "name another folder, or restore that model"
        )


def _check_changes(path: Path, state: RunState, recipe: Recipe, changed: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse changes of the recipe with which the run cannot go on, even if forced."""
    if state.stage > recipe.stages:
        raise UsageError(
            f"the run of {path} is in stage {state.stage} and the recipe has only {counted(recipe.stages, 'stage')}; set stages to "
            f"{state.stage} or more, "
            "or name another folder"
        )
    if any(key.partition(".")[0] == "vocabulary" for key in changed):
        raise UsageError(
            f"the vocabulary of {path} has been cut already, and the recipe now asks for another one; "
            "leave vocabulary as it was, or name another folder"
        )
    if "training.lora" in changed and any(base_name(name) is None for name in tensors):
        raise UsageError(
            f"{path} contains LoRA adapters that are not trained to the end, and another training.lora would lose them; "
            "leave training.lora as it was, or name another folder"
        )


def _sentences(
    path: Path | None, *, damaged: Mapping[Path, str], changed: Sequence[str], replaced: Sequence[str]
) -> Iterator[str]:
    """Warnings for a run that does not continue exactly as it was."""
    for checkpoint, trouble in damaged.items():
        yield f"a checkpoint is damaged and set aside as {checkpoint.name}.damaged: {trouble}"
    if damaged and path is None:
        yield "every checkpoint is damaged, so the run starts again; the log of the lost work is log.damaged.jsonl"
    if changed:
        yield f"continuing with another recipe, which differs in {', '.join(changed)}"
    if replaced:
        yield f"continuing with another {' and another '.join(replaced)} from where the run stopped"


def _logged(listen: Listener, folder: RunFolder) -> Listener:
    """A listener that also writes the log and where the run stands; on processes other than the main one it does nothing."""

    def tell(event: dict[str, Any]) -> None:
        if world.is_main():
            folder.log(event)
            folder.write_progress(event)
            listen(event)

    return tell


def _tell_start(work: Work, trainer: Trainer) -> None:
    state, recipe, feed = work.state, work.recipe, work.data.feed
    coming = work.stages[state.stage - 1 + state.pruned :]
    source = recipe.calibration.ids or recipe.calibration.source
    start, decoder = sizes_begun(work)
    decoder_target = None if "residual" in recipe.axes else max(0, decoder - start + min(start, work.budget.keep))
    left: dict[str, Any] = {} if recipe.minutes is None else {"seconds_left": max(0.0, 60 * recipe.minutes - work.elapsed)}
    work.tell(Start(
        method=recipe.method, dequantised=work.loaded.dequantised, text=", ".join(domains(source)) if work.reads_text else None, decoder=decoder,
        decoder_target=decoder_target, stages=recipe.stages, params=work.budget.total, target=work.budget.keep, now=work.num_params,
        sparsity=recipe.sparsity or None,
        dense=work.loaded.mask is None, random=recipe.init == "random", calibration_tokens=sum(stage.calibration_tokens for stage in coming),
        training_tokens=0 if feed is None else trainer.expected_tokens(feed), trained_tokens=state.progress.tokens, processes=world.size(),
        parallel=recipe.parallel, began=state.began, sizes=families.sizes(work.model), layers_left=state.layers_left,
        device=work.model.device.type, precision="bfloat16" if uses_bfloat16(work.model.device, recipe.dtype) else "float32",
        **left,
    ))  # fmt: skip
