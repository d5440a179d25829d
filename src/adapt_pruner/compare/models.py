"""Several models measured alike, one after the other: perplexity and speed on a text, answers to prompts, scores on tasks."""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load_that_fits, locate, pick_device
from adapt_pruner.compare.measures import WINDOW, Measures
from adapt_pruner.core.events import Find, Listener, Load, Progress, Warned, counting
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.hot_experts import Hot, one_by_one
from adapt_pruner.core.model.weight_mask import count_nonzero
from adapt_pruner.core.system.memory import free_bytes, peak_bytes
from adapt_pruner.data.pictures import holds_pictures
from adapt_pruner.data.sources import SELF, texts
from adapt_pruner.data.tokens import opening
from adapt_pruner.data.windows import too_long
from adapt_pruner.errors import option
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.evaluate.chat import chat_answers
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.speed import forward_speed
from adapt_pruner.evaluate.task_sources import Wanted, find_tasks
from adapt_pruner.evaluate.tasks import TaskScore, average, evaluate_tasks, set_shots
from adapt_pruner.work import task_for

_FOR_EXPERTS = 4
"""Experts of a model whose weights are on a shelf may take the free memory divided by this."""


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
        `chat`; of a model with experts on a shelf `experts`, what `Hot.figures` gives, and `peak_bytes`; with tasks `tasks` and `average`.
        And the scores of each model, none without tasks.

    Raises:
        UsageError: a model, text or task is not there.
        RunError: a model's files are damaged, or its loss is not a number.
    """
    if how.text is not None and how.text != SELF and not holds_pictures(how.text):
        for _ in itertools.islice(texts(how.text), None if how.max_windows is None else 1):
            pass  # reports a missing text before a model is loaded
    for name in models:
        locate(name)  # reports a missing model before hours go into another
    tasks: list[Wanted] = []
    if how.tasks is not None:
        listen(Find(tasks=how.tasks))
        tasks = find_tasks(how.tasks, task_dir=how.task_dir, trust_remote_code=how.trust_remote_code)
        if plain := set_shots(tasks, how.num_fewshot):
            listen(Warned(message=f"{', '.join(plain)}: scored without examples, as defined in lm-eval"))
    with ExitStack() as stack:
        return _measured(models, how, tasks, stack, listen=listen)


def _measured(
    models: Sequence[str], how: Measures, tasks: Sequence[Wanted], stack: ExitStack, *, listen: Listener
) -> tuple[list[dict[str, Any]], list[Sequence[TaskScore]]]:
    """As `measured`; what models hold until all are measured goes to `stack`."""
    scores: list[Sequence[TaskScore]] = []
    rows: list[dict[str, Any]] = []
    held: list[tuple[dict[str, Any], Any, Any]] = []
    place: Any = how.offload
    hot: list[tuple[dict[str, Any], Any, Hot]] = []
    for name in models:
        listen(Load(model=name))
        loaded = load_that_fits(
            name, device=pick_device(how.device), trust_remote_code=how.trust_remote_code, any_family=True,
            any_task=how.tasks is None and how.chat is None, offload=place, only_read=True,
        )  # fmt: skip
        model, tokenizer, task = loaded.model, loaded.tokenizer, task_for(loaded.model)
        row: dict[str, Any] = {
            "model": name, "params": count_parameters(model), "nonzero": count_nonzero(model),
            "decoder_params": decoder_parameters(model) if families.is_known(model.config) else None,
            "weight_bytes": loaded.weight_bytes, "dequantised": loaded.dequantised,
            "windows_start_with": tokenizer.decode(opening(tokenizer)) or None if len(task.towers) == 1 else None,
        }  # fmt: skip
        axes = families.declared(model) if loaded.offload != "none" else ()
        if any(axis.per_token for axis in axes):
            free = free_bytes(model.device)
            room = loaded.weight_bytes if free is None else free // _FOR_EXPERTS
            hot.append((row, model, stack.enter_context(one_by_one(model, axes, room=room))))
        if how.text is not None:
            window = WINDOW if how.window is None else how.window
            by_text = task.held_out(tokenizer, source=how.text, window=window, max_windows=how.max_windows)
            windows = [ids for some in by_text.values() for ids in some]
            for sentence in too_long(model.config, {option("window"): window} if len(task.towers) == 1 else {}):
                listen(Warned(message=f"{loaded.source}: {sentence}"))
            num_bytes = task.num_bytes(tokenizer, windows)
            on_window = counting(listen, "evaluate")
            row |= perplexity(model, windows, task=task, dtype=how.dtype, num_bytes=num_bytes, on_window=on_window).to_dict()
            if len(task.towers) == 1:
                held.append((row, model, windows[0]))
        if how.chat is not None:
            row["chat"] = None  # no chat template, or one without a place for a prompt
            if getattr(tokenizer, "chat_template", None):
                answers = chat_answers(model, tokenizer, number=how.chat, dtype=how.dtype)
                row["chat"] = None if answers is None else answers.to_dict()
        if how.tasks is not None:
            scored = evaluate_tasks(
                model, tokenizer, tasks, limit=how.limit, dtype=how.dtype, cache=how.cache_dir, trust_remote_code=how.trust_remote_code,
                on_task=lambda task, done, of: listen(Progress(phase="task", task=task, done=done, of=of)),
                warn=lambda message: listen(Warned(message=message)),
            )  # fmt: skip
            scores.append(scored)
            row["tasks"], mean = [asdict(score) for score in scored], average(scored)
            row["average"] = None if mean is None else {"value": mean[0], "stderr": mean[1]}
        rows.append(row)
        del loaded, model, tokenizer  # frees them before the next one is loaded
    if held:
        speeds = forward_speed([model for _, model, _ in held], held[0][2], dtype=how.dtype)
        for (row, _, _), speed in zip(held, speeds, strict=True):
            row["tokens_per_second"] = speed
    for row, model, experts in hot:
        row["experts"] = {**experts.figures(), "peak_bytes": peak_bytes(model)}
    return rows, scores
