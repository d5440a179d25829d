"""CPM-2's knowledge inheritance on a small scale: English, then the tokens and text of code, then experts; with two controls.

    python benchmarks/inheritance.py [--folder cpm-2] [--rung S] [--seeds 3] [--tokens 8M] [--english SPEC] [--prepare]

FOLDER gets `english.jsonl` and `code.jsonl` (Python files of the standard library and of installed packages), `first/` (config.json and
a tokenizer learnt on English, of a rung of benchmarks/ladder) and `second/` (that tokenizer with tokens of code added). With
--prepare that is all, and `adapt-pruner run cpm-2-first -o cpm-2/runs/first` and the recipes after it run by hand.

Otherwise every stage of every seed is run, and `results.jsonl` gets a line for each that has ended:

    first, second, experts     the three stages, each with --tokens
    dense                      the third stage without experts
    scratch                    the model of `experts` from random weights, on the tokens of all three stages in one

The command may be stopped at any moment; the same command goes on.
"""

import argparse
import itertools
import json
import random
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from adapt_pruner.core.model.budget import parse_count
from adapt_pruner.core.system.files import write_whole
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.data.sources import texts
from adapt_pruner.recipe import read
from adapt_pruner.run import loop

sys.path.insert(0, str(Path(__file__).parent / "ladder"))
from jobs import BYTES_A_TOKEN, Ladder

LONGEST = 100_000  # characters of a file; longer ones are mostly tables
LEARNT_FROM = 4_000_000  # characters of code that the new tokens are learnt from
ENGLISH, CODE = "english.jsonl", "code.jsonl"
SHARES = {"first": (1, 0), "second": (1, 2), "experts": (1, 2), "dense": (1, 2), "scratch": (5, 4)}
"""Stage -> its shares of English and code; `scratch` has what the three stages have together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("cpm-2"))
    parser.add_argument("--rung", default="S")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=parse_count, default=parse_count("8M"), help="training tokens of a stage")
    parser.add_argument("--english", help="SPEC of the English text; by default that of the ladder")
    parser.add_argument("--prepare", action="store_true", help="only write texts and tokenizers")
    args = parser.parse_args()
    prepare(args.folder, args.rung, english=args.english, tokens=args.tokens)
    for seed in () if args.prepare else range(args.seeds):
        for stage in SHARES:
            line = result(args.folder, stage, seed, tokens=args.tokens)
            print(to_json(line), flush=True)


def prepare(folder: Path, rung: str, *, english: str | None, tokens: int) -> None:
    """Write texts, shape and tokenizers to a folder, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    ladder = Ladder(folder / "ladder", text=None)
    spec = english or str(ladder.text["train"]).partition("#")[0]
    most = 2 * tokens * BYTES_A_TOKEN
    for name, documents in ((ENGLISH, texts(spec)), (CODE, python_files())):
        if not (folder / name).exists():
            write_whole(folder / name, "".join(to_json({"text": document}) + "\n" for document in shuffled(documents, most)))
    if not (folder / "first" / "config.json").exists():
        known = {"train": str(folder / ENGLISH), "heldout": str(folder / ENGLISH)}
        with TemporaryDirectory(dir=folder) as beside:
            ladder = Ladder(Path(beside), text=known)
            ladder.prepare(rung)
            (ladder.home(rung) / "tokenizer").rename(folder / "first")
    if not (folder / "second").exists():
        old = AutoTokenizer.from_pretrained(folder / "first")
        characters, learnt_from = 0, []
        for document in texts(str(folder / CODE) + "#train"):
            learnt_from.append(document)
            characters += len(document)
            if characters > LEARNT_FROM:
                break
        larger_tokenizer(old, learnt_from, added=len(old) // 2).save_pretrained(folder / "second")


def python_files() -> Iterable[str]:
    """Python files of the standard library and of installed packages, each text once."""
    seen = set()
    for root in dict.fromkeys(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if 200 < len(text) < LONGEST and text not in seen:
                seen.add(text)
                yield text


def shuffled(documents: Iterable[str], most: int) -> list[str]:
    """Documents in a random order, up to `most` characters."""
    every = list(documents)
    random.Random(0).shuffle(every)
    lengths = itertools.accumulate(map(len, every))
    return [document for document, reached in zip(every, lengths, strict=True) if reached - len(document) < most]


def larger_tokenizer(tokenizer: Any, documents: Sequence[str], *, added: int) -> Any:
    """A BPE tokenizer with further merges, learnt on documents as BPE learns: again and again the most frequent pair of tokens.

    Its old tokens and merges stay as they are, so that old tokens keep their numbers.
    """
    backend = tokenizer.backend_tokenizer
    counts = Counter(word for document in documents for word, _ in backend.pre_tokenizer.pre_tokenize_str(document))
    words = [[piece.value for piece in backend.model.tokenize(word)] for word in counts]
    number = list(counts.values())
    data = json.loads(backend.to_str())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    size = len(tokenizer)
    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += number[index]
            where[pair].add(index)
    while len(tokenizer) + added > size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(list(best))
        if (merged := "".join(best)) not in vocabulary:
            vocabulary[merged] = size
            size += 1
        for index in where.pop(best):
            for pair in itertools.pairwise(words[index]):
                pairs[pair] -= number[index]
            words[index] = _merged(words[index], best, merged)
            for pair in itertools.pairwise(words[index]):
                pairs[pair] += number[index]
                where[pair].add(index)
        del pairs[best]
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(to_json(data), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _merged(word: Sequence[str], pair: tuple[str, str], merged: str) -> list[str]:
    result: list[str] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] = merged
        else:
            result.append(piece)
    return result


def result(folder: Path, stage: str, seed: int, *, tokens: int) -> dict[str, Any]:
    """The figures of a stage of a seed: from results.jsonl, or from a run, which then goes there.

    `nats` are per token of the held-out text of each language, in the tokens of that stage.
    """
    kept = folder / "results.jsonl"
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    if found := next((line for line in lines if (line["stage"], line["seed"]) == (stage, seed)), None):
        return dict(found)
    runs, name = folder / "runs" / str(seed), {"dense": "experts", "scratch": "experts"}.get(stage, stage)
    before = {"first": folder / "first", "second": runs / "first" / "model"}.get(stage, runs / "second" / "model")
    english, code = SHARES[stage]
    recipe: dict[str, Any] = {
        "seed": seed, "model": str(before), "checkpoint_minutes": 5, "keep_checkpoints": 1, "training.tokens": tokens,
        "training.source": {f"{folder / text}#train": share for text, share in ((ENGLISH, english), (CODE, code)) if share},
        "evaluation.source": {f"{folder / text}#heldout": 1 for text in (ENGLISH, CODE)},
    }  # fmt: skip
    if stage == "second":
        recipe["grow.vocabulary"] = str(folder / "second")
    if stage == "dense":
        recipe |= {"grow": None, "training.objective": "objectives.lm"}
    if stage == "scratch":
        shape = str(runs / "experts" / "model")
        recipe |= {"grow": None, "init": "random", "model": shape, "training.tokens": 3 * tokens, "training.lr": 4e-3}
    loop.run(read(f"cpm-2-{name}", values=recipe), runs / stage)
    log = [json.loads(line) for line in (runs / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = next(event for event in reversed(log) if event["event"] == "evaluation")
    figures = json.loads((runs / stage / "model" / "pruning.json").read_text(encoding="utf-8"))["figures"]
    line = {
        "stage": stage, "seed": seed, "params": figures["params_after"], "active": figures.get("active_params_after", figures["params_after"]),
        "tokens": figures["trained_tokens"], "nats": {Path(spec.partition("#")[0]).stem: nll for spec, nll in last["by_text"].items()},
        "bits_per_byte": last["bits_per_byte"], "used": last.get("used"), "seconds": figures["seconds"],
    }  # fmt: skip
    with kept.open("a", encoding="utf-8") as file:
        file.write(to_json(line) + "\n")
    return line


if __name__ == "__main__":
    main()
