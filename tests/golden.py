"""Whether a change of the code changed what a run computes: every method row, on tiny models, by two versions of the package.

`make golden` runs the code of a base commit and the code as it lies here side by side on this machine, through the command line, and
compares mask.json, the weights, log.jsonl without times and the page of each run without its style, to the last bit. Nothing is
stored in git, since processors round differently. It also takes a run that the base commit left in its middle and lets the code here finish it.

    make golden                    against the last commit
    make golden BASE=6fb363c       against that commit
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAMILIES = {"llama": ("llama", "llama"), "qwen2": ("llama", "qwen2"), "gemma3": ("gemma3", "gemma3-grouped")}
VOLATILE = re.compile(r"^(time|(\w+_)?seconds(_.*)?|tokens_per_second|peak_bytes|peak_rss_bytes|path|made_by|spent|identity)$")
RENAMED = (  # recipe keys that a version may spell otherwise, or not have
    "rotate", "reduce", "feed", "task", "init", "behind", "sequential_scoring", "own", "self_generated", "repair_samples", "expected",
)  # fmt: skip
SHARED = {
    "budget": "70%", "device": "cpu", "dtype": "float32", "stages": 2, "keep_checkpoints": 9, "multiple_of": 1,
    "calibration": {"samples": 8, "length": 16},
    "training": {"tokens": 1024, "batch_tokens": 128, "length": 32, "lr": 1e-3},
    "evaluation": {"window": 32, "max_windows": 4},
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {  # what a row cannot do without
    "adaptive-ls-v1": {"calibration": {"own": 4}},
    "slicegpt": {"stages": 1},
    "shortgpt": {"training": {"objective": "objectives.distil"}},
    "flap": {"training": {"lora": {"rank": 4}}},
    "minitron": {"moments": "reset", "debt": "reset"},
    "uniform": {"multiple_of": 4},
    "llm-pruner": {"chooser": "allocate.uniform(first=1)"},
    "magnitude": {"chooser": "allocate.uniform"},  # of three layers its own would leave all whole
    "random": {"axes": ["neurons", "kv_heads", "query_heads"]},
    "wanda-sp": {"equal_widths": True},
}


def main() -> int:
    """Compare; 0 where nothing differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="HEAD", help="commit whose code is compared with the code here")
    parser.add_argument("--work", type=Path, help="folder to work in, kept; else a temporary one")
    asked = parser.parse_args()
    with _folder(asked.work) as work:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", asked.base], check=True, stdout=subprocess.PIPE).stdout
        sides = [("after", ROOT)]
        if not (work / "commit").exists() or (work / "commit").read_bytes() != commit:  # a folder that is kept may have its runs
            shutil.rmtree(work)
            (work / "base").mkdir(parents=True)
            archive = subprocess.run(["git", "-C", ROOT, "archive", asked.base, "src"], check=True, stdout=subprocess.PIPE).stdout
            subprocess.run(["tar", "-x", "-C", work / "base"], input=archive, check=True)
            _child("make", work, ROOT)
            sides.append(("before", work / "base"))
        for place in (work / "after", work / "page" / "after"):
            shutil.rmtree(place, ignore_errors=True)
        children = [_start("run", work, tree, side) for side, tree in sides]
        statuses = [child.wait() for child in children]
        if any(statuses):
            raise SystemExit("a version of the package could not be run")
        (work / "commit").write_bytes(commit)
        _child("resume", work, ROOT, "after")
        return _compared(work)


@contextlib.contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="golden-") as path:
        yield Path(path)


def _start(what: str, work: Path, tree: Path, side: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "ADAPT_PRUNER_CACHE": str(work / f"cache-{side}"),
        "HF_HUB_OFFLINE": "1",
        "GOLDEN": f"{what} {side}",
    }
    return subprocess.Popen([sys.executable, str(Path(__file__)), "--work", str(work)], env=environment)


def _child(what: str, work: Path, tree: Path, side: str = "") -> None:
    if _start(what, work, tree, side).wait():
        raise SystemExit(f"the code in {tree} failed to {what}")


# In a process of its own, with one version of the package.


def make(work: Path) -> None:
    """The models, their text and the recipes."""
    from conftest import VOCAB, byte_tokenizer, tiny_model

    for name, layout in FAMILIES.items():
        tiny_model(layout, vocab_size=VOCAB).save_pretrained(work / "models" / name)
        byte_tokenizer().save_pretrained(work / "models" / name)
    lines = (f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n\n" for i in range(400))
    (work / "text.txt").write_text("".join(lines), encoding="utf-8")


def _rows(tree: Path) -> set[str]:
    return {path.stem for path in (tree / "src/adapt_pruner").rglob("methods/*.yaml")}


def run(work: Path, side: str) -> None:
    """Every row that both versions have on every model, and the page of each."""
    for model in FAMILIES:
        for row in sorted(_rows(ROOT) & _rows(work / "base")):
            out = work / side / f"{model}-{row}"
            said = _command("run", str(_recipe(work, model, row)), "-o", str(out))
            if not (out / "model").is_dir():  # a row that refuses a model says why
                out.mkdir(parents=True, exist_ok=True)
                (out / "refused").write_text(re.sub(r"\S*golden\S*", "…", said), encoding="utf-8")
                continue
            _page(out, work / "page" / side / f"{model}-{row}")


def resume(work: Path, side: str) -> None:
    """Runs that the base commit left after their first cuts, finished by the code here."""
    for name in ("llama-adapt-pruner", "llama-slicegpt", "gemma3-adaptive-ls-v1"):
        out = work / side / f"{name}-resumed"
        if not (work / "before" / name).exists():  # a row that the base commit calls otherwise, or has not
            print(f"not resumed: {name}, which the base commit does not have")
            continue
        shutil.copytree(work / "before" / name, out)
        shutil.rmtree(out / "model")
        for path in (out / "checkpoints").iterdir():
            if path.name != "stage-1-pruned":
                shutil.rmtree(path)
        state = json.loads((out / "checkpoints" / "stage-1-pruned" / "state.json").read_text())
        os.truncate(out / "log.jsonl", state["log_size"])
        said = _command("run", str(out / "recipe.yaml"), "-o", str(out))
        if not (out / "model").is_dir():
            raise SystemExit(f"{name} of the base commit does not go on: {said}")


def _recipe(work: Path, model: str, row: str) -> Path:
    import yaml

    text = str(work / "text.txt")
    data: dict[str, Any] = {"model": str(work / "models" / model), "method": row}
    for more in (SHARED, FURTHER.get(row, {})):
        for key, value in more.items():
            data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    for key in ("calibration", "training", "evaluation"):
        data[key]["source"] = text
    path = work / "recipes" / f"{model}-{row}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _command(*words: str) -> str:
    """What a command says on stderr."""
    from adapt_pruner import cli

    said = io.StringIO()
    sys.argv = ["adapt-pruner", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        cli.main()
    return said.getvalue()


def _page(run_dir: Path, copy: Path) -> None:
    """The page of a run whose times and places are all the same."""
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors", "report.html", ".lock"))
    (copy / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _log(run_dir, fixed=1.0)), encoding="utf-8")
    pruning = copy / "model" / "pruning.json"
    pruning.write_text(json.dumps(_steady(json.loads(pruning.read_text()), fixed=1.0)), encoding="utf-8")
    recipe = copy / "recipe.yaml"
    kept = [line for line in recipe.read_text().splitlines()[1:] if line.strip().partition(":")[0] not in RENAMED]
    recipe.write_text("\n".join(kept) + "\n", encoding="utf-8")
    _command("report", str(copy), "-o", str(copy / "page.html"))
    page = re.sub(r"Written by adapt-pruner on [^<]*", "", (copy / "page.html").read_text(encoding="utf-8"))
    (copy / "page.html").write_text(re.sub(r"/page/(before|after)/", "/page/", page), encoding="utf-8")


def _steady(data: Any, *, fixed: float | None) -> Any:
    """Plain data in which whatever differs from one run to the next is `fixed`, or left out where that is None."""
    if isinstance(data, dict):
        return {
            key: fixed if VOLATILE.match(key) and not isinstance(value, str) else _steady(value, fixed=fixed)
            for key, value in data.items()
            if key not in RENAMED and not (VOLATILE.match(key) and (fixed is None or isinstance(value, str)))
        }
    return [_steady(item, fixed=fixed) for item in data] if isinstance(data, list) else data


def _log(run_dir: Path, *, fixed: float | None) -> list[Any]:
    return [_steady(json.loads(line), fixed=fixed) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# What both versions gave.


def _compared(work: Path) -> int:
    """Print what differs; the number of runs in which anything does."""
    differing = 0
    names = sorted(path.name for path in (work / "after").iterdir())
    for name in names:
        one, other = work / "before" / name.removesuffix("-resumed"), work / "after" / name
        found = [what for what, lines in _differences(work, one, other) if lines]
        differing += bool(found)
        refused = " (refused)" if (other / "refused").exists() else ""
        print(f"{'DIFFERS: ' + ', '.join(found) if found else 'equal'}  {name}{refused}")
        for what, lines in _differences(work, one, other):
            for line in lines[:6]:
                print(f"    {what}: {line[:240]}")
    print(f"{len(names) - differing} of {len(names)} runs are equal to the last bit")
    return min(differing, 1)


def _differences(work: Path, one: Path, other: Path) -> Iterator[tuple[str, list[str]]]:
    if (one / "refused").exists() or (other / "refused").exists():
        texts = [(path / "refused").read_text() if (path / "refused").exists() else "not refused" for path in (one, other)]
        yield "refusal", _diff(*texts)
        return
    listed = ["\n".join(sorted(file.name for file in (path / "model").iterdir())) for path in (one, other)]
    yield "files", _diff(*listed)
    for what in ("mask.json", "config.json", "model.safetensors"):
        digests = [hashlib.sha256((path / "model" / what).read_bytes()).hexdigest() for path in (one, other)]
        yield what, [] if digests[0] == digests[1] else ["other bytes"]
    if not other.name.endswith("-resumed"):
        logs = ["\n".join(json.dumps(line, sort_keys=True) for line in _log(path, fixed=None)) for path in (one, other)]
        yield "log.jsonl", _diff(*logs)
        pages = [(work / "page" / side / other.name / "page.html").read_text() for side in ("before", "after")]
        yield "page", _diff(*(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).replace(">", ">\n") for page in pages))


def _diff(one: str, other: str) -> list[str]:
    lines = difflib.unified_diff(one.splitlines(), other.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


if __name__ == "__main__":
    if "GOLDEN" in os.environ:
        action, *which = os.environ["GOLDEN"].split()
        sys.exit({"make": make, "run": run, "resume": resume}[action](Path(sys.argv[2]), *which))
    sys.exit(main())
