"""What interleaving, carried moments, distillation and adaptive pruning are each worth.

    python benchmarks/interleaving.py --budgets 105M 90M --seeds 0 [--variants NAME …] [--out runs/interleaving]

Every variant is one `adapt-pruner run benchmarks/interleaving.yaml` with a few `--set`, then one `adapt-pruner eval` on
WikiText-2; run it from the project's folder, with ../shared/data beside it. A variant that is done is not run again, one
that was stopped goes on. The table goes to stdout, the figures to OUT/results.json. About half an hour a trained variant on
two cores.
"""

import argparse
import json
from pathlib import Path

from command import command

WIKITEXT = "../shared/data/wikitext2/test_public.txt"
NO_TRAINING = ["training.source=null", "training.tokens=0"]
VARIANTS = {
    "a one-shot": ["stages=1", *NO_TRAINING],
    "b one-shot, trained": ["stages=1"],
    "c interleaved, moments reset": ["moments=reset"],
    "d interleaved, moments carried": [],
    "e d, distilled": ["training.objective=objectives.distil(temperature=1)"],
    "f uniform one-shot": ["method=uniform", "stages=1", *NO_TRAINING],
    "g b, uniform": ["method=uniform", "stages=1"],
    "h d, uniform": ["method=uniform"],
    "i e, one-shot": ["stages=1", "training.objective=objectives.distil(temperature=1)"],
    "j b, repaired": ["method=adaptive-ls-v1", "calibration.self_generated=32", "stages=1"],
    "k b, one ranking of all layers": ["method=efficientllm-one-cut", "axes=[neurons,kv_heads]", "stages=1"],
    "l k, repaired": [
        "method=adaptive-ls-v1",
        "calibration.self_generated=32",
        "chooser=rank.per_parameter",
        "head_metric=null",
        "stages=1",
    ],
    "m d, 80 % of the tokens in the last stage": ["training.shards=last=0.8"],
}


def measured(budget: str, seed: int, name: str, *, model: str, out: Path) -> dict[str, float]:
    """The figures of a variant; worked out unless they are there."""
    folder = out / f"{budget}-{name.partition(' ')[0]}-{seed}"
    told = folder / "figures.json"
    if not told.exists():
        changes = [*VARIANTS[name], f"budget={budget}", f"seed={seed}", f"model={model}"]
        words = [word for change in changes for word in ("--set", change)]
        run = json.loads(command("run", "benchmarks/interleaving.yaml", "-o", str(folder), "--json", *words))
        where = ["--text", WIKITEXT, "--window", "512", "--max-windows", "100", "--dtype", "auto", "--json"]
        wikitext = json.loads(command("eval", str(folder / "model"), *where))
        kept = {
            "params": run["params_after"], "corpus": run["perplexities"][-1], "dense_corpus": run["perplexities"][0],
            "wikitext2": wikitext["perplexity"],
            "tokens": run["trained_tokens"], "seconds": run["seconds"], "seconds_train": run["seconds_train"],
        }  # fmt: skip
        told.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    figures: dict[str, float] = json.loads(told.read_text(encoding="utf-8"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["105M", "90M"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="names, or their first letters")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/interleaving"))
    asked = parser.parse_args()
    names = [name for name in VARIANTS if name in asked.variants or name[0] in asked.variants]
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for budget in asked.budgets:
        for name in names:
            for seed in asked.seeds:
                figures = measured(budget, seed, name, model=asked.model, out=asked.out)
                rows.append({"budget": budget, "variant": name, "seed": seed, **figures})
                (asked.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
                print(
                    f"{budget} {name} (seed {seed}): corpus {figures['corpus']:.2f}, WikiText-2 {figures['wikitext2']:.2f}",
                    flush=True,
                )
    print("\n| budget | variant | seed | parameters | tokens | corpus | WikiText-2 |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['budget']} | {row['variant']} | {row['seed']} | {row['params']:,} | {row['tokens']:,} "
            f"| {row['corpus']:.2f} | {row['wikitext2']:.2f} |"
        )


if __name__ == "__main__":
    main()
