"""Whether a change of the code changed what a run computes: every method row, on tiny models, by two versions of the package.

`make golden` runs the code of a base commit and the code as it lies here side by side on this machine, through the command line, and
compares mask.json, config.json, the weights and log.jsonl without times, to the last bit. Nothing is stored in git, since processors round
differently. Then the code here finishes runs of its own that stand in their middle, and these are compared, too.

    make golden                    against the last commit
    make golden BASE=6fb363c       against that commit
"""

import argparse
import contextlib
import difflib
import hashlib
import inspect
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
SHARED = {
    "budget": "70%", "device": "cpu", "dtype": "float32", "stages": 2, "keep_checkpoints": 9, "multiple_of": 1,
    "calibration": {"samples": 8, "length": 16},
    "training": {"tokens": 1024, "batch_tokens": 128, "length": 32, "lr": 1e-3},
    "evaluation": {"window": 32, "max_windows": 4},
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {  # what a row cannot do without
    "adaptive-ls-v1": {"calibration": {"self_generated": 4}},
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
    options = parser.parse_args()
    with _folder(options.work) as work:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", options.base], check=True, stdout=subprocess.PIPE).stdout
        sides = [("after", ROOT)]
        if not (work / "commit").exists() or (work / "commit").read_bytes() != commit:  # a folder that is kept may have its runs
            shutil.rmtree(work)
            (work / "base").mkdir(parents=True)
            archive = subprocess.run(
                ["git", "-C", ROOT, "archive", options.base, "src"], check=True, stdout=subprocess.PIPE
            ).stdout
            subprocess.run(["tar", "-x", "-C", work / "base"], input=archive, check=True)
            _child("make", work, ROOT)
            sides.append(("before", work / "base"))
        shutil.rmtree(work / "after", ignore_errors=True)
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
    """Every row that both versions have, on every model."""
    for model in FAMILIES:
        for row in sorted(_rows(ROOT) & _rows(work / "base")):
            out = work / side / f"{model}-{row}"
            message = _command("run", str(_recipe(work, side, model, row)), "-o", str(out))
            if not (out / "model").is_dir():  # a row that refuses a model says why
                out.mkdir(parents=True, exist_ok=True)
                (out / "refused").write_text(re.sub(rf"{re.escape(str(work))}\S*", "…", message), encoding="utf-8")


def resume(work: Path, side: str) -> None:
    """Runs of the code here that stand after their first cuts, finished by it."""
    for name in ("llama-adapt-pruner", "llama-slicegpt", "gemma3-adaptive-ls-v1"):
        out = work / side / f"{name}-resumed"
        shutil.copytree(work / side / name, out)
        shutil.rmtree(out / "model")
        for path in (out / "checkpoints").iterdir():
            if path.name != "stage-1-pruned":
                shutil.rmtree(path)
        state = json.loads((out / "checkpoints" / "stage-1-pruned" / "state.json").read_text())
        os.truncate(out / "log.jsonl", state["log_size"])
        message = _command("run", str(out / "recipe.yaml"), "-o", str(out))
        if not (out / "model").is_dir():
            raise SystemExit(f"{name} does not go on: {message}")


def _recipe(work: Path, side: str, model: str, row: str) -> Path:
    """The recipe of a row, without what its method does not read: a version may refuse that."""
    import yaml

    from adapt_pruner.errors import UsageError
    from adapt_pruner.recipe import read

    text = str(work / "text.txt")
    data: dict[str, Any] = {"model": str(work / "models" / model), "method": row}
    for more in (SHARED, FURTHER.get(row, {})):
        for key, value in more.items():
            data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    for key in ("calibration", "training", "evaluation"):
        data[key]["source"] = text
    if "shared" in inspect.signature(read).parameters:
        with contextlib.suppress(UsageError):  # the run refuses it, too
            data = read(data, shared=True).fitted().model_dump(mode="json")
    path = work / "recipes" / side / f"{model}-{row}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _command(*words: str) -> str:
    """What a command writes to stderr."""
    from adapt_pruner import cli

    stderr = io.StringIO()
    sys.argv = ["adapt-pruner", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr), contextlib.suppress(SystemExit):
        cli.main()
    return stderr.getvalue()


def _steady(data: Any) -> Any:
    """Plain data without what differs from one run to the next."""
    if isinstance(data, dict):
        return {key: _steady(value) for key, value in data.items() if not VOLATILE.match(key)}
    return [_steady(item) for item in data] if isinstance(data, list) else data


def _log(run_dir: Path) -> str:
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.dumps(_steady(json.loads(line)), sort_keys=True) for line in lines)


# What both versions gave.


def _compared(work: Path) -> int:
    """Print what differs; 1 if anything does."""
    differing = 0
    names = sorted(path.name for path in (work / "after").iterdir())
    for name in names:
        before, after = work / "before" / name.removesuffix("-resumed"), work / "after" / name
        differences = {what: lines for what, lines in _differences(before, after) if lines}
        differing += bool(differences)
        refused = " (refused)" if (after / "refused").exists() else ""
        print(f"{'DIFFERS: ' + ', '.join(differences) if differences else 'equal'}  {name}{refused}")
        for what, lines in differences.items():
            for line in lines[:6]:
                print(f"    {what}: {line[:240]}")
    print(f"{len(names) - differing} of {len(names)} runs are equal to the last bit")
    return min(differing, 1)


def _differences(before: Path, after: Path) -> Iterator[tuple[str, list[str]]]:
    if (before / "refused").exists() or (after / "refused").exists():
        texts = [(path / "refused").read_text() if (path / "refused").exists() else "not refused" for path in (before, after)]
        yield "refusal", _diff(*texts)
        return
    for what in ("mask.json", "config.json", "model.safetensors"):
        digests = [hashlib.sha256((path / "model" / what).read_bytes()).hexdigest() for path in (before, after)]
        yield what, [] if digests[0] == digests[1] else ["other bytes"]
    if not after.name.endswith("-resumed"):  # the log of these has one more start
        yield "log.jsonl", _diff(_log(before), _log(after))


def _diff(before: str, after: str) -> list[str]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


if __name__ == "__main__":
    if "GOLDEN" in os.environ:
        action, *which = os.environ["GOLDEN"].split()
        sys.exit({"make": make, "run": run, "resume": resume}[action](Path(sys.argv[2]), *which))
    sys.exit(main())
