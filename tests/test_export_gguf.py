"""GGUF files compute in llama.cpp what the model computes in torch, and what llama.cpp cannot hold is refused."""

import json
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapt_pruner as ap
from adapt_pruner import families
from adapt_pruner.checkpoint import stored
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.model.shelf import InFile, is_shelved
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.export import export, gguf, gguf_tokenizer, verify
from adapt_pruner.export.engines import torch_engine
from adapt_pruner.export.loading import GGUF_TYPES, no_gguf
from adapt_pruner.grow import with_experts
from adapt_pruner.report import with_card
from conftest import LAYOUTS, tiny_config, tiny_model
from test_cli import call
from test_export import TEMPLATE, VOCAB, as_loaded, bpe, compared, repaired, unequal

__all__ = ["repaired"]  # a fixture


def fields(path: Path) -> dict[str, Any]:
    reader = pytest.importorskip("gguf", reason="gguf is not installed").GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


def test_a_gguf_file_is_complete(tmp_path: Path) -> None:
    tokenizer, model = bpe(), unequal()
    model.generation_config.eos_token_id = [2, 5]
    assert export(as_loaded(model, tokenizer), tmp_path / "x.gguf", to="gguf") == []
    found = fields(tmp_path / "x.gguf")
    assert found["general.architecture"] == "deci"
    assert found["deci.attention.head_count"] == [6, 2, 1]
    assert found["deci.attention.head_count_kv"] == [3, 2, 1]
    assert found["deci.feed_forward_length"] == [35, 34, 33]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 8
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(found["tokenizer.ggml.tokens"]) == VOCAB, "rows without a token are filled up"
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB - 1}]"
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert found["tokenizer.ggml.eot_token_id"] == 5
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == TEMPLATE


def test_a_file_says_what_it_is_and_under_which_licence(tmp_path: Path) -> None:
    """As its checkpoint has it from the model that was pruned."""
    folder = tmp_path / "runs" / "model"
    model = unequal()
    base = {"name": "Fox-1B", "hub": "foxes/Fox-1B", "license": "mit", "license_from": "README.md"}
    save(
        model,
        bpe(),
        folder,
        mask=Mask({}),
        dtype=torch.float32,
        pruning={"dense_params": 10**9, "base": base, "recipe": {}, "figures": {}, "history": []},
    )
    loaded = replace(as_loaded(model, bpe()), source=str(folder), mask=Mask({}))
    export(loaded, tmp_path / "x.gguf", to="gguf")
    found = fields(tmp_path / "x.gguf")
    assert found["general.name"].startswith("Fox-1B pruned to ")
    assert found["general.license"] == "mit"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/foxes/Fox-1B"


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([("Split", LLAMA3), ("ByteLevel", False)], "llama-bpe"),
        ([("Split", LLAMA3.replace("{1,3}", "")), ("ByteLevel", False)], "qwen2"),
        ([("Digits", True), ("ByteLevel", True)], "smollm"),
        ([("ByteLevel", True)], "gpt-2"),
        ([("Split", r"\w+"), ("ByteLevel", False)], None),
        ([("Digits", False), ("ByteLevel", True)], None),
        ([("Split", r"\d+"), ("Split", LLAMA3), ("ByteLevel", False)], None),
        ([("Digits", False), ("Digits", True), ("ByteLevel", True)], None),
    ],
)
def test_the_way_text_is_split_has_llama_cpps_name(steps: list[tuple[str, Any]], name: str | None) -> None:
    keys = {
        "Split": lambda value: {"pattern": {"Regex": value}, "behavior": "Isolated", "invert": False},
        "Digits": lambda value: {"individual_digits": value},
        "ByteLevel": lambda value: {"add_prefix_space": False, "trim_offsets": True, "use_regex": value},
    }
    described = [{"type": kind} | keys[kind](value) for kind, value in steps]
    assert gguf_tokenizer._pre({"type": "Sequence", "pretokenizers": described}) == name


# From file to file, without all weights in memory


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    reader = pytest.importorskip("gguf", reason="gguf is not installed").GGUFReader(path)
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


def keys(path: Path) -> dict[str, Any]:
    return {name: value for name, value in fields(path).items() if not name.startswith("GGUF.")}


def in_shards(folder: Path, model: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder of a model with several files of weights."""
    save(model, bpe(), folder, dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {f"model-{i}.safetensors": dict(list(weights.items())[i::3]) for i in range(3)}
    for shard, part in shards.items():
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Watched:
    """How many of the weights that were read from files are there at a time."""

    there = most = 0

    @classmethod
    def read(cls, place: InFile) -> torch.Tensor:
        weight = READ(place)
        weakref.finalize(weight, cls.gone)
        cls.there += 1
        cls.most = max(cls.most, cls.there)
        return weight

    @classmethod
    def gone(cls) -> None:
        cls.there -= 1


READ = InFile.read


@pytest.mark.parametrize("layout", [("llama", "qwen3"), ("gemma3", "gemma3")], ids=lambda layout: layout[1])
def test_weights_go_into_the_file_one_by_one(layout: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights that are read from the files, few are there at a time; the bytes are those of a model in memory."""
    folder = in_shards(tmp_path / "model", unequal(layout, **({"query_pre_attn_scalar": 16} if layout[0] == "gemma3" else {})))
    monkeypatch.setattr(InFile, "read", lambda place: Watched.read(place))
    for quant in (None, "q8_0"):
        export(load(str(folder)), tmp_path / f"memory-{quant}.gguf", to="gguf", quant=quant)
        Watched.there = Watched.most = 0
        with_card.export(str(folder), tmp_path / f"{quant}.gguf", to="gguf", quant=quant)
        assert 1 <= Watched.most <= 4, (
            "queries, keys and values of openelm are one matrix; the next is read while the last is there"
        )
        assert (tmp_path / f"{quant}.gguf").read_bytes() == (tmp_path / f"memory-{quant}.gguf").read_bytes()


@pytest.mark.parametrize(
    ("width", "tied", "quants"), [(96, True, ("q8_0", "q4_1", "q5_0")), (256, False, ("q8_0", "q4_0", "q5_1", "q4_k_m"))]
)
def test_what_is_quantised_here_is_what_llama_cpp_makes_of_a_float32_file(
    width: int, tied: bool, quants: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All types to the last bit. llama.cpp is only asked for k-quants, and for heads of 6 bits, and then reads no float32."""
    llama_cpp()
    folder = in_shards(
        tmp_path / "model", unequal(hidden_size=width, head_dim=32, intermediate_size=200, tie_word_embeddings=tied)
    )
    export(load(str(folder)), tmp_path / "f32.gguf", to="gguf", quant="f32", pad=32)
    quantise, between = gguf.llama_cpp.quantise, set[str]()

    def watched(source: Path, target: Path, quant: str) -> None:
        between.update(kind for name, (kind, _) in tensors(source).items() if "norm" not in name)
        quantise(source, target, quant)

    monkeypatch.setattr(gguf.llama_cpp, "quantise", watched)
    for quant in quants:
        ours, theirs = tmp_path / f"ours-{quant}.gguf", tmp_path / f"theirs-{quant}.gguf"
        between.clear()
        with_card.export(str(folder), ours, to="gguf", quant=quant)
        left = {quant.upper(), "BF16"} if width == 256 else set()
        assert between == {"q8_0": set(), "q4_k_m": {"BF16"}}.get(quant, left)
        quantise(tmp_path / "f32.gguf", theirs, quant)
        assert tensors(ours) == tensors(theirs)
        assert keys(ours) == keys(theirs)


def test_a_matrix_without_whole_blocks_stays_wide_as_llama_cpp_has_it(tmp_path: Path) -> None:
    llama_cpp()
    folder = in_shards(
        tmp_path / "model", unequal(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=140)
    )
    export(load(str(folder)), tmp_path / "f32.gguf", to="gguf", quant="f32", pad=32)
    for quant in ("q8_0", "q4_k_m"):
        gguf.llama_cpp.quantise(tmp_path / "f32.gguf", tmp_path / f"theirs-{quant}.gguf", quant)
        with_card.export(str(folder), tmp_path / f"ours-{quant}.gguf", to="gguf", quant=quant)
        assert tensors(tmp_path / f"ours-{quant}.gguf") == tensors(tmp_path / f"theirs-{quant}.gguf")
        assert "F16" in {kind for kind, _ in tensors(tmp_path / f"ours-{quant}.gguf").values()}


def test_q8_0_needs_no_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    export(as_loaded(unequal(hidden_size=256, head_dim=32)), tmp_path / "x.gguf", to="gguf", quant="q8_0")
    assert fields(tmp_path / "x.gguf")["general.file_type"] == 7
    with pytest.raises(UsageError, match="llama.cpp's library is not installed"):
        export(as_loaded(unequal(hidden_size=256, head_dim=32)), tmp_path / "y.gguf", to="gguf", quant="q4_0")
    assert not list(tmp_path.glob("*y.gguf*"))


@pytest.mark.parametrize("how", ["other names", "an own head in spite of the config", "GGUF"])
def test_weights_that_do_not_lie_there_as_the_model_has_them_are_loaded(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny_model(vocab_size=VOCAB, tie_word_embeddings=True)
    save(model, bpe(), folder, dtype=torch.float32)
    name = str(folder)
    assert is_shelved(stored.load_unread(name).model)
    weights = load_file(folder / "model.safetensors")
    if how == "other names":
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    elif how == "GGUF":
        export(load(name), tmp_path / "source.gguf", to="gguf", quant="f32")
        name = str(tmp_path / "source.gguf")
    else:
        weights["lm_head.weight"] = torch.ones_like(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    unread, whole = stored.load_unread(name), load(name)
    assert is_shelved(unread.model) == (how == "GGUF"), "of a GGUF file the cache keeps a folder"
    names, read = stored.weights_of(unread)
    assert names.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(read(key), weight) for key, weight in whole.model.state_dict().items())


def test_a_shard_that_goes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    folder = in_shards(tmp_path / "model", unequal())
    with_card.export(str(folder), tmp_path / "before.gguf", to="gguf")
    add_keys = gguf._add_keys

    def while_it_changes(*given: Any) -> None:
        add_keys(*given)
        with (folder / "model-1.safetensors").open("ab") as file:
            file.write(b"more")
        for shard in folder.glob("*.safetensors"):
            shard.unlink()

    monkeypatch.setattr(gguf, "_add_keys", while_it_changes)
    with pytest.raises(RunError, match=r"model-1.safetensors changed while it was read"):
        with_card.export(str(folder), tmp_path / "x.gguf", to="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before.Modelfile", "before.gguf", "model"]


# GGUF, run in llama.cpp


def llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed", exc_type=ImportError)


PLAIN = {
    "gemma3": {"query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": ["full_attention"] * 3},
}
ARCHITECTURES = {
    "llama": "deci",
    "mistral": "deci",
    "qwen2": "deci",
    "qwen3": "openelm",
    "qwen3-untied": "qwen3",
    "gemma3": "gemma3",
}


@pytest.mark.parametrize(
    "layout", [one for one in LAYOUTS if tiny_config(one).model_type in GGUF_TYPES], ids=lambda layout: layout[1]
)
@pytest.mark.parametrize("alike", [False, True], ids=["unequal", "equal"])
def test_llama_cpp_computes_what_torch_computes(layout: tuple[str, str], alike: bool, tmp_path: Path) -> None:
    llama_cpp()
    changes: dict[str, Any] = {"vocab_size": VOCAB} | PLAIN.get(layout[1], PLAIN["gemma3"] if layout[0] == "gemma3" else {})
    if layout[1] == "gemma3-capped":
        changes["attention_bias"] = False
    loaded = as_loaded(tiny_model(layout, **changes) if alike else unequal(layout, **changes))
    export(loaded, tmp_path / "x.gguf", to="gguf")
    found = compared(loaded, tmp_path / "x.gguf")
    assert found["passed"], found["failures"]
    bound = 0.02 if layout[0] == "gemma3" else 1e-4  # llama.cpp reads Gemma's GELU from a table in 16 bits
    assert found["max_difference"] < bound * found["deviation"]
    if not alike and layout[1] in ARCHITECTURES:
        assert f"({ARCHITECTURES[layout[1]]})" in found["engine"]


def test_a_forgotten_permutation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp()
    monkeypatch.setattr(gguf, "_neighbours", lambda tensor, head_dim: tensor)
    loaded = as_loaded(unequal())
    export(loaded, tmp_path / "x.gguf", to="gguf")
    found = compared(loaded, tmp_path / "x.gguf")
    assert not found["passed"]
    assert any("a logit is off" in failure for failure in found["failures"])


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_ropes_are_scaled_alike(kind: str, tmp_path: Path) -> None:
    llama_cpp()
    loaded = as_loaded(unequal(rope_parameters={"rope_type": kind, "rope_theta": 10000.0} | ROPES[kind]))
    export(loaded, tmp_path / "x.gguf", to="gguf")
    found = compared(loaded, tmp_path / "x.gguf")
    assert found["max_difference"] < 1e-4 * found["deviation"], found


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0} | ROPES["llama3"]


@pytest.mark.parametrize("what", ["heads", "rope"])
def test_a_qwen2_whose_layers_are_alike_and_not_as_llama_cpp_expects(what: str, tmp_path: Path) -> None:
    """Queries narrower than the stream, or positions scaled as Llama 3 does it: llama.cpp's qwen2 knows neither, its deci both."""
    llama_cpp()
    model = tiny_model(
        ("llama", "qwen2"), vocab_size=VOCAB, **PLAIN["qwen2"], **({} if what == "heads" else {"rope_parameters": LLAMA3_ROPE})
    )
    if what == "heads":
        axes = families.axes(model)
        cut(model, axes, Mask({axis.name: torch.arange(axis.size) < 2 for axis in axes if axis.kind == "kv_heads"}))
        assert model.config.hidden_size != model.config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    loaded = as_loaded(model)
    export(loaded, tmp_path / "x.gguf", to="gguf")
    found = compared(loaded, tmp_path / "x.gguf")
    assert found["passed"], found["failures"]
    assert "(deci)" in found["engine"]


def test_biases_of_a_repair_and_pieces_as_sentencepiece_has_them(repaired: Loaded, tmp_path: Path) -> None:
    llama_cpp()
    export(repaired, tmp_path / "repaired.gguf", to="gguf")
    assert compared(repaired, tmp_path / "repaired.gguf")["passed"]
    pieces = bpe(sentencepiece=True)
    loaded = as_loaded(unequal(vocab_size=len(pieces) + 2), pieces)
    export(loaded, tmp_path / "pieces.gguf", to="gguf")
    found = compared(loaded, tmp_path / "pieces.gguf")
    assert found["passed"], found["failures"]
    assert found["encoding"]["same"] == 30
    assert fields(tmp_path / "pieces.gguf")["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q4_k_m"])
def test_quantised_files_are_padded_to_whole_blocks(quant: str, tmp_path: Path) -> None:
    llama_cpp()
    model = unequal(hidden_size=256, head_dim=32, intermediate_size=200)
    loaded = as_loaded(model)
    notes = export(loaded, tmp_path / "x.gguf", to="gguf", quant=quant.upper())
    assert notes == []
    widths = fields(tmp_path / "x.gguf")["deci.feed_forward_length"]
    assert widths == ([195, 194, 193] if quant.endswith("16") else [224, 224, 224])
    found = compared(loaded, tmp_path / "x.gguf")
    assert found["stored"] == quant
    assert found["agreement"] >= 0.4
    assert found["max_difference"] < (3 if quant == "q4_k_m" else 0.5) * found["deviation"]


@pytest.mark.parametrize(("quant", "pad", "widths"), [(None, 32, [224] * 3), ("f16", 256, [256] * 3), ("q8_0", 256, [256] * 3)])
def test_a_file_may_be_padded_for_who_quantises_it_later(quant: str | None, pad: int, widths: list[int], tmp_path: Path) -> None:
    llama_cpp()
    loaded = as_loaded(unequal(hidden_size=256, head_dim=32, intermediate_size=200))
    assert export(loaded, tmp_path / "x.gguf", to="gguf", quant=quant, pad=pad) == []
    found = fields(tmp_path / "x.gguf")
    written = next(value for key, value in found.items() if key.endswith(".feed_forward_length"))
    assert written in (widths, widths[0])
    judged = compared(loaded, tmp_path / "x.gguf")
    assert judged["max_difference"] < (0.5 if quant else 0.01) * judged["deviation"], "zeros change nothing"


def test_a_padding_that_is_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pad 64 is not a block size of llama.cpp's types; use 32 or 256"):
        export(as_loaded(unequal()), tmp_path / "x.gguf", to="gguf", pad=64)
    with pytest.raises(
        UsageError, match="--pad 32 works only with --to gguf; the form padded sets its widths itself, so leave it out"
    ):
        export(as_loaded(unequal()), tmp_path / "x", to="padded", pad=32)


def test_a_file_is_judged_with_plain_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for repacked matrices are wrong on CPUs with AMX; what other code in the process opens is left alone."""
    llama_cpp()
    import llama_cpp as module

    seen, plain = [], module.Llama
    monkeypatch.setattr(module, "Llama", lambda *given, **named: seen.append(plain(*given, **named)) or seen[-1])
    loaded = as_loaded(unequal())
    export(loaded, tmp_path / "x.gguf", to="gguf")
    assert compared(loaded, tmp_path / "x.gguf")["passed"]
    assert [llama.model_params.use_extra_bufts for llama in seen] == [False]
    assert module.llama_cpp.llama_model_default_params().use_extra_bufts


def test_rows_that_are_no_whole_blocks_are_said(tmp_path: Path) -> None:
    llama_cpp()
    loaded = as_loaded(unequal(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=140))
    (note,) = export(loaded, tmp_path / "x.gguf", to="gguf", quant="q8_0")
    assert "matrices stay in 16 bits, since their rows of 8 numbers are not whole blocks of 32" in note


def test_damaged_files_and_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text_file: Path
) -> None:
    llama_cpp()
    loaded = as_loaded(unequal(("llama", "mistral")))
    (note,) = export(loaded, tmp_path / "x.gguf", to="gguf")
    assert "its context is set to the window of 16 tokens" in note
    assert fields(tmp_path / "x.gguf")["deci.context_length"] == 16
    save(loaded.model, loaded.tokenizer, tmp_path / "own", dtype=torch.float32)
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    status, _, error = call(monkeypatch, capsys, "verify", tmp_path / "own", tmp_path / "cut.gguf", "--text", text_file)
    assert status == 1
    assert "llama.cpp cannot load" in error.splitlines()[-1]


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path, repaired: Loaded) -> None:
    for model, said in (
        (tiny_model(("gemma3", "gemma3"), vocab_size=VOCAB), "scales attention by the head size 16"),
        (tiny_model(("gemma3", "gemma3-capped"), vocab_size=VOCAB, query_pre_attn_scalar=16), "no attention biases"),
        (tiny_model(vocab_size=VOCAB, hidden_act="gelu"), "computes silu, and this model has gelu"),
        (
            tiny_model(("llama", "qwen3"), vocab_size=VOCAB, rope_parameters=LLAMA3_ROPE),
            "rope scaling 'llama3' of a model of type qwen3",
        ),
        (
            tiny_model(vocab_size=VOCAB, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}),
            "rope scaling 'yarn'",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            export(as_loaded(model), tmp_path / "x.gguf", to="gguf")
        assert said in str(no_gguf(model.config.to_dict())), "the card knows it, too"
    assert list(tmp_path.iterdir()) == []


def test_a_gemma_whose_pattern_is_another_is_said(tmp_path: Path) -> None:
    """Older llama.cpp takes every sixth layer for a full one, whatever the file says."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(7)]
    model = tiny_model(("gemma3", "gemma3"), vocab_size=VOCAB, num_hidden_layers=7, layer_types=kinds, query_pre_attn_scalar=16)
    assert not any("llama.cpp" in note for note in export(as_loaded(model), tmp_path / "whole.gguf", to="gguf"))
    cut(model, families.axes(model), Mask({"layers": torch.tensor([False] + [True] * 6)}))
    (note,) = export(as_loaded(model), tmp_path / "cut.gguf", to="gguf")
    assert "full-attention layers of this model are not every sixth one" in note


def test_ollama_finds_what_to_read_beside_the_file(tmp_path: Path) -> None:
    """The file beside it, and each token that ends a turn."""
    tokenizer, model = bpe(), unequal()
    model.generation_config.eos_token_id = [2, 5]
    export(as_loaded(model, tokenizer), tmp_path / "x.gguf", to="gguf")
    first, second = (json.dumps(tokenizer.convert_ids_to_tokens(end)) for end in (2, 5))
    assert (tmp_path / "x.Modelfile").read_text(encoding="utf-8").splitlines() == [
        "# ollama create x -f x.Modelfile", "FROM ./x.gguf", f"PARAMETER stop {first}", f"PARAMETER stop {second}",
    ]  # fmt: skip


def test_a_file_for_each_number_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a table of bytes, and of the bits per byte that the engine reads from the file itself; here torch stands in for it."""
    folder = tmp_path / "model"
    save(unequal(), bpe(), folder, mask=Mask({}), dtype=torch.float32, pruning={"dense_params": 1, "figures": {}, "recipe": {}})
    opened: list[Path] = []

    @contextmanager
    def in_torch(artefact: Path, **how: Any) -> Any:
        opened.append(artefact)
        loaded = load(str(folder))
        yield torch_engine(loaded.model, loaded.tokenizer)

    monkeypatch.setattr(verify, "opened", in_torch)
    monkeypatch.setattr(gguf.llama_cpp, "library", lambda: None)
    words = ["export", folder, "--to", "gguf", "-o", tmp_path / "x.gguf"]
    status, out, err = call(monkeypatch, capsys, *words, "--quant", "f32,f16", "--json")
    assert status == 0, err
    files = json.loads(out)["files"]
    assert [Path(row["path"]).name for row in files] == ["x-f32.gguf", "x-f16.gguf"]
    assert [Path(row["path"]) for row in files] == opened
    assert files[0]["bytes"] == (tmp_path / "x-f32.gguf").stat().st_size > files[1]["bytes"]
    measured = ap.evaluate(str(folder), text="python-docs:heldout", window=256, max_windows=8, dtype="float32")
    assert files[0]["bits_per_byte"] == pytest.approx(measured.bits_per_byte, rel=1e-4)
    status, out, err = call(monkeypatch, capsys, *words, "--quant", "bf16,f16")
    assert status == 2
    assert "x-f16.gguf exists" in err
    assert not (tmp_path / "x-bf16.gguf").exists(), "nothing is written if one of them cannot be"


def with_unequal_experts(kind: str) -> Loaded:
    """Mixtral (of `llama`) or Qwen3-MoE (of `qwen3`) as grown, with experts that differ."""
    model = with_experts(tiny_model(("llama", kind), vocab_size=VOCAB), 4, 2)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.mul_(torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(3)) * 4)
    return as_loaded(model, bpe())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_file_of_experts_says_how_many_there_are(kind: str, tmp_path: Path) -> None:
    loaded = with_unequal_experts(kind)
    assert export(loaded, tmp_path / "x.gguf", to="gguf") == []
    arch = GGUF_TYPES[loaded.model.config.model_type]
    found = fields(tmp_path / "x.gguf")
    assert (found["general.architecture"], found[f"{arch}.expert_count"], found[f"{arch}.expert_used_count"]) == (arch, 4, 2)
    assert found[f"{arch}.expert_feed_forward_length"] == loaded.model.config.intermediate_size


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_experts_compute_in_llama_cpp_what_they_do_here(kind: str, tmp_path: Path) -> None:
    """In float32 and 8 bits."""
    llama_cpp()
    loaded = with_unequal_experts(kind)
    export(loaded, tmp_path / "x.gguf", to="gguf")
    result = compared(loaded, tmp_path / "x.gguf")
    assert result["passed"], result["failures"]
    assert result["max_difference"] < 1e-4
    export(loaded, tmp_path / "q8.gguf", to="gguf", quant="q8_0")
    assert (result := compared(loaded, tmp_path / "q8.gguf"))["passed"], result["failures"]


def test_experts_that_llama_cpp_would_compute_otherwise_are_refused(tmp_path: Path) -> None:
    model = with_experts(tiny_model(("llama", "qwen3"), vocab_size=VOCAB), 4, 2)
    model.config.norm_topk_prob = False
    assert "norm_topk_prob" in (no_gguf(model.config.to_dict()) or "")
    with pytest.raises(UsageError, match="norm_topk_prob"):
        export(as_loaded(model, bpe()), tmp_path / "x.gguf", to="gguf")
    model = with_experts(tiny_model(("llama", "llama"), vocab_size=VOCAB), 4, 2)
    model.config.output_bias = True
    assert "biases that a repair added" in (no_gguf(model.config.to_dict()) or "")
    with pytest.raises(UsageError, match="no place for the biases that a repair gave this"):
        export(as_loaded(model, bpe()), tmp_path / "z.gguf", to="gguf")
    model.config.output_bias = False
    cut(model, families.axes(model), Mask({"layers.1.experts": torch.tensor([True, False, True, True])}))
    with pytest.raises(UsageError, match="only in layers that are all alike, and those of this model differ"):
        export(as_loaded(model, bpe()), tmp_path / "y.gguf", to="gguf")
    assert not list(tmp_path.iterdir())
