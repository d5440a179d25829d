"""How large a share of what `shrink` trains on should be conversations: SmolLM2-135M-Instruct, the same minutes for every share.

    python benchmarks/conversations.py [--minutes 15] [--params 105M] [--seeds 0 1 2] [--shares 0 1/3 1/2 2/3] [-o runs/conversations]
    python benchmarks/conversations.py --tokens 61440 --shares 1/2 --label distilled --set 'training.objective=objectives.distil(temperature=1)'

The second form tries another setting of `shrink` at a share, on the same tokens and the same conversations, whatever they cost. The rest
of what a run reads is C4. Each run has a cache of its own, so that it writes its conversations in its own minutes. Then the model is asked the 100 prompts that `eval --chat` has, and reads three
held-out texts, 16 windows each; the run itself says how far it is from the dense model on conversations that it held out (KL, in nats a
token). Call it from the project's folder, with ../shared/data beside it; tokens count by the clock, so compare only runs that had the
machine alike. A job that is done is skipped, and each writes OUT/SHARE-PARAMS-MINUTES-SEED.json; the table of all that is there goes to
stdout at the end.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from command import command, evaluated
from shrink import MEASURED, MODEL, TEXT

_PROMPTS, _WINDOWS = 100, 16


def _job(share: Fraction, asked: argparse.Namespace, seed: int) -> None:
    """Write the figures of a run, unless they are there."""
    out, length = asked.output, asked.tokens or f"{asked.minutes:g}"
    folder = out / f"{share.numerator}of{share.denominator}{asked.label}-{asked.params}-{length}-{seed}"
    told = folder.with_name(f"{folder.name}.json")
    if told.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # its minutes would not be those of one go
    os.environ["ADAPT_PRUNER_CACHE"] = str((out / "cache").resolve())
    if not asked.tokens:
        shutil.rmtree(out / "cache", ignore_errors=True)
    weights = {"self-chat#train": float(share), f"{TEXT}#train": float(1 - share)}
    mixture = json.dumps({spec: weight for spec, weight in weights.items() if weight})
    settings = dict.fromkeys(("training.source", "calibration.source"), mixture) if share else {"training.written": 0}
    if asked.tokens:
        settings = {"training.written": asked.written, "evaluation.chat": _PROMPTS, "evaluation.max_windows": 2} | settings
    words = [
        word for setting in [*(f"{key}={value}" for key, value in settings.items()), *asked.set] for word in ("--set", setting)
    ]
    words += ["--tokens", asked.tokens] if asked.tokens else ["--minutes", f"{asked.minutes:g}"]
    run = json.loads(
        command("shrink", MODEL, "-o", folder, "--text", TEXT, "--params", asked.params, "--seed", seed, *words, "--json")
    )
    if not asked.tokens:
        del os.environ["ADAPT_PRUNER_CACHE"]  # the dense model answers once for all runs
    model = folder / "model"
    made = json.loads((model / "pruning.json").read_text(encoding="utf-8"))
    bits = {name: evaluated(model, text, windows=_WINDOWS)["bits_per_byte"] for name, text in MEASURED.items()}
    figures = {
        "share": f"{share} {asked.label}".strip(), "size": asked.params, "asked": length, "seed": seed, "params": run["params_after"],
        "trained": run["trained_tokens"], "written": _texts(made), "bits_per_byte": bits,
        "kl": made["figures"].get("chat", [{}])[-1].get("kl"),
        "chat": json.loads(command("eval", model, "--chat", _PROMPTS, "--dtype", "auto", "--json"))["chat"],
    }  # fmt: skip
    told.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (model / "model.safetensors").unlink()


def _texts(made: dict[str, Any]) -> int:
    """How many texts the dense model wrote."""
    return sum(each["texts"] for each in made["figures"].get("written", {}).values())


def _table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """The means over seeds, and the right answers of each seed, as Markdown."""
    yield f"| minutes or tokens | share | tokens trained | conversations | right of {_PROMPTS} | mean | end | loop | KL | {' | '.join(MEASURED)} |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|" + "---:|" * len(MEASURED)
    for minutes, share in dict.fromkeys((line["asked"], line["share"]) for line in lines):
        its = sorted(
            (line for line in lines if (line["asked"], line["share"]) == (minutes, share)), key=lambda line: line["seed"]
        )
        right = ", ".join(str(len(line["chat"]["right"])) for line in its)
        counts = [f"{fmean(len(line['chat']['right']) for line in its):.1f}"]
        counts += [f"{fmean(line['chat'][key] for line in its):.1f}" for key in ("ended", "looping")]
        far = [line["kl"] for line in its if line.get("kl") is not None]
        counts.append(f"{fmean(far):.3f}" if far else "–")
        texts = [f"{fmean(line['bits_per_byte'][name] for line in its):.3f}" for name in MEASURED]
        tokens, written = (fmean(line[key] for line in its) for key in ("trained", "written"))
        yield f"| {minutes} | {share} | {tokens:,.0f} | {written:.0f} | {right} | {' | '.join([*counts, *texts])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--tokens", type=int, help="instead of minutes")
    parser.add_argument("--written", type=int, default=128, help="conversations, with --tokens")
    parser.add_argument("--params", default="105M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--shares", type=Fraction, nargs="+", default=[Fraction(1, 2), Fraction(0), Fraction(2, 3), Fraction(1, 3)]
    )
    parser.add_argument("--label", default="", help="of a change under trial, beside its share in the table")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of `shrink` under trial")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/conversations"))
    asked = parser.parse_args()
    for seed in asked.seeds:
        for share in asked.shares:
            _job(share, asked, seed)
    lines = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.output.glob("*.json"))]
    print("\n".join(_table(lines)))


if __name__ == "__main__":
    main()
