"""python matrix_write.py FOLDER: checkpoints of tiny random models of every family, and what each computes, for .ci/matrix."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.export import export
from adapt_pruner.reduce.slice import slice_to
from conftest import LAYOUTS, VOCAB, byte_tokenizer, tiny_model
from test_checkpoint import pruned
from test_sums_and_tools import summed
from test_without_trust import biased

TEXT = "The quick brown fox jumps over 13 lazy dogs."


def expect(model: Any, folder: Path) -> None:
    """What the model computes, beside its folder: logits, the last hidden state, and tokens written greedily."""
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        logits, hidden = model(ids).logits, model.model(ids).last_hidden_state
        written = model.generate(ids[:1, :5], max_new_tokens=12, do_sample=False, eos_token_id=None)
    facts = {
        "ids": ids,
        "logits": logits,
        "hidden": hidden,
        "written": written,
        "tokens": torch.tensor(byte_tokenizer()(TEXT).input_ids),
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in facts.items()}, folder.with_suffix(".safetensors"))


def keep(model: Any, folder: Path, **how: Any) -> None:
    """A checkpoint as `prune` writes it."""
    save(model, byte_tokenizer(), folder, dtype=torch.float32, **how)
    expect(model, folder)


def main(out: Path) -> None:
    """Write all of them."""
    for layout in LAYOUTS:
        name = layout[1]
        keep(tiny_model(layout, vocab_size=VOCAB), out / f"{name}_dense")
        unequal, _ = pruned(layout)
        keep(unequal, out / f"{name}_unequal")
        for form in ("padded", "decilm"):
            model = unequal if form == "padded" else pruned(layout, kinds=("kv_heads", "neurons"))[0]
            try:
                export(Loaded(model, byte_tokenizer(), torch.float32, None, None, "tiny", 0), out / f"{name}_{form}", to=form)
            except UsageError:  # the form does not hold this layout
                continue
            expect(model, out / f"{name}_{form}")
        even = tiny_model(layout, vocab_size=VOCAB)
        axes = families.axes(even)
        cut(even, axes, Mask({axis.name: torch.arange(axis.size) % 5 > 0 for axis in axes if axis.kind == "neurons"}))
        try:
            export(Loaded(even, byte_tokenizer(), torch.float32, None, None, "tiny", 0), out / f"{name}_uniform", to="uniform")
            expect(even, out / f"{name}_uniform")
        except UsageError:  # of a model that is not laid out as a Llama; as a checkpoint it is a plain folder, too
            keep(even, out / f"{name}_even")
        lacking = tiny_model(layout, vocab_size=VOCAB)
        cut(
            lacking,
            families.axes(lacking),
            Mask({f"layers.{block}": torch.tensor([False]) for block in ("0.mlps", "1.attentions")}),
        )
        keep(lacking, out / f"{name}_lacking")
        keep(biased(layout, equal=True), out / f"{name}_biased")
        keep(biased(layout, equal=False), out / f"{name}_biased_unequal")
        keep(summed(layout), out / f"{name}_sums")
        narrow = tiny_model(layout, vocab_size=VOCAB)
        batches = [torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(12))]
        try:
            slice_to(narrow, 32, batches, dtype="float32")
        except UsageError:  # there is no sliced class of this layout
            continue
        keep(narrow, out / f"{name}_sliced")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
