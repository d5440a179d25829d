"""Whether texts with different roles (calibration, training, evaluation, vocabulary) share passages or are of the same kind."""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapt_pruner.core.events.words import counted
from adapt_pruner.core.system.files import expanded
from adapt_pruner.data.copies import Passages
from adapt_pruner.data.sources import COMPARED, Source, beginning, domains, parts_of, pieces, written_spec

_NAMED = 3
_COPIED = 0.5  # share of a passage that stands in the other text, from which on it is shared
_RUN = 32  # consecutive tokens that two texts do not share by chance
_BUILT_IN = "python-docs"
_OF_ANY_TEXT = {
    "calibration", "clean", "corpora", "corpus", "data", "dataset", "datasets", "docs", "documents", "eval", "evaluation", "files",
    "heldout", "input", "json", "jsonl", "ndjson", "parquet", "part", "private", "public", "sample", "samples", "shard", "shards", "small",
    "split", "test", "text", "texts", "tiny", "token", "tokens", "train", "training", "valid", "validation",
}  # fmt: skip
"""Words in the names of texts that do not tell their kind."""


@dataclass(frozen=True)
class Overlap:
    """Text that two roles share.

    Attributes:
        roles: the two, `evaluation` first if it is one of them.
        found: a sentence for people, without the remedy.
        remedy: what mends it; empty if nothing needs to.
    """

    roles: tuple[str, str]
    found: str
    remedy: str

    @property
    def sentence(self) -> str:
        """What was found and what to do, for people."""
        return f"{self.found}; {self.remedy}" if self.remedy else self.found


def overlaps(sources: Mapping[str, Source | None]) -> list[Overlap]:
    """Each pair of roles whose texts share passages.

    A passage is a document, or a piece of about 4,000 characters of a longer one. It is shared if half of it or more stands in
    the other text, whatever stands around it (see `data.copies`). The same SPEC for calibration, training and vocabulary is
    intended, and not reported. Of a hub data set the first 10,000 documents are compared.

    Args:
        sources: role ("calibration", "training", "evaluation", "vocabulary") -> its text or mixture; None for none.

    Raises:
        UsageError: there is no such text.
    """
    specs = {
        role: [spec for spec in domains(source) if written_spec(spec) is None]
        for role, source in sources.items()
        if source is not None
    }

    def passages(spec: str) -> Iterator[tuple[str, str]]:
        return ((document.name, piece) for document in beginning(spec, COMPARED) for piece in pieces(document.text))

    @functools.cache
    def known(spec: str) -> Passages:
        return Passages(document.text for document in beginning(spec, COMPARED))

    @functools.cache
    def copied(spec: str, other: str) -> list[tuple[str, bool]]:
        """The document of each passage of a text, and whether the passage stands in another text."""
        named, same = itertools.tee(passages(spec))
        covered = known(other).cover(text for _, text in same)
        return [(name, bool(bytes_of.mean() >= _COPIED)) for (name, _), bytes_of in zip(named, covered, strict=True)]

    overlapping = []
    for pair in itertools.combinations(specs, 2):
        role, other = sorted(pair, key=lambda role: role != "evaluation")
        shared, total, remedy = list[str](), 0, ""
        for mine in specs[role]:
            against = [spec for spec in specs[other] if spec != mine or role == "evaluation"]
            for of_one in zip(*(copied(mine, spec) for spec in against), strict=True):
                total += 1
                shared += [of_one[0][0]] if any(is_copied for _, is_copied in of_one) else []
            if role == "evaluation" and not remedy:
                remedy = next(
                    (_remedy(mine, spec) for spec in against if any(is_copied for _, is_copied in copied(mine, spec))), ""
                )
        if shared:
            places = list(dict.fromkeys(shared))
            examples = ", ".join(places[:_NAMED]) + (", …" if len(places) > _NAMED else "")
            sentence = (
                f"the {other} text contains {len(shared):,} of the {counted(total, 'passage')} of the {role} text ({examples})"
            )
            overlapping.append(Overlap((role, other), sentence, remedy))
    return overlapping


def _remedy(measured: str, other: str) -> str:
    """What separates a text from the one that is measured on."""
    train, held_out = parts_of(measured)
    if (train, held_out) == parts_of(other) and (measured, other) != (held_out, train):
        return f"to measure on separate text, split it: {train} and {held_out}"
    return "to measure on separate text, name another one, or remove the copies"


def same_tokens(ids: str, batches: Iterable[Tensor], text: str, windows: Iterable[Tensor]) -> str | None:
    """A sentence if calibration sequences share 32 consecutive tokens with the evaluation text; else None.

    Args:
        ids: the name of the file of token ids.
        batches: its sequences, int64 [batch, length].
        text: the name of the evaluation text.
        windows: its windows, int64 [batch, window].
    """
    rows = [row for batch in batches for row in batch.tolist()]
    runs: dict[tuple[int, ...], set[int]] = {}
    for number, row in enumerate(rows):
        for run in _runs(row):
            runs.setdefault(run, set()).add(number)
    nothing: set[int] = set()
    shared = {number for window in windows for row in window.tolist() for run in _runs(row) for number in runs.get(run, nothing)}
    if not shared:
        return None
    return (
        f"in the calibration ids {ids!r}, {len(shared):,} of {len(rows):,} sequences share text with {text!r}, "
        "so the perplexities are lower than on text of another kind; measure on other text, or calibrate on other ids"
    )


def _runs(row: list[int]) -> Iterator[tuple[int, ...]]:
    return (tuple(row[at : at + _RUN]) for at in range(len(row) - _RUN + 1))


def same_kind(calibration: Iterable[str], evaluation: Iterable[str]) -> str | None:
    """A sentence if a calibration text seems, by its name, to be of the same kind as an evaluation text; else None.

    Two texts are of one kind if both are the same data set or built-in text, if one lies in the folder that the other
    names, or if both are files of one folder and one ending. They also are if the last two parts of their names share a word, or
    its beginning, that tells a kind (`wikitext2/valid.txt`, `wiki.jsonl.gz`). This is a guess: only names are compared.
    """
    for read, other in itertools.product(calibration, evaluation):
        shared = _shared(read, other)
        if shared is not None:
            return (
                f"calibration text {read!r} and evaluation text {other!r} look like the same kind of text ({shared}), so the "
                "perplexities are lower than on text of another kind; calibrate or measure on other text to see what carries "
                "over"
            )
    return None


def of_kind(calibration: Iterable[str], text: str) -> bool:
    """Whether a text is of the same kind as a calibration text; see `same_kind`."""
    return any(_shared(spec, text) is not None for spec in calibration)


def _shared(spec: str, other: str) -> str | None:
    """What two SPECs have in common, in a few words."""
    if any(written_spec(text) is not None for text in (spec, other)):
        return None
    spec, other = (re.sub("#(train|heldout)$", "", text) for text in (spec, other))
    kinds = [text.partition(":")[0] for text in (spec, other)]
    if kinds in (["hub"] * 2, [_BUILT_IN] * 2):
        names = [text.split(":")[1] if kind == "hub" else kind for kind, text in zip(kinds, (spec, other), strict=True)]
        if names[0] == names[1]:
            return f"both are from {names[0]}"
    elif not {"hub", _BUILT_IN} & set(kinds):
        a, b = _place(spec), _place(other)
        if a == b or a in b.parents or b in a.parents:
            return f"both are from {min(a, b, key=lambda path: len(path.parts))}"
        if a.is_file() and b.is_file() and (a.parent, a.suffixes[-2:]) == (b.parent, b.suffixes[-2:]):
            return f"both are in {a.parent}"
    for pair in itertools.product(sorted(_words(spec)), sorted(_words(other))):
        short, long = sorted(pair, key=len)
        if short == long or (len(short) >= 4 and long.startswith(short)):
            return f"both names contain {short!r}"
    return None


def _place(spec: str) -> Path:
    """The file or folder that a SPEC names; for a glob, the folder that holds all its matches."""
    path = expanded(spec).absolute()
    return next(folder for folder in (path, *path.parents) if not set("*?[") & set(str(folder)))


def _words(spec: str) -> set[str]:
    """The words in a SPEC that may tell its kind: of four or more letters, without their number, or with a number (`c4`)."""
    parts = spec.split(":")[1] if spec.startswith("hub:") else "/".join([part for part in Path(spec).parts if part != "**"][-2:])
    matches = (re.fullmatch(r"([a-z]+)(\d*)", word) for word in re.findall(r"[a-z]+\d*", parts.lower()))
    words = {match[1] if len(match[1]) >= 4 else match[0] for match in matches if match and (len(match[1]) >= 4 or match[2])}
    return words - _OF_ANY_TEXT
