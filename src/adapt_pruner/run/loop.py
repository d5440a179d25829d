"""The loop on one screen: for each stage, score → choose → cut until the stage's target is met, then train.

`shrink` is the loop. `prune` and `run` put a model in at its front and a folder at its back; a run that was stopped
goes on from its newest checkpoint. What happens on the way is told to a listener as plain dicts with an `event` key; the
library itself prints nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, pick_device
from adapt_pruner.checkpoint.save import check_target
from adapt_pruner.checkpoint.state import identity, load_state, save_state, start_of
from adapt_pruner.core import world
from adapt_pruner.core.axes import Axis, Mask, Scores
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.core.cutline import cut_line
from adapt_pruner.core.memory import peak_bytes, peak_rss_bytes
from adapt_pruner.core.precision import uses_bfloat16
from adapt_pruner.core.provenance import made_by
from adapt_pruner.core.surgery import cut
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.recipe import Recipe, parts
from adapt_pruner.reduce.allocate import Debt
from adapt_pruner.reduce.slicing import slice_to, width_for
from adapt_pruner.run import latency
from adapt_pruner.run.folder import RunFolder, opened
from adapt_pruner.run.measure import measure_tasks, measure_text
from adapt_pruner.run.outcome import Outcome
from adapt_pruner.run.plan import (
    Stage,
    chooser_of,
    layer_measure_of,
    measured_whole,
    metrics_of,
    prunable,
    repair_parameters,
    scored,
)
from adapt_pruner.run.position import Position
from adapt_pruner.run.prepare import Listener, Prepared, cut_vocabulary, load_model, prepare, progress
from adapt_pruner.run.stage import Trainer
from adapt_pruner.score.calibrate import score, score_behind
from adapt_pruner.train.adapters import base_name

__all__ = ["prune", "run", "shrink"]

_HEAD_TOKENS = 1024  # tokens on which a KV head is measured


def shrink(loaded: Loaded, recipe: Recipe, *, ready: Prepared, at: Position, trainer: Trainer, listen: Listener) -> Outcome:
    """Prune and train `loaded.model`, in place, as the recipe says, from where the run stands to its end.

    Args:
        loaded: the model as it is now, float32.
        recipe: everything else.
        ready: what `prepare` made of them.
        at: where the run stands; moved along.
        trainer: trains between cuts, and saves.
        listen: told of every event.

    Raises:
        RunError: a loss is not finite or explodes, or a checkpoint cannot be written.
    """
    model = loaded.model
    if "params_before" not in at.figures:
        at.figures |= {"params_before": ready.budget.total, "decoder_params_before": decoder_parameters(model)}
        measure_text(model, ready, recipe, at, listen, stage=0)
        measure_tasks(loaded, ready, recipe, at, listen, stage=0)
    for stage in ready.stages[at.stage - 1 :]:
        at.stage = stage.stage
        went_on, steps = at.pruned, at.progress.steps
        if not at.pruned:
            _prune(loaded, stage, recipe, ready=ready, at=at, trainer=trainer, listen=listen)
            at.pruned = True
            trainer.begin_stage()
        trainer.train(until=ready.spans[stage.stage - 1] if ready.spans else 0)
        scores_tasks = stage.stage == recipe.stages and recipe.evaluation.tasks is not None
        if scores_tasks and not (went_on and at.progress.steps == steps):
            trainer.save(f"stage-{stage.stage}")  # what follows may take hours
        measure_text(model, ready, recipe, at, listen, stage=stage.stage)
        if scores_tasks:
            measure_tasks(loaded, ready, recipe, at, listen, stage=stage.stage)
        at.stage, at.pruned = stage.stage + 1, False
        if stage.stage < recipe.stages:
            trainer.save(f"stage-{stage.stage}")

    at.figures |= {
        "params_after": count_parameters(model),
        "decoder_params_after": decoder_parameters(model),
        "budget": ready.budget.keep,
        "iterations": len(at.history),
        "trained_tokens": at.progress.tokens,
        "seconds": at.seconds,
        **{f"seconds_{phase}": seconds for phase, seconds in at.spent.items()},
        "peak_bytes": peak_bytes(model),
        "peak_rss_bytes": peak_rss_bytes(),
        "method": recipe.method,
        "seed": recipe.seed,
    }
    return Outcome(loaded, at.mask, at.figures, at.history)


def _prune(
    loaded: Loaded, stage: Stage, recipe: Recipe, *, ready: Prepared, at: Position, trainer: Trainer, listen: Listener
) -> None:
    """Score → choose → cut, in place, until the stage's target is met."""
    model = loaded.model
    if recipe.rotate is not None:
        _slice(model, stage, recipe, ready=ready, at=at, listen=listen)
        return
    chooser = chooser_of(recipe, step=recipe.step, amplitude=recipe.amplitude)

    said: set[str] = set()

    def warn(message: str) -> None:
        """Once a stage, however many iterations it has and whatever figures they put into the sentence."""
        if (sentence := re.sub(r"\d[\d.,]*", "", message)) not in said:
            said.add(sentence)
            listen({"event": "warning", "message": f"stage {stage.stage}: {message}"})

    trainer.before_cuts()
    if recipe.debt == "reset":
        at.debt = Debt.none(prunable(model, recipe))
    while (now := count_parameters(model)) > stage.params:
        where = {"stage": stage.stage, "iteration": len(at.history) + 1}
        axes = families.axes(model)
        with at.clock("score"):
            batches = at.counted(ready.calibration(where["iteration"]))
            metrics = metrics_of(recipe, seed=recipe.seed + where["iteration"])
            tell = progress(listen, "score", **where)
            scores, loss = score(model, scored(model, recipe), batches, metrics=metrics, dtype=recipe.dtype, on_batch=tell)
            if (measure_layers := layer_measure_of(recipe)) is not None:
                scores |= measure_layers(model, measured_whole(model, recipe), batches)
            may_shrink = prunable(model, recipe)
            if unscored := sorted({axis.kind for axis in may_shrink if axis.name not in scores}):
                raise UsageError(
                    f"metric {recipe.metric!r} says nothing of {', '.join(unscored)}; take another, such as weights.taylor, "
                    "or leave them out of axes"
                )
            budget = Budget(keep=stage.params, total=now + repair_parameters(model, recipe))
            sizes, at.debt = chooser(scores, may_shrink, budget, debt=at.debt)
            if recipe.behind:
                scores |= score_behind(model, axes, sizes, batches, metric=metrics[0], known=scores, dtype=recipe.dtype)
            scores |= _head_scores(model, may_shrink, sizes, batches, recipe, progress(listen, "heads", **where))
            mask = Mask.of_sizes(may_shrink, scores, sizes)
        if mask.num_removed() == 0:
            raise RunError(
                f"{recipe.chooser} finds nothing more to take at {now:,} parameters, above the target {stage.params:,}"
            )
        if recipe.repair is not None:
            with at.clock("repair"):
                tell = progress(listen, "repair", **where)
                repair = parts.bind("repair", recipe.repair, dtype=recipe.dtype, warn=warn, on_layer=tell)
                repair(model, axes, mask, [*batches, *ready.own])
        with at.clock("cut"):
            cut(model, families.axes(model), mask, optimizer=trainer.optimizer)  # with biases that a repair added
            at.mask, at.debt = at.mask.then(mask), at.debt.after(mask)
        note = {**where, "params": count_parameters(model), "target": stage.params, "loss": loss}
        at.history.append(note)
        listen({
            "event": "cut", **note, "sizes": sizes, "distances": scores["layers"].tolist() if "layers" in scores else None,
            "blocks": {axis.name: float(scores[axis.name]) for axis in may_shrink if axis.modules},
            "layers_left": at.layers_left, "scores": cut_line(may_shrink, scores, mask), "read": at.figures["calibration_tokens"],
        })  # fmt: skip


def _slice(model: Any, stage: Stage, recipe: Recipe, *, ready: Prepared, at: Position, listen: Listener) -> None:
    """Slice the residual stream, in place, to the width that the stage's target allows."""
    if count_parameters(model) <= stage.params:
        return
    where = {"stage": stage.stage, "iteration": len(at.history) + 1}
    width = width_for(model, stage.params)
    batches = at.counted(ready.calibration(where["iteration"]))
    num_tokens = sum(batch.numel() for batch in batches)
    if num_tokens < width:
        message = f"the calibration text has {num_tokens:,} tokens, which span fewer directions than the {width:,} to keep; give it more"
        listen({"event": "warning", "message": message})
    with at.clock("score"):
        slice_to(model, width, batches, dtype=recipe.dtype, on_basis=progress(listen, "score", **where))
    note = {**where, "params": count_parameters(model), "target": stage.params, "loss": float("nan")}
    at.history.append(note)
    listen({"event": "cut", **note, "sizes": {"width": width}, "distances": None, "read": at.figures["calibration_tokens"]})


def _head_scores(
    model: Any,
    axes: Sequence[Axis],
    sizes: Mapping[str, int],
    batches: Sequence[Tensor],
    recipe: Recipe,
    tell: Callable[[int, int], None],
) -> Scores:
    """What `recipe.head_metric` says of the KV heads in every layer that is to lose one; nothing of the others."""
    losing = [axis for axis in axes if axis.kind == "kv_heads" and sizes[axis.name] < axis.size]
    if recipe.head_metric is None or not losing:
        return {}
    measure = parts.bind("head_metric", recipe.head_metric, dtype=recipe.dtype, on_axis=tell)
    ahead = accumulate((batch.numel() for batch in batches), initial=0)
    enough = [batch for batch, before in zip(batches, ahead, strict=False) if before < _HEAD_TOKENS]
    measured: Scores = measure(model, losing, enough)
    return measured


def prune(
    recipe: Recipe,
    out: str | Path,
    *,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
    beside: Callable[[Path], None] = lambda folder: None,
) -> Outcome:
    """Run the recipe and write the resulting checkpoint to the folder `out`, with nothing saved on the way.

    `beside` writes more files into the checkpoint before it has its name.

    Raises:
        UsageError: the budget or a text does not fit the model, or `out` is not empty.
        RunError: a loss is not finite, or the result cannot be written.
    """
    out = Path(out)
    check_target(out)
    loaded, at, dense = _begun(recipe.ready(), listen, trust_remote_code)
    start = count_parameters(loaded.model)
    keep = latency.kept(recipe, at.figures)
    ready = prepare(
        loaded, recipe, listen=listen, trust_remote_code=trust_remote_code, dense=dense, start=start, keep=keep, clock=at.clock
    )
    _tell_start(loaded, ready, recipe, at, listen)
    trainer = Trainer(loaded, recipe, ready=ready, at=at, listen=listen, save=None)
    with at.clock("other"):
        outcome = shrink(loaded, recipe, ready=ready, at=at, trainer=trainer, listen=listen)
    outcome.write(recipe, out, listen=listen, trust_remote_code=trust_remote_code, beside=beside)
    listen({"event": "saved", "path": str(out), **outcome.figures})
    return outcome


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    listen: Listener = lambda event: None,
    trust_remote_code: bool = False,
    force_recipe: bool = False,
    beside: Callable[[Path], None] = lambda folder: None,
) -> Outcome | None:
    """Run the recipe in a run folder (see `run.folder`); go on where it was if the folder holds an unfinished run.

    Args:
        recipe: the run.
        run_dir: a new or empty folder, or that of a run.
        listen: told of every event.
        trust_remote_code: whether code that comes with the model may run.
        force_recipe: go on with this recipe although the run began with another.
        beside: writes more files into the result before it has its name.

    Returns:
        What came of it; None where the run there was already finished.

    Raises:
        UsageError: the recipe does not fit the model or the folder; nothing has been changed.
        RunError: a loss is not finite or explodes, or something cannot be written; the message names the last checkpoint.
    """
    with opened(Path(run_dir)) as folder:
        changed = world.on_main(lambda: folder.check(recipe.ready(), force=force_recipe))
        if world.agreed(folder.is_finished):
            listen({"event": "finished", "path": str(folder.result)})
            return None
        tell = _logged(listen, folder)
        try:
            return _run(recipe.ready(), folder, tell, trust_remote_code, force=force_recipe, changed=changed, beside=beside)
        except UsageError:
            raise
        except (Exception, KeyboardInterrupt) as error:  # out of memory, too
            if world.is_main():
                folder.tidy()
            if folder.is_finished:  # with the model written, while the last was measured or said of it
                message = f"the result is complete in {folder.result}"
                listen({"event": "interrupted", "message": message, "path": str(folder.result)})
                raise
            newest, _, _ = folder.newest(thorough=False)  # whoever interrupts does not wait long
            where = f"the last complete checkpoint is {newest}" if newest else "no checkpoint was complete yet"
            if not isinstance(error, RunError):
                then = "goes on from there" if newest else "begins anew"
                listen({"event": "interrupted", "message": f"{where}; the same command with -o {folder.path} {then}"})
                raise
            raise RunError(f"{error}; {where}") from error


def _run(
    recipe: Recipe,
    folder: RunFolder,
    tell: Listener,
    trust_remote_code: bool,
    *,
    force: bool,
    changed: list[str],
    beside: Callable[[Path], None],
) -> Outcome:
    path, state, damaged = world.on_main(folder.newest)
    origin = identity(recipe.model)
    tensors: Mapping[str, Tensor] = {}
    if path is None:
        loaded, at, dense = _begun(recipe, tell, trust_remote_code)
    else:
        _check_origin(path, state, recipe, origin)
        loaded, tensors = load_state(path, state, device=pick_device(recipe.device))
        at = Position.from_json(state)
        _check_place(path, at, recipe, changed, tensors)
        dense = at.figures["params_before"]
    ready = prepare(
        loaded,
        recipe,
        listen=tell,
        trust_remote_code=trust_remote_code,
        dense=dense,
        start=at.figures.get("params_after_vocabulary", dense),
        keep=latency.kept(recipe, at.figures),
        begun=path is not None,
        folder=folder.path,
        clock=at.clock,
    )
    replaced = [] if path is None else [what for what, digest in ready.digests.items() if digest != state["digests"][what]]
    if replaced and not force:
        raise UsageError(
            f"the {' and the '.join(replaced)} changed after {path} was written; bring back what was there, begin anew in another "
            "folder, or pass --force-recipe to go on with what is there now"
        )

    def begin() -> None:
        folder.begin(recipe, made_by())
        folder.rewind(log_size=state.get("log_size", 0), damaged=damaged)
        folder.tidy(keep=recipe.keep_checkpoints)

    world.on_main(begin)
    for sentence in _sentences(path, at, damaged=damaged, changed=changed, replaced=replaced):
        tell({"event": "warning", "message": sentence})
    if changed or replaced:
        at.fit(prunable(loaded.model, recipe), ready.rows)
    if path is not None:
        tell({"event": "resumed", "path": str(path), "stage": at.stage, "step": at.progress.steps, "pruned": at.pruned})
    _tell_start(loaded, ready, recipe, at, tell)

    def keep(name: str, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        target = folder.checkpoints / name
        facts = {
            **at.to_json(), "start": start_of(loaded), "model": recipe.model, "identity": origin,
            "digests": ready.digests, "log_size": folder.log_size,
        }  # fmt: skip
        so_far = Outcome(loaded, at.mask, at.figures, at.history)
        save_state(
            loaded,
            target,
            weights=weights,
            moments=moments,
            mask=so_far.whole_mask(),
            pruning=so_far.facts(recipe),
            state=facts,
        )
        tell({"event": "saved", "path": str(target), "stage": at.stage})
        folder.tidy(keep=recipe.keep_checkpoints)

    trainer = Trainer(loaded, recipe, ready=ready, at=at, listen=tell, save=keep, tensors=tensors)
    del tensors  # as large as the weights, or twice that
    with at.clock("other"):
        outcome = shrink(loaded, recipe, ready=ready, at=at, trainer=trainer, listen=tell)
    world.on_main(lambda: outcome.write(recipe, folder.result, listen=tell, trust_remote_code=trust_remote_code, beside=beside))
    tell({"event": "saved", "path": str(folder.result), **outcome.figures})
    return outcome


def _begun(recipe: Recipe, listen: Listener, trust_remote_code: bool) -> tuple[Loaded, Position, int]:
    """The model that a run begins with, once tokens have gone that are to go; where it stands; parameters before that."""
    loaded = load_model(recipe, listen, trust_remote_code)
    dense = count_parameters(loaded.model)
    loaded, mask = cut_vocabulary(loaded, recipe, listen)
    at = Position(Debt.none(prunable(loaded.model, recipe)), mask=mask, began=families.sizes(loaded.model))
    if "vocabulary" in mask:
        at.figures |= {
            "vocabulary_before": mask["vocabulary"].numel(),
            "vocabulary_after": int(mask["vocabulary"].sum()),
            "params_after_vocabulary": count_parameters(loaded.model),
        }
    at.figures |= world.on_main(lambda: latency.find(loaded.model, recipe, listen=listen))
    return loaded, at, dense


def _check_origin(path: Path, state: Mapping[str, Any], recipe: Recipe, origin: str) -> None:
    if state["model"] != recipe.model or state["identity"] != origin:
        raise UsageError(
            f"{path} is a checkpoint of another model ({state['model']}, as it was then) than the recipe's {recipe.model}; "
            "name another folder, or bring that model back"
        )


def _check_place(path: Path, at: Position, recipe: Recipe, changed: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse what even a forced recipe cannot go on with from where the run stands."""
    if at.stage > recipe.stages:
        raise UsageError(
            f"the run of {path} is in stage {at.stage} and the recipe has {recipe.stages}; set stages to {at.stage} or more, "
            "or name another folder"
        )
    if any(key.partition(".")[0] == "vocabulary" for key in changed):
        raise UsageError(
            f"the tokens of {path} went before anything else, and the recipe now asks for others; "
            "leave vocabulary as it was, or name another folder"
        )
    if "training.lora" in changed and any(base_name(name) is None for name in tensors):
        raise UsageError(
            f"{path} holds low-rank additions in the middle of their training, which other ones would forget; "
            "leave training.lora as it was, or name another folder"
        )


def _sentences(
    path: Path | None, at: Position, *, damaged: Mapping[Path, str], changed: Sequence[str], replaced: Sequence[str]
) -> Iterator[str]:
    """What is to be said of a run that does not go on quite as it was."""
    for checkpoint, trouble in damaged.items():
        yield f"a checkpoint is damaged and set aside as {checkpoint.name}.damaged: {trouble}"
    if damaged and path is None:
        yield "no checkpoint is whole, so the run begins anew; the log of the work that is lost is log.damaged.jsonl"
    if changed:
        yield f"going on with another recipe, which differs in {', '.join(changed)}"
    if replaced:
        yield f"going on with another {' and another '.join(replaced)}, from where the run stands"


def _logged(listen: Listener, folder: RunFolder) -> Listener:
    """A listener that writes the log too; silent on all processes but the main one."""

    def tell(event: dict[str, Any]) -> None:
        if world.is_main():
            if event["event"] != "progress":
                folder.log(event)
            listen(event)

    return tell


def _tell_start(loaded: Loaded, ready: Prepared, recipe: Recipe, at: Position, listen: Listener) -> None:
    coming = ready.stages[at.stage - 1 + at.pruned :]
    listen({
        "event": "start", "method": recipe.method, "stages": recipe.stages, "params": ready.budget.total, "target": ready.budget.keep,
        "now": count_parameters(loaded.model), "dense": loaded.mask is None,
        "calibration_tokens": sum(stage.calibration_tokens for stage in coming),
        "training_tokens": 0 if ready.rows is None else ready.rows.num_tokens(0, len(ready.rows)),
        "trained_tokens": at.progress.tokens, "processes": world.size(), "parallel": recipe.parallel,
        "began": at.began, "sizes": families.sizes(loaded.model), "layers_left": at.layers_left, "device": loaded.model.device.type,
        "precision": "bfloat16" if uses_bfloat16(loaded.model.device, recipe.dtype) else "float32",
    })  # fmt: skip
