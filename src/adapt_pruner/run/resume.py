"""Go on with the run of a folder: from its newest whole checkpoint, if what the run began with is still the same."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adapt_pruner.checkpoint.load import pick_device
from adapt_pruner.checkpoint.state import identity, load_state, save_state, start_of
from adapt_pruner.core.events import Interrupted, Listener, Saved
from adapt_pruner.core.events.run import Resumed
from adapt_pruner.core.events.words import counted, typed
from adapt_pruner.core.system import world
from adapt_pruner.core.system.provenance import made_by
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe
from adapt_pruner.run import results
from adapt_pruner.run.checkpoints import kept
from adapt_pruner.run.folder import RunFolder
from adapt_pruner.run.plan import check_run
from adapt_pruner.run.start import begin, prepare
from adapt_pruner.run.training import Trainer
from adapt_pruner.train.adapters import base_name
from adapt_pruner.work import RunState, Work


def resumed(
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
        work = begin(recipe, tell, trust_remote_code=trust_remote_code, scratch=folder.path)
    else:
        if saved["identity"] != origin:  # the same files may lie at another path now
            raise UsageError(
                f"{path} is a checkpoint of the model {saved['model']} as it was when the run began, not of {recipe.model} as it "
                "is now; name another folder, or restore that model"
            )
        loaded, tensors = load_state(
            path, saved, device=pick_device(recipe.device), offload=recipe.offload, trust_remote_code=trust_remote_code
        )
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
    feed, state = work.data.feed, work.state
    if feed is not None and "training text" in replaced:
        state.progress.rows = feed.skip_to(state.progress.tokens)
    elif feed is not None:
        feed.restore(state.feed)
    if path is not None:
        cuts = sum(note["stage"] == state.stage for note in state.history)
        work.tell(Resumed(path=str(path), stage=state.stage, step=state.progress.steps, pruned=state.pruned, cuts=cuts))

    def keep(name: str, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, log_size: int | None = None) -> None:
        folder.check_here()
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
            work.loaded, target, weights=weights, moments=moments, mask=results.whole_mask(work), pruning=results.facts(work), state=facts,
            weight_mask=work.weight_mask,
        )  # fmt: skip
        work.tell(Saved(path=str(target), stage=work.state.stage))
        folder.tidy(keep=kept(recipe))

    return work, Trainer(work, save=keep, log_size=lambda: folder.log_size, tensors=tensors)


def _check_changes(path: Path, state: RunState, recipe: Recipe, changed: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse changes of the recipe with which the run cannot go on, even if forced."""
    if state.stage > recipe.stages:
        raise UsageError(
            f"the run of {path} is in stage {state.stage} and the recipe has only {counted(recipe.stages, 'stage')}; set stages to "
            f"{state.stage} or more, or name another folder"
        )
    for table, done in (("vocabulary", "the vocabulary of {} has been cut"), ("grow", "the model of {} has grown")):
        if any(key.partition(".")[0] == table for key in changed):
            raise UsageError(
                f"{done.format(path)} already, and the recipe now asks for another one; leave {table} as it was, or name another folder"
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


def interrupted(error: BaseException, folder: RunFolder, listen: Listener) -> BaseException:
    """Tell where an interrupted run would continue; returns the error to raise."""
    if world.is_main():
        try:
            folder.check_here()
        except RunError as moved:
            return moved if isinstance(error, RunError) else error
        folder.tidy()
    if folder.is_finished:  # the interrupt came after the model was written
        message = f"the result is complete in {folder.result}"
        listen(Interrupted(message=message, path=str(folder.result)))
        return error
    newest, _, _ = folder.newest(thorough=False)  # a quick check: people who interrupt do not wait long
    where = f"the last complete checkpoint is {newest}" if newest else "no checkpoint was complete yet"
    if isinstance(error, RunError):
        return RunError(f"{error}; {where}")
    then = "continues from there" if newest else "starts again"
    listen(Interrupted(message=f"{where}; the same command with -o {folder.path} {then}"))
    return error
