"""Let the dense model write the texts of a run that it is to learn from; they are kept in the cache."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.system import world
from adapt_pruner.data.conversations import of_part, written_batches
from adapt_pruner.data.fixed import Written
from adapt_pruner.data.sources import SELF, SELF_CHAT, domains, written_spec
from adapt_pruner.data.store import Store
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.tasks import fingerprint
from adapt_pruner.recipe import Recipe
from adapt_pruner.work import Work

__all__ = ["WRITING", "held_out_chats", "specs_to_write", "written_texts"]

WRITING = 1 / 6
"""Share of a run's minutes that the dense model may write, at most."""


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
    before = figures.get("written", {}).get(base) or {"whose": fingerprint(work.model, work.tokenizer), "batches": None}
    again = before["batches"] is not None
    in_time = (lambda: again) if again or not world.is_main() else _in_time(recipe)
    stores = written_batches(
        work.model, work.tokenizer, base, whose=before["whose"], texts=recipe.training.written, batches=before["batches"],
        length=recipe.training.length, seed=recipe.seed, dtype=recipe.dtype, warn=work.warn, in_time=in_time,
        on_texts=work.counts("write", what="text to train on" if base == SELF else "conversations"),
        dense=(lambda: _dense(work)) if begun else None,
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


def _dense(work: Work) -> Any:
    """The dense model of a run that has cut its model since.

    Raises:
        UsageError: the run has cut the vocabulary, too.
    """
    if work.recipe.vocabulary is not None:
        raise UsageError(
            "what the dense model wrote is no longer in the cache and cannot be written again, since the vocabulary of the model has "
            "been cut; start again in another folder"
        )
    device = next(work.model.parameters()).device
    return load(work.recipe.model, device=device, trust_remote_code=work.trust_remote_code).model
