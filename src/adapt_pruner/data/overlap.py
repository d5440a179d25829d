"""Whether texts with different roles (calibration, training, evaluation, vocabulary) share documents."""

import functools
import itertools
from collections.abc import Mapping

from adapt_pruner.data.sources import SELF, Source, domains, read

__all__ = ["overlaps"]

_NAMED = 3
_MAX_HUB_DOCUMENTS = 10_000


def overlaps(sources: Mapping[str, Source | None]) -> list[str]:
    """One sentence for each two roles whose texts share documents, naming some; white space does not tell two apart.

    That the very same SPEC serves calibration, training and vocabulary is how it is meant, and not reported. A hub data set is
    compared by its first 10,000 documents. Reads each text once, in full, and keeps a hash and a name of every document.

    Args:
        sources: role ("calibration", "training", "evaluation", "vocabulary") -> its text or mixture; None for none.

    Raises:
        UsageError: there is no such text.
    """
    specs = {role: [spec for spec in domains(source) if spec != SELF] for role, source in sources.items() if source is not None}

    @functools.cache
    def names(spec: str) -> dict[bytes, str]:
        most = _MAX_HUB_DOCUMENTS if spec.startswith("hub:") else None
        return {document.digest: document.name for document in itertools.islice(read(spec), most)}

    sentences = []
    for (one, its), (other, others) in itertools.combinations(specs.items(), 2):
        measures = "evaluation" in (one, other)
        shared: dict[bytes, str] = {}
        for mine, theirs in itertools.product(its, others):
            if mine != theirs or measures:
                shared |= {digest: name for digest, name in names(mine).items() if digest in names(theirs)}
        if shared:
            named = ", ".join(list(shared.values())[:_NAMED]) + (", …" if len(shared) > _NAMED else "")
            count = f"{len(shared):,} documents" if len(shared) > 1 else "a document"
            remedy = "; to measure on text of its own, split it: SPEC#train and SPEC#heldout" if measures else ""
            sentences.append(f"{one} and {other} text share {count} ({named}){remedy}")
    return sentences
