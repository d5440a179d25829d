"""Whether curvature foretells what pruning one layer costs: predicted and measured, one layer's MLP at a time.

    python benchmarks/layer_costs.py --params 113.3M [--model smollm2-135m-instruct] [--text SPEC] [--calibration-ids FILE]

One line for all layers (`rank.per_parameter` on `curvature.kfac`) says how many neurons each gives up; then each layer alone is repaired and
shut that far, the loss is measured on 2,048 tokens of --text, and everything is put back. Predicted is the sum of the scores.
"""

import argparse
from typing import Any

import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import Budget, count_parameters
from adapt_pruner.core.model.cut import gated
from adapt_pruner.data.windows import calibration_feed
from adapt_pruner.evaluate.anatomy import decoder_parameters
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.rank import per_parameter
from adapt_pruner.reduce.repair.closed_form import least_squares
from adapt_pruner.score.calibrate import mean_loss, score
from adapt_pruner.score.curvature import kfac


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--params", default="113.3M")
    parser.add_argument("--text", default="python-docs:heldout")
    parser.add_argument("--calibration", default="python-docs:train")
    parser.add_argument("--calibration-ids")
    asked = parser.parse_args()
    loaded = load(asked.model)
    model: Any = loaded.model
    common = {"samples": 64, "length": 128, "ids": asked.calibration_ids, "seed": 0}
    batches = calibration_feed(model, loaded.tokenizer, source=asked.calibration, **common)(1)
    unseen = calibration_feed(model, loaded.tokenizer, source=asked.text, samples=16, length=128, ids=None, seed=1)(1)
    axes = families.axes(model)
    neurons = [axis for axis in axes if axis.kind == "neurons"]
    scores, _ = score(model, neurons, batches, metrics=[kfac])
    dense, decoder = count_parameters(model), decoder_parameters(model)
    budget = Budget.parse(asked.params, dense=dense, decoder=decoder, outside=dense - decoder)
    sizes, _ = per_parameter(scores, neurons, budget, debt=Debt.none(neurons), step=1.0)
    whole = mean_loss(model, unseen, dtype="auto")
    total = [0.0, 0.0]
    print(f"{'layer':>5} {'neurons gone':>12} {'predicted':>10} {'measured':>10}   nats per token")
    for axis in neurons:
        if sizes[axis.name] == axis.size:
            continue
        mask = Mask.of_sizes([axis], scores, sizes)
        predicted = float(scores[axis.name][~mask[axis.name]].sum())
        weight = model.get_parameter(f"{axis.gate.module}.weight")
        before = weight.detach().clone()
        least_squares(model, axes, mask, batches)
        with gated(model, axes, mask):
            measured = mean_loss(model, unseen, dtype="auto") - whole
        with torch.no_grad():
            weight.copy_(before)
        total = [total[0] + predicted, total[1] + measured]
        print(f"{axis.layer:>5} {axis.size - sizes[axis.name]:>12,} {predicted:>10.4f} {measured:>10.4f}", flush=True)
    print(f"{'all':>5} {'':>12} {total[0]:>10.4f} {total[1]:>10.4f}")


if __name__ == "__main__":
    main()
