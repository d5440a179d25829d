"""Peak memory and time of pruning models that memory need not hold, beside what the forecast says.

    python benchmarks/offload.py [--like 8b 70b] [--layers 4] [--methods adapt-pruner llm-pruner flap adaptive-ls-v1] [--offload disk]
                                  [--own-text]
    python benchmarks/offload.py --whole [--methods llm-pruner]
    python benchmarks/offload.py --time

The models have the shapes of Llama-3.1-8B and Llama-3.1-70B, `--layers` of their layers and random bfloat16 weights. They are made once, in the
folder `--folder` (4 GB and 11 GB with four layers; a whole 8B takes 16 GB). Each run is a process of its own, calibrated on 32
sequences of 128 random tokens, with `--own-text` on as many that the model writes, `step=1`, without repair text. `anonymous` is
memory that cannot be given back; pages of mapped files are told apart. `--whole` takes all layers, under `ulimit -d`. `--time` compares disk, cpu and memory on smollm2-135m-instruct.
One JSON line per run goes to DIR/results.jsonl; a run that has its line is not made again.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from adapt_pruner.checkpoint.load import locate
from adapt_pruner.checkpoint.shards import tensors_of, write_shards
from adapt_pruner.core.model.shelf import Shelf, Shelved, Stored
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.run.estimate import process_bytes
from adapt_pruner.run.plan import memory, setup_of
from adapt_pruner.run.start import stages
from adapt_pruner.work import Work

GIB = 2**30
SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "layers": 80},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, "layers": 6},
}
VOCABULARY = 128256
KEYS: dict[str, dict[str, Any]] = {
    "adapt-pruner": {"step": 1.0}, "adaptive-ls-v1": {"step": 1.0, "calibration.self_generated": 0},
    "llm-pruner": {"chooser": "allocate.uniform(first=1, last=1)"},  # the authors' own leaves four layers whole
}  # fmt: skip


@dataclass(frozen=True)
class Drawn(Stored):
    """Random numbers in the place of stored ones."""

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def read(self) -> Tensor:
        """Normal numbers as transformers initialises a Llama."""
        return torch.empty(self.shape, dtype=self.dtype).normal_(0, 0.02, generator=torch.Generator().manual_seed(self.seed))


def config_of(like: str, layers: int) -> Any:
    """The config of a model of this shape and depth."""
    sizes = {key: value for key, value in SHAPES[like].items() if key != "layers"}
    vocabulary = VOCABULARY if like != "tiny" else 49152
    return LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=vocabulary, dtype="bfloat16", tie_word_embeddings=False)


def made(folder: Path, like: str, layers: int) -> Path:
    """The folder of a model with random weights; made once."""
    place = folder / f"{like}-{layers}"
    if (place / "tokenizer.json").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    config = config_of(like, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shelf = Shelf(list, scratch=None, ahead=False)
    for seed, (name, parameter) in enumerate(list(model.named_parameters())):
        owner, _, leaf = name.rpartition(".")
        shape = tuple(parameter.shape)
        new: Any = torch.nn.Parameter(torch.ones(shape))
        if parameter.dim() > 1:
            new = Shelved.of(Drawn(seed, shape), shelf, shape, dtype=torch.bfloat16, device=torch.device("cpu"))
        setattr(model.get_submodule(owner), leaf, new)
    write_shards(tensors_of(model), place, dtype=torch.bfloat16, check=lambda name, numbers: None)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place)
    tokenizer, _ = locate("smollm2-135m-instruct")
    AutoTokenizer.from_pretrained(tokenizer, gguf_file=next(Path(tokenizer).glob("*.gguf")).name).save_pretrained(place)
    return place


def recipe_of(model: Path | str, method: str, offload: str, *, samples: int, folder: Path, own_text: bool = False) -> Recipe:
    """The recipe of a run."""
    ids = folder / f"ids-{samples}.json"
    rows = random.Random(0)
    ids.write_text(json.dumps({"input_ids": [[rows.randrange(5, 49000) for _ in range(128)] for _ in range(samples)]}))
    keys: dict[str, Any] = {
        "model": str(model),
        "method": method,
        "budget": "80% of decoder",
        "offload": offload,
    }
    keys |= {"calibration.source": "self", "calibration.samples": samples} if own_text else {"calibration.ids": str(ids)}
    return read({}, values={**keys, **KEYS.get(method, {})})


def forecast(recipe: Recipe, like: str, layers: int, offload: Any) -> int:
    """Bytes of a process that prunes so many layers, by the formulas."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(like, layers))
    if recipe.calibration.ids is not None:
        samples = len(json.loads(Path(recipe.calibration.ids).read_text())["input_ids"])
        recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"samples": samples})})
    work = Work.of(model, recipe)
    work.stages = stages(work, start=work.num_params, end=work.budget.keep)
    how = replace(setup_of(work, device=torch.device("cpu")), offload=offload)
    parts = memory(work, how)["pruning"]
    print("   ", {name: f"{size / GIB:.2f}" for name, size in parts.items() if size})
    return process_bytes(parts, "cpu")


def watched(recipe: Recipe, out: Path, *, limit: int | None) -> dict[str, Any]:
    """Run a recipe in a process of its own; returns its seconds and peaks in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    code = f"import adapt_pruner as ap; print(ap.prune({str(file)!r}, {str(out)!r}).figures.get('weights_read'))"

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began, peaks = time.perf_counter(), dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=limited, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for line in lines:
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.05)
    said = process.stdout.read() if process.stdout else ""
    read_times = float(said) if process.wait() == 0 and said.strip() != "None" else None
    return {"rc": process.returncode, "weights_read": read_times, "seconds": round(time.perf_counter() - began, 1), **peaks}


def main() -> None:
    """Make what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", nargs="+", default=["8b", "70b"], choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["adapt-pruner", "llm-pruner", "flap", "adaptive-ls-v1"])
    parser.add_argument("--offload", nargs="+", default=["disk"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("runs/offload"))
    parser.add_argument("--own-text", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "results.jsonl"
    done = [{"own_text": False} | json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for like in ["smollm2"] if options.time else options.like:
        layers = SHAPES[like]["layers"] if options.whole else options.layers
        model = Path("smollm2-135m-instruct") if options.time else made(options.folder, like, layers)
        for method in options.methods:
            for offload in ["none", "cpu", "disk"] if options.time else options.offload:
                key = {"like": like, "layers": layers, "method": method, "offload": offload, "samples": options.samples}
                key["own_text"] = options.own_text
                found = next((row for row in done if key.items() <= row.items()), None)
                recipe = recipe_of(
                    model, method, offload, samples=options.samples, folder=options.folder, own_text=options.own_text
                )
                if found is None:
                    out = options.folder / f"out-{like}-{method}-{offload}"
                    found = {**key, **watched(recipe, out, limit=8 * GIB if options.whole else None)}
                    if not options.whole:
                        shutil.rmtree(out, ignore_errors=True)
                    with results.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                if not options.time:
                    here, all_layers = (forecast(recipe, like, depth, offload) for depth in (layers, SHAPES[like]["layers"]))
                    found = {**found, "forecast": here, "forecast_whole": all_layers}
                sizes = {name: f"{value / GIB:.2f}" for name, value in found.items() if isinstance(value, int) and value > 10**7}
                print(key, sizes, found["seconds"], "s", "rc", found["rc"], flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
