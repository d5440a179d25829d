"""Adapt-Pruner's loop by hand: score, choose, cut, repair, train, save. The command `adapt-pruner run` does the same.

python examples/loop.py smollm2-135m-instruct python-docs:train small
"""

import sys

import torch

import adapt_pruner as ap
from adapt_pruner.score.blocks import cosine
from adapt_pruner.score.weights import taylor

STAGES, KEEP, STEP = 2, 0.8, 0.1


def main(name: str, text: str, out: str) -> None:
    """Prune the model `name` to 80 % in two stages, training on `text`, and save it in the folder `out`."""
    loaded = ap.load(name)
    model, tokenizer = loaded.model, loaded.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dense, mask, debt = ap.count_parameters(model), ap.Mask(), None
    for stage in range(1, STAGES + 1):
        target = round(dense * (1 - (1 - KEEP) * stage / STAGES))
        while (now := ap.count_parameters(model)) > target:
            batches = ap.text_batches(tokenizer, text, samples=16, length=128, seed=now)
            may_shrink = [axis for axis in ap.axes(model) if axis.kind in ("neurons", "kv_heads")]
            scores, loss = ap.score(model, ap.axes(model), batches, metrics=[taylor, cosine])
            budget = ap.Budget(keep=target, total=now)
            sizes, debt = ap.adaptive(
                scores, may_shrink, budget, debt=debt or ap.Debt.none(may_shrink), step=STEP, amplitude=STEP
            )
            chosen = ap.Mask.of_sizes(may_shrink, scores, sizes)
            ap.least_squares(model, ap.axes(model), chosen, batches)
            ap.cut(model, ap.axes(model), chosen, optimizer=optimizer)
            mask, debt = mask.then(chosen, ap.axes(model)), debt.after(chosen)
            print(f"stage {stage}: {ap.count_parameters(model):,} parameters; loss before this cut {loss:.3f}")
        losses = ap.train(model, ap.text_batches(tokenizer, text, samples=64, length=256, seed=stage), optimizer=optimizer)
        print(f"stage {stage}: trained, loss {losses[0]:.3f} → {losses[-1]:.3f}")
    ap.save(model, tokenizer, out, mask=mask, dtype=loaded.dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
