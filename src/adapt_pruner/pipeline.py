"""The loop on one screen: for each stage, score → choose → cut until the stage's target is met, then train.

`shrink` is the loop. `prune` and `run` put a model in at its front and a folder at its back. What
happens on the way is told to a listener as plain dicts with an `event` key; the library itself prints nothing.
"""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from adapt_pruner import families, parts
from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import check_target, save
from adapt_pruner.choose.allocate import Debt
from adapt_pruner.core.axes import Axis, Mask, Scores
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.core.calibrate import score
from adapt_pruner.core.memory import peak_rss_bytes
from adapt_pruner.core.plain import to_json
from adapt_pruner.core.surgery import cut
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.plan import metrics_of, prunable
from adapt_pruner.prepare import Listener, load_model, prepare
from adapt_pruner.recipe import Recipe
from adapt_pruner.train.loop import Progress, Step, make_optimizer, train

__all__ = ["Outcome", "prune", "run", "shrink"]

_HEAD_TOKENS = 1024  # tokens on which a KV head is measured


@dataclass
class Outcome:
    """What came of a run: the pruned model, its mask against the model at the start, and the figures."""

    loaded: Loaded
    mask: Mask
    figures: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def shrink(loaded: Loaded, recipe: Recipe, *, listen: Listener, on_stage: Callable[[int, Outcome], None]) -> Outcome:
    """Prune and train `loaded.model`, in place, as the recipe says.

    Args:
        loaded: the model to prune, float32.
        recipe: everything else.
        listen: told of every event.
        on_stage: told of every finished stage but the last, to save it.

    Raises:
        UsageError: the budget or the text does not fit the model; nothing has been changed.
        RunError: a loss is not finite.
    """
    model, began = loaded.model, time.perf_counter()
    dense = count_parameters(model)
    ready = prepare(loaded, recipe, listen=listen)
    planned, budget, calibration, shards, held_out = ready.stages, ready.budget, ready.calibration, ready.shards, ready.held_out
    chooser = parts.bind("chooser", recipe.chooser, step=recipe.step, amplitude=recipe.amplitude)
    optimizer = make_optimizer(model, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay) if shards else None
    progress, debt = Progress(), Debt.none(prunable(model, recipe))
    outcome = Outcome(loaded, Mask(), {"params_before": dense, "decoder_params_before": decoder_parameters(model)})
    spent = {"score": 0.0, "cut": 0.0, "train": 0.0}
    listen({
        "event": "start", "method": recipe.method, "stages": recipe.stages, "params": dense, "target": budget.keep,
        "calibration_tokens": sum(stage.calibration_tokens for stage in planned),
        "training_tokens": sum(shard.numel() for shard in shards),
    })  # fmt: skip
    _evaluate(model, held_out, recipe, outcome, listen, stage=0)

    for stage in planned:
        if recipe.debt == "reset":
            debt = Debt.none(prunable(model, recipe))
        while (now := count_parameters(model)) > stage.params:
            where = {"stage": stage.stage, "iteration": len(outcome.history) + 1}
            axes = families.axes(model)
            with _clock(spent, "score"):
                batches = calibration(where["iteration"])
                metrics = metrics_of(recipe, seed=recipe.seed + where["iteration"])
                tell = _progress(listen, "score", **where)
                scores, loss = score(model, axes, batches, metrics=metrics, dtype=recipe.dtype, on_batch=tell)
                may_shrink = prunable(model, recipe)
                sizes, debt = chooser(scores, may_shrink, Budget(keep=stage.params, total=now), debt=debt)
                scores |= _head_scores(model, may_shrink, sizes, batches, recipe)
            with _clock(spent, "cut"):
                mask = Mask.of_sizes(may_shrink, scores, sizes)
                cut(model, axes, mask, optimizer=optimizer)
                outcome.mask = outcome.mask.then(mask)
            note = {**where, "params": count_parameters(model), "target": stage.params, "loss": loss}
            outcome.history.append(note)
            listen(
                {"event": "cut", **note, "sizes": sizes, "distances": scores["layers"].tolist() if "layers" in scores else None}
            )

        if optimizer is not None:
            if recipe.moments == "reset":
                optimizer.state.clear()
            with _clock(spent, "train"):
                train(
                    model, shards[stage.stage - 1], optimizer=optimizer, progress=progress,
                    objective=parts.bind("objective", recipe.training.objective),
                    schedule=parts.bind("schedule", recipe.training.schedule, **recipe.training.model_dump()),
                    lr=recipe.training.lr, total_tokens=sum(shard.numel() for shard in shards),
                    batch_tokens=recipe.training.batch_tokens, clip=recipe.training.clip, dtype=recipe.dtype,
                    on_step=_on_step(listen, stage.stage),
                )  # fmt: skip
        _evaluate(model, held_out, recipe, outcome, listen, stage=stage.stage)
        if stage.stage < recipe.stages:
            on_stage(stage.stage, outcome)

    outcome.figures |= {
        "params_after": count_parameters(model),
        "decoder_params_after": decoder_parameters(model),
        "budget": budget.keep,
        "iterations": len(outcome.history),
        "trained_tokens": progress.tokens,
        "seconds": time.perf_counter() - began,
        **{f"seconds_{phase}": seconds for phase, seconds in spent.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "method": recipe.method,
        "seed": recipe.seed,
    }
    return outcome


def prune(recipe: Recipe, out: str | Path, *, listen: Listener = lambda event: None, trust_remote_code: bool = False) -> Outcome:
    """Run the recipe and write the resulting checkpoint to the folder `out`; see `shrink` for what can go wrong."""
    out = Path(out)
    check_target(out)
    loaded = load_model(recipe.ready(), listen, trust_remote_code)
    outcome = shrink(loaded, recipe, listen=listen, on_stage=lambda stage, so_far: None)
    _save(outcome, recipe, out)
    listen({"event": "saved", "path": str(out), **outcome.figures})
    return outcome


def run(
    recipe: Recipe, run_dir: str | Path, *, listen: Listener = lambda event: None, trust_remote_code: bool = False
) -> Outcome:
    """Run the recipe in a run folder: recipe.yaml, log.jsonl, checkpoints/stage-K (the newest), model/."""
    run_dir = Path(run_dir)
    check_target(run_dir)
    loaded = load_model(recipe.ready(), listen, trust_remote_code)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(f"# {_provenance()}\n{recipe.to_yaml()}", encoding="utf-8")
    newest: list[Path] = []

    with (run_dir / "log.jsonl").open("a", encoding="utf-8") as log:

        def tell(event: dict[str, Any]) -> None:
            if event["event"] != "progress":
                log.write(to_json({"time": time.time()} | event) + "\n")
                log.flush()
            listen(event)

        def keep(stage: int, so_far: Outcome) -> None:
            path = run_dir / "checkpoints" / f"stage-{stage}"
            _save(so_far, recipe, path)
            for older in newest:
                shutil.rmtree(older, ignore_errors=True)
            newest[:] = [path]
            tell({"event": "saved", "path": str(path), "stage": stage})

        try:
            outcome = shrink(loaded, recipe, listen=tell, on_stage=keep)
        except UsageError:  # refused before any work: the folder is free for the next try
            for name in ("recipe.yaml", "log.jsonl"):
                (run_dir / name).unlink()
            run_dir.rmdir()
            raise
        except RunError as error:
            where = f"the last complete checkpoint is {newest[0]}" if newest else "no stage was complete yet"
            raise RunError(f"{error}; {where}") from error
        _save(outcome, recipe, run_dir / "model")
        tell({"event": "saved", "path": str(run_dir / "model"), **outcome.figures})
    return outcome


def _head_scores(model: Any, axes: Sequence[Axis], sizes: Mapping[str, int], batches: Sequence[Tensor], recipe: Recipe) -> Scores:
    """What `recipe.head_metric` says of the KV heads in every layer that is to lose one; nothing of the others."""
    losing = [axis for axis in axes if axis.kind == "kv_heads" and sizes[axis.name] < axis.size]
    if recipe.head_metric is None or not losing:
        return {}
    measure = parts.bind("head_metric", recipe.head_metric, dtype=recipe.dtype)
    enough = [
        batch
        for batch, before in zip(batches, accumulate((b.numel() for b in batches), initial=0), strict=False)
        if before < _HEAD_TOKENS
    ]
    measured: Scores = measure(model, losing, enough)
    return measured


def _evaluate(model: Any, windows: list[Tensor], recipe: Recipe, outcome: Outcome, listen: Listener, *, stage: int) -> None:
    if windows:
        measured = perplexity(model, windows, dtype=recipe.dtype, on_window=_progress(listen, "evaluate", stage=stage))
        outcome.figures.setdefault("perplexities", []).append(measured.perplexity)
        listen({"event": "evaluation", "stage": stage, "params": count_parameters(model), **asdict(measured)})


def _progress(listen: Listener, phase: str, **where: int) -> Callable[[int, int], None]:
    return lambda done, of: listen({"event": "progress", "phase": phase, "done": done, "of": of, **where})


def _on_step(listen: Listener, stage: int) -> Callable[[Step], None]:
    return lambda step: listen({"event": "step", "stage": stage, **asdict(step)})


def _save(outcome: Outcome, recipe: Recipe, path: Path) -> None:
    """Save with a mask against the dense model, also where the run began from a model already pruned."""
    loaded = outcome.loaded
    mask = loaded.mask.then(outcome.mask) if loaded.mask is not None else outcome.mask
    pruning = {
        "dense_params": outcome.figures["params_before"] if loaded.mask is None else loaded.dense_params,
        "made_by": _provenance(),
        "recipe": recipe.model_dump(mode="json"),
        "figures": outcome.figures,
        "history": outcome.history,
    }
    save(loaded.model, loaded.tokenizer, path, mask=mask, pruning=pruning, dtype=loaded.dtype)


def _provenance() -> str:
    """Versions of what made a run, and the commit when the package lies in its own git checkout."""
    versions = []
    for name in ("adapt-pruner", "torch", "transformers"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # run from a source tree that is not installed
            versions.append(f"{name} unknown")
    text = ", ".join([*versions, f"Python {platform.python_version()}"])
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        text += f", commit {commit}" if commit else ""
    return text


@contextmanager
def _clock(spent: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[phase] += time.perf_counter() - began
