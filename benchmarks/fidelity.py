"""Our rows against their authors' own code: the same model, calibration, text and number of parameters.

    python benchmarks/fidelity.py [--only flap,wanda-sp] [-o fidelity]

Prunes SmolLM2-135M-Instruct once a line with `adapt-pruner prune`, calibrated on the token ids of `calibration_c4_64x128.json`, and
measures it with `adapt-pruner eval` on the first 40 windows of 512 tokens of WikiText-2's test text, both from the folder `--data`. The authors'
figures are those of their released code on the same text and ids. What is measured already is kept in the folder of `-o`.

One line is no row of ours but a control: `wanda-sp, behind what is pruned` measures each layer as the released code does, on what
comes out of the layers below when these are pruned already.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.axes import Mask
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.core.layerwise import streams
from adapt_pruner.core.surgery import cut, gated
from adapt_pruner.data.feeds import held_out_windows
from adapt_pruner.evaluate.perplexity import perplexity

MODEL = "smollm2-135m-instruct"
ALL_LAYERS = ["--set", "chooser=allocate.uniform"]
OUR_FOLD = ["--set", "metric=weights.taylor"]
BEHIND = "wanda-sp, behind what is pruned"
LINES: list[tuple[str, list[str], int, float]] = [  # name, options, parameters, the authors' perplexity
    ("llm-pruner", [], 113_613_120, 39.12),
    ("llm-pruner", [], 91_937_088, 160.19),
    ("llm-pruner", OUR_FOLD, 91_937_088, 160.19),
    ("llm-pruner", ALL_LAYERS, 113_208_768, 48.41),
    ("llm-pruner", ALL_LAYERS, 91_971_648, 338.62),
    ("llm-pruner", ALL_LAYERS + OUR_FOLD, 91_971_648, 338.62),
    ("llm-pruner", ALL_LAYERS, 73_101_888, 1526.75),
    ("flap", [], 113_330_304, 48.63),
    ("flap", [], 92_100_096, 649.16),
    ("flap", [], 70_720_128, 2880.78),
    ("wanda-sp", [], 113_260_608, 44.71),
    ("wanda-sp", [], 92_023_488, 1067.90),
    ("wanda-sp", [], 73_153_728, 2620.15),
    (BEHIND, [], 113_260_608, 44.71),
    (BEHIND, [], 92_023_488, 1067.90),
]


def measured(name: str, options: list[str], params: int, *, data: Path, out: Path) -> dict[str, Any]:
    """Parameters and perplexity of a line, by the command line."""
    slug = "-".join([name, *(option.split("=")[-1] for option in options[1::2]), str(params)])
    kept, model = out / f"{slug}.json", out / slug
    if not kept.exists():
        ids = ["--calibration-ids", str(data / "calibration_c4_64x128.json")]
        _command("prune", MODEL, "-o", str(model), "--params", str(params), "--method", name, *options, *ids)
        said = _command("eval", str(model), "--text", str(_text(data)), "--window", "512", "--max-windows", "40", "--json")
        (model / "model.safetensors").unlink()
        kept.write_text(said)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _command(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "adapt_pruner", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _text(data: Path) -> Path:
    return data / "wikitext2" / "test_public.txt"


@torch.no_grad()
def behind(params: int, *, data: Path) -> dict[str, Any]:
    """Wanda-sp with every layer measured behind pruned ones; sizes as `wanda-sp` has them at `params`: alike in all layers."""
    loaded = load(MODEL)
    model = loaded.model
    ids = torch.tensor(json.loads((data / "calibration_c4_64x128.json").read_text())["input_ids"])
    axes = families.axes(model)
    sizes = _alike(model, params)
    layers = model.get_decoder().layers
    flows = streams(model, layers, ids.split(2))
    mask = Mask()
    for index, layer in enumerate(layers):
        mine = [axis for axis in axes if axis.layer == index and axis.kind in sizes]
        squares = {axis.name: torch.zeros(axis.size * axis.gate.width, dtype=torch.float64) for axis in mine}
        handles = [
            model.get_submodule(axis.gate.module).register_forward_pre_hook(partial(_add_squares, squares[axis.name]))
            for axis in mine
        ]
        for flow in flows:
            flow.through(layer, index)
        for handle in handles:
            handle.remove()
        scores = {
            axis.name: (model.get_parameter(f"{axis.gate.module}.weight").abs().double().mean(0) * squares[axis.name].sqrt())
            .view(axis.size, -1)
            .sum(1)
            for axis in mine
        }
        here = Mask.of_sizes(mine, scores, {axis.name: sizes[axis.kind] for axis in mine})
        mask = Mask({**{name: mask[name] for name in mask}, **{name: here[name] for name in here}})
        with gated(model, axes, here):
            for flow in flows:
                flow.hidden = flow.through(layer, index)
    cut(model, axes, mask)
    windows = held_out_windows(loaded.tokenizer, source=str(_text(data)), window=512, max_windows=40)
    return {"params": count_parameters(model), "perplexity": perplexity(model, windows).perplexity}


def _add_squares(total: Tensor, module: Any, args: tuple[Tensor, ...]) -> None:
    total += args[0].flatten(0, -2).double().square().sum(0)


def _alike(model: Any, params: int) -> dict[str, int]:
    """The most KV heads and neurons a layer, by equal shares, that come to `params` or fewer."""
    axes = [axis for axis in families.axes(model) if axis.kind in ("kv_heads", "neurons")]
    total, neurons = count_parameters(model), next(axis.size for axis in axes if axis.kind == "neurons")
    for gone in range(neurons):
        sizes = {axis.kind: axis.size - int(axis.size * gone / neurons + 1e-9) for axis in axes}
        if total - sum((axis.size - sizes[axis.kind]) * axis.cost for axis in axes) <= params:
            return sizes
    raise SystemExit(f"no equal shares come to {params:,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows, with commas")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--output", type=Path, default=Path("fidelity"))
    asked = parser.parse_args()
    if not _text(asked.data).exists():
        sys.exit(f"{_text(asked.data)} is not there; name the folder that holds it with --data")
    asked.output.mkdir(parents=True, exist_ok=True)
    print("| row | options | parameters | authors' code | ours | ours / authors' |\n|---|---|---|---|---|---|")
    for name, options, params, theirs in LINES:
        if asked.only is not None and name.split(",")[0] not in asked.only.split(","):
            continue
        if name == BEHIND:
            found = behind(params, data=asked.data)
        else:
            found = measured(name, options, params, data=asked.data, out=asked.output)
        ours, said = found["perplexity"], " ".join(option for option in options if option != "--set")
        print(f"| {name} | {said} | {found['params']:,} | {theirs:,.2f} | {ours:,.2f} | {ours / theirs:.3f} |", flush=True)


if __name__ == "__main__":
    main()
