"""What the dense model writes for a run to learn from: how much `shrink` plans, and the texts, which are kept in the cache."""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events.words import span
from adapt_pruner.core.system import world
from adapt_pruner.data.conversations import BATCH, of_part, written_batches
from adapt_pruner.data.fixed import Written
from adapt_pruner.data.generation import continued
from adapt_pruner.data.sources import SELF, SELF_CHAT, domains, parts_of, read, written_spec
from adapt_pruner.data.store import Store
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.chat import FEW, LONGEST, MANY
from adapt_pruner.evaluate.tasks import fingerprint
from adapt_pruner.grow import grown
from adapt_pruner.recipe import Recipe
from adapt_pruner.work import Work

WRITING = 1 / 6
"""Share of a run's minutes that the dense model may write, at most."""
_CONVERSATION = 200  # tokens written for each conversation that comes to its end; SmolLM2 ends about half within 128 tokens
_LEAST, _MANY, _ENOUGH, _MOST = 10, 100, 512, 4096
"""Texts below which none are planned, below which the plan says that they are few, of a run without a time limit, and at most."""
_SHORT = 15 * 60.0  # seconds below which a run asks few prompts
_FOR_ANSWERS = 1 / 5  # of the time, at most; else the prompts of ours are not asked
_TIMED = 8  # tokens of each text that is timed


def specs_to_write(recipe: Recipe) -> list[str]:
    """The SPECs of a run's texts that the dense model writes; not `self` as calibration text, which the run's folder keeps."""
    sources = (recipe.training.source, recipe.calibration.source, recipe.evaluation.source)
    specs = [spec for source in sources if source is not None for spec in domains(source) if written_spec(spec) is not None]
    if recipe.training.source is None or SELF not in domains(recipe.training.source):
        specs = [spec for spec in specs if spec != SELF]
    return list(dict.fromkeys(specs))


def written_texts(work: Work, *, begun: bool) -> Written:
    """What the dense model writes of the run's texts, by SPEC; the figure `written` says how much, and of which model.

    A run that goes on reads what it read before; it is written again only if it is lost.

    Raises:
        UsageError: the model has no chat template, or the text is lost and the model can no longer write it.
    """
    specs = specs_to_write(work.recipe)
    found: dict[str, list[Store]] = {}
    for base in dict.fromkeys(parts[0] for spec in specs if (parts := written_spec(spec)) is not None):
        with work.state.clock("other"):
            batches: list[list[Store]] = []
            world.on_main(lambda base=base, batches=batches: batches.append(_batches(work, base, begun=begun)))  # type: ignore[misc]
            found[base] = batches[0] if batches else _batches(work, base, begun=begun)  # which the main process stored
    held_out = [f"{base}#heldout" for base in found if any(spec == f"{base}#train" for spec in specs)]
    wanted = dict.fromkeys([*specs, *held_out])
    return {spec: of_part(found[parts[0]], parts[1]) for spec in wanted if (parts := written_spec(spec)) is not None}


def held_out_chats(written: Written) -> Store | None:
    """The conversations that nothing learns from; None if there are none."""
    held_out = (store for spec, store in written.items() if spec.startswith(SELF_CHAT) and spec.endswith("#heldout"))
    return next((store for store in held_out if len(store)), None)


def _batches(work: Work, base: str, *, begun: bool) -> list[Store]:
    recipe, figures = work.recipe, work.state.figures
    before = figures.get("written", {}).get(base) or {"whose": dense_fingerprint(work), "batches": None}
    again = before["batches"] is not None
    in_time = (lambda: again) if again or not world.is_main() else _in_time(recipe)
    stores = written_batches(
        work.model, work.tokenizer, base, whose=before["whose"], texts=recipe.training.written, batches=before["batches"],
        length=recipe.training.length, seed=recipe.seed, dtype=recipe.dtype, warn=work.warn, in_time=in_time,
        on_texts=work.counts("write", what="text to train on" if base == SELF else "conversations"),
        dense=(lambda: dense_again(work, "what the dense model wrote is no longer in the cache")) if begun else None,
    )  # fmt: skip
    texts = sum(map(len, stores))
    figures["written"] = {**figures.get("written", {}), base: {**before, "batches": len(stores), "texts": texts}}
    return stores


def _in_time(recipe: Recipe) -> Callable[[], bool]:
    """Whether there is time to write another batch that takes as long as the longest so far; the first one is always written."""
    asked: list[float] = []

    def in_time() -> bool:
        asked.append(time.monotonic())
        longest = max((after - before for before, after in itertools.pairwise(asked)), default=0.0)
        return len(asked) == 1 or asked[-1] - asked[0] + longest <= 60 * WRITING * (recipe.minutes or math.inf)

    return in_time


def dense_again(work: Work, lost: str) -> Any:
    """The dense model of a run that has cut its model since, so that it writes once more what is `lost`, in words for people.

    Raises:
        UsageError: the run has cut the vocabulary, too.
    """
    if work.recipe.vocabulary is not None:
        raise UsageError(
            f"{lost} and cannot be written again, since the vocabulary of the model has been cut; start again in another folder"
        )
    loaded = load(work.recipe.model, device=work.model.device, trust_remote_code=work.trust_remote_code, any_task=True)
    return grown(loaded, work.recipe.grow, seed=work.recipe.seed).model


def dense_fingerprint(work: Work) -> str:
    """What identifies the model that a run began with, if it has been found; else what identifies the model as it is."""
    found: Mapping[str, Mapping[str, Any]] = work.state.figures.get("written", {})
    return next((str(text["whose"]) for text in found.values()), "") or fingerprint(work.model, work.tokenizer)


@dataclass(frozen=True)
class Writing:
    """What the dense model writes in a run that `shrink` plans.

    Attributes:
        base: the SPEC, without a part.
        texts: how many; 0 for none.
        seconds: about how long that takes.
        chat: number of our prompts that the model is asked at the start and the end; 0 for none.
        answering: about how long that takes, in seconds.
        why_not: why nothing is written, for people; empty if something is, or nobody expects it.
    """

    base: str
    texts: int
    seconds: float = 0.0
    chat: int = 0
    answering: float = 0.0
    why_not: str = ""

    @property
    def minutes(self) -> float:
        """About how long all of it takes."""
        return (self.seconds + self.answering) / 60

    def and_less(self, *, asked: bool) -> list["Writing"]:
        """This, and what is left where a run has no time for it: first without our prompts, then without texts.

        Args:
            asked: whether the user asked for the texts; then they stay.
        """
        silent = replace(self, chat=0, answering=0.0)
        nothing = Writing(self.base, 0, why_not="no time; a longer run would learn from what the dense model writes")
        return [self, *([silent] if self.chat else []), *([nothing] if self.texts and not asked else [])]

    @property
    def line(self) -> str:
        """What is planned, for people; empty for nothing."""
        if not self.texts:
            return f"writing: {self.why_not}" if self.why_not else ""
        what = "sequences" if self.base == SELF else "conversations"
        few = f"; that is few, so a longer run would be better (from {_MANY} on)" if self.texts < _MANY else ""
        return (
            f"writing: the dense model first writes up to {self.texts:,} {what} to learn from, in about {span(self.seconds)}{few}"
        )

    def settings(self, source: str, *, own: bool) -> dict[str, Any]:
        """Keys of the recipe.

        Args:
            source: the text to train and calibrate on.
            own: whether the user named it; then half of what is read is the user's text.
        """
        found: dict[str, Any] = {"evaluation.chat": self.chat} if self.chat else {}
        if not self.texts:
            return found
        train, held_out = parts_of(self.base)
        both = {train: 1.0, source: 1.0} if own else train
        return found | {
            "training.written": self.texts, "training.source": both, "calibration.source": both,
            **({} if own else {"evaluation.source": held_out, "training.objective": "objectives.lm"}),
        }  # fmt: skip


def writing_planned(work: Work, *, text: str | None, seconds: float | None, texts: int | None) -> Writing:
    """What the dense model is to write of the text of a run that `shrink` plans, after timing how fast it writes.

    A model with a chat template writes conversations, to the user's prompts if the text has conversations. Any other model writes
    plain text, if the user named no text.

    Args:
        work: the run, with the dense model.
        text: the user's text, or None.
        seconds: that the run may take; None if it has no such limit.
        texts: how many texts the user asks for; None for as many as are sensible.
    """
    chats = bool(getattr(work.tokenizer, "chat_template", None))
    if (
        work.loaded.offload != "none"
        or not work.model.can_generate()
        or work.weight_mask is not None
        or not (chats or text is None)
    ):
        return Writing(SELF, 0)
    speed = _writing_speed(work)
    base, each = (_base(text), _CONVERSATION) if chats else (SELF, work.recipe.training.length)
    fitting = _ENOUGH if seconds is None else int(seconds * WRITING * speed / each)
    number, why_not = min(_MOST, fitting) if texts is None else texts, ""
    if texts is None and number < _LEAST:
        number, why_not = 0, f"no time, since {_LEAST} texts would take {span(_LEAST * each / speed)}"
    asked = (FEW if seconds is not None and seconds < _SHORT else MANY) if chats else 0
    answering = 2 * asked * LONGEST / speed
    if seconds is not None and answering > _FOR_ANSWERS * seconds:
        asked, answering = 0, 0.0
    return Writing(base, number, number * each / speed, asked, answering, why_not)


def _base(text: str | None) -> str:
    """`self-chat`, to the user's prompts if the text has conversations."""
    if text is None:
        return SELF_CHAT
    first = next(read(parts_of(text)[0]))
    return f"{SELF_CHAT}:{text.partition('#')[0]}" if first.messages else SELF_CHAT


def _writing_speed(work: Work) -> float:
    """Tokens a second that the model writes, many texts at a time."""
    ids = torch.randint(work.model.config.vocab_size, (BATCH, _TIMED), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.perf_counter()
    continued(work.model, ids, most=_TIMED, ends=[], temperature=1.0, seed=0, dtype=work.recipe.dtype)
    return BATCH * _TIMED / max(1e-6, time.perf_counter() - began)
