"""Fewer weights, fewer bits, or both: quality against bytes and against speed, of the files themselves in llama.cpp.

    python benchmarks/frontier.py [--model smollm2] [--minutes 60] [--arms dense trained 80 60 40] [--windows 40] [--threads 1 2] [--data ../shared/data]
    python benchmarks/frontier.py --page            # docs/frontier.md and its pictures, of what is there; measures nothing

Arms: `dense`; `trained`, the dense model trained by `shrink` for the same minutes, since its packaged weights were four-bit ones, which it is nearly
free to quantise to four bits again; 80, 60, 40: `shrink` to that share of the decoder. Each is exported in several types. Call it from the project's
folder, with texts in the folder that --data names. Each file's figures go to benchmarks/frontier/, and what is there is not measured again.
"""

import argparse
import hashlib
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command
from shrink import MEASURED

import adapt_pruner as ap
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events.words import counted
from adapt_pruner.core.system.files import write_whole
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.data.conversations import Template
from adapt_pruner.data.generation import ends_of
from adapt_pruner.data.prompts import Prompt, measured_prompts
from adapt_pruner.data.tokens import text_bytes
from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.errors import RunError
from adapt_pruner.evaluate.chat import LONGEST, judged
from adapt_pruner.export import llama_cpp
from adapt_pruner.export.verify import opened
from adapt_pruner.report.charts import Beside, Lines, Series
from adapt_pruner.report.paper import write_pictures

Figures = dict[str, Any]
_DATA = "../shared/data"
TEXT = f"{_DATA}/corpus/w*/*.jsonl.gz"
WINDOW, ROWS = 512, 25  # tokens of a window, and prompts that are answered together
CELLS, FILES = Path(__file__).with_name("frontier"), Path("runs/frontier")
PAGE = Path(__file__).parents[1] / "docs" / "frontier.md"
DENSE_QUANTS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
PRUNED_QUANTS = ("f16", "q8_0", "q4_k_m")
ARMS = {"dense": None, "trained": "100%", "80": "80% of decoder", "60": "60% of decoder", "40": "40% of decoder"}
"""What `shrink` is asked to keep; None for the model as it is."""
_BEGIN, _END = "<!-- from here on made by benchmarks/frontier.py -->", "<!-- up to here -->"


@dataclass(frozen=True)
class Model:
    """A model of the page: its packaged name, what people call it, and what `shrink` is told beside the size."""

    packaged: str
    title: str
    settings: tuple[str, ...] = ()


MODELS = {
    "smollm2": Model("smollm2-135m-instruct", "SmolLM2-135M-Instruct"),
    "gemma3": Model("gemma3-270m", "Gemma-3-270M", ("--set", "equal_widths=true")),
}


@dataclass(frozen=True)
class Bench:
    """Where the files and figures of a model are, and how it is measured."""

    name: str
    minutes: float
    windows: int
    rounds: int
    data: Path

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    def text(self, spec: str) -> str:
        """A text of these benchmarks, in the folder that has it here."""
        return spec.replace(_DATA, str(self.data))

    def arm(self, arm: str) -> str:
        """An arm with its minutes."""
        return arm if arm == "dense" else f"{arm}-{self.minutes:g}min"

    def made(self, arm: str) -> tuple[str, Figures]:
        """The model of an arm, made if it is not there, and what its making said."""
        if arm == "dense":
            return self.model.packaged, {}
        folder = FILES / self.name / self.arm(arm)
        told = folder / "figures.json"
        if not told.exists():
            words = [
                "--params",
                ARMS[arm],
                "--text",
                self.text(TEXT),
                "--minutes",
                f"{self.minutes:g}",
                *self.model.settings,
                "-o",
                folder,
            ]
            said = json.loads(command("shrink", self.model.packaged, *words, "--json"))  # goes on where it was stopped
            write_whole(told, to_json({"trained_tokens": said.get("trained_tokens", 0), "seconds": said["seconds"]}))
        return str(folder / "model"), dict(json.loads(told.read_text(encoding="utf-8")))

    def file(self, arm: str, quant: str) -> Path:
        """The GGUF file of an arm, written if it is not there."""
        path = FILES / self.name / f"{self.arm(arm)}-{quant}.gguf"
        if not path.exists():
            ap.export(self.made(arm)[0], "gguf", path, quant=quant)
        return path

    def measure(self, arm: str, quant: str, threads: Sequence[int]) -> None:
        """Measure a file, and keep each figure as soon as it is there."""
        kept = CELLS / self.name / f"{self.arm(arm)}-{quant}.json"
        cell: Figures = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}

        def keep(**figures: Any) -> None:
            cell.update(figures)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, to_json(cell))

        if "bytes" not in cell:
            keep(arm=arm, quant=quant, minutes=self.minutes, **self.made(arm)[1], **stored(self.file(arm, quant)))
        if cell.get("windows") != self.windows:
            keep(windows=self.windows, texts={})
        for text, spec in MEASURED.items():
            if text not in cell["texts"]:
                keep(
                    texts={
                        **cell["texts"],
                        text: bits_per_byte(self.model.packaged, self.file(arm, quant), self.text(spec), self.windows),
                    }
                )
        if "chat" not in cell:
            keep(chat=chat(self.model.packaged, self.file(arm, quant)))
        for number in threads:
            if str(number) not in cell.get("speed", {}):
                keep(speed={**cell.get("speed", {}), str(number): self._speed(arm, quant, number)})

    def _speed(self, arm: str, quant: str, threads: int) -> Figures:
        """How many times as fast as the dense F16 file, in turn with it, so that a busy machine slows both."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        words = ["--engine", "llama.cpp", "--batch", 1, "--rounds", self.rounds, "--generate", 32, "--json"]
        said = json.loads(command("bench", self.file(arm, quant), "--against", self.file("dense", "f16"), *words))
        return {row["phase"]: row["speed_up"] for row in said["speeds"]}


def stored(path: Path) -> Figures:
    """Bytes of a file, its weights, stored bits for each, and a digest of all that it stores but its name."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.tensor_type.name}".encode() + tensor.data.tobytes())
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / weights
    return {"bytes": path.stat().st_size, "weights": weights, "bits": bits, "digest": digest.hexdigest()[:16]}


def bits_per_byte(model: str, path: Path, text: str, windows: int) -> float:
    """How well llama.cpp reads a text from a file."""
    tokenizer = load(model).tokenizer
    read = held_out_windows(tokenizer, source=text, window=WINDOW, max_windows=windows)
    nats = 0.0
    with opened(path, context=WINDOW) as engine:
        for ids in read:
            log_p = engine.logits(ids[0].tolist())[:-1].log_softmax(-1)
            nats -= float(log_p.gather(1, ids[0, 1:, None]).double().sum())
    return nats / math.log(2) / text_bytes(tokenizer, read)


def chat(model: str, path: Path) -> Figures | None:
    """What `evaluate.chat` finds, where llama.cpp writes the answers; None without a chat template."""
    loaded = load(model)
    if not loaded.tokenizer.chat_template:
        return None
    template, ends = Template(loaded.tokenizer), ends_of(loaded.model, loaded.tokenizer)
    openings = [template.opening(Prompt((prompt.ask,))) for prompt in measured_prompts()]
    answers = [answer for at in range(0, len(openings), ROWS) for answer in _written(path, openings[at : at + ROWS], ends)]
    return judged(loaded.tokenizer, answers, ends=ends).to_dict()


def _written(path: Path, openings: Sequence[Sequence[int]], ends: Sequence[int]) -> list[list[int]]:
    """What llama.cpp writes after each opening, all rows together: the likeliest token each time, up to an end or 64 tokens."""
    module, _ = llama_cpp.library()
    most = len(openings) * (max(map(len, openings)) + LONGEST)
    with llama_cpp.plain_kernels(module):
        model = module.llama_model_load_from_file(str(path).encode(), module.llama_cpp.llama_model_default_params())
    room = module.llama_context_default_params()
    room.n_ctx = room.n_batch = room.n_ubatch = most
    room.n_seq_max = len(openings)
    room.n_threads = room.n_threads_batch = torch.get_num_threads()
    context = module.llama_init_from_model(model, room)
    vocabulary = module.llama_vocab_n_tokens(module.llama_model_get_vocab(model))
    batch = module.llama_batch_init(most, 0, 1)
    answers: list[list[int]] = [[] for _ in openings]
    given = dict(enumerate(openings))  # what each row that still writes has not read yet
    for _ in range(LONGEST):
        batch.n_tokens, last = 0, {}
        for row, ids in given.items():
            begin = len(openings[row]) + len(answers[row]) - len(ids)
            for position, token in enumerate(ids, start=begin):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, position, 1, row
                last[row], batch.logits[at], batch.n_tokens = at, position == begin + len(ids) - 1, at + 1
        if module.llama_decode(context, batch):
            raise RunError(f"llama.cpp could not read {batch.n_tokens:,} tokens of {path}")
        for row, at in last.items():
            answers[row].append(int(np.ctypeslib.as_array(module.llama_get_logits_ith(context, at), (vocabulary,)).argmax()))
        given = {row: answers[row][-1:] for row in given if answers[row][-1] not in ends}
        if not given:
            break
    module.llama_batch_free(batch)
    module.llama_free(context)
    module.llama_model_free(model)
    return answers


def points_of(name: str, minutes: float) -> list[Figures]:
    """The figures of a model's files, the smallest file first; of files that store the same, one, with the names of all."""
    found: dict[str, Figures] = {}
    order = [f"{arm}-{quant}" for arm in ARMS for quant in DENSE_QUANTS]
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (CELLS / name).glob("*.json")]
    speeds = {cell["quant"]: cell["speed"] for cell in cells if cell["arm"] == "dense" and cell.get("speed")}
    for cell in sorted(cells, key=lambda cell: order.index(f"{cell['arm']}-{cell['quant']}")):
        if (cell["arm"] == "dense" or cell["minutes"] == minutes) and len(cell.get("texts", {})) == len(MEASURED):
            if cell["arm"] == "trained" and cell["quant"] in speeds:  # it has the dense model's shapes, so its speed
                cell.setdefault("speed", speeds[cell["quant"]])
            same = found.setdefault(cell["digest"], {**cell, "types": []})
            same["types"].append(cell["quant"].upper())
            same.update({key: cell[key] for key in ("chat", "speed") if cell.get(key)})
    for point in found.values():
        point["mean"] = sum(point["texts"].values()) / len(MEASURED)
    return sorted(found.values(), key=lambda point: float(point["bytes"]))


def front(points: Sequence[Figures]) -> list[Figures]:
    """The points that no smaller one equals in bits per byte, the smallest first."""
    best = math.inf
    ahead = []
    for point in points:
        if point["mean"] < best:
            ahead.append(point)
            best = point["mean"]
    return ahead


def verdict(points: Sequence[Figures]) -> str:
    """Which files are worth their bytes, and where pruning pays, in words."""
    ahead = front(points)
    pruned = [point for point in ahead if is_pruned(point)]
    plain = [point for point in ahead if not is_pruned(point)]
    listed = "Bold: no smaller file has as few bits per byte."
    if not any(map(is_pruned, points)):
        return f"No pruned file has been measured yet. {listed}"
    if not pruned:
        return f"**Of these files, no pruned one is worth its bytes: quantise alone.** {listed}"
    if pruned[-1]["bytes"] < min((point["bytes"] for point in plain), default=math.inf):
        border = pruned[-1]["bytes"] / 1e6
        return f"**Up to {border:.0f} MB prune and quantise; above, quantise alone.** {listed}"
    return f"**Pruned files and whole ones take turns.** {listed}"


def is_pruned(point: Figures) -> bool:
    return str(point["arm"]).isdigit()


def title(point: Figures) -> str:
    return f"{_arm(point['arm'])}, {' = '.join(point['types'])}"


def _arm(arm: str) -> str:
    return f"pruned to {arm} %" if arm.isdigit() else {"dense": "as it is", "trained": "as it is, trained"}[arm]


def table(points: Sequence[Figures]) -> Iterator[str]:
    """A row for each file, as Markdown."""
    chats, threads = (
        any(point.get("chat") for point in points),
        sorted({number for point in points for number in point.get("speed", {})}),
    )
    columns = ["model, types", "MB", "bits a weight", "bits per byte", *MEASURED, *(["right", "end", "loop"] if chats else [])]
    columns += [f"{phase}, {counted(int(number), 'thread')}" for number in threads for phase in ("reading", "writing")]
    yield f"| {' | '.join(columns)} |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    ahead = front(points)
    for point in points:
        cells = [
            f"**{title(point)}**" if point in ahead else title(point),
            f"{point['bytes'] / 1e6:.1f}",
            f"{point['bits']:.2f}",
            f"{point['mean']:.3f}",
        ]
        cells += [f"{point['texts'][text]:.3f}" for text in MEASURED]
        answers = point.get("chat")
        cells += [str(len(answers["right"])), str(answers["ended"]), str(answers["looping"])] if answers else ["–"] * 3 * chats
        for number in threads:
            speed = point.get("speed", {}).get(number)
            cells += [f"{speed[phase]['median']:.2f}×" if speed else "–" for phase in ("prefill", "decode")]
        yield f"| {' | '.join(cells)} |"


def pictures(name: str, points: Sequence[Figures]) -> list[Beside]:
    """Quality against bytes, and against the speed of writing where it was measured."""
    qualities: dict[str, tuple[str, Callable[[Figures], float | None]]] = {
        "bits per byte, lower is better": ("bits", lambda point: float(point["mean"])),
        "right answers, higher is better": ("plain", lambda point: len(point["chat"]["right"]) if point.get("chat") else None),
    }
    sides: dict[str, tuple[str, Callable[[Figures], float | None]]] = {
        "bytes": ("MB of the file", lambda point: point["bytes"] / 1e6),
        "speed": (
            "times as fast as F16 at writing, one thread",
            lambda point: point["speed"]["1"]["decode"]["median"] if point.get("speed") else None,
        ),
    }
    found = []
    for key, (x_label, x_of) in sides.items():
        panels = []
        for y_label, (form, y_of) in qualities.items():
            series = []
            for arm in ARMS:
                places = sorted(
                    (x, y, "/".join(point["types"])) for point in points
                    if point["arm"] == arm and (x := x_of(point)) is not None and (y := y_of(point)) is not None
                )  # fmt: skip
                if places:
                    series.append(
                        Series(_arm(arm), [(x, y) for x, y, _ in places], dots=True, labels=[kind for _, _, kind in places])
                    )
            if series:
                panels.append(Lines(f"{key}-{form}", y_label, "", series, x_label, y_label, "plain", form))  # type: ignore[arg-type]
        if panels:
            note = "each point a GGUF file, read by llama.cpp; bits per byte: the mean of three texts"
            found.append(Beside(f"frontier-{name}-{key}", f"{MODELS[name].title}: quality against {key}", panels, note))
    return found


def write_page(minutes: float) -> None:
    """The pictures, and the marked part of docs/frontier.md, of what is there; the rest of the page stays."""
    parts = []
    for name, model in MODELS.items():
        if not (points := points_of(name, minutes)):
            continue
        written = write_pictures(pictures(name, points), PAGE.parent, endings=["svg"])
        trained = {point["arm"]: point["trained_tokens"] for point in points if point.get("trained_tokens")}
        tokens = ", ".join(f"{_arm(arm)}: {count:,} tokens" for arm, count in trained.items())
        windows = sorted({point["windows"] for point in points})
        how = f"`shrink --minutes {minutes:g}` for each pruned and trained model ({tokens}). " if tokens else ""
        how += f"Bits per byte over {' or '.join(map(str, windows))} windows of {WINDOW} tokens of each text."
        missing = [f"{_arm(arm)}" for arm in ARMS if not any(point["arm"] == arm for point in points)]
        if missing:
            how += f" Not measured yet: {'; '.join(missing)}."
        shown = [f"![{path.stem}]({path.name})" for path in written]
        said = [textwrap.fill(words, 118, break_long_words=False) for words in (verdict(points), how)]
        parts.append("\n\n".join([f"## {model.title}", said[0], *shown, "\n".join(table(points)), said[1]]))
    page = PAGE.read_text(encoding="utf-8")
    made = f"{_BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{_END}"
    write_whole(PAGE, re.sub(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", lambda _: made, page, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--quants",
        nargs="+",
        choices=DENSE_QUANTS,
        default=list(DENSE_QUANTS),
        help="pruned arms take f16, q8_0 and q4_k_m of them",
    )
    parser.add_argument("--minutes", type=float, default=60, help="of `shrink` for each arm but dense")
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens, of each text")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="for which speed is measured; none: no speed")
    parser.add_argument("--rounds", type=int, default=5, help="of speed")
    parser.add_argument("--data", type=Path, default=Path(_DATA), help="folder of the texts (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page of what is there, and measure nothing")
    options = parser.parse_args()
    bench = Bench(options.model, options.minutes, options.windows, options.rounds, options.data)
    for arm in () if options.page else options.arms:
        for quant in DENSE_QUANTS if arm in ("dense", "trained") else PRUNED_QUANTS:
            if quant in options.quants:
                bench.measure(arm, quant, options.threads)
    write_page(options.minutes)


if __name__ == "__main__":
    main()
