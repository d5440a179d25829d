"""How well a model does on tasks: lm-eval's questions and metrics. Each task is scored once and the score is kept."""

import copy
import hashlib
import inspect
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from adapt_pruner.core.model.precision import uses_bfloat16
from adapt_pruner.core.system.files import cache_folder, why, write_whole
from adapt_pruner.core.system.strict_json import read_json, to_json
from adapt_pruner.errors import RunError, UsageError, first_line, option
from adapt_pruner.evaluate.task_sources import Wanted, as_lm_eval_does, lm_eval

_FORMAT = 2  # version of the kept scores and of how they are computed
_BOOTSTRAP = 1000  # draws for the standard error of a metric that is not a mean; for a mean there is a formula
_ACCURACIES = ("acc_norm", "acc")
_PASSING = ("_name_or_path", "_from_model_config", "transformers_version")  # settings of a config that do not describe the model
_ELSEWHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata", "training_split", "validation_split", "test_split")
_CPU_LOGITS, _DEVICE_LOGITS = 2**17, 2**20  # sequences in a pass × tokens of the vocabulary; on a CPU more only takes memory
_MOST_SEQUENCES = 32
_FEWSHOT_SEED = 1234  # the seed of lm-eval's own command


@dataclass(frozen=True)
class TaskScore:
    """How well a model does on a task.

    Attributes:
        task: its name.
        metric: name of the metric of `value`: acc_norm if the task has it, else acc, else its first one.
        value: over all items; a share for accuracies.
        stderr: standard error of `value`; None if there is none.
        chance: the value reached by guessing, the mean of 1 / choices; None if not known.
        items: number of scored items.
        shots: examples before each of them.
        version: lm-eval's version of the task.
        data: where its items are from.
        metrics: all of lm-eval's figures, by "metric,filter".
        seconds: time that scoring took; 0 for a cached score that was made on another device or with another number of threads.
        again: whether the score comes from the cache.
        parts: the tasks of a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    items: int
    shots: int
    version: str
    data: str
    metrics: Mapping[str, float | None]
    seconds: float
    again: bool
    parts: Sequence["TaskScore"] = ()

    @property
    def accuracy(self) -> bool:
        """Whether the value is a share of right answers."""
        return self.metric.split(",")[0] in _ACCURACIES

    def headline(self) -> dict[str, Any]:
        """The fields that a record keeps: all but the other metrics, the parts, and how the score was obtained."""
        return {
            "task": self.task, "metric": self.metric, "value": self.value, "stderr": self.stderr, "chance": self.chance,
            "accuracy": self.accuracy, "items": self.items, "shots": self.shots, "data": self.data,
        }  # fmt: skip


def set_shots(lines: Sequence[Wanted], num_fewshot: int | None) -> list[str]:
    """Set, in place, how many examples precede each item; a task whose definition says 0 keeps 0, as in lm-eval.

    Returns:
        The tasks that keep 0 although another number was asked for.
    """
    kept = []
    for task_name, task in _tasks(lines):
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default == 0 and num_fewshot != 0:
            kept.append(task_name)
        elif num_fewshot is not None or default is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return kept


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    lines: Sequence[Wanted],
    *,
    limit: int | None = None,
    dtype: str = "float32",
    cache: Path | None = None,
    trust_remote_code: bool = False,
    on_task: Callable[[str, int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[TaskScore]:
    """Score a model on tasks. Scores in the cache for the same model, items, examples and precision are used again.

    Args:
        model: causal LM in eval mode; left as found.
        tokenizer: a transformers tokenizer.
        lines: see `task_sources.find_tasks`; `set_shots` has been called on them.
        limit: score only the first `limit` items of each task.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        cache: folder of the scores; by default tasks/ in `cache_folder()`.
        trust_remote_code: whether tasks may run that lm-eval marks as unsafe.
        on_task: called with (task, requests done, of).
        warn: called with a sentence if requests are longer than the model can read.

    Returns:
        One score per line of `lines`.

    Raises:
        UsageError: a task cannot be scored as it is defined.
        RunError: scores cannot be kept, or a likelihood or a figure is not a number.
    """
    harness = lm_eval()
    folder = cache or cache_folder() / "tasks"
    _check_keeps(folder)
    device = next(model.parameters()).device
    precision = "bfloat16" if uses_bfloat16(device, dtype) else "float32"
    whose = fingerprint(model, tokenizer)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    name, done, num_requests = "", 0, 1
    stdout = sys.stdout  # lm-eval prints, and nobody should see that; what a listener prints is seen

    def tell() -> None:
        if on_task is not None:
            with redirect_stdout(stdout):
                on_task(name, done, num_requests)

    def answered(answer: Any) -> None:
        nonlocal done, num_requests
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and math.isnan(value):  # lm-eval would take the first choice, which looks like a score
            raise RunError("the likelihood of an answer is not a number; the model's weights are damaged or overflow")
        if not done:
            num_requests = sum(instance.repeats for instance in task.instances)
        done += 1
        tell()

    def cut(requests: int, of: int, tokens: int) -> None:
        if warn is not None:
            with redirect_stdout(stdout):
                warn(
                    f"{name}: {requests:,} of {of:,} requests were cut off on the left to the {tokens:,} tokens that the model reads"
                )

    lm = None
    scores: dict[str, dict[str, Any]] = {}
    for name, task in _tasks(lines):
        with as_lm_eval_does():
            made_from = {"format": _FORMAT, "model": whose, "precision": precision, "task": _task_fingerprint(task, limit)}
        path = folder / f"{hashlib.sha256(to_json(made_from).encode()).hexdigest()[:32]}.json"
        score = _kept(path, on)
        if score is None:
            began, done, num_requests = time.perf_counter(), 0, 1
            tell()
            with as_lm_eval_does():
                lm = lm or harness_model(model, tokenizer, dtype=dtype, on_answer=answered, on_cut=cut)
            with as_lm_eval_does(), _blamed_on(name, task):
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # set again, so that every model sees the same examples
                results = harness.evaluate(
                    lm, {"tasks": {name: task}}, limit=limit, log_samples=False, bootstrap_iters=_BOOTSTRAP,
                    confirm_run_unsafe_code=trust_remote_code,
                )  # fmt: skip
            score = {**_figures(name, task, results), "seconds": time.perf_counter() - began}
            _keep(path, {"made_from": made_from, "score": score, "on": on})
            score["again"] = False
        scores[name] = score
    return [_line(line, scores) for line in lines]


@contextmanager
def _blamed_on(name: str, task: Any) -> Iterator[None]:
    """If lm-eval, a task's YAML file or its items raise an error, say which task it is."""
    try:
        yield
    except (UsageError, RuntimeError, OSError, MemoryError):
        raise
    except Exception as error:  # templates, metrics and the tasks' own code raise errors of many kinds
        shots = task.get_config("num_fewshot") or 0
        raise UsageError(
            f"task {name!r} cannot be scored {shots}-shot ({first_line(error)}); correct its definition or its items"
            + (f", or ask for fewer examples with {option('num_fewshot')}" if shots else "")
        ) from error


def _tasks(lines: Sequence[Wanted]) -> Iterable[tuple[str, Any]]:
    return [(name, task) for line in lines for name, task in line.tasks.items()]


def _figures(name: str, task: Any, results: Any) -> dict[str, Any]:
    """What is kept for a task: its metrics, and the value reached by guessing."""
    metrics = {key: value for key, value in results["results"][name].items() if "," in key}
    metrics = {key: float(value) if isinstance(value, int | float) else None for key, value in metrics.items()}
    for key, value in metrics.items():
        if value is not None and math.isnan(value) and "_stderr," not in key:
            raise RunError(f"{key} of task {name!r} is not a number; the model's weights are damaged or overflow")
    chance = None
    if task.OUTPUT_TYPE == "multiple_choice" and not any(key.startswith("acc_mutual_info") for key in metrics):
        choices: dict[int, int] = {}
        for instance in task.instances:
            choices[instance.doc_id] = choices.get(instance.doc_id, 0) + 1
        chance = sum(1 / count for count in choices.values()) / len(choices)
    return {
        "metrics": metrics, "chance": chance, "items": results["n-samples"][name]["effective"],
        "shots": task.get_config("num_fewshot") or 0, "version": str(results["versions"].get(name)),
    }  # fmt: skip


def _line(line: Wanted, scores: Mapping[str, Mapping[str, Any]]) -> TaskScore:
    parts = [_score(name, scores[name], line.data) for name in line.tasks]
    if line.group is None:
        return parts[0]
        # lm-eval's group itself combines the tasks, with its weights and pooled standard errors
    by_task = {name: {**scores[name]["metrics"], "sample_len": scores[name]["items"]} for name in line.tasks}
    metrics = {
        key: float(value) for key, value in line.group.aggregate(by_task).items() if isinstance(value, int | float) and "," in key
    }
    chances, items = [part.chance for part in parts], sum(part.items for part in parts)
    pooled = [chance * part.items for chance, part in zip(chances, parts, strict=True) if chance is not None]
    whole = {
        "metrics": metrics, "chance": sum(pooled) / items if len(pooled) == len(parts) else None, "items": items,
        "shots": parts[0].shots, "version": str(line.group.version), "seconds": sum(part.seconds for part in parts),
        "again": all(part.again for part in parts),
    }  # fmt: skip
    return _score(line.name, whole, line.data, parts)


def _score(name: str, score: Mapping[str, Any], data: str, parts: Sequence[TaskScore] = ()) -> TaskScore:
    metrics: Mapping[str, float | None] = score["metrics"]
    measured = [key for key in metrics if "_stderr," not in key]
    key = next((key for metric in _ACCURACIES for key in measured if key.split(",")[0] == metric), measured[0])
    metric, filtered = key.split(",", 1)
    value = metrics[key]
    assert value is not None
    return TaskScore(
        name, metric if filtered == "none" else key, value, metrics.get(f"{metric}_stderr,{filtered}"), score["chance"],
        score["items"], score["shots"], score["version"], data, metrics, score["seconds"], score["again"], parts,
    )  # fmt: skip


def average(scores: Sequence[TaskScore]) -> tuple[float, float | None] | None:
    """The mean of the accuracies and its standard error, sqrt(sum of squared errors) / tasks; None for fewer than two.

    Figures that are not accuracies are left out.
    """
    counted = [score for score in scores if score.accuracy]
    if len(counted) < 2:
        return None
    errors = [score.stderr for score in counted if score.stderr is not None]
    error = math.sqrt(sum(each**2 for each in errors)) / len(counted) if len(errors) == len(counted) else None
    return sum(score.value for score in counted) / len(counted), error


def retention(score: TaskScore, dense: TaskScore) -> tuple[float | None, float | None]:
    """How much of the dense model's accuracy is left: accuracy / dense accuracy, and the same for the part above chance.

    The second is (accuracy - chance) / (dense accuracy - chance). It is None if the dense model itself is less than two standard
    errors above chance, because the divisor would be noise. Both are None if the figure is no accuracy.
    """
    if not (score.accuracy and dense.accuracy and dense.value > 0):
        return None, None
    chance, error = dense.chance, dense.stderr
    above = None
    if chance is not None and error is not None and dense.value - chance > 2 * error:
        above = (score.value - chance) / (dense.value - chance)
    return score.value / dense.value, above


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Identifies a model wherever its files lie: a hash of its weights, its config and its tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for settings in (model.config, model.generation_config):  # generation_config decides what a model writes
        changed = {} if settings is None else settings.to_diff_dict()
        digest.update(_stable({key: value for key, value in changed.items() if key not in _PASSING}))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend is not None else _stable(tokenizer.get_vocab()))
    digest.update(_stable({"special": tokenizer.special_tokens_map, "longest": tokenizer.model_max_length}))
    return digest.hexdigest()[:32]


def _task_fingerprint(task: Any, limit: int | None) -> str:
    """Identifies what a task asks: its definition, its items and the examples before them, wherever the data is from."""
    config = {key: value for key, value in task.dump_config().items() if key not in _ELSEWHERE}
    digest = hashlib.sha256(_stable({"lm_eval": version("lm_eval"), "config": config, "limit": limit}))
    for path in _own_code(task):
        digest.update(path.read_bytes())
    for doc in itertools.islice(task.eval_docs, limit):
        digest.update(_stable(doc))
    if task.get_config("num_fewshot"):
        for doc in task.fewshot_docs():
            digest.update(_stable(doc))
    return digest.hexdigest()[:32]


def _own_code(task: Any) -> list[Path]:
    """The Python files beside those that define a task and its functions, except lm-eval's own, which its version identifies."""
    package = Path(lm_eval().__file__).parent
    files = {inspect.getsourcefile(type(task)), *(code.co_filename for code in _functions(vars(task.config)))}
    folders = {Path(file).parent for file in files if file is not None and not Path(file).is_relative_to(package)}
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def _functions(value: Any) -> Iterator[Any]:
    """The code of every function in nested settings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _functions(inner)
    elif (code := getattr(value, "__code__", None)) is not None:
        yield code


def _stable(value: Any) -> bytes:
    def named(other: Any) -> str:
        return f"{getattr(other, '__module__', '')}.{getattr(other, '__qualname__', type(other).__name__)}"

    return json.dumps(value, sort_keys=True, default=named).encode()


def _kept(path: Path, on: str) -> dict[str, Any] | None:
    """A score from the cache; None if it is missing or damaged. Its seconds count only if it was made `on` a device like this one."""
    try:
        kept = read_json(path)
        score = kept["score"]
        return {**score, "seconds": score["seconds"] if kept.get("on") == on else 0.0, "again": True}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, kept: Mapping[str, Any]) -> None:
    with _said_of(path.parent):
        write_whole(path, to_json(kept))


def _check_keeps(folder: Path) -> None:
    """Make the folder of the scores, and check that it can be written before hours go into a score."""
    with _said_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"scores cannot be stored in {folder} ({why(error)}); make room there or name another folder: {option('cache_dir')} of eval, "
            "or ADAPT_PRUNER_CACHE=DIR"
        ) from error


def harness_model(
    model: Any,
    tokenizer: Any,
    *,
    dtype: str = "float32",
    on_answer: Callable[[Any], None] | None = None,
    on_cut: Callable[[int, int, int], None] | None = None,
) -> Any:
    """A model as lm-eval's `HFLM`.

    Like lm-eval, it begins texts as the tokenizer does by itself (Gemma's puts <bos> first, SmolLM2's nothing).
    `data.tokens.opening` uses the same rule for perplexity.

    Args:
        model: causal LM, in eval mode.
        tokenizer: a transformers tokenizer; left as found.
        dtype: precision of the matrix products: `auto`, `float32` or `bfloat16`.
        on_answer: called with each likelihood or text as it comes.
        on_cut: called with (requests, of, tokens) if `requests` requests are cut off on the left to the `tokens` that the model
            reads.

    Its likelihoods raise UsageError if a continuation is longer than the model can read.
    """
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
            lengths = [(len(context), len(continuation)) for _, context, continuation in requests]
            if (longest := max((continuation for _, continuation in lengths), default=0)) > self.max_length:
                raise UsageError(
                    f"a continuation of {longest:,} tokens is longer than the {self.max_length:,} that the model reads"
                )
            cut = sum(context + continuation > self.max_length + 1 for context, continuation in lengths)
            if cut and on_cut is not None:
                on_cut(cut, len(lengths), self.max_length)
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    device = next(model.parameters()).device
    logits = _CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS
    harness = Harness(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval adds a padding token if it is missing
        batch_size=max(1, min(_MOST_SEQUENCES, logits // model.get_output_embeddings().weight.shape[0])),
        mixed_precision_dtype="bfloat16" if uses_bfloat16(device, dtype) else None,
        softmax_dtype="float32",
    )
    if on_answer is not None:
        harness.set_cache_hook(SimpleNamespace(add_partial=lambda kind, request, answer: on_answer(answer)))
    return harness
