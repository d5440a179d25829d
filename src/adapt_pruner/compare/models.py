"""Several models measured alike, one after the other: perplexity and speed on a text, answers to prompts, scores on tasks."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load, locate, pick_device
from adapt_pruner.compare.measures import WINDOW, Measures
from adapt_pruner.core.events import Find, Listener, Load, Progress, Warned, counting
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.weight_mask import count_nonzero
from adapt_pruner.data.sources import SELF, texts
from adapt_pruner.data.tokens import opening, text_bytes
from adapt_pruner.data.windows import held_out_windows, too_long
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.evaluate.chat import chat_answers
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.speed import forward_speed
from adapt_pruner.evaluate.task_sources import Wanted, find_tasks
from adapt_pruner.evaluate.tasks import TaskScore, average, evaluate_tasks, set_shots

__all__ = ["measured"]


def measured(
    models: Sequence[str], how: Measures, *, listen: Listener = lambda event: None
) -> tuple[list[dict[str, Any]], list[Sequence[TaskScore]]]:
    """The figures of each model, and its scores on the tasks.

    Models are loaded one after the other. If speed is measured, models take turns, so they are all held in memory.

    Args:
        models: as `checkpoint.load` takes them; of known families or not.
        how: what is measured.
        listen: called with every event.

    Returns:
        For each model `model`, `params`, `nonzero`, `decoder_params` (None of unknown families), `weight_bytes`, `dequantised`,
        `windows_start_with`; with a text what `Perplexity.to_dict` gives, and `tokens_per_second`; with prompts
        `chat`; with tasks `tasks` and `average`.
        And the scores of each model, none without tasks.

    Raises:
        UsageError: a model, text or task is not there.
        RunError: a model's files are damaged, or its loss is not a number.
    """
    if how.text is not None and how.text != SELF:
        for _ in itertools.islice(texts(how.text), None if how.max_windows is None else 1):
            pass  # reports a missing text before a model is loaded
    for name in models:
        locate(name)  # reports a missing model before hours go into another
    wanted = _wanted(how, listen)
    rows, scores, held = [], [], []
    for name in models:
        listen(Load(model=name).to_dict())
        loaded = load(name, device=pick_device(how.device), trust_remote_code=how.trust_remote_code, any_family=True)
        row = _described(name, loaded)
        if how.text is not None:
            figures, ids = _on_text(loaded, how.text, how, listen)
            row |= figures
            held.append((loaded.model, ids))
        if how.chat is not None:
            row["chat"] = _on_prompts(loaded, how.chat, how)
        if wanted is not None:
            scored = _on_tasks(loaded, wanted, how, listen)
            scores.append(scored)
            row["tasks"], mean = [asdict(score) for score in scored], average(scored)
            row["average"] = None if mean is None else {"value": mean[0], "stderr": mean[1]}
        rows.append(row)
        del loaded  # frees it before the next one is loaded
    if held:
        speeds = forward_speed([model for model, _ in held], held[0][1], dtype=how.dtype)
        for row, speed in zip(rows, speeds, strict=True):
            row["tokens_per_second"] = speed
    return rows, scores


def _wanted(how: Measures, listen: Listener) -> list[Wanted] | None:
    if how.tasks is None:
        return None
    listen(Find(tasks=how.tasks).to_dict())
    wanted = find_tasks(how.tasks, task_dir=how.task_dir, trust_remote_code=how.trust_remote_code)
    if kept := set_shots(wanted, how.num_fewshot):
        listen(Warned(message=f"{', '.join(kept)}: scored without examples, as defined in lm-eval").to_dict())
    return wanted


def _described(name: str, loaded: Loaded) -> dict[str, Any]:
    """Facts about a model before anything is measured."""
    return {
        "model": name, "params": count_parameters(loaded.model), "nonzero": count_nonzero(loaded.model),
        "decoder_params": decoder_parameters(loaded.model) if families.is_known(loaded.model.config) else None,
        "weight_bytes": loaded.weight_bytes, "dequantised": loaded.dequantised,
        "windows_start_with": loaded.tokenizer.decode(opening(loaded.tokenizer)) or None,
    }  # fmt: skip


def _on_text(loaded: Loaded, text: str, how: Measures, listen: Listener) -> tuple[dict[str, Any], Tensor]:
    """The figures of a model on a text, and the ids of the first window."""
    window = WINDOW if how.window is None else how.window
    windows = held_out_windows(loaded.tokenizer, source=text, window=window, max_windows=how.max_windows)
    for sentence in too_long(loaded.model.config, {"--window": window}):
        listen(Warned(message=f"{loaded.source}: {sentence}").to_dict())

    num_bytes = text_bytes(loaded.tokenizer, windows)
    return perplexity(
        loaded.model, windows, dtype=how.dtype, num_bytes=num_bytes, on_window=counting(listen, "evaluate")
    ).to_dict(), windows[0]


def _on_prompts(loaded: Loaded, number: int, how: Measures) -> dict[str, Any] | None:
    """How a model answers prompts of ours; None if it has no chat template, or one without a place for them."""
    if not getattr(loaded.tokenizer, "chat_template", None):
        return None
    answers = chat_answers(loaded.model, loaded.tokenizer, number=number, dtype=how.dtype)
    return None if answers is None else answers.to_dict()


def _on_tasks(loaded: Loaded, wanted: list[Wanted], how: Measures, listen: Listener) -> Sequence[TaskScore]:
    def told(task: str, done: int, of: int) -> None:
        listen(Progress(phase="task", task=task, done=done, of=of).to_dict())

    return evaluate_tasks(
        loaded.model, loaded.tokenizer, wanted, limit=how.limit, dtype=how.dtype, cache=how.cache_dir,
        trust_remote_code=how.trust_remote_code, on_task=told, warn=lambda message: listen(Warned(message=message).to_dict()),
    )  # fmt: skip
