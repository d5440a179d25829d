"""Measure a run's model during the run, and write its checkpoint at the end.

`figures["perplexities"]` and `figures["bits_per_byte"]` list the model at the start and after each stage, and `figures["judged"]`
lists what else its task measures. `figures["tasks"]`, `figures["answers"]` and `figures["calibration_losses"]`, the loss on
calibration text, list the start and the end. None means not measured, because the recipe asked for it only later. In JSON, null
can also mean infinity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.origin import origin
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.events import Evaluation, Progress, Tasks
from adapt_pruner.core.events.run import Answered, Chatted, PromptAnswer
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import num_active
from adapt_pruner.core.model.precision import nonfinite_error
from adapt_pruner.core.model.shelf import bytes_read
from adapt_pruner.core.model.weight_mask import count_nonzero
from adapt_pruner.core.system import world
from adapt_pruner.core.system.memory import peak_bytes, peak_rss_bytes
from adapt_pruner.core.system.provenance import made_by
from adapt_pruner.errors import RunError, UsageError, first_line
from adapt_pruner.evaluate.anatomy import decoder_parameters, use_on
from adapt_pruner.evaluate.answer import LONGEST, PROMPTS, answer
from adapt_pruner.evaluate.chat import chat_answers, kl_to_written
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.evaluate.tasks import average, evaluate_tasks
from adapt_pruner.export.loading import misread
from adapt_pruner.run import latency
from adapt_pruner.run.conversations import dense_fingerprint
from adapt_pruner.score.calibrate import mean_loss
from adapt_pruner.work import Work

_ENOUGH = 2048  # calibration tokens on which the loss is compared


@dataclass
class Outcome:
    """The outcome of a run: the pruned model, its mask against the model at the start, figures, and a note on each iteration."""

    loaded: Loaded
    mask: Mask
    figures: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def measure_start(work: Work) -> None:
    """Measure the model before its first cut."""
    state = work.state
    state.figures |= {"params_before": work.budget.total, "decoder_params_before": decoder_parameters(work.model)}
    state.figures |= _active(work, "before")
    if work.recipe.makes_zeros or work.weight_mask is not None:
        state.figures["nonzero_before"] = count_nonzero(work.model)
    _measure_calibration(work)
    measure_text(work, stage=0)
    cached = measure_tasks(work, stage=0)
    measure_answers(work, stage=0)
    cached += measure_chat(work, stage=0)
    timing = state.figures.get("measuring_seconds", 0.0)  # see `run.latency.budget_for`
    state.figures["measuring_seconds"] = timing + cached + state.spent["evaluate"]


def measure_end(work: Work) -> None:
    """Measure the model after its last stage, as far as no stage has done so, and sum up the run."""
    state = work.state
    if "calibration_losses" in state.figures:
        _measure_calibration(work)
    state.figures |= {
        "params_after": work.num_params,
        "decoder_params_after": decoder_parameters(work.model),
        **_active(work, "after"),
        "budget": work.budget.keep,
        "iterations": len(state.history),
        "trained_tokens": state.progress.tokens,
        "seconds": state.seconds,
        **{f"seconds_{phase}": seconds for phase, seconds in state.spent.items()},
        "peak_bytes": peak_bytes(work.model),
        "peak_rss_bytes": peak_rss_bytes(),
        **({"weights_read": round(read / work.loaded.weight_bytes, 1)} if (read := bytes_read(work.model)) else {}),
        "method": work.recipe.method,
        "seed": work.recipe.seed,
    }
    if work.weight_mask is not None:
        pattern = work.weight_mask.pattern
        state.figures |= {"nonzero_after": count_nonzero(work.model), "sparsity_after": None if pattern is None else str(pattern)}


def _active(work: Work, when: str) -> dict[str, int]:
    """Parameters that one token goes through now; nothing for a model without experts, where these are all."""
    has_experts = any(axis.per_token for axis in work.axes)
    return {f"active_params_{when}": num_active(work.model, work.axes)} if has_experts else {}


def _measure_calibration(work: Work) -> None:
    """Add the loss on the first calibration text, nats per token, to the figures; done before the first cut and at the end.

    A run with held-out text has no need of it.
    """
    batches: list[Tensor] = []
    for batch in work.data.calibration(1) if not work.data.held_out else ():
        if sum(before.numel() for before in batches) < _ENOUGH:
            batches.append(batch)
    if not batches:
        return
    with work.state.clock("evaluate"):
        loss = mean_loss(work.model, batches, task=work.task, dtype=work.recipe.dtype)
    losses = work.state.figures.get("calibration_losses", [])
    if math.isnan(loss) and losses:
        raise RunError(
            f"the loss of the pruned model on the calibration text is {loss}; set dtype to float32, or method or repair to another"
        )
    if math.isnan(loss):
        raise nonfinite_error(f"the loss on the calibration text is {loss}", work.model.device, work.recipe.dtype)
    work.state.figures["calibration_losses"] = [*losses, loss]


def measure_text(work: Work, *, stage: int, after_cuts: bool = False) -> None:
    """Measure the perplexity on the recipe's held-out text, if it names one; `stage` 0 is the model at the start.

    With `after_cuts` the model has been cut and most of the stage's training is still to come; these figures have other names.
    """
    data, figures = work.data, work.state.figures
    if not data.held_out:
        return
    with work.state.clock("evaluate"):
        measured = perplexity(
            work.model, data.held_out, task=work.task, dtype=work.recipe.dtype, num_bytes=data.held_out_bytes,
            texts=data.held_out_texts, on_window=work.progress("evaluate", stage=stage),
        )  # fmt: skip
        has_experts = not after_cuts and any(axis.per_token for axis in work.axes)
        used = use_on(work.model, data.held_out, dtype=work.recipe.dtype) if has_experts else {}
    for name, figure in (("perplexities", measured.perplexity), ("bits_per_byte", measured.bits_per_byte)):
        values = figures.setdefault(f"{name}_after_cuts" if after_cuts else name, [])
        values += [None] * (stage - len(values)) + [figure]  # None for stages that ended before somebody asked for it
    if measured.judged and not after_cuts:
        figures["judged"] = [*figures.get("judged", []), {"stage": stage, **measured.judged}]
    of_experts = {str(layer): shares for layer, shares in used.items()} or None
    work.tell(Evaluation(stage=stage, after_cuts=after_cuts, params=work.num_params, used=of_experts, **measured.to_dict()))


def measure_tasks(work: Work, *, stage: int) -> float:
    """Score the recipe's tasks, if it names any, on the main process alone. Scores of the same model are taken from the cache.

    Returns:
        The seconds that the scores from the cache once took.
    """
    evaluation, figures = work.recipe.evaluation, work.state.figures
    if evaluation.tasks is None:
        return 0.0

    def tell(task: str, done: int, of: int) -> None:
        work.tell(Progress(phase="task", task=task, done=done, of=of, stage=stage or None))

    with work.state.clock("evaluate"):
        settings: dict[str, Any] = {
            "limit": evaluation.limit, "dtype": work.recipe.dtype, "trust_remote_code": work.trust_remote_code, "on_task": tell, "warn": work.warn,
        }  # fmt: skip
        scores = world.on_main(lambda: evaluate_tasks(work.model, work.tokenizer, work.data.tasks, **settings))
    mean, stderr = average(scores) or (None, None)
    summary: dict[str, Any] = {"average": mean, "stderr": stderr, "scores": [score.headline() for score in scores]}
    figures["tasks"] = [*figures.get("tasks", [None] if stage else []), summary]  # of the start and of the end
    work.tell(Tasks(stage=stage, params=work.num_params, **summary))
    return sum(part.seconds for score in scores for part in score.parts or (score,) if part.again)


def measure_answers(work: Work, *, stage: int) -> None:
    """Let the model answer the recipe's prompts, or three of ours if it chats; it writes the likeliest token each time.

    A model that does not lie in memory answers only the recipe's: each token would read all weights.

    A model that cannot answer, such as one that pruning ruined, gives a warning and not an error.
    """
    prompts = work.recipe.evaluation.prompts
    if prompts is None:
        chats = getattr(work.tokenizer, "chat_template", None) and work.loaded.offload == "none"
        prompts = list(PROMPTS) if chats else []
    if not prompts or not work.model.can_generate():
        return

    def answered() -> list[str] | str:
        how: dict[str, Any] = {"max_new_tokens": LONGEST, "dtype": work.recipe.dtype}
        try:
            return [answer(work.model, work.tokenizer, prompt, **how).text for prompt in prompts]
        except (RunError, UsageError) as error:
            return str(error)

    with work.state.clock("evaluate"):
        texts = world.on_main(answered)
    if isinstance(texts, str):
        work.warn(f"the prompts were not answered: {texts}")
        return
    answers = [PromptAnswer(prompt=prompt, text=text) for prompt, text in zip(prompts, texts, strict=True)]
    figures = work.state.figures
    figures["answers"] = [*figures.get("answers", []), {"stage": stage, "answers": answers}]
    work.tell(Answered(stage=stage, answers=answers))


def measure_chat(work: Work, *, stage: int) -> float:
    """Ask the model the recipe's number of our prompts, and measure how far it is from the dense model on held-out conversations.

    A model without a chat template is not asked. One that cannot answer gives a warning and not an error.

    Returns:
        The seconds that answers from the cache once took.
    """
    number, figures = work.recipe.evaluation.chat, work.state.figures
    if not (number and getattr(work.tokenizer, "chat_template", None) and work.model.can_generate()):
        return 0.0

    def answered() -> dict[str, Any] | str:
        try:
            whose = None if stage else dense_fingerprint(work)
            answers = chat_answers(work.model, work.tokenizer, number=number, dtype=work.recipe.dtype, whose=whose)
            if answers is None:
                return "the chat template has no place for a prompt"
            chats = work.data.held_out_chats
            kl = None if chats is None else kl_to_written(work.model, chats, dtype=work.recipe.dtype)
            return {**answers.to_dict(), "kl": kl, "saved": answers.saved}
        except (RunError, UsageError) as error:
            return str(error)

    work.begins("evaluate", stage=stage)
    with work.state.clock("evaluate"):
        chat = world.on_main(answered)
    if isinstance(chat, str):
        work.warn(f"the model was not asked our prompts: {chat}")
        return 0.0
    saved = float(chat.pop("saved"))
    earlier = figures.get("chat", [])
    dense = next((each["right"] for each in earlier if each["stage"] == 0), None)
    event = Chatted(stage=stage, dense=dense, **chat)
    figures["chat"] = [*earlier, {"stage": stage, **chat}]
    work.tell(event)
    return saved


def warn_of_pattern(work: Work) -> None:
    """Warn if layers went and the kinds of those that are left mislead another tool (see `export.loading.misread`)."""
    config = work.model.config
    if work.state.layers_left is None:
        return
    if (trouble := misread(config.model_type, getattr(config, "layer_types", None) or ())) is not None:
        work.warn(f"{trouble}; serve it with another tool, or remove layers with chooser='depth.drop_layers(periodic=true)'")


def whole_mask(work: Work) -> Mask:
    """The mask so far against the dense model, even if the run began with a model that was pruned before."""
    before = work.loaded.mask
    return work.state.mask if before is None else before.then(work.state.mask, work.axes)


def facts(work: Work) -> dict[str, Any]:
    """The content of pruning.json: how the model was made."""
    loaded, figures = work.loaded, work.state.figures
    return {
        "dense_params": figures["params_before"] if loaded.mask is None else loaded.dense_params,
        "made_by": made_by(),
        "recipe": work.recipe.model_dump(mode="json"),
        "figures": figures,
        "history": work.state.history,
    }


def write(work: Work, path: Path, *, write_more: Callable[[Path], None]) -> None:
    """Write the checkpoint of a finished run; if the recipe has a latency, measure the model's first.

    The checkpoint is written even if that measurement fails or is interrupted.

    Args:
        work: the run at its end.
        path: a folder that does not exist or is empty.
        write_more: writes more files into the folder before the folder gets its final name.

    Raises:
        RunError: the checkpoint cannot be written.
    """
    interrupted = False
    work.begins("finish")
    try:
        work.state.figures |= latency.measured(work)
    except Exception as error:  # out of memory, too
        work.warn(f"the latency of the pruned model could not be measured: {first_line(error)}")
    except KeyboardInterrupt:
        interrupted = True  # the error itself would keep the timed models in memory
    save(
        work.model, work.tokenizer, path, mask=whole_mask(work), pruning=facts(work) | {"base": origin(work.recipe.model)},
        dtype=work.loaded.dtype, weight_mask=work.weight_mask, write_more=write_more,
    )  # fmt: skip
    if interrupted:
        raise KeyboardInterrupt
