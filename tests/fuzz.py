"""Hostile recipes, texts, checkpoints, run folders and options: every command must answer with one sentence, in bounded time and memory.

    python tests/fuzz.py --seconds 600 --seed 7      # make fuzz
    python tests/fuzz.py --seed 7 --only 123         # one attack again, with its output

Each attack is a number. Number and seed decide its files and its command. It runs in a forked process with limits. What counts as
a failure: a traceback or an exception that the command line does not know, a signal, a hang, output that is no strict JSON, a file
changed outside the output folder, a half-written file, or an output folder although the command failed.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 90  # of wall clock for one attack; the machine may be busy
CPU_SECONDS = 45
MEMORY = 6 * 2**30  # bytes of address space beyond what the process has when it begins
FILE = 2**28  # bytes that it may write to one file

KNOWN: list[str] = []
"""Patterns of what is told elsewhere, while it is mended there; empty when all is well."""

NUMBERS = ["0", "-1", "1", "2", "1e9", "1e18", "1e-320", "1e400", "nan", ".nan", "inf", "-.inf", "1" * 5000, "0x10", "1_0", "٣", "", " ", "1e5", "10**9",
           str(10**9), str(10**12), str(2**31), str(2**63), "900000T", "1e-9%", "100%", "101%", "0.5x", "1T"]  # fmt: skip
WORDS = ["", " ", "\n", "\x00", "é", "💥", "a" * 5000, "../..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/maps",
         "/proc/kmsg", "~", "~nosuchuser", "~nosuchuser/x", "$HOME", "%s%n", "{}", "[", "null", "true", "self", "hub:", "hub:x",
         "python-docs:x", "python-docs#y", "*", "**", "[!", "no/such", "a/b/c", "\udcff", "-", "--", "meta", "cuda", "cuda:99", "mps", "cpu:7", "xla"]  # fmt: skip
YAML = ["2026-01-01", "2026-01-01T00:00:00Z", "2026-13-45", "!!int abc", "!!float x", "!!binary x", "!!python/object:os.system x", "!!set {a}", "!!timestamp x",
        "!!omap [a: 1]", "[" * 3000, "{a: " * 3000, "{5: 1}", "{null: 1}", "{[1]: 2}", "? [a]", "&a [*a]", "*a", "<<: 1", "{<<: 3}", "{<<: [1]}",
        "[]", "{}", "[[]]", "[1, 2]", "{a: {b: c}}", '"\\0"', "'", '"', "|", ">", "@x", "`x", "%x", "0o7", "0b1", "1:30:00", "190:20:30",
        "true", "no", "~", "1e3", "1.5", "!!str 5", "!x y", "--- a", "...", "- a", "a: b: c", "\t"]  # fmt: skip


class Draw(random.Random):
    """The choices of one attack."""

    def word(self) -> str:
        return self.choice([*WORDS, *NUMBERS])

    def value(self) -> str:
        """Of a recipe's key, as YAML has it."""
        return self.choice([*YAML, *NUMBERS, *(w for w in WORDS if "\udcff" not in w)])

    def json(self, depth: int = 0) -> Any:
        plain = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 1e300, 0.5, -0.0, float("nan"), float("inf"), "", "x", "\x00", "💥", "a" * 5000]  # fmt: skip
        if depth < 3 and self.random() < 0.3:
            return [self.json(depth + 1) for _ in range(self.randrange(4))]
        if depth < 3 and self.random() < 0.3:
            return {self.choice(["a", "", "0", "text", "type"]): self.json(depth + 1) for _ in range(self.randrange(4))}
        return self.choice(plain)

    def mutated(self, data: Any) -> Any:
        """JSON with one place changed, removed or added, however deep."""
        if isinstance(data, dict) and data and self.random() < 0.9:
            key = self.choice(sorted(data))
            rest = {name: value for name, value in data.items() if name != key}
            return rest if self.random() < 0.15 else rest | {key: self.mutated(data[key])}
        if isinstance(data, list) and data and self.random() < 0.8:
            at = self.randrange(len(data))
            return [*data[:at], *([] if self.random() < 0.2 else [self.mutated(data[at])]), *data[at + 1 :]]
        if isinstance(data, int) and self.random() < 0.4:
            return self.choice([data + 1, data - 1, -data, data * 2, data / 2 + 0.25, str(data), [data], data * 10**6])
        return self.json()

    def damaged(self, content: bytes) -> bytes:
        """Bytes cut off, changed or added."""
        at = self.randrange(len(content) + 1)
        return self.choice(
            [
                lambda: b"",
                lambda: content[:at],
                lambda: content[:at] + self.randbytes(self.randrange(1, 40)) + content[at:],
                lambda: content[:at] + self.randbytes(4) + content[at + 4 :],
                lambda: content[at:],
                lambda: b"[" * 100_000,
                lambda: b'{"a":' * 100_000,
                lambda: b"\x00" * 1000,
                lambda: b"\xff\xfe" + content,
                lambda: b"[]",
                lambda: b"{}",
                lambda: b"null",
                lambda: b"1" * 5000,
                lambda: self.randbytes(2000),
            ]
        )()


def damage(draw: Draw, path: Path) -> None:
    """Put something hostile in the place of a file, or remove it."""
    kind = draw.choice(["bytes", "bytes", "json", "json", "json", "gone", "folder", "fifo", "link", "loop", "device", "locked"])
    content = path.read_bytes()
    if kind == "json":
        try:
            if path.suffix == ".jsonl":
                lines = content.decode().splitlines()
                at = draw.randrange(len(lines))
                changed = json.dumps(draw.mutated(json.loads(lines[at])))
                path.write_text("\n".join([*lines[:at], changed, *lines[at + 1 :]]) + "\n")
            else:
                path.write_text(json.dumps(draw.mutated(json.loads(content))))
            return
        except ValueError:
            kind = "bytes"
    path.unlink()
    match kind:
        case "bytes":
            path.write_bytes(draw.damaged(content))
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/dev/full"]))
        case "locked":
            path.write_bytes(content)
            path.chmod(0)


def text_file(draw: Draw, folder: Path) -> str:
    """A SPEC of a text that is not what it seems."""
    name = draw.choice(["t.txt", "t.md", "t.jsonl", "t.jsonl.gz", "t.jsonl.zst", "t.parquet", "t.json", "t"])
    path = folder / name
    row = json.dumps({"text": "some text " * 50}).encode() + b"\n"
    chat = (
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 200}]}).encode()
        + b"\n"
    )
    contents: list[Callable[[], bytes]] = [
        lambda: b"", lambda: b" \n" * 1000, lambda: b"a" * 2_000_000, lambda: b"7" * 300_000, lambda: row * 40, lambda: chat * 40, lambda: row * 3 + chat * 3,
        lambda: draw.randbytes(5000), lambda: row[:-5] + b"\xff" + row, lambda: b'{"text": 5}\n' * 9, lambda: b"[" * 100_000, lambda: b"5\n" * 9,
        lambda: b'{"text": "\\ud800"}\n' * 99, lambda: json.dumps({"text": "word " * 400_000}).encode(), lambda: b"\x00" * 3000, lambda: b"\xef\xbb\xbf" + row * 9,
        lambda: json.dumps(draw.json()).encode() + b"\n", lambda: b"1" * 5000 + b"\n", lambda: b'{"text": "x"}' * 2, lambda: json.dumps({"messages": draw.json()}).encode() + b"\n",
        lambda: draw.damaged(row * 20), lambda: ("é️‍🔥́" * 9000).encode(),
    ]  # fmt: skip
    content = draw.choice(contents)()
    kind = draw.choice(["plain"] * 5 + ["packed", "bomb", "fifo", "folder", "device", "locked", "loop", "word"])
    if kind == "word":
        return draw.word()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / draw.choice(["state.json", "dataset_dict.json", "a.txt", "b.parquet"])).write_bytes(content)
    elif kind == "device":
        path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/proc/kmsg"]))
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "bomb":
        path = folder / draw.choice(["t.jsonl.gz", "t.jsonl.zst"])
        if path.suffix == ".gz":
            path.write_bytes(
                gzip.compress(b'{"text": "' + b"\0" * 2_000_000, 1) + gzip.compress(b"a" * 2**24, 1) * draw.choice([1, 300])
            )
        else:
            from conftest import zstd

            path.write_bytes(zstd(b'{"text": "') + zstd(b"a" * 2**24) * draw.choice([1, 300]))
    else:
        if kind == "packed" and path.suffix == ".gz":
            content = gzip.compress(content)
        path.write_bytes(content)
        if kind == "locked":
            path.chmod(0)
    return str(path) + draw.choice(["", "", "", "", "#train", "#heldout", "#x"])


def keys() -> list[str]:
    """Every dotted key of a recipe."""
    from pydantic import BaseModel

    from adapt_pruner.recipe import Calibration, Evaluation, Lora, Recipe, Training, Vocabulary

    tables: dict[str, type[BaseModel]] = {
        "": Recipe, "calibration.": Calibration, "evaluation.": Evaluation, "training.": Training, "training.lora.": Lora, "vocabulary.": Vocabulary,
    }  # fmt: skip
    return [table + key for table, model in tables.items() for key in model.model_fields]


SMALL = {
    "model": "good", "budget": "80%", "calibration.source": "good.txt", "calibration.samples": 2, "calibration.length": 16, "device": "cpu",
    "evaluation.source": "good.txt", "evaluation.window": 32, "evaluation.max_windows": 2, "step": 0.5,
}  # fmt: skip
TRAINED = {"training.source": "good.txt", "training.tokens": 256, "training.batch_tokens": 64, "training.length": 32}


def recipe_attack(draw: Draw, folder: Path) -> list[str]:
    """A recipe with hostile values, in its file or by --set; mostly only read, sometimes run."""
    chosen = SMALL | (TRAINED if draw.random() < 0.5 else {})
    hostile = {key: draw.value() for key in draw.sample(keys(), draw.choice([1, 1, 1, 2, 3]))}
    if draw.random() < 0.5:
        sets = [f"--set={key}={value}" for key, value in (chosen | hostile).items()]
        (folder / "r.yaml").write_text("about: x\n")
    else:
        tables: dict[str, list[str]] = {}
        for key, value in (chosen | hostile).items():
            table, _, leaf = key.rpartition(".")
            tables.setdefault(table, []).append(f"{leaf}: {value}")
        written = "\n".join(tables.pop("", []))
        for table, lines in tables.items():
            written += f"\n{table.rpartition('.')[2]}:\n" + "\n".join(f"  {line}" for line in lines)
        if draw.random() < 0.2:
            laughs = ["a0: &a0 [lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
            written = draw.choice(
                [
                    written[: draw.randrange(len(written))],
                    "\n".join(laughs) + f"\nabout: *a29\n{written}",
                    "\n".join(laughs) + "\n" + written,
                    written + "\nseed: &s [*s]",
                    draw.choice(YAML),
                    written + "\n5: 1\nnull: 2\n",
                    "---\n".join([written, written]),
                ]
            )
        (folder / "r.yaml").write_text(written, "utf-8", "surrogatepass")
        sets = []
        if draw.random() < 0.2:
            damage(draw, folder / "r.yaml")
    return ["run", "r.yaml", "-o", "out", *sets, *draw.choice([[], ["--dry-run"], ["--json"]])]


def text_attack(draw: Draw, folder: Path) -> list[str]:
    """A text that is none, to every command that reads one."""
    spec = text_file(draw, folder)
    small = [f"--set={key}={value}" for key, value in (SMALL | TRAINED).items()]
    (folder / "r.yaml").write_text("about: x\n")
    return draw.choice([
        ["eval", "good", "--text", spec, "--window", "32", "--max-windows", "2", "--device", "cpu"],
        ["eval", "good", "--text", spec, "--window", "64", "--max-windows", "1", "--json"],
        ["prune", "good", "-o", "out", "--params", "80%", "--set", "step=0.5", "--calibration", spec, "--calibration-samples", "2", "--calibration-length", "16"],
        ["prune", "good", "-o", "out", "--params", "80%", "--set", "step=0.5", "--calibration-ids", spec],
        ["compare", "good", "-o", "out", "--params", "80%", "--methods", "magnitude-all", "--draws", "1", "--text", spec, "--window", "16"],
        ["run", "r.yaml", "-o", "out", *small, f"--set=training.source={json.dumps(spec)}"],
        ["run", "r.yaml", "-o", "out", *small, f"--set=calibration.source={json.dumps(spec)}", "--dry-run"],
        ["run", "r.yaml", "-o", "out", *small, f"--set=evaluation.source={json.dumps(spec)}"],
        ["run", "r.yaml", "-o", "out", *small, f"--set=vocabulary={{source: {json.dumps(spec)}, keep: 100}}"],
    ])  # fmt: skip


def model_commands(name: str) -> list[list[str]]:
    pruned = [
        "--params",
        "80%",
        "--set",
        "step=0.5",
        "--calibration",
        "good.txt",
        "--calibration-samples",
        "2",
        "--calibration-length",
        "16",
    ]
    return [
        ["inspect", name], ["inspect", name, "--json"], ["chat", name, "hello", "--max-new-tokens", "3"], ["chat", name, "hi", "--system", "x", "--max-new-tokens", "2", "--json"],
        ["eval", name, "--text", "good.txt", "--window", "16", "--max-windows", "2", "--json"], ["prune", name, "-o", "out", *pruned],
        ["export", name, "--to", "gguf", "-o", "out.gguf"], ["export", name, "--to", "padded", "-o", "out"], ["export", name, "--to", "decilm", "-o", "out"],
        ["verify", "good", name, "--text", "good.txt", "--window", "16", "--max-windows", "1"],
        ["card", name], ["card", name, "--show"], ["push", name, "me/x", "--dry-run"],
    ]  # fmt: skip


def model_attack(draw: Draw, folder: Path) -> list[str]:
    """A checkpoint with one or two files damaged, to every command that loads one."""
    from_run = draw.random() < 0.6
    shutil.copytree(folder / ("ran/model" if from_run else "good"), folder / "bad")
    files = sorted(
        path for path in (folder / "bad").iterdir() if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja")
    )
    if draw.random() < 0.3:
        files = [folder / "bad" / "config.json"]
    for path in draw.sample(files, min(len(files), draw.choice([1, 1, 1, 2]))):
        if path.name == "model.safetensors" and draw.random() < 0.6:
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = json.dumps(draw.mutated(json.loads(content[8 : 8 + size]))).encode()
            path.write_bytes(
                draw.choice([len(header), len(header), size, 2**40, 0]).to_bytes(8, "little") + header + content[8 + size :]
            )
        elif path.name == "generation_config.json" and draw.random() < 0.6:
            settings = {
                "num_beams": 4, "temperature": 1e-320, "max_length": 2, "eos_token_id": [draw.json()], "penalty_alpha": 0.5, "num_return_sequences": 3, "use_cache": False,
                "repetition_penalty": -1.0, "stop_strings": ["a"], "max_time": 0, "forced_eos_token_id": 10**9, "cache_implementation": "x", "assistant_early_exit": 3, "guidance_scale": 2,
                "num_beam_groups": 2, "min_new_tokens": 10**9, "suppress_tokens": [10**9], "bad_words_ids": [[10**9]], "prompt_lookup_num_tokens": 3, "watermarking_config": {}, "dola_layers": "x",
            }  # fmt: skip
            path.write_text(json.dumps({key: settings[key] for key in draw.sample(sorted(settings), draw.choice([1, 2]))}))
        else:
            damage(draw, path)
    if draw.random() < 0.1:
        template = draw.choice(
            [
                "",
                "{{ x.y.z }}",
                "{% for x in y",
                "{% for i in range(10**9) %}x{% endfor %}",
                "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                "{% for i in range(3000) %}{% for j in range(3000) %}word {% endfor %}{% endfor %}",
                "{{ 'x' * 10**9 }}",
                "{{ 9 ** (9 ** 9) }}",
                "{{ 1/0 }}",
                "{{ messages }}" * 99,
                " \n",
            ]
        )
        path = folder / "bad" / "chat_template.jinja"
        path.unlink(missing_ok=True)  # it may be a pipe by now
        path.write_text(template)
    return draw.choice([line for line in model_commands("bad") if line[0] != "verify" or draw.random() < 0.3])


def run_attack(draw: Draw, folder: Path) -> list[str]:
    """The folder of a run, or of a comparison, with files damaged."""
    name = draw.choice(["ran", "stopped", "compared"])
    shutil.copytree(folder / name, folder / "bad", symlinks=True)
    files = sorted(
        path for path in (folder / "bad").rglob("*") if path.is_file() and path.suffix not in (".html", ".safetensors")
    )
    here = [path for path in files if path.parent == folder / "bad"]
    for path in draw.sample(here if draw.random() < 0.7 and here else files, draw.choice([1, 1, 2])):
        if path.exists():
            damage(draw, path)
    if name == "compared":
        return draw.choice([["report", "bad"], ["report", "bad", "-o", "page.html"], [*COMPARE, "-o", "bad"]])
    run = ["run", "good.yaml", "-o", "bad"]
    return draw.choice([["report", "bad"], ["report", "bad", "-o", "page.html", "--json"], run, [*run, "--dry-run"], ["run", "bad/recipe.yaml", "-o", "bad"],
                        ["watch", "bad"], ["card", "bad/model"], ["push", "bad/model", "me/x", "--dry-run"]])  # fmt: skip


COMPARE = [
    "compare",
    "good",
    "--params",
    "80%",
    "--methods",
    "magnitude-all",
    "--draws",
    "1",
    "--text",
    "good.txt",
    "--window",
    "16",
    "--max-windows",
    "2",
    "--device",
    "cpu",
]


def option_attack(draw: Draw, folder: Path) -> list[str]:
    """Options with values that they do not take."""
    import typer

    from adapt_pruner.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = draw.choice(sorted(commands))
    command = commands[name]
    options = [
        option
        for option in command.params
        if option.param_type_name == "option" and option.name != "help" and option.name != "engine"
    ]
    first = next((line for line in model_commands("good") if line[0] == name), [name])
    given = {
        "run": ["run", "good.yaml", "-o", "out"], "compare": [*COMPARE, "-o", "out"], "bench": ["bench", "good", "--against", "good", "--batch", "1", "--prompt", "4", "--generate", "2", "--rounds", "1"],
        "watch": ["watch", "ran"], "report": ["report", "ran"],
    }.get(name, first)  # fmt: skip
    line = list(given)
    for option in draw.sample(options, min(len(options), draw.choice([1, 1, 2]))):
        flag = option.opts[0]
        if flag in line and not option.is_flag:
            at = line.index(flag)
            del line[at : at + 2]
        if flag == "-o" or flag == "--output":
            line = [word for at, word in enumerate(line) if word != "-o" and line[at - 1] != "-o"]
        value = draw.choice([draw.word(), draw.word(), "good", "good.txt", "ran", "good.yaml", "out/a/b"])
        line += [flag] if option.is_flag else [f"{flag}={value}"]
    if draw.random() < 0.25:
        at = draw.randrange(1, len(line)) if len(line) > 1 else 0
        line[at] = draw.word()
    return line


ATTACKS = {"recipe": recipe_attack, "text": text_attack, "model": model_attack, "run": run_attack, "option": option_attack}


def prepared(root: Path) -> Path:
    """A folder with a good model, a text, a recipe, a finished run, a stopped one and a comparison; copied for every attack."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import byte_tokenizer, tiny_model

    base = root / "base"
    base.mkdir()
    tiny_model(vocab_size=259).save_pretrained(base / "good")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(base / "good")
    (base / "good.txt").write_text("All human beings are born free and equal in dignity and rights. " * 60)
    import yaml

    tables: dict[str, Any] = {}
    for key, value in (SMALL | TRAINED | {"stages": 2}).items():
        table, _, leaf = key.rpartition(".")
        (tables.setdefault(table, {}) if table else tables)[leaf] = value
    (base / "good.yaml").write_text(yaml.safe_dump(tables))
    _warm(base)
    for line in (["run", "good.yaml", "-o", "ran"], [*COMPARE, "-o", "compared"]):
        status, told = command(line, base)
        if status:
            raise SystemExit(f"a good command fails: {shlex.join(line)}: {told}")
    shutil.copytree(base / "ran", base / "stopped")
    shutil.rmtree(base / "stopped" / "model")
    return base


def _warm(base: Path) -> None:
    """Import, once for all attacks, what the commands import."""
    from adapt_pruner.cli import main

    held = Path.cwd()
    handlers = {sent: signal.getsignal(sent) for sent in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(base)
    for line in model_commands("good"):
        if "-o" in line or "--json" in line:
            continue
        with (
            contextlib.suppress(SystemExit),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            sys.argv = ["adapt-pruner", *line]
            main()
    os.chdir(held)
    for sent, handler in handlers.items():
        signal.signal(sent, handler)
    import adapt_pruner.compare.comparison
    import adapt_pruner.report.with_card
    import adapt_pruner.run.forecast
    import adapt_pruner.run.loop  # noqa: F401


def command(line: list[str], folder: Path) -> tuple[int, str]:
    """Run a command line in a forked process with limits; its status (negative: the signal) and what it printed."""
    out = folder.parent / f"{folder.name}.out"
    sys.stdout.flush()
    with out.open("wb") as stream:
        child = os.fork()
        if child == 0:
            _be_child(line, folder, stream.fileno())
    deadline, status = time.monotonic() + SECONDS, None
    while status is None and time.monotonic() < deadline:
        done, raw = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(raw) if done else None
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what it started
    if status is None:
        os.waitpid(child, 0)
    told = out.read_bytes().decode(errors="replace")
    out.unlink()
    return -999 if status is None else status, told


def _be_child(line: list[str], folder: Path, stream: int) -> None:
    """Never returns."""
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        held = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if Path("/proc/self/statm").exists()
            else 0
        )
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if "\0" in "".join(line):
            os._exit(2)  # no command line can hold it
        sys.argv = ["adapt-pruner", *line]
        from adapt_pruner.cli import main

        main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    os._exit(0)


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What tells whether anything in a folder was changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (
            stat.st_mode,
            stat.st_ino,
            0 if path.is_dir() else stat.st_mtime_ns,
            0 if path.is_dir() else stat.st_size,
        )
    return found


def outputs(line: list[str]) -> tuple[str, ...]:
    """Names in the folder that this command may write: what it is told to, pictures beside it, and what is there by default."""
    given = [line[at + 1] for at, word in enumerate(line[:-1]) if word in ("-o", "--output")]
    given += [word.partition("=")[2] for word in line if word.startswith(("-o=", "--output="))]
    given += [f"{Path(name).parent / Path(name).stem}-png" for name in given if line[0] == "report" and name]
    default = {
        "report": [f"{line[1]}/" if len(line) > 1 else ""],
        "run": ["runs"],
        "card": [f"{line[1]}/README.md" if len(line) > 1 else ""],
    }
    return tuple(os.path.normpath(name) for name in [*given, *(default.get(line[0], []) if line else [])] if name) + (
        "cache",
        "home",
    )


def faults(line: list[str], status: int, told: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Everything that is wrong with how a command answered."""
    errors = [row for row in told.splitlines() if row.startswith("error: ")]
    if status == -999:
        yield f"hangs: no answer within {SECONDS} s"
    elif status < 0:
        yield f"ended by signal {signal.Signals(-status).name}"
    elif status not in (0, 1, 2):
        yield f"exit status {status}"
    if "Traceback (most recent" in told:
        yield "a traceback"
    if "unexpected " in told and "(ADAPT_PRUNER_TRACEBACK=1" in told:
        yield "an exception that the command line does not know"
    if status in (1, 2) and not errors and "\0" not in "".join(line):
        yield "it fails without a sentence"
    if status == 0 and errors:
        yield "it fails with exit status 0"
    for row in errors:
        if len(row) > 1500:
            yield f"a sentence of {len(row):,} characters"
        if re.search(r"\[Errno|<class|object at 0x|Error\(|^error: \w*Error\b|^error: *$", row):
            yield "a sentence of a program, not for people"
    if status == 0 and "--json" in line and "--help" not in line:
        printed = [row for row in told.splitlines() if row.startswith("{")]
        try:
            json.loads(printed[-1], parse_constant=lambda word: (_ for _ in ()).throw(ValueError(word)))
        except (ValueError, IndexError):
            yield "no strict JSON"
    mine = outputs(line)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not any(
            name == own or name.startswith(f"{own}/") or (status == 0 and name not in before and own.startswith(f"{name}/"))
            for own in mine
        ):
            yield f"{name} was {'changed' if name in before and name in after else 'removed' if name in before else 'made'}"
        if ".partial-" in name and name not in before:
            yield f"half-written: {name}"
    if status not in (0,) and line and line[0] in ("prune", "export") and not any(name in before for name in mine):
        yield from (
            f"{name} is there although the command failed" for name in mine if name in after and name not in ("cache", "home")
        )


def attack(base: Path, root: Path, seed: int, number: int, *, only: str | None = None) -> tuple[list[str], int, str, list[str]]:
    """Carry out one attack; its command, its status, what it printed and what is wrong with that."""
    draw = Draw(f"{seed} {number}")
    folder = root / "attack"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)
    kind = only or draw.choice(sorted(ATTACKS))
    line = ATTACKS[kind](draw, folder)
    os.environ |= {
        "HOME": str(folder / "home"),
        "ADAPT_PRUNER_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
    }
    before = snapshot(folder)
    status, told = command(line, folder)
    wrong = list(dict.fromkeys(faults(line, status, told, before, snapshot(folder))))
    return line, status, told, [fault for fault in wrong if not any(re.search(known, f"{fault}\n{told}") for known in KNOWN)]


def fuzz(
    *, seconds: float, seed: int, first: int = 0, count: int | None = None, kind: str | None = None, verbose: bool = False
) -> int:
    """Attack until the time is over or `count` is reached; the number of failures."""
    failures = done = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        root = Path(scratch)
        os.environ["ADAPT_PRUNER_CACHE"] = str(root / "cache")
        base = prepared(root)
        began = time.monotonic()
        for number in range(first, first + (count or sys.maxsize)):
            if time.monotonic() - began > seconds:
                break
            line, status, told, wrong = attack(base, root, seed, number, only=kind)
            if verbose or wrong:
                print(f"\nattack {number}: adapt-pruner {shlex.join(line)[:1500]}\n  exit status {status}; " + "; ".join(wrong))
                print("  " + "\n  ".join(told.strip()[-1500:].splitlines()))
            done += 1
            if wrong:
                failures += 1
                again = f"python tests/fuzz.py --seed {seed} --only {number}" + (f" --kind {kind}" if kind else "")
                print(f"  again: {again}", flush=True)
    print(f"\nseed {seed}: {done} attacks in {time.monotonic() - began:.0f} s, {failures} failures")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="by default a new one, which is printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first attack")
    parser.add_argument("--count", type=int, default=None, help="attacks at most")
    parser.add_argument("--only", type=int, default=None, help="one attack, by its number")
    parser.add_argument("--kind", choices=sorted(ATTACKS), default=None)
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    first, count = (asked.only, 1) if asked.only is not None else (asked.first, asked.count)
    failures = fuzz(seconds=asked.seconds, seed=seed, first=first, count=count, kind=asked.kind, verbose=asked.only is not None)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
