"""Which jobs a plan has, what each is made of, and doing one: a base model, or an arm on a base."""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters, parse_count
from adapt_pruner.core.system.files import write_whole
from adapt_pruner.core.system.provenance import made_by
from adapt_pruner.core.system.strict_json import to_json
from adapt_pruner.data.sources import texts
from adapt_pruner.data.tokens import evaluation_windows, text_bytes
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.recipe import Recipe
from adapt_pruner.recipe import read as read_recipe
from adapt_pruner.run import loop

END = "<|endoftext|>"
BYTES_A_TOKEN = 4  # of text kept for training, at least: tokens of these vocabularies have 2.5 to 3.5


@dataclass(frozen=True)
class Job:
    """One run: an arm on a base, at so many tokens a parameter, with a seed; of the sweep also a learning rate."""

    rung: str
    base: int
    arm: str
    at: float
    seed: int
    lr: float | None = None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Job":
        """The job that a result is of."""
        lr = result["lr"] if result.get("swept") else None
        return cls(result["rung"], result["base"], result["arm"], result["at"], result["seed"], lr)

    @property
    def name(self) -> str:
        """Its file: X-0-b-1-0, with the learning rate where one is given."""
        return f"{self.rung}-{self.base}-{self.arm}-{self.at:g}-{self.seed}" + (f"-lr{self.lr:g}" if self.lr is not None else "")


class Ladder:
    """The table, and the folder where bases and results are kept.

    FOLDER/RUNG/made_of.json                the text and the settings of its bases; a rung that is `like` another has those of that one
    FOLDER/RUNG/text/{train,heldout}.jsonl  the documents that bases and arms read, drawn once
    FOLDER/RUNG/tokenizer/                  byte-level BPE trained on them
    FOLDER/RUNG/base-N/                     a run folder: model/, recipe.yaml, log.jsonl
    FOLDER/results/NAME.json                what came of a job
    FOLDER/masks/NAME/mask.json             the units that it ended with, if another arm takes these
    FOLDER/runs/NAME/                       a job's run folder, removed once its result is written
    """

    def __init__(self, folder: Path, *, text: Mapping[str, str] | None = None, table: Path | None = None) -> None:
        path = table or Path(__file__).with_name("ladder.yaml")
        self.table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        rungs = self.table["rungs"]
        self.table["rungs"] = {name: rungs.get(rung.get("like"), {}) | rung for name, rung in rungs.items()}
        self.folder = folder
        self.results = folder / "results"
        self.text = dict(text or self.table["text"])

    def jobs(self, plan: str) -> list[Job]:
        """The jobs of a plan, in order, each once."""
        return list(dict.fromkeys(job for group in self.table["plans"][plan] for job in self._of_group(group)))

    def _of_group(self, group: Mapping[str, Any]) -> Iterator[Job]:
        rung, rates = group["rung"], self.table["learning_rates"]
        if "rates" in group:
            for arm in group["rates"]:
                at = self.table["arms"][arm].get("tried_at", rates["at_of"].get(rung, rates["at"]))
                for lr in rates["tried"]:
                    yield Job(rung, rates["base"], arm, at, rates["seed"], lr)
            return
        for at in group["at"]:
            for base in group["bases"]:
                for seed in group["seeds"]:
                    for arm in group["arms"]:
                        yield Job(rung, base, arm, at, seed)

    def result(self, job: Job) -> dict[str, Any] | None:
        """What came of a job; None if it has not been done, or with other settings of its arm or at another learning rate."""
        found = self._found(self._place(job))
        if found is not None and job.at and found.get("lr") not in (None, lr_of(self, job)):
            return None  # a rate that has been tried since is better
        return found

    def results_of(self, rungs: Collection[str]) -> list[dict[str, Any]]:
        """The results of these rungs, of whatever plan, in the order of their names."""
        found = (one for one in map(self._found, sorted(self.results.glob("*.json"))) if one is not None and one["rung"] in rungs)
        return [one for one in found if "error" in one or self.result(Job.of(one)) is not None]

    def _found(self, path: Path) -> dict[str, Any] | None:
        """The result in a file; None if there is no such file, or its arm has other settings now."""
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if found is not None and "of" in found and found["of"] != self.of(found["arm"]):  # older ones have no digest
            return None
        return found

    def _place(self, job: Job) -> Path:
        return self.results / f"{job.name}.json"

    def of(self, arm: str) -> str:
        """A digest of an arm's settings, which make a result besides its name."""
        its = [
            {key: value for key, value in self.table["arms"][arm].items() if key != "says"},
            self.table["arm"],
            self.table["pruning"],
        ]
        return hashlib.sha256(json.dumps(its, sort_keys=True).encode()).hexdigest()[:8]

    def failed(self, job: Job, error: Exception) -> None:
        """Keep what a job failed with."""
        self._keep(job, {"error": str(error)})

    def forget_failures(self, jobs: Iterable[Job]) -> None:
        """Jobs that failed are to be tried once more."""
        for job in jobs:
            if "error" in (self.result(job) or {}):
                self._place(job).unlink()

    def _keep(self, job: Job, done: Mapping[str, Any]) -> dict[str, Any]:
        """Write what came of a job, with what the job is; returns both."""
        named = {"rung": job.rung, "base": job.base, "arm": job.arm, "at": job.at, "seed": job.seed, "of": self.of(job.arm)}
        self.results.mkdir(parents=True, exist_ok=True)
        write_whole(self._place(job), to_json({**named, **done}) + "\n")
        return {**named, **done}

    def check(self, rung: str) -> None:
        """Refuse a folder whose bases of this rung were made of another text or with other settings; note ours in a new one.

        Raises:
            UsageError: it was.
        """
        path = self.home(rung) / "made_of.json"
        ours = {
            "text": self.text,
            "rung": self.table["rungs"][self.home(rung).name],
            **{key: self.table[key] for key in ("base", "length", "heldout_windows")},
        }
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_json(ours) + "\n")
        elif wrong := [key for key, value in json.loads(path.read_text(encoding="utf-8")).items() if value != ours[key]]:
            raise UsageError(
                f"{path.parent} was made with another {' and another '.join(wrong)} (see {path}); name another --folder, or remove it"
            )

    def sweep(self, rung: str, arm: str) -> list[Job]:
        """The jobs that try learning rates for an arm."""
        return list(self._of_group({"rung": rung, "rates": [arm]}))

    def tried(self, job: Job) -> Job | None:
        """The job of the sweep that is the same as this one; None if the sweep has another base, seed or number of tokens."""
        same = replace(job, lr=lr_of(self, job))
        return same if job.lr is None and same in self.sweep(job.rung, job.arm) else None

    def source(self, job: Job) -> Job | None:
        """The job whose units this one is cut to; None for most."""
        arm = self.table["arms"][job.arm].get("units_of")
        return None if arm is None else replace(job, arm=arm, lr=None)

    def mask(self, job: Job) -> Path:
        """The folder with the units that a job ended with."""
        return self.folder / "masks" / job.name

    def home(self, rung: str) -> Path:
        """The folder of a rung's text, tokenizer and bases: those of the rung that it is like, if any."""
        return self.folder / str(self.table["rungs"][rung].get("like", rung))

    def prepare(self, rung: str) -> None:
        """Write the text and the tokenizer of a rung, unless they are there."""
        where = self.home(rung) / "text"
        tokens = parse_count(self.table["rungs"][rung]["base_tokens"])
        most = {"train": tokens * BYTES_A_TOKEN, "heldout": self.table["heldout_windows"] * self.table["length"] * 8}
        for part, spec in self.text.items():
            if not (where / f"{part}.jsonl").exists():
                documents = list(texts(spec))
                random.Random(0).shuffle(documents)
                kept, characters = [], 0
                for document in documents:
                    kept.append(json.dumps({"text": document}) + "\n")
                    characters += len(document)
                    if characters >= most[part]:
                        break
                where.mkdir(parents=True, exist_ok=True)
                write_whole(where / f"{part}.jsonl", "".join(kept))
        folder = self.home(rung) / "tokenizer"
        if not (folder / "config.json").exists():
            tokenizer = _tokenizer(texts(str(where / "train.jsonl")), size=self.table["rungs"][rung]["vocabulary"])
            tokenizer.save_pretrained(folder)
            _config(self.table["rungs"][rung], len(tokenizer)).save_pretrained(folder)

    def base(self, rung: str, number: int) -> Path:
        """The folder of a base model, trained from random weights unless it is there."""
        folder = self.home(rung) / f"base-{number}"
        if not (folder / "model").exists():
            recipe = self._trained(rung, self.home(rung) / "tokenizer", seed=number)
            loop.run(recipe, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return folder / "model"

    def _trained(self, rung: str, shape: Path, *, seed: int, **training: Any) -> Recipe:
        """The recipe of a model of a folder's shape, trained from random weights; by default as bases are."""
        tokens = _whole(parse_count(self.table["rungs"][rung]["base_tokens"]), self.table["base"]["batch_tokens"])
        asked = {**self.table["base"], "tokens": tokens} | training
        return read_recipe({
            "method": "magnitude-all", "model": str(shape), "init": "random", "budget": "100%", "seed": seed,
            "dtype": self.table["rungs"][rung]["dtype"], "checkpoint_minutes": 5, "keep_checkpoints": 1,
            "training": {"source": self._train_text(rung), "length": self.table["length"], **asked},
        })  # fmt: skip

    def recipe(self, job: Job, base: Path) -> Recipe:
        """The recipe of a job."""
        arm, rung = self.table["arms"][job.arm], self.table["rungs"][job.rung]
        target = parse_count(rung["target"])
        batch = self.table["arm"]["batch_tokens"]
        tokens = _whole(job.at * target, batch) if job.at else 0
        training = {**self.table["arm"], "tokens": tokens, "lr": lr_of(self, job), "batch_tokens": min(batch, tokens or batch)}
        if arm.get("scratch"):
            shape = self.folder / job.rung / "scratch"
            if not (shape / "config.json").exists():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(self.home(job.rung) / "tokenizer")
                tokenizer.save_pretrained(shape)
                _config(rung | {"mlp": rung["scratch_mlp"]}, len(tokenizer)).save_pretrained(shape)
            return self._trained(job.rung, shape, seed=1000 * (job.base + 1) + job.seed, **training)
        how = self.table["pruning"]
        calibration = {"source": self._train_text(job.rung), "samples": how["samples"], "length": how["calibration_length"]}
        values: dict[str, Any] = (
            {"training": {"source": self._train_text(job.rung), "length": self.table["length"], **training}} if tokens else {}
        )
        if source := self.source(job):
            values |= {"reduce": f"masks(run={self.mask(source)})"}
        elif not arm.get("uncut"):
            values |= {key: how[key] for key in ("method", "step", "amplitude", "head_metric")}
        data = {
            "method": "magnitude-all", "model": str(base), "budget": "100%" if arm.get("uncut") else str(target),
            "stages": arm.get("stages", 1), "seed": job.seed, "dtype": rung["dtype"], "checkpoint_minutes": 5,
            "keep_checkpoints": 1, "calibration": calibration, **values,
        }  # fmt: skip
        changes = arm.get("set", {}) if tokens else {key: value for key, value in arm.get("set", {}).items() if "." not in key}
        return read_recipe(data, values=changes, shared=True).fitted()  # all arms share settings that not every method reads

    def do(self, job: Job) -> dict[str, Any]:
        """Run a job and keep its result; the base must be there, and the units that it is cut to."""
        if (
            (same := self.tried(job)) is not None
            and (result := self._found(self._place(same))) is not None
            and "error" not in result
        ):
            if self.mask(same).exists():
                shutil.copytree(self.mask(same), self.mask(job), dirs_exist_ok=True)
            return self._keep(job, result | {"swept": False})
        began = time.process_time(), time.perf_counter()
        folder = self.folder / "runs" / job.name
        recipe = self.recipe(job, self.home(job.rung) / f"base-{job.base}" / "model")
        begun = folder / "recipe.yaml"
        if begun.exists() and read_recipe(begun).training.lr != recipe.training.lr:  # another rate has won since
            shutil.rmtree(folder)
        loop.run(recipe, folder)
        if any(arm.get("units_of") == job.arm for arm in self.table["arms"].values()):
            self.mask(job).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "model" / "mask.json", self.mask(job) / "mask.json")
        done = self._keep(job, self.measured(job.rung, folder / "model") | {
            "lr": recipe.training.lr, "swept": job.lr is not None,
            "tokens": recipe.training.tokens, "parameter_tokens": _parameter_tokens(folder / "log.jsonl"), "cpu_seconds": time.process_time() - began[0],
            "seconds": time.perf_counter() - began[1], "made_by": made_by(),
        })  # fmt: skip
        shutil.rmtree(folder)
        return done

    def measured(self, rung: str, model: Path) -> dict[str, Any]:
        """Parameters and held-out loss, in nats a token and bits a byte, of a model."""
        loaded = load(str(model))
        held_out = texts(str(self.home(rung) / "text" / "heldout.jsonl"))
        windows = list(
            evaluation_windows(loaded.tokenizer, held_out, window=self.table["length"], max_windows=self.table["heldout_windows"])
        )
        figures = perplexity(loaded.model, windows, num_bytes=text_bytes(loaded.tokenizer, windows))
        return {
            "params": count_parameters(loaded.model), "loss": figures.nll, "bits_per_byte": figures.bits_per_byte,
            "predicted": figures.tokens,
        }  # fmt: skip

    def _train_text(self, rung: str) -> str:
        return str(self.home(rung) / "text" / "train.jsonl")


def lr_of(ladder: Ladder, job: Job) -> float:
    """The learning rate of a job: its own, its arm's, or the best that was tried for the arm that its arm names.

    As long as some have not been tried, the middle one.
    """
    if job.lr is not None:
        return job.lr
    named = ladder.table["arms"][job.arm]["lr"]
    if not isinstance(named, str):
        return float(named)
    swept = [ladder.result(one) for one in ladder.sweep(job.rung, named)]
    tried = [result for result in swept if result is not None and "error" not in result]
    if None in swept or not tried:
        rates = ladder.table["learning_rates"]["tried"]
        return float(rates[len(rates) // 2])
    return float(min(tried, key=lambda result: result["loss"])["lr"])


def _parameter_tokens(log: Path) -> int:
    """The sum over training tokens of the parameters that the model had; 6 times this are the operations of the training, about."""
    params = total = read = 0
    for event in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        if event["event"] in ("start", "cut"):  # a run that goes on starts with the model as it is by now
            params = event["now"] if event["event"] == "start" else event["params"]
        elif event["event"] == "step":
            total, read = total + (event["tokens"] - read) * params, event["tokens"]
    return total


def _whole(tokens: float, batch: int) -> int:
    """The nearest number of whole batches, at least one."""
    return max(1, round(tokens / batch)) * batch


def _tokenizer(documents: Iterator[str], *, size: int) -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    inner.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)


def _config(rung: Mapping[str, Any], vocabulary: int) -> Any:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=rung["width"], num_hidden_layers=rung["layers"], num_attention_heads=rung["heads"],
        num_key_value_heads=rung["kv_heads"], intermediate_size=rung["mlp"], max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
