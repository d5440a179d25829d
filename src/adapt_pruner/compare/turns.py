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
from typing import Any

from adapt_pruner.compare.ideal import PHASES, Weights, ideal_speed_up
from adapt_pruner.core.events import Listener, Load, Progress, Warned
from adapt_pruner.core.system.processes import Child, module, talking
from adapt_pruner.errors import RunError, UsageError

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


def loaded_in_turn(
    paths: Sequence[str], how: dict[str, Any], stack: ExitStack, listen: Listener
) -> tuple[list["_Worker"], list[list[float]]]:
    """Load each model `LOADS` times, in turn; the last process of each stays until `stack` ends. Returns these, and the seconds.

    Args:
        paths: the models.
        how: what `compare.worker` is asked for, but the model.
        stack: keeps the processes.
        listen: called with an event for every round.
    """
    loads: list[list[float]] = [[] for _ in paths]
    workers = []
    for round_idx in range(LOADS):
        listen(Progress(phase="time", what="loading", done=round_idx + 1, of=LOADS))
        for path, seconds in zip(paths, loads, strict=True):
            with ExitStack() as once:
                worker = once.enter_context(_opened(how | {"model": path}))
                seconds.append(worker.facts["load_seconds"])
                if round_idx == LOADS - 1:
                    stack.push(once.pop_all())
                    workers.append(worker)
    return workers, loads


def speeds(
    workers: Sequence["_Worker"],
    weights: Sequence[Weights],
    *,
    batch: int,
    prompt: int,
    generate: int,
    rounds: int,
    listen: Listener,
) -> list[dict[str, Any]]:
    """How fast the first model reads and writes beside the second, by rounds in turn after one that is not counted.

    Args:
        workers: the processes of the pruned and the dense model.
        weights: what each holds.
        batch: rows at one time.
        prompt: tokens of a prompt.
        generate: tokens written after it; each is the one with the highest logit.
        rounds: how many count.
        listen: called with an event for every round.

    Returns:
        A row a phase: `pruned` and `dense` in tokens per second, `speed_up`, `ideal` and `share` = speed_up / ideal.
    """
    vocabulary = min(held.shapes.vocabulary for held in weights)
    question = {"batch": batch, "prompt": prompt, "generate": generate, "vocabulary": vocabulary}
    taken: list[list[dict[str, float]]] = [[] for _ in workers]
    for round_idx in range(rounds + 1):
        listen(Progress(phase="time", what=f"batch {batch}", done=round_idx, of=rounds))
        for worker, answers in zip(workers, taken, strict=True):
            answers.append(worker.ask(question))
    rows = []
    for phase in PHASES:
        tokens = batch * (prompt if phase == "prefill" else generate)
        pruned, dense = ([tokens / answer[phase] for answer in answers[1:]] for answers in taken)
        gained = Spread.of([ours / theirs for ours, theirs in zip(pruned, dense, strict=True)])
        ideal = ideal_speed_up(weights[1], weights[0], phase=phase, batch=batch, prompt=prompt, generate=generate)
        rows.append({
            "phase": phase, "batch": batch, "pruned": asdict(Spread.of(pruned)), "dense": asdict(Spread.of(dense)),
            "speed_up": asdict(gained), "ideal": ideal, "share": gained.median / ideal,
        })  # fmt: skip
    return rows


def as_gguf(model: str, path: Path, quant: str | None, trust: bool, listen: Listener) -> str:
    """A model as a GGUF file: the file itself, or the model exported to `path`."""
    from adapt_pruner.checkpoint.stored import load_unread
    from adapt_pruner.export import export, llama_cpp

    llama_cpp.library()  # fails before any work is done
    if Path(model).is_file():
        return model
    listen(Load(model=model))
    for note in export(load_unread(model, trust_remote_code=trust), path, to="gguf", quant=quant):
        listen(Warned(message=f"{model}: {note}"))
    return str(path)


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
def _opened(how: dict[str, Any]) -> Iterator[_Worker]:
    silent = (
        f"the process with {how['model']} ended with status {{status}} and without a message; there may be too "
        "little memory for two models, or for so large a batch"
    )
    with talking(module("adapt_pruner.compare.worker", json.dumps(how)), silent=silent) as child:
        yield _Worker(child)
