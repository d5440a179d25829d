"""Two models measured in turn, A B A B …, each in a process of its own, so that a busy machine favours neither.

A figure is the median with its quartiles. A speed-up is the median of each round's own speed-up. The two models of a round run
seconds apart, so that anything that slows the machine slows both.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapt_pruner.compare.ideal import PHASES, Weights, ideal_speed_up, of_gguf, of_torch
from adapt_pruner.core.events import Listener, Load, Progress, Warned
from adapt_pruner.core.system.processes import Child, module, talking
from adapt_pruner.errors import RunError, UsageError, nearest

__all__ = ["ENGINES", "LOADS", "Spread", "bench"]

ENGINES = ("torch", "llama.cpp")
LOADS = 3  # how often each model is loaded, each time in a new process


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times: the median, and the lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """From any number of values; with one value, all three are equal to it."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def bench(
    pruned: str,
    dense: str,
    *,
    engine: str = "torch",
    batches: Sequence[int] = (1, 8),
    prompt: int = 512,
    generate: int = 64,
    rounds: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    quant: str | None = None,
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """How fast `pruned` runs beside `dense`, in tokens per second, and what share of the ideal speed-up that is.

    Args:
        pruned: folder, .gguf file, hub id or packaged name.
        dense: the model to compare with, given in the same way.
        engine: one of `ENGINES`.
        batches: rows at one time; each is a measurement of its own.
        prompt: tokens of a prompt.
        generate: tokens written after it; each is the one with the highest logit.
        rounds: how often each is measured, after one round that is not counted.
        device: for torch.
        dtype: for torch: precision of the weights; `auto` is bfloat16 where native.
        quant: for llama.cpp: the type in which a model that is no GGUF file is exported; None for its stored type.
        trust_remote_code: run Python code that comes with a folder.
        listen: called with an event for every round.

    Returns:
        `engine`, `device`, `threads` and what was asked; `models`, the figures of each, the pruned one first; `speeds`, for each
        phase and batch `pruned` and `dense` in tokens per second, `speed_up`, `ideal` and `share` = speed_up / ideal.

    Raises:
        UsageError: the request cannot be met.
        RunError: an engine fails on a model.
    """
    _check(engine, device, dtype, quant)
    if quant is not None and Path(pruned).is_file() and Path(dense).is_file():
        raise UsageError(
            f"--quant {quant} applies only to models that bench exports, and both are .gguf files already; leave it out"
        )
    import torch  # only after everything that can be refused without it

    asked = {
        "engine": engine, "threads": torch.get_num_threads(), "rows": max(batches), "tokens": prompt + generate, "device": device,
        "dtype": dtype, "trust": trust_remote_code,
    }  # fmt: skip
    with ExitStack() as stack:
        paths = [pruned, dense]
        if engine == "llama.cpp":
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="adapt-pruner-bench-")))
            files = [folder / "pruned.gguf", folder / "dense.gguf"]
            paths = [_as_gguf(*pair, quant, trust_remote_code, listen) for pair in zip(paths, files, strict=True)]
        loads: list[list[float]] = [[], []]
        workers: list[_Worker] = []
        for round_idx in range(LOADS):
            listen(Progress(phase="time", what="loading", done=round_idx + 1, of=LOADS))
            for path, seconds in zip(paths, loads, strict=True):
                with ExitStack() as once:
                    worker = once.enter_context(_opened(asked | {"model": path}))
                    seconds.append(worker.facts["load_seconds"])
                    if round_idx == LOADS - 1:
                        stack.push(once.pop_all())
                        workers.append(worker)
        weights = [_weights(worker, path, engine) for worker, path in zip(workers, paths, strict=True)]
        vocabulary = min(of.shapes.vocabulary for of in weights)
        speeds = []
        for batch in batches:
            question = {"batch": batch, "prompt": prompt, "generate": generate, "vocabulary": vocabulary}
            taken: list[list[dict[str, float]]] = [[], []]
            for round_idx in range(rounds + 1):
                listen(Progress(phase="time", what=f"batch {batch}", done=round_idx, of=rounds))
                for worker, answers in zip(workers, taken, strict=True):
                    answer = worker.ask(question)
                    if round_idx:
                        answers.append(answer)
            for phase in PHASES:
                tokens = batch * (prompt if phase == "prefill" else generate)
                rates = [[tokens / answer[phase] for answer in answers] for answers in taken]
                gained = Spread.of([ours / theirs for ours, theirs in zip(*rates, strict=True)])
                ideal = ideal_speed_up(weights[1], weights[0], phase=phase, batch=batch, prompt=prompt, generate=generate)
                speeds.append({
                    "phase": phase, "batch": batch, "pruned": asdict(Spread.of(rates[0])), "dense": asdict(Spread.of(rates[1])),
                    "speed_up": asdict(gained), "ideal": ideal, "share": gained.median / ideal,
                })  # fmt: skip
        facts = [worker.facts for worker in workers]
    if facts[0]["stored"] != facts[1]["stored"]:
        message = (
            f"{pruned} is stored in {facts[0]['stored']} and {dense} in {facts[1]['stored']}, so the speed-ups do not come from "
            "pruning alone"
        )
        listen(Warned(message=message))
    models = [
        {
            "model": name, "params": of.shapes.params, "stored": fact["stored"], "disk_bytes": fact["disk_bytes"],
            "load_seconds": asdict(Spread.of(seconds)), "peak_bytes": fact["peak_bytes"],
        }
        for name, of, fact, seconds in zip((pruned, dense), weights, facts, loads, strict=True)
    ]  # fmt: skip
    return {
        "engine": facts[0]["engine"], "device": facts[0]["device"], "threads": asked["threads"], "prompt": prompt, "generate": generate,
        "rounds": rounds, "models": models, "speeds": speeds,
    }  # fmt: skip


def _check(engine: str, device: str, dtype: str, quant: str | None) -> None:
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is not known; {nearest(engine, ENGINES)}")
    if engine == "torch" and quant is not None:
        raise UsageError(f"--quant {quant} applies only to --engine llama.cpp; torch has no such weights, so leave it out")
    if engine == "llama.cpp" and device not in ("auto", "cpu"):
        raise UsageError(f"llama.cpp is measured on the CPU, not on {device!r}; leave --device out")
    if engine == "llama.cpp" and dtype != "auto":
        raise UsageError(f"--dtype {dtype} applies only to --engine torch; for llama.cpp use --quant f32, f16, bf16, …")


def _as_gguf(model: str, path: Path, quant: str | None, trust: bool, listen: Listener) -> str:
    """A model as a GGUF file: the file itself, or the model exported to `path`."""
    from adapt_pruner.checkpoint.load import load
    from adapt_pruner.export import export, llama_cpp

    llama_cpp.library()  # fails before any work is done
    if Path(model).is_file():
        return model
    listen(Load(model=model))
    for note in export(load(model, trust_remote_code=trust), path, to="gguf", quant=quant):
        listen(Warned(message=f"{model}: {note}"))
    return str(path)


def _weights(worker: "_Worker", path: str, engine: str) -> Weights:
    return of_torch(worker.facts) if engine == "torch" else of_gguf(Path(path))


class _Worker:
    """A process with a model in an engine."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.facts: dict[str, Any] = _heard(child.hear())

    def ask(self, question: dict[str, Any]) -> dict[str, float]:
        """Seconds to read a prompt and to write after it. The memory held is kept among the facts."""
        answer: dict[str, float] = _heard(self._child.ask(question))
        self.facts["peak_bytes"] = answer.pop("peak_bytes")
        return answer


def _heard(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, unless it is an error, which is raised."""
    if "error" in answer:
        raise (UsageError if answer["usage"] else RunError)(answer["error"])
    return answer


@contextmanager
def _opened(asked: dict[str, Any]) -> Iterator[_Worker]:
    silent = (
        f"the process with {asked['model']} ended with status {{status}} and without a message; there may be too "
        "little memory for two models, or for so large a --batch"
    )
    with talking(module("adapt_pruner.compare.worker", json.dumps(asked)), silent=silent) as child:
        yield _Worker(child)
