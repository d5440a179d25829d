"""The loop on one screen: for each stage, score → choose → cut until the stage's target is met, then train.

`shrink` is the loop. `prune` and `run` put a model in at its front and a folder at its back. What happens on the way
is told to a listener as plain dicts with an `event` key; the library itself prints nothing.
"""

import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_pruner import families, parts
from adapt_pruner.checkpoint.load import Loaded, load, pick_device
from adapt_pruner.checkpoint.save import check_target, save
from adapt_pruner.choose.allocate import Debt
from adapt_pruner.core.axes import Axis, Mask
from adapt_pruner.core.budget import Budget, count_parameters
from adapt_pruner.core.calibrate import score
from adapt_pruner.core.surgery import cut
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.sources import SELF, documents
from adapt_pruner.data.tokens import batches_of, calibration_ids, calibration_windows, evaluation_windows, training_blocks
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.recipe import Recipe
from adapt_pruner.train.loop import Progress, make_optimizer, stage_tokens, train

__all__ = ["Outcome", "anatomy", "decoder_parameters", "plan", "prune", "run", "shrink", "stage_targets"]

Listener = Callable[[dict[str, Any]], None]

_MICRO_TOKENS = 2048  # calibration tokens in one forward and backward


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
    before = {"params_before": count_parameters(model), "decoder_params_before": decoder_parameters(model)}
    budget = Budget.parse(recipe.budget, dense=before["params_before"])
    budget.check_reachable(_prunable(model, recipe))
    calibration = _calibration(loaded, recipe)
    shards = _shards(loaded, recipe, listen)
    held_out = _held_out(loaded, recipe)
    chooser = parts.bind("chooser", recipe.chooser, step=recipe.step, amplitude=recipe.amplitude)
    optimizer = make_optimizer(model, lr=recipe.training.lr, weight_decay=recipe.training.weight_decay)
    progress = Progress()
    outcome = Outcome(loaded, Mask(), before)
    debt = Debt.none(_prunable(model, recipe))
    spent = {"score": 0.0, "cut": 0.0, "train": 0.0}
    iteration = 0
    _announce(recipe, before["params_before"], budget.keep, _prunable(model, recipe), shards, listen)
    _evaluate(model, held_out, recipe, outcome, listen, stage=0)

    for stage, target in enumerate(stage_targets(before["params_before"], budget.keep, recipe.stages), start=1):
        if recipe.debt == "reset":
            debt = Debt.none(_prunable(model, recipe))
        while (now := count_parameters(model)) > target:
            iteration += 1
            axes = families.axes(model)
            metrics = [
                parts.bind("metric", recipe.metric, seed=recipe.seed + iteration),
                parts.bind("distance", recipe.distance),
            ]
            with _clock(spent, "score"):
                batches = calibration(iteration)
                tell = _progress(listen, "score", stage=stage, iteration=iteration)
                scores, loss = score(model, axes, batches, metrics=metrics, dtype=recipe.dtype, on_batch=tell)
            with _clock(spent, "cut"):
                goal = Budget(keep=target, total=now)
                mask, debt = chooser(scores, _prunable(model, recipe), goal, debt=debt)
                cut(model, axes, mask, optimizer=optimizer)
                outcome.mask = outcome.mask.then(mask)
            note = {"stage": stage, "iteration": iteration, "params": count_parameters(model), "target": target, "loss": loss}
            outcome.history.append(note)
            listen({"event": "cut", **note, "importance": scores["layers"].tolist(), "sparsity": dict(debt.sparsity)})

        if len(shards):
            if recipe.moments == "reset":
                optimizer.state.clear()
            with _clock(spent, "train"):
                train(
                    model, shards[stage - 1], optimizer=optimizer, progress=progress,
                    objective=parts.bind("objective", recipe.training.objective),
                    schedule=parts.bind("schedule", recipe.training.schedule, **recipe.training.model_dump()),
                    lr=recipe.training.lr, total_tokens=sum(shard.numel() for shard in shards),
                    batch_tokens=recipe.training.batch_tokens, clip=recipe.training.clip, dtype=recipe.dtype,
                    on_step=lambda step, stage=stage: listen({"event": "step", "stage": stage, **asdict(step)}),
                )  # fmt: skip
        _evaluate(model, held_out, recipe, outcome, listen, stage=stage)
        if stage < recipe.stages:
            on_stage(stage, outcome)

    outcome.figures |= {
        "params_after": count_parameters(model),
        "decoder_params_after": decoder_parameters(model),
        "budget": budget.keep,
        "iterations": iteration,
        "trained_tokens": progress.tokens,
        "seconds": time.perf_counter() - began,
        **{f"seconds_{phase}": seconds for phase, seconds in spent.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "method": recipe.method,
        "seed": recipe.seed,
    }
    return outcome


def prune(recipe: Recipe, out: Path, *, listen: Listener) -> Outcome:
    """Run the recipe and write the resulting checkpoint to the folder `out`; see `shrink` for what can go wrong."""
    check_target(out)
    loaded = _load(recipe, listen)
    outcome = shrink(loaded, recipe, listen=listen, on_stage=lambda stage, so_far: None)
    _save(outcome, recipe, out)
    listen({"event": "saved", "path": str(out), **outcome.figures})
    return outcome


def run(recipe: Recipe, run_dir: Path, *, listen: Listener) -> Outcome:
    """Run the recipe in a run folder: recipe.yaml, log.jsonl, checkpoints/stage-K (the newest), model/."""
    check_target(run_dir)
    loaded = _load(recipe, listen)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(f"# {_provenance()}\n{recipe.to_yaml()}", encoding="utf-8")
    last: list[Path] = []

    def keep(stage: int, so_far: Outcome) -> None:
        path = run_dir / "checkpoints" / f"stage-{stage}"
        _save(so_far, recipe, path)
        for older in last:
            shutil.rmtree(older, ignore_errors=True)
        last[:] = [path]
        listen({"event": "saved", "path": str(path), "stage": stage})

    with (run_dir / "log.jsonl").open("a", encoding="utf-8") as log:

        def tell(event: dict[str, Any]) -> None:
            if event["event"] != "progress":
                log.write(json.dumps({"time": time.time()} | event) + "\n")
                log.flush()
            listen(event)

        try:
            outcome = shrink(loaded, recipe, listen=tell, on_stage=keep)
        except RunError as error:
            where = f"the last complete checkpoint is {last[0]}" if last else "no stage was complete yet"
            raise RunError(f"{error}; {where}") from error
        _save(outcome, recipe, run_dir / "model")
        tell({"event": "saved", "path": str(run_dir / "model"), **outcome.figures})
    return outcome


def plan(recipe: Recipe, *, listen: Listener) -> dict[str, Any]:
    """What a run would do, with time and memory estimated from a quick probe of the real model; nothing is written.

    The probe is one calibration batch forward and backward. A training token is taken to cost what a calibration token
    does; Adam's two moments and the gradients of all weights are added to the memory seen.
    """
    loaded = _load(recipe, listen)
    model = loaded.model
    dense = count_parameters(model)
    budget = Budget.parse(recipe.budget, dense=dense)
    axes = _prunable(model, recipe)
    budget.check_reachable(axes)
    batch = _calibration(loaded, recipe)(1)[0]
    began = time.perf_counter()
    metrics = [parts.bind("metric", recipe.metric, seed=0), parts.bind("distance", recipe.distance)]
    score(model, families.axes(model), [batch], metrics=metrics, dtype=recipe.dtype)
    per_token = (time.perf_counter() - began) / batch.numel()

    tokens = _stage_tokens(recipe)
    stages, reached = [], dense
    for stage, target in enumerate(stage_targets(dense, budget.keep, recipe.stages), start=1):
        iterations = _expected_iterations(reached - target, axes, recipe)
        trained = tokens[stage - 1]
        measured = recipe.calibration.samples * recipe.calibration.length * iterations
        stages.append({
            "stage": stage, "params": target, "iterations": iterations, "tokens": trained,
            "steps": -(-trained // recipe.training.batch_tokens), "seconds": round((measured + trained) * per_token, 1),
        })  # fmt: skip
        reached = target
    training_bytes = 3 * 4 * dense if recipe.training.tokens else 0
    return {
        "model": recipe.model,
        "params_before": dense,
        "params_after": budget.keep,
        "stages": stages,
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "peak_rss_bytes": peak_rss_bytes() + training_bytes,
        "seed": recipe.seed,
        "method": recipe.method,
    }


def stage_targets(start: int, end: int, stages: int) -> list[int]:
    """Parameters after each of T stages, linear: N_k = N_0 - (N_0 - N_T) · k / T, in whole numbers."""
    return [start - (start - end) * k // stages for k in range(1, stages + 1)]


def decoder_parameters(model: Any) -> int:
    """Parameters of all decoder layers together, without embeddings, head and final norm."""
    depth = next(axis for axis in families.axes(model) if axis.name == "layers")
    return count_parameters(model.get_submodule(depth.gate.module))


def anatomy(loaded: Loaded) -> dict[str, Any]:
    """What a model is made of: for each layer its sizes, parameters, and share of the dense model where a mask tells.

    Returns:
        `params`, `decoder_params`, `share_of_dense` (None where not known) and `layers`, one dict a layer with `layer`
        (its number now), `dense_layer` (its number in the dense model), `heads`, `kv_heads`, `neurons`, `params`, `share_of_dense`.
    """
    model, mask = loaded.model, loaded.mask
    axes = families.axes(model)
    depth = next(axis for axis in axes if axis.name == "layers")
    stack: Any = model.get_submodule(depth.gate.module)
    stayed = mask["layers"].nonzero().flatten().tolist() if mask is not None and "layers" in mask else list(range(depth.size))
    layers = []
    for i in range(depth.size):
        sizes = {field: axis.size * units for axis in axes if axis.layer == i for field, units in axis.fields}
        params = count_parameters(stack[i])
        gone = 0
        for axis in axes:
            dense_name = axis.name.replace(f"layers.{i}.", f"layers.{stayed[i]}.")
            if axis.layer == i and mask is not None and dense_name in mask:
                gone += int((~mask[dense_name]).sum()) * axis.cost
        layers.append({
            "layer": i, "dense_layer": stayed[i], "heads": sizes.get("num_attention_heads"), "kv_heads": sizes.get("num_key_value_heads"),
            "neurons": sizes.get("intermediate_size"), "params": params,
            "share_of_dense": None if mask is None else params / (params + gone),
        })  # fmt: skip
    params, decoder = count_parameters(model), count_parameters(stack)
    dense = loaded.dense_params
    return {"params": params, "decoder_params": decoder, "share_of_dense": dense and params / dense, "layers": layers}


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prunable(model: Any, recipe: Recipe) -> list[Axis]:
    return [axis for axis in families.axes(model) if axis.kind in recipe.axes]


def _load(recipe: Recipe, listen: Listener) -> Loaded:
    listen({"event": "load", "model": recipe.model})
    loaded = load(recipe.model, device=pick_device(recipe.device), trust_remote_code=recipe.trust_remote_code)
    listen({"event": "loaded", "model": recipe.model, "params": count_parameters(loaded.model)})
    return loaded


def _calibration(loaded: Loaded, recipe: Recipe) -> Callable[[int], list[Tensor]]:
    """A function from the number of the iteration to its batches."""
    asked = recipe.calibration
    if asked.ids is not None:
        rows = calibration_ids(asked.ids, vocab_size=loaded.model.config.vocab_size)
    elif asked.source == SELF:
        written = selfwritten_windows(loaded.model, loaded.tokenizer, samples=asked.samples, length=asked.length, seed=recipe.seed)
        rows = list(written.split(1))
    else:
        texts = documents(asked.source)

        def draw(iteration: int) -> list[Tensor]:
            seed = recipe.seed * 1_000_003 + iteration
            windows = calibration_windows(loaded.tokenizer, texts, samples=asked.samples, length=asked.length, seed=seed)
            return batches_of(windows.split(1), max_tokens=_MICRO_TOKENS)

        draw(0)  # a text that is too short is refused before any work is done
        return draw
    batches = batches_of(rows, max_tokens=_MICRO_TOKENS)
    return lambda iteration: batches


def _expected_iterations(excess: int, axes: list[Axis], recipe: Recipe) -> int:
    """Iterations it takes to remove `excess` parameters at the recipe's step."""
    per_iteration = recipe.step * sum(axis.size * axis.cost for axis in axes)
    return max(1, round(excess / per_iteration)) if excess > 0 else 0


def _announce(recipe: Recipe, start: int, target: int, axes: list[Axis], shards: list[Tensor], listen: Listener) -> None:
    """Tell what is going to be done, in tokens, so that listeners can say how much is left."""
    iterations = _expected_iterations(start - target, axes, recipe)
    listen({
        "event": "start", "method": recipe.method, "stages": recipe.stages, "params": start, "target": target,
        "calibration_tokens": iterations * recipe.calibration.samples * recipe.calibration.length,
        "training_tokens": sum(shard.numel() for shard in shards),
    })  # fmt: skip


def _stage_tokens(recipe: Recipe) -> list[int]:
    return stage_tokens(recipe.training.tokens, stages=recipe.stages, shards=recipe.training.shards)


def _shards(loaded: Loaded, recipe: Recipe, listen: Listener) -> list[Tensor]:
    """The training blocks of each stage; empty when nothing is to be trained."""
    asked = recipe.training
    if not asked.tokens or asked.source is None:
        return []
    if asked.source == SELF:
        raise UsageError("training.source 'self' would train the model on its own text; it serves as calibration only, name a text")
    blocks, once = training_blocks(
        loaded.tokenizer, documents(asked.source), length=asked.length, tokens=asked.tokens, seed=recipe.seed
    )
    if once < blocks.numel():
        listen({"event": "warning", "message": f"training text has {once:,} tokens, {asked.tokens:,} are asked for: it is repeated"})
    ends = torch.tensor(_stage_tokens(recipe)).cumsum(0).div(asked.tokens).mul(len(blocks)).round().long().tolist()
    return [blocks[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _held_out(loaded: Loaded, recipe: Recipe) -> list[Tensor]:
    asked = recipe.evaluation
    if asked.source is None:
        return []
    return evaluation_windows(loaded.tokenizer, documents(asked.source), window=asked.window, max_windows=asked.max_windows)


def _evaluate(model: Any, windows: list[Tensor], recipe: Recipe, outcome: Outcome, listen: Listener, *, stage: int) -> None:
    if windows:
        measured = perplexity(model, windows, dtype=recipe.dtype, on_window=_progress(listen, "evaluate", stage=stage))
        outcome.figures.setdefault("perplexities", []).append(measured.perplexity)
        listen({"event": "evaluation", "stage": stage, "params": count_parameters(model), **asdict(measured)})


def _progress(listen: Listener, phase: str, **where: int) -> Callable[[int, int], None]:
    return lambda done, of: listen({"event": "progress", "phase": phase, "done": done, "of": of, **where})


def _save(outcome: Outcome, recipe: Recipe, path: Path) -> None:
    """Save with a mask against the dense model, also where the run began from a model already pruned."""
    loaded = outcome.loaded
    mask = loaded.mask.then(outcome.mask) if loaded.mask is not None else outcome.mask
    pruning = {
        "dense_params": loaded.dense_params or outcome.figures["params_before"],
        "made_by": _provenance(),
        "recipe": recipe.model_dump(mode="json"),
        "figures": outcome.figures,
        "history": outcome.history,
    }
    save(loaded.model, loaded.tokenizer, path, mask=mask, pruning=pruning, dtype=loaded.dtype)


def _provenance() -> str:
    """Versions of what made a run, and the commit when the package lies in a git checkout."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("adapt-pruner", "torch", "transformers"))
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip() if shutil.which("git") else ""  # fmt: skip
    return f"{packages}, Python {platform.python_version()}" + (f", commit {commit}" if commit else "")


@contextmanager
def _clock(spent: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[phase] += time.perf_counter() - began
