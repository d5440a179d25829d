"""Contract: a folder of ours that is loaded without `trust_remote_code` is right to the last bit, or refused with a word on what to pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.export import export
from adapt_pruner.reduce.repair.closed_form import mean_bias
from adapt_pruner.reduce.slice import slice_to
from conftest import LAYOUTS, VOCAB, byte_tokenizer, read_json, tiny_model
from strangers import ask_a_stranger
from test_checkpoint import pruned

WITHOUT = """
import json, os, sys, torch, warnings
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
sys.stdin = open(os.devnull)  # which transformers would ask
found, root = {}, sys.argv[1]
ids, text = torch.load(root + "/ids.pt"), "The quick brown fox"
for name in sorted(json.loads(sys.argv[2])):
    folder, expected = f"{root}/{name}", torch.load(f"{root}/{name}.pt")
    found[name] = []
    for loader, of in ((AutoModelForCausalLM, lambda model: model(ids).logits), (AutoModel, lambda model: model(ids).last_hidden_state)):
        try:
            with torch.no_grad():
                found[name].append("right" if torch.equal(of(loader.from_pretrained(folder)), expected[loader.__name__]) else "wrong")
        except Exception as error:
            found[name].append(str(error))
    found[name].append(AutoTokenizer.from_pretrained(folder)(text).input_ids == expected["tokens"])
print()
print(json.dumps(found))
"""


def even(layout: tuple[str, str]) -> Any:
    """A model whose layers are cut alike."""
    model = tiny_model(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    cut(model, axes, Mask({axis.name: torch.arange(axis.size) % 5 > 0 for axis in axes if axis.kind == "neurons"}))
    return model


def biased(layout: tuple[str, str], *, equal: bool) -> Any:
    """A model that a repair gave biases."""
    model = tiny_model(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    mask = Mask(
        {axis.name: torch.arange(axis.size) % 5 > (0 if equal else axis.layer or 0) for axis in axes if axis.kind == "neurons"}
    )
    mean_bias(model, axes, mask, [torch.randint(3, VOCAB, (2, 16))], dtype="auto")
    cut(model, axes, mask)
    return model


def lacking(layout: tuple[str, str], *blocks: str) -> Any:
    model = tiny_model(layout, vocab_size=VOCAB)
    cut(model, families.axes(model), Mask({f"layers.{block}": torch.tensor([False]) for block in blocks}))
    return model


def sliced(layout: tuple[str, str], width: int) -> Any:
    model = tiny_model(layout, vocab_size=VOCAB)
    slice_to(model, width, [torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(12))], dtype="float32")
    return model


def narrow(layout: tuple[str, str]) -> Any:
    """Another width of the stream, of which the heads are no divisor."""
    model = tiny_model(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    if not any(axis.name == "residual" for axis in axes):
        raise UsageError("no such axis")
    cut(model, axes, Mask({"residual": torch.arange(48) >= 7}))
    return model


KINDS: dict[str, Callable[[tuple[str, str]], Any]] = {
    "dense": lambda layout: tiny_model(layout, vocab_size=VOCAB),
    "even": even,
    "unequal": lambda layout: pruned(layout)[0],
    "unequal-heads": lambda layout: pruned(layout, kinds=("query_heads", "kv_heads"))[0],
    "biased": lambda layout: biased(layout, equal=True),
    "biased-unequal": lambda layout: biased(layout, equal=False),
    "no-attention": lambda layout: lacking(layout, "1.attentions"),
    "no-mlp": lambda layout: lacking(layout, "0.mlps", "2.mlps"),
    "no-blocks": lambda layout: lacking(layout, "0.attentions", "0.mlps"),
    "narrow": narrow,
    "sliced": lambda layout: sliced(layout, 40),
    "sliced-to-all": lambda layout: sliced(layout, 48),
    "padded": lambda layout: pruned(layout)[0],
    "uniform": even,
    "decilm": lambda layout: pruned(layout, kinds=("kv_heads", "neurons"))[0],
}  # fmt: skip

SLICED, PADDED = {"sliced", "sliced-to-all"}, {"padded", "uniform"}
LACKING = {"gemma3": {"decilm"} | SLICED, "phi3": {"decilm"} | SLICED | PADDED}
"""The kinds that a family must refuse; the others `decilm` alone, but for these layouts of theirs:"""
WHOLE = ("decilm", "llama", "mobilellm")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_without_the_flag_a_folder_is_right_or_refused(layout: tuple[str, str], tmp_path: Path) -> None:
    ids = torch.randint(3, VOCAB, (2, 24))
    torch.save(ids, tmp_path / "ids.pt")
    tokens, own = byte_tokenizer()("The quick brown fox").input_ids, {}
    for kind, made in KINDS.items():
        try:
            model = made(layout)
            if kind in ("padded", "uniform", "decilm"):
                export(Loaded(model, byte_tokenizer(), torch.float32, None, None, "tiny", 0), tmp_path / kind, to=kind)
            else:
                save(model, byte_tokenizer(), tmp_path / kind, dtype=torch.float32)
        except UsageError:  # there is no such model of this layout
            continue
        with torch.no_grad():
            logits, hidden = model(ids).logits, model.model(ids).last_hidden_state
            if kind != "decilm":
                assert torch.equal(load(str(tmp_path / kind)).model(ids).logits, logits)
        torch.save({"AutoModelForCausalLM": logits, "AutoModel": hidden, "tokens": tokens}, tmp_path / f"{kind}.pt")
        own[kind] = "auto_map" in read_json(tmp_path / kind / "config.json")
    found = json.loads(ask_a_stranger(WITHOUT, tmp_path, json.dumps(list(own)), folder=tmp_path).splitlines()[-1])
    assert KINDS.keys() - own.keys() == (set() if layout[1] in WHOLE else LACKING.get(layout[0], {"decilm"}))
    for kind, (causal, base, same_tokens) in found.items():
        for said in (causal, base):
            assert ("trust_remote_code=True" in said) if own[kind] else said == "right", f"{kind}: {said}"
        assert same_tokens
