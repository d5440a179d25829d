"""What to try next: rules that look at the figures of a run. Each gives a sentence and a command, or nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from adapt_pruner.core.events.words import compact, shown, typed
from adapt_pruner.core.system.strict_json import number_of
from adapt_pruner.report.figures import Figures, fit_slope

_SURE = 3.0  # a slope counts if it is this many standard errors from zero
_HEAVY_VOCABULARY = 0.25  # share of the remaining parameters outside the decoder layers
_SLACK = 0.01  # share of the budget that may be left unused


@dataclass(frozen=True)
class Advice:
    """A remark: what the figures show and what follows, and a command or recipe key for it, which may be empty."""

    text: str
    try_it: str = ""


def advice(figures: Figures, recipe: dict[str, Any], *, folder: str, checkpoint: str | None) -> list[Advice]:
    """The advice of all rules for a run, the most important first.

    Args:
        figures: the run's figures.
        recipe: as in recipe.yaml; empty if it could not be read.
        folder: the run's folder, as the page names it.
        checkpoint: name of the newest checkpoint; None if there is none.
    """
    remarks: list[Advice] = []
    if figures.status == "stopped":
        where = f"from {checkpoint}" if checkpoint else "from the beginning, since no checkpoint was complete"
        remarks.append(
            Advice(f"The run was stopped. The same command goes on {where}.", typed("run", f"{folder}/recipe.yaml", "-o", folder))
        )
    for rule in _RULES:
        remarks += rule(figures, recipe)
    return remarks


def _budget(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    now = figures.rows[0].now if figures.rows else None
    if figures.status != "finished" or now is None or not figures.target:
        return
    if now > figures.target:
        yield Advice(
            f"The budget of {figures.target:,} parameters was not reached: {now:,.0f} are left. "
            "Let more kinds of units go, for example query heads or layers.",
            "--set 'axes=[neurons, kv_heads, query_heads]'",
        )
    elif now < figures.target * (1 - _SLACK):
        yield Advice(
            f"{figures.target - now:,.0f} parameters of the budget are unused, since the last units that went were large. "
            "A smaller step comes closer to the budget.",
            f"--set step={float(recipe.get('step') or 0.02) / 2:g}",
        )


def _no_training(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    if figures.steps or figures.status != "finished":
        return
    before, now = _perplexities(figures)
    rise = (
        f" Perplexity went from {shown(before, 'perplexity')} to {shown(now, 'perplexity')}, most of which training can give back."
        if before and now and now > before
        else ""
    )
    yield Advice(f"Nothing was trained.{rise}", "--set training.source=TEXT --set training.tokens=10M")


def _still_falling(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    """Advice if a line through the losses in the last half of the last stage falls, and its slope is clear of the noise."""
    if figures.status != "finished" or not figures.steps:
        return
    last = [step for step in figures.steps if step.stage == figures.steps[-1].stage]
    half = [(float(step.tokens), step.loss) for step in last[len(last) // 2 :]]
    slope, error = fit_slope(half)
    if len(half) >= 8 and slope < -_SURE * error:
        fell = -slope * (half[-1][0] - half[0][0])
        times = f"{-slope / error:.0f}" if -slope <= 1000 * error else "over 1,000"  # the error of a perfect line is 0
        tokens = int((recipe.get("training") or {}).get("tokens") or figures.tokens.get("train", 0))
        yield Advice(
            f"The training loss was still falling when it ended: {fell:.2f} nats over the last {compact(half[-1][0] - half[0][0])} tokens "
            f"({times} times its standard error). More tokens will still help.",
            f"--set minutes={2 * minutes:g}"
            if (minutes := number_of(recipe.get("minutes")))
            else f"--set training.tokens={2 * tokens}",
        )


def _few_tokens(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    trained, now = figures.tokens.get("train"), figures.rows[0].now if figures.rows else None
    if trained and now and figures.status == "finished" and trained < now / 10:
        yield Advice(
            f"It was trained on {compact(trained)} tokens, {trained / now:.2g} for each parameter that is left. "
            "With so few, little of what pruning took can come back. "
            "The runs of the Adapt-Pruner paper train on 5 B tokens, 8 to 44 for each parameter."
        )


def _poor_answers(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    if figures.status == "finished" and figures.chats and figures.chats[-1].is_poor:
        minutes = number_of(recipe.get("minutes"))
        yield Advice(
            f"As an assistant it is poor: it {figures.chats[-1].verdict}. More minutes help, and so does a larger size.",
            f"--set minutes={4 * minutes:g}" if minutes else "",
        )


def _attention(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    if figures.began is None or not figures.states or figures.status == "running":
        return
    gone = {}
    for kind in figures.kinds:
        before = sum(layer.get(kind, 0) for layer in figures.began.layers.values())
        after = sum(layer.get(kind, 0) for layer in figures.states[-1].layers.values())
        gone[kind] = (before, before - after)
    heads, neurons = gone.get("kv_heads", (0, 0)), gone.get("neurons", (0, 0))
    if heads[0] and not heads[1] and not gone.get("query_heads", (0, 0))[1] and neurons[1] > 0.15 * neurons[0]:
        share = f"{neurons[1] / neurons[0]:.0%} of the neurons went"
        if "kv_heads" not in (recipe.get("axes") or ["kv_heads"]):
            yield Advice(f"Attention is untouched: {share}, and heads were not allowed to.", "--set 'axes=[neurons, kv_heads]'")
        elif "heads_after" not in str(recipe.get("chooser")):  # that chooser makes heads wait on purpose
            yield Advice(
                f"Attention is untouched: {share}, and all {heads[0]} KV heads stayed: no layer had to give up a whole head. A larger "
                "amplitude makes layers differ more, so that some lose one.",
                f"--set amplitude={2 * float(recipe.get('amplitude') or 0.02):g}",
            )


def _vocabulary(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    rows = {row.name: row for row in figures.rows}
    whole, decoder = rows.get("parameters"), rows.get("in decoder layers")
    if not whole or not decoder or not whole.now or not decoder.now or recipe.get("vocabulary") or figures.status == "running":
        return
    share = 1 - decoder.now / whole.now
    if share > _HEAVY_VOCABULARY:
        yield Advice(
            f"{share:.0%} of what is left lies in embeddings and head, which were not asked to give anything. If you know what the model "
            "will read, you can remove tokens that it never uses at almost no cost.",
            "--set vocabulary.source=TEXT --set vocabulary.keep=20000",
        )


def _no_evaluation(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    if not figures.evaluations and not figures.tasks:
        yield Advice(
            "No held-out text was measured, so nothing here says how good the model is.", "--set evaluation.source=SPEC#heldout"
        )


def _better_than_dense(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    before, now = _perplexities(figures)
    if before and now and now < before and figures.begun == "dense":
        yield Advice(
            f"The small model reads the held-out text better than the dense one ({shown(now, 'perplexity')} against {shown(before, 'perplexity')}). "
            "It has adapted to the kind of text it was trained on; measure it on another kind before you believe it.",
            "adapt-pruner eval DENSE PRUNED --text OTHER",
        )


def _where_time_went(figures: Figures, recipe: dict[str, Any]) -> Iterator[Advice]:
    total = sum(figures.seconds.values())
    scoring = figures.seconds.get("score", 0.0) + figures.seconds.get("repair", 0.0)
    step = float(recipe.get("step") or 0.02)
    larger = recipe.get("reduce", "units") == "units" and step < 1  # others do not read the step
    if figures.status == "finished" and total > 600 and scoring > 0.5 * total and figures.steps and larger:
        yield Advice(
            f"{scoring / total:.0%} of the time went into scoring and repair. "
            "A larger step makes fewer iterations and costs a little quality.",
            f"--set step={min(1.0, 2 * step):g}",
        )


def _perplexities(figures: Figures) -> tuple[float | None, float | None]:
    row = next((row for row in figures.rows if row.name == "perplexity"), None)
    return (row.before, row.now) if row else (None, None)


_RULES: tuple[Callable[[Figures, dict[str, Any]], Iterator[Advice]], ...] = (
    _budget, _poor_answers, _no_training, _still_falling, _few_tokens, _attention, _vocabulary, _better_than_dense, _no_evaluation, _where_time_went,
)  # fmt: skip
