"""Draws of calibration text for `compare --calibration-ids`: the first tokens of random documents, each in one draw at most.

    python benchmarks/draws.py [--text '../shared/data/corpus/web_c4/*.jsonl.gz'] [--numbers 1 2] [-o runs/draws]

Writes 1.json, 2.json, …: 64 sequences of 128 tokens, in the form of ../shared/data/calibration_c4_64x128.json, whose sequences are in none of
them. The same call gives the same files.
"""

import argparse
import json
import random
from pathlib import Path

from adapt_pruner.checkpoint.load import load
from adapt_pruner.data.sources import documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer counts")
    parser.add_argument("--text", default="../shared/data/corpus/web_c4/*.jsonl.gz")
    parser.add_argument("--besides", type=Path, default=Path("../shared/data/calibration_c4_64x128.json"))
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/draws"))
    asked = parser.parse_args()
    tokenizer = load(asked.model).tokenizer
    taken = {tuple(row) for row in json.loads(asked.besides.read_text())["input_ids"]}
    texts = list(documents(asked.text))
    random.Random(0).shuffle(texts)
    rows: list[tuple[int, ...]] = []
    for text in texts:
        row = tuple(tokenizer(text[: 20 * asked.length]).input_ids[: asked.length])
        if len(row) == asked.length and row not in taken:
            taken.add(row)
            rows.append(row)
        if len(rows) == asked.samples * max(asked.numbers):
            break
    else:
        raise SystemExit(f"{asked.text} has {len(rows):,} documents of {asked.length} tokens; give more text or fewer draws")
    asked.output.mkdir(parents=True, exist_ok=True)
    for number in asked.numbers:
        drawn = rows[asked.samples * (number - 1) : asked.samples * number]
        told = {"tokenizer": asked.model, "source": f"draw {number} of {asked.text}", "input_ids": drawn}
        (asked.output / f"{number}.json").write_text(json.dumps(told))
        print(asked.output / f"{number}.json")


if __name__ == "__main__":
    main()
