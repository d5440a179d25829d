"""What the rows that search or learn claim, each beside its control, on SmolLM2-135M-Instruct.

    python benchmarks/claims.py [GROUP | GROUP/JOB …] [--seeds 0] [--out runs/claims]

Each job is one `adapt-pruner prune`, or one `run` of benchmarks/claims.yaml, and then `eval` on each of its texts. Call it from the project's
folder, with ../shared/data beside it. A job that is done is skipped, and a stopped run goes on. Each job writes
OUT/GROUP-JOB-SEED/figures.json when it ends; the table of all that is there goes to stdout at the end.
"""

import argparse
import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command import command, evaluated
from texts import TESTED, TUNED_ON

MODEL = "smollm2-135m-instruct"
CORPUS = "../shared/data/corpus/{}/*.jsonl.gz#{}"
TEXTS = {"wikitext2": TESTED["WikiText-2"], "web_owt": TESTED["web text"]}
CHOOSING = {"wikitext2": "../shared/data/wikitext2/valid.txt", "web_c4": TUNED_ON}  # of shares by layer
DOMAINS = ("web_c4", "wiki", "books", "stackexchange")

_SIZES = {20: "113.3M", 30: "102.7M", 40: "92M", 60: "70.8M"}
_AS_MUCH = {20: 640, 40: 427, 60: 256}
_SEARCH = "rounds=10,tokens=1024,finalists=3"
_SHAPE = "residual=448,kv_heads=2,neurons=1152,layers=24"  # 70,211,008 parameters
_CUTS = {  # the same shape by one cut of each kind, scored alike, to exactly these parameters
    "104_622_784": "--method minitron --set axes=[residual]",
    "97_741_504": "--method minitron --set axes=[kv_heads]",
    "82_258_624": "--method minitron --set axes=[neurons]",
    "70_211_008": "--method shortgpt",
}


def _searched(percent: int) -> dict[str, str]:
    row = f"prune --params {_SIZES[percent]} --method self-pruner --calibration-samples 32"
    repaired = "--set 'repair=closed_form.least_squares' --set multiple_of=1"
    return {
        "uniform": f"{row} --set reduce=units",
        "evolution": f"{row} --set 'reduce=search({_SEARCH})'",
        "random": f"{row} --set 'reduce=search(proposals=random,{_SEARCH})'",
        "uniform, repaired": f"{row} --set reduce=units {repaired}",
        "evolution, repaired": f"{row} --set 'reduce=search(repaired=true,{_SEARCH})' {repaired}",
    }


def _shares(what: str, step: float) -> dict[str, str]:
    """Rules that divide what is removed among layers; all else alike: the repair, heads late, the steps, the text."""
    row = f"prune {what} --calibration-samples 32 --set calibration.self_generated=0 --set step={step}"
    alike, adaptive = f"{row} --method first-layer-whole-ls", f"{row} --method adaptive-ls-v1 --set amplitude={step}"
    return {
        "alike": f"{alike} --set 'chooser=allocate.uniform(heads_after=0.5)'",
        "first layer whole": alike,
        "adaptive": adaptive,
        "adaptive, half": f"{row} --method adaptive-ls-v1 --set amplitude={step / 2}",
        "adaptive, log": f"{adaptive} --set distance=blocks.block_influence --set 'chooser=allocate.adaptive(heads_after=0.5,scale=log)'",
    }


def _learnt(percent: int) -> dict[str, str]:
    """Gates learnt on frozen weights, and the default row: on the text it takes, and on about as much as they read."""
    row = f"prune --params {_SIZES[percent]} --method"
    ours = f"{row} adaptive-ls-v1 --set calibration.self_generated=0"
    return {
        "grasprune": f"{row} grasprune",
        "ddp": f"{row} ddp",
        "ddp, 250 updates": f"{row} ddp --set 'reduce=free_gates(updates=250,ascent=4)'",
        "adaptive-ls-v1": ours,
        "adaptive-ls-v1, as much text": f"{ours} --calibration-samples {_AS_MUCH[percent]}",
    }


def _plain_shares(what: str, step: float) -> dict[str, str]:
    """The same rules as in the paper: no repair, and heads from the start."""
    row = f"prune {what} --calibration-samples 32 --set step={step}"
    return {
        "alike": f"{row} --method uniform",
        "first layer whole": f"{row} --method first-layer-whole",
        "adaptive": f"{row} --method adapt-pruner --set amplitude={step}",
    }


JOBS: dict[str, dict[str, str]] = {
    "shares-20": _shares("--params 113.3M", 0.1),
    "shares-40": _shares("--params 92M", 0.2),
    "shares-40-fine": _shares("--params 92M", 0.1),
    "shares-60": _shares("--params 70.8M", 0.3),
    "shares-20-plain": _plain_shares("--params 113.3M", 0.1),
    "shares-40-plain": _plain_shares("--params 92M", 0.1),
    "shares-60-plain": _plain_shares("--params 70.8M", 0.1),
    "gemma3-shares-20": _shares("gemma3-270m --params '80% of decoder'", 0.1),
    "gemma3-shares-40": _shares("gemma3-270m --params '60% of decoder'", 0.2),
    "gemma3-shares-60": _shares("gemma3-270m --params '40% of decoder'", 0.3),
    "saap": {
        "fused, stability": "prune --params 113.3M --method saap",
        "fused": "prune --params 113.3M --method saap --set 'metric=saap.saap(stability=false)'",
        "vector": "prune --params 113.3M --method saap --set 'metric=saap.saap(terms=vector,stability=false)'",
        "element": "prune --params 113.3M --method saap --set 'metric=saap.saap(terms=element,stability=false)'",
        "element, per parameter": "prune --params 113.3M --method saap --set 'metric=saap.saap(terms=element,stability=false)' "
        "--set chooser=rank.per_parameter",
    },
    "gisp": {
        "llm-pruner": "prune --params 92M --method llm-pruner",
        "adapt-pruner": "prune --params 92M --method adapt-pruner",
        "gisp": "prune --params 92M --method gisp --calibration-samples 16",
        "gisp, one shot on the same text": "prune --params 92M --method gisp --calibration-samples 16 --set step=1",
        "gisp, one shot on four times the text": "prune --params 92M --method gisp --set step=1",
    },
    "learnt-20": _learnt(20),
    "learnt-40": _learnt(40),
    "learnt-60": _learnt(60),
    "search-20": _searched(20),
    "bypass": {
        "wanda-sp": "prune --params 102.7M --method wanda-sp",
        "flap": "prune --params 102.7M --method flap",
        "start": "prune --params 102.7M --method bypass --set 'reduce=policy_gradient(updates=1,lr=1.0e-9)'",
        "learned": "prune --params 102.7M --method bypass --set 'reduce=policy_gradient(updates=200)'",
    },
    "evopress": {
        "20 %": "prune --params 113.3M --method evopress",
        "20 %, by block influence": "prune --params 113.3M --method shortgpt --set axes=[attentions,mlps]",
        "40 %": "prune --params 92M --method evopress",
        "40 %, by block influence": "prune --params 92M --method shortgpt --set axes=[attentions,mlps]",
        "40 %, of a model cut before": "prune {narrower} --params 92M --method evopress",
        "40 %, adaptive-ls-v1": "prune --params 92M --method adaptive-ls-v1",
    },
    "search-40": _searched(40),
    "efficientllm": {
        "between steps": "run --set method=efficientllm",
        "between steps, each": "run --set method=efficientllm --set reduce=between_steps",
        "one shot, then trained": "run --set method=efficientllm-one-cut",
        "5 stages": "run --set method=efficientllm --set reduce=units --set step=1 --set stages=5",
        "trained, not pruned": "run --set method=efficientllm --set reduce=units --set budget=100%",
    },
    "sheared": {
        "learnt masks": f"run --set method=sheared --set 'reduce=hard_concrete({_SHAPE})' --set budget=70_211_008 --set training.tokens=100k",
        "one uniform cut": "run --set method=efficientllm --set reduce=units --set budget=100% --set training.tokens=100k --set model={cut}",
    },
    "feed": {  # the fixed one is efficientllm/one shot, then trained
        "dynamic": "run --set method=efficientllm --set reduce=units --set step=1 "
        "--set 'training.feed=dynamic(references={references},every=10)'",
    },
}


def _at(out: Path, *, group: str, job: str, seed: int) -> dict[str, Any]:
    """The figures of a job; worked out unless they are there."""
    folder = out / f"{group}-{job}-{seed}".replace(", ", "-").replace(" ", "-")
    told = folder / "figures.json"
    if told.exists():
        return dict(json.loads(told.read_text(encoding="utf-8")))
    words = shlex.split(
        JOBS[group][job].format(cut=out / f"cut-{seed}", references=out / "references.json", narrower=out / f"narrower-{seed}")
    )
    if "{cut}" in JOBS[group][job]:
        _cut(out, seed)
    if "{narrower}" in JOBS[group][job]:
        _narrower(out, seed)
    if "{references}" in JOBS[group][job]:
        _references(out / "references.json")
    if words[0] == "prune":
        if folder.exists():
            shutil.rmtree(folder)
        text = ["--calibration", CORPUS.format("web_c4", "train"), "--seed", seed]
        model = words.pop(1) if not words[1].startswith("--") else MODEL
        run = json.loads(command("prune", model, "-o", folder / "model", "--json", *text, *words[1:]))
    else:
        run = json.loads(command("run", "benchmarks/claims.yaml", "-o", folder, "--json", "--set", f"seed={seed}", *words[1:]))
    texts = CHOOSING if "shares" in group else TEXTS
    if words[0] == "run":
        texts = texts | {name: CORPUS.format(name, "heldout") for name in DOMAINS}
    figures = {
        **{key: run[key] for key in ("params_after", "seconds", "peak_rss_bytes", "trained_tokens")},
        "perplexity": {name: _perplexity(folder / "model", text) for name, text in texts.items()},
        "widths": _widths(folder / "model"),
        "command": shlex.join(words),
    }
    told.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "model")
    return figures


def _perplexity(model: Any, text: str) -> float:
    return float(evaluated(model, text)["perplexity"])


def _widths(folder: Path) -> list[int]:
    """The number of neurons of each layer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers: list[dict[str, int]] = [{} for _ in range(config["num_hidden_layers"])]
    for number, differing in config.get("per_layer_config", {}).items():
        layers[int(number)] = differing
    return [layer.get("intermediate_size", config["intermediate_size"]) for layer in layers]


def _cut(out: Path, seed: int) -> None:
    """SmolLM2 cut to `_SHAPE`, in OUT/cut-SEED."""
    model: Any = MODEL
    for params, how in _CUTS.items():
        folder = out / (f"cut-{seed}" if params == list(_CUTS)[-1] else f"cut-{seed}-{params}")
        if not folder.exists():
            text = ["--calibration", CORPUS.format("web_c4", "train"), "--seed", seed, "--calibration-samples", 32]
            command("prune", model, "-o", folder, "--params", params, "--json", *text, *shlex.split(how))
        model = folder


def _narrower(out: Path, seed: int) -> None:
    """SmolLM2 cut and repaired by `adaptive-ls-v1` half of the way to 92 M, in OUT/narrower-SEED."""
    folder = out / f"narrower-{seed}"
    if not folder.exists():
        text = ["--calibration", CORPUS.format("web_c4", "train"), "--seed", seed]
        command("prune", MODEL, "-o", folder, "--params", "113.3M", "--method", "adaptive-ls-v1", "--json", *text)


def _references(path: Path) -> None:
    """The dense model's loss on each text of the training mixture, as reference."""
    if not path.exists():
        losses = {CORPUS.format(name, "train"): math.log(_perplexity(MODEL, CORPUS.format(name, "heldout"))) for name in DOMAINS}
        path.write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")


def _wanted(names: list[str]) -> Iterator[tuple[str, str]]:
    for group, jobs in JOBS.items():
        for job in jobs:
            if not names or group in names or f"{group}/{job}" in names:
                yield group, job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="GROUP | GROUP/JOB")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print("| group | job | seed | parameters | tokens | seconds | peak memory | perplexity |\n" + "|---" * 8 + "|")
    for seed in asked.seeds:
        for group, job in _wanted(asked.names):
            its = _at(asked.out, group=group, job=job, seed=seed)
            texts = ", ".join(f"{name} {value:.2f}" for name, value in its["perplexity"].items())
            print(
                f"| {group} | {job} | {seed} | {its['params_after']:,} | {its['trained_tokens']:,} | {its['seconds']:,.0f} | "
                f"{its['peak_rss_bytes'] / 2**30:.2f} GiB | {texts} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
