"""Exports compute what the model computes in tools that do not have this package, and what a form cannot hold is refused."""

import io
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from adapt_pruner import families, recipe
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.system import processes
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.export import export, plain
from adapt_pruner.export import onnx as onnx_form
from adapt_pruner.export import verify as proof
from adapt_pruner.export.loading import no_gguf
from adapt_pruner.export.padding import LayerSizes, layer_sizes, padded_weights
from adapt_pruner.export.verify import TOLERANCES, _failures, opened, tolerance_for, verify
from adapt_pruner.families.llama import decilm_width
from adapt_pruner.report import with_card
from conftest import LAYOUTS, read_json, tiny_model
from test_cli import call

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs,  1 at a time.\n" for i in range(30))
VOCAB = 290
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def bpe(*, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """A small trained tokenizer: byte-level as GPT-2's, or pieces and bytes as Llama 2's."""
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        words = [word.replace(" ", "▁") for word in TEXT.splitlines()]
        tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = data["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(data))
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def unequal(layout: tuple[str, str] = ("llama", "llama"), **changes: Any) -> Any:
    """A tiny model whose layers differ in neurons, KV heads and query heads, each kept at random."""
    model = tiny_model(layout, **({"vocab_size": VOCAB} | changes))
    generator, kept = torch.Generator().manual_seed(1), {}
    for axis in families.axes(model):
        if axis.layer is not None and axis.size > 1:
            stay = max(1, axis.size - axis.layer - (5 if axis.kind == "neurons" else 0))
            keep = torch.zeros(axis.groups, axis.size, dtype=torch.bool)
            for block in keep:
                block[torch.randperm(axis.size, generator=generator)[:stay]] = True
            kept[axis.name] = keep.flatten()
    cut(model, families.axes(model), Mask(kept))
    assert len(set(layer_sizes(model))) == len(layer_sizes(model))
    return model


def five_heads() -> Any:
    model = tiny_model(num_attention_heads=6, num_key_value_heads=6)
    cut(model, families.axes(model), Mask({f"layers.{i}.kv_heads": torch.tensor([True] * 5 + [False]) for i in range(3)}))
    return model


def as_loaded(model: Any, tokenizer: Any = None) -> Loaded:
    return Loaded(model, tokenizer or bpe(), torch.float32, None, None, "org/tiny", 0)


def compared(loaded: Loaded, artefact: Path, **options: Any) -> dict[str, Any]:
    ids = loaded.tokenizer(TEXT)["input_ids"]
    return verify(loaded, artefact, [torch.tensor([ids[:48]]), torch.tensor([ids[48:80]])], pieces=TEXT.splitlines(), **options)


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A pruned Llama whose output layers have biases that a repair gave them."""
    place = tmp_path_factory.mktemp("repaired")
    (place / "text.txt").write_text(TEXT * 5, encoding="utf-8")
    tiny_model(vocab_size=VOCAB).save_pretrained(place / "dense")
    bpe().save_pretrained(place / "dense")
    values = {
        "model": str(place / "dense"), "budget": "75%", "method": "flap", "calibration.source": str(place / "text.txt"),
        "calibration.samples": 4, "calibration.length": 16, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    with_card.prune(recipe.read({}, values=values), place / "pruned")
    loaded = load(str(place / "pruned"))
    assert loaded.model.config.output_bias
    return loaded


# Plain folders


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one[0] != "phi3"], ids=lambda layout: layout[1])
def test_a_padded_folder_is_one_of_the_stock_class(layout: tuple[str, str], tmp_path: Path) -> None:
    model = unequal(layout)
    (note,) = export(as_loaded(model), tmp_path / "out", to="padded")
    assert "what was pruned is zero" in note
    assert not list((tmp_path / "out").glob("*.py"))
    assert {"per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"}.isdisjoint(
        read_json(tmp_path / "out" / "config.json")
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(stock).__name__ == type(model).__name__.removeprefix("Pruned")
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(ids).logits, stock(ids).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("form", ["padded", "uniform", "decilm", "gguf"])
def test_what_cannot_hold_matrices_of_several_parts_says_so(form: str, tmp_path: Path) -> None:
    model = tiny_model(("phi3", "phi3"))
    said = {
        "gguf": "models of type 'phi3' have no GGUF form here",
        "decilm": "DeciLM is a Llama, and this model is of type 'phi3'",
    }.get(form, "queries, keys and values of this model are one matrix, qkv_proj, which zero-padding does not support yet; use")
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    with pytest.raises(UsageError, match=said):
        export(as_loaded(model), out, to=form)
    assert not out.exists()
    assert no_gguf(model.config.to_dict()) == "the export knows no form for models of type phi3"


def test_padding_moves_query_heads_to_the_kv_head_that_they_read() -> None:
    model = unequal()
    state = padded_weights(model, [LayerSizes(4, 3, 50)] * 3)
    now, head_dim = layer_sizes(model)[1], 8
    wide = state["model.layers.1.self_attn.q_proj.weight"].view(4, 3, head_dim, -1)
    narrow = model.model.layers[1].self_attn.q_proj.weight.view(now.kv_heads, now.query_heads, head_dim, -1)
    assert torch.equal(wide[: now.kv_heads, : now.query_heads], narrow)
    assert int(wide.count_nonzero()) == int(narrow.count_nonzero())
    with pytest.raises(ValueError, match="layer 0 has"):
        padded_weights(model, [LayerSizes(1, 1, 50)] * 3)


def test_biases_of_a_repair_find_a_place_in_a_stock_llama(repaired: Loaded, tmp_path: Path) -> None:
    export(repaired, tmp_path / "out", to="padded")
    found = compared(repaired, tmp_path / "out")
    assert found["passed"], found["failures"]
    assert found["engine"].endswith("LlamaForCausalLM")


def test_more_heads_are_padded_where_the_stock_config_wants_them_to_divide_the_width(tmp_path: Path) -> None:
    """A width of 48 takes 6 heads, not 5."""
    model = tiny_model(("llama", "llama-mha-biased"), vocab_size=VOCAB)
    cut(model, families.axes(model), Mask({f"layers.{i}.kv_heads": torch.tensor([True] * 5 + [False]) for i in range(3)}))
    with pytest.raises(UsageError, match="does not allow 5 heads: the width 48 is not a multiple of that; use the form padded"):
        export(as_loaded(model), tmp_path / "uniform", to="uniform")
    export(as_loaded(model), tmp_path / "out", to="padded")
    assert read_json(tmp_path / "out" / "config.json")["num_attention_heads"] == 6
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("form", ["padded", "uniform", "decilm", "gguf", "onnx"])
def test_weights_that_are_no_numbers_are_not_exported(form: str, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB)
    model.model.norm.weight.data[3] = math.nan
    path = tmp_path / ("model.gguf" if form == "gguf" else "model")
    with pytest.raises(RunError, match=r"was not written: model.norm.weight holds nan"):
        export(as_loaded(model), path, to=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dora", [False, True])
def test_what_the_card_of_a_padded_folder_says_of_dora(dora: bool, tmp_path: Path) -> None:
    """If peft once divides by no zero, the sentence in `plain.loading_padded` and docs/export.md goes."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    export(as_loaded(unequal()), tmp_path / "padded", to="padded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", use_dora=dora, target_modules=["gate_proj"]))
    with torch.no_grad():
        logits = adapted(torch.arange(3, 20)[None]).logits
    assert bool(logits.isnan().any()) == dora


def test_a_uniform_folder_holds_no_more_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"layers have between 33 and 35 MLP neurons.*--set equal_widths=true"):
        export(as_loaded(unequal()), tmp_path / "out", to="uniform")
    assert not (tmp_path / "out").exists()
    model = tiny_model(vocab_size=VOCAB)
    cut(model, families.axes(model), Mask({f"layers.{i}.neurons": torch.arange(40) > 7 for i in range(3)}))
    assert export(as_loaded(model), tmp_path / "out", to="uniform") == []
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"mask.json", "pruning.json", "modeling_pruned.py"})
    assert read_json(tmp_path / "out" / "config.json")["intermediate_size"] == 32
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits)


# DeciLM


def decilm_model() -> Any:
    """Of unequal MLPs and equal heads, fewer than the dense model's."""
    model = tiny_model(vocab_size=VOCAB, intermediate_size=600)
    kept = {f"layers.{i}.neurons": torch.arange(600) < width for i, width in enumerate((300, 256, 520))}
    kept |= {f"layers.{i}.kv_heads": torch.tensor([True, False, True]) for i in range(3)}
    cut(model, families.axes(model), Mask(kept))
    return model


def test_a_decilm_folder_loads_from_block_configs_alone(tmp_path: Path) -> None:
    loaded = as_loaded(decilm_model())
    (note,) = export(loaded, tmp_path / "out", to="decilm")
    assert "460 neurons to multiples of 256" in note
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert "per_layer_config" not in config
    assert [decilm_width(block["ffn"]["ffn_mult"], 48) for block in config["block_configs"]] == [512, 256, 768]
    with pytest.raises(UsageError, match="brings Python code"):
        compared(loaded, tmp_path / "out")
    found = compared(loaded, tmp_path / "out", trust_remote_code=True)
    assert found["passed"], found["failures"]
    assert found["engine"].endswith("DeciLMForCausalLM")


def test_a_decilm_folder_has_the_number_of_query_heads_that_its_layers_have(tmp_path: Path) -> None:
    """Two in each: two of one KV head, or one each of two KV heads. The most of both would be four."""
    model = tiny_model(vocab_size=VOCAB, intermediate_size=256)
    kept = {f"layers.{i}.kv_heads": torch.arange(3) < (2 if i == 1 else 1) for i in range(3)}
    kept["layers.1.query_heads"] = torch.tensor([True, False] * 3)
    cut(model, families.axes(model), Mask(kept))
    export(as_loaded(model), tmp_path / "out", to="decilm")
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 2)
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, 1, 2]
    found = compared(as_loaded(model), tmp_path / "out", trust_remote_code=True)
    assert found["passed"], found["failures"]


@pytest.mark.parametrize("form", ["padded", "decilm"])
def test_the_command_that_export_prints_works(
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_folder: Path,
    text_file: Path,
) -> None:
    _, said, _ = call(monkeypatch, capsys, "export", tiny_folder, "--to", form, "-o", tmp_path / "out")
    program, *words = shlex.split(said.rpartition("try: ")[2])
    assert program == "adapt-pruner"
    assert call(monkeypatch, capsys, *words, "--text", text_file, "--max-windows", "1")[0] == 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            unequal,
            r"one number of query heads for all layers, and those of this model have between 1 and 6; prune with --set "
            r"axes=\[neurons\]",
        ),
        (lambda: tiny_model(("llama", "qwen2")), "DeciLM is a Llama, and this model is of type 'qwen2'"),
        (lambda: tiny_model(("llama", "mistral")), "'mistral' with a sliding window"),
        (five_heads, "DeciLM's config wants the number of query heads, 5, to divide the width, 48; use the form padded"),
        (lambda: tiny_model(("llama", "llama-mha-biased")), "DeciLM has no biases"),
    ],
)
def test_what_decilm_cannot_say_is_refused_with_the_reason(model: Callable[[], Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export(as_loaded(model()), tmp_path / "out", to="decilm")
    assert list(tmp_path.iterdir()) == []


# ONNX


def test_a_rope_that_depends_on_the_length_of_a_text_is_no_graph(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match="this model's rope 'dynamic' is not; use the form padded"):
        export(as_loaded(tiny_model(vocab_size=VOCAB, rope_parameters=rope)), tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_an_onnx_graph_takes_any_batch_and_length(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    loaded = as_loaded(unequal(num_hidden_layers=2))
    attention = loaded.model.config._attn_implementation
    loaded.model.generation_config.temperature = 0.6  # without do_sample, which transformers refuses to save
    export(loaded, tmp_path / "out", to="onnx")
    assert loaded.model.config._attn_implementation == attention
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(3, VOCAB, (3, 41), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = loaded.model(ids, attention_mask=mask).logits
    assert torch.allclose(torch.from_numpy(found)[mask.bool()], expected[mask.bool()], atol=1e-4)
    checked = compared(loaded, tmp_path / "out")
    assert checked["passed"], checked["failures"]
    assert checked["encoding"]["same"] == 30
    told = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast", "the name in transformers 4, which optimum-onnx pins"
    (tmp_path / "out" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(RunError, match="onnxruntime cannot open"):
        compared(loaded, tmp_path / "out")


# What is refused


def test_every_error_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    for words, status, said in (
        (["export", tiny_folder, "--to", "ggml", "-o", tmp_path / "x"], 2, "form 'ggml' is not known; did you mean 'gguf'?"),
        (
            ["export", tiny_folder, "--to", "gguf", "-o", tmp_path / "x.gguf", "--quant", "q4_k"],
            2,
            "'q4_k' is not known; did you mean",
        ),
        (
            ["export", tiny_folder, "--to", "padded", "-o", tmp_path / "x", "--quant", "q8_0"],
            2,
            "--quant q8_0 works only with --to gguf",
        ),
        (["export", tiny_folder, "--to", "gguf", "-o", tmp_path / "there.gguf"], 2, "there.gguf exists"),
        (["export", tiny_folder, "--to", "gguf", "-o", tmp_path / "x"], 2, "name it x.gguf"),
        (["export", tiny_folder, "--to", "gguf", "-o", tmp_path / "x.gguf"], 2, "the tokenizer has no merges"),
        (["export", tiny_folder, "--to", "padded", "-o", tmp_path], 2, "is not empty"),
        (["verify", tiny_folder, tmp_path / "nowhere.gguf"], 2, "nowhere.gguf does not exist"),
        (["verify", tiny_folder, tmp_path / "empty"], 2, "is not an artefact"),
        (["verify", tiny_folder, tiny_folder, "--text", "self"], 2, "measure the model on its own text"),
    ):
        assert call(monkeypatch, capsys, *words)[0] == status, words
        error = call(monkeypatch, capsys, *words)[2].splitlines()[-1]
        assert error.startswith("error: "), error
        assert said in error, error
    assert {path.name for path in tmp_path.iterdir()} == {"there.gguf", "empty"}, "nothing half-written"


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("gguf", ["export", "--to", "gguf", "-o", "OUT.gguf"], "gguf"),
        ("onnxscript", ["export", "--to", "onnx", "-o", "OUT"], "onnx"),
        ("llama_cpp", ["export", "--to", "gguf", "-o", "OUT.gguf", "--quant", "q4_k_m"], "verify"),
        ("llama_cpp", ["verify", "THERE.gguf"], "verify"),
        ("onnxruntime", ["verify", "THERE"], "onnx"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    missing: str, words: list[str], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tiny_folder: Path,
) -> None:  # fmt: skip
    (tmp_path / "THERE").mkdir()
    (tmp_path / "THERE" / "model.onnx").touch()
    (tmp_path / "THERE.gguf").touch()
    monkeypatch.setitem(sys.modules, missing, None)
    places = [tmp_path / word if "OUT" in word or "THERE" in word else word for word in words[1:]]
    status, _, error = call(monkeypatch, capsys, words[0], tiny_folder, *places)
    assert status == 2
    assert to_install(extra) in error.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"THERE", "THERE.gguf"}


def test_a_sliced_model_is_refused_by_all_but_onnx(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB)
    model.config.sliced_hidden_size = 40
    for to in ("padded", "uniform", "decilm", "gguf"):
        with pytest.raises(UsageError, match="the model is sliced"):
            export(as_loaded(model), tmp_path / "x.gguf", to=to)


def test_a_model_without_some_attention_is_refused_by_all_but_onnx(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB)
    cut(model, families.axes(model), Mask({"layers.1.attentions": torch.tensor([False])}))
    for to in ("padded", "uniform", "decilm", "gguf"):
        with pytest.raises(UsageError, match="layer 1 has no attention, which this export to"):
            export(as_loaded(model), tmp_path / "x.gguf", to=to)


# verify


def test_verify_sees_another_model_and_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text_file: Path
) -> None:
    model = unequal()
    save(model, bpe(), tmp_path / "own", dtype=torch.float32)
    export(as_loaded(model), tmp_path / "right", to="padded")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)
    export(as_loaded(model), tmp_path / "wrong", to="padded")
    export(as_loaded(unequal(vocab_size=300)), tmp_path / "other", to="padded")
    options = ["--text", text_file, "--window", 32, "--max-windows", 2]
    status, out, _ = call(monkeypatch, capsys, "verify", tmp_path / "own", tmp_path / "right", *options)
    assert (status, "computes what the model computes" in out) == (0, True)
    status, out, error = call(monkeypatch, capsys, "verify", tmp_path / "own", tmp_path / "wrong", *options, "--json")
    found = json.loads(out)
    assert (status, found["passed"]) == (1, False)
    assert "does not compute what" in error
    assert found["tolerance"]["agreement"] == 0.98
    status, _, error = call(monkeypatch, capsys, "verify", tmp_path / "own", tmp_path / "other", *options)
    assert (status, "has 300 tokens and" in error, "comes from another model" in error) == (1, True, True)


def test_verify_runs_our_own_folder_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code in the folder imports nothing of this package: in the process that runs it, it cannot; the second is a real one."""
    loaded = as_loaded(unequal())
    save(loaded.model, loaded.tokenizer, tmp_path / "own", dtype=torch.float32)
    found = compared(loaded, tmp_path / "own", trust_remote_code=True)
    assert found["passed"], found["failures"]
    code = tmp_path / "own" / "modeling_pruned.py"
    code.write_text(code.read_text(encoding="utf-8") + "\nimport adapt_pruner\n", encoding="utf-8")
    monkeypatch.setattr(plain, "talking", processes.talking)
    with pytest.raises(RunError, match="stock transformers cannot load"):
        compared(loaded, tmp_path / "own", trust_remote_code=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"max_difference": 0.2}, "a logit is off by 0.1 standard deviations"),
        ({"max_difference": math.inf}, "a logit is off by inf"),
        ({"agreement": 0.9}, "agrees at 90.0% of positions"),
        ({"perplexity": {"model": 20.0, "artefact": 20.2}}, "perplexity is 20.2 instead of 20"),
        ({"perplexity": {"model": 20.0, "artefact": 19.0}}, "perplexity is 19 instead of 20"),
        ({"perplexity": {"model": 20.0, "artefact": math.inf}}, "perplexity is inf"),
        ({"greedy": {"parts_only_where_undecided": False}}, "greedy text differs"),
        ({"encoding": {"same": 90, "of": 100, "example": "x"}}, "10 of 100 pieces of text become other tokens, for example 'x'"),
        ({"encoding": None}, None),
    ],
)
def test_each_figure_can_fail(change: dict[str, Any], said: str | None) -> None:
    fine = {
        "max_difference": 0.01, "deviation": 2.0, "agreement": 1.0, "perplexity": {"model": 20.0, "artefact": 20.05},
        "greedy": {"parts_only_where_undecided": True}, "encoding": {"same": 100, "of": 100, "example": None},
    }  # fmt: skip
    found = _failures(fine | change, TOLERANCES[32])
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_tolerances_go_by_bits() -> None:
    assert tolerance_for("f32") is TOLERANCES[32]
    assert tolerance_for("bf16") is TOLERANCES[16]
    assert tolerance_for("q8_0") is TOLERANCES[8]
    assert tolerance_for("q6_k") is TOLERANCES[5]
    assert tolerance_for("q4_k_m") is TOLERANCES[4]
    assert tolerance_for("q3_k_s") is TOLERANCES[2]
    assert tolerance_for("iq1_s") is TOLERANCES[2]


def test_code_of_a_tokenizer_beside_a_graph_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked on the terminal, where a `yes |` would answer."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    bpe().save_pretrained(tmp_path)
    said = read_json(tmp_path / "tokenizer_config.json")
    said |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(
        onnx_form, "_session", lambda path: SimpleNamespace(get_outputs=lambda: [SimpleNamespace(shape=[1, 1, VOCAB])])
    )
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match="pass --trust-remote-code"), opened(tmp_path, context=8):
        pass
    assert not (tmp_path / "ran").exists()


def test_a_proof_reads_no_more_text_than_it_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    model, lines = unequal(), list[int]()
    save(model, bpe(), tmp_path / "own", dtype=torch.float32)
    export(as_loaded(model), tmp_path / "out", to="padded")

    def endless(spec: str) -> Any:
        for number in itertools.count():
            lines.append(number)
            yield f"Line {number}.\n"

    monkeypatch.setattr(proof, "texts", endless)
    assert proof.prove(str(tmp_path / "own"), tmp_path / "out", text=str(text_file), window=64)["passed"]
    assert len(lines) == 200
    with pytest.raises(UsageError, match="does not exist"):
        proof.prove(str(tmp_path / "own"), tmp_path / "nothing", text=str(text_file))
    assert len(lines) == 200, "none is read for what is not there"
