"""A model folder of somebody else: regular files, safetensors that lie in it, no adapter unasked, and no code by its JSON."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adapt_pruner.checkpoint.load import load, load_shapes
from adapt_pruner.checkpoint.save import save
from adapt_pruner.checkpoint.untrusted import code_in, without_code
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.export.verify import opened
from conftest import VOCAB, byte_tokenizer, read_json, tiny_model
from test_cli import call


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.fixture
def pickles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of torch.load, which is not let near it."""
    asked: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *words, **_: asked.append(words) or {})
    return asked


class Evil:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._marker,)


def changed(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps((read_json(path) if path.exists() else {}) | fields), encoding="utf-8")
    return folder


def sharded(folder: Path, shard: str) -> Path:
    """The folder with an index that names one shard for everything."""
    weights = folder / "model.safetensors"
    keys = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    weights.rename(folder / "moved.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, shard)}), encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize(
    "shard",
    ["weights.bin", "../elsewhere.safetensors", "/ABSOLUTE", "sub/x.safetensors", "..\\x.safetensors", ".safetensors", "x.safetensors/../w.bin",
     "x.safetensors\n", "x.SAFETENSORS.pt", ""],
)  # fmt: skip
def test_an_index_names_safetensors_of_its_folder(shard: str, folder: Path, pickles: list[Any]) -> None:
    absolute = str(shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors"))
    pickle.dump(Evil(folder.parent / "marker"), (folder / "weights.bin").open("wb"))
    sharded(folder, shard.replace("/ABSOLUTE", absolute))
    with pytest.raises(
        UsageError, match=r"index\.json of .* names the file .*; only \*\.safetensors files of the folder are read"
    ):
        load(str(folder))
    assert not pickles
    assert not (folder.parent / "marker").exists()


@pytest.mark.parametrize("index", ["[", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none_is_said(index: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(RunError, match="is damaged .*; get the file again"):
        load(str(folder))


def test_shards_that_are_links_into_a_cache_are_read(folder: Path) -> None:
    """As huggingface_hub keeps them."""
    before = load(str(folder)).model.state_dict()
    sharded(folder, "x-00001-of-00001.safetensors")
    (folder.parent / "blobs").mkdir()
    (folder / "moved.safetensors").rename(folder.parent / "blobs" / "a1")
    (folder / "x-00001-of-00001.safetensors").symlink_to(Path("..") / "blobs" / "a1")
    (folder / "config.json").rename(folder.parent / "blobs" / "a2")
    (folder / "config.json").symlink_to(Path("..") / "blobs" / "a2")
    after = load(str(folder)).model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("named", ["adapter_model.bin", "../x.safetensors", "../model.safetensors.index.json", 3, "weights.pt"])
def test_a_config_that_names_other_weights(named: Any, folder: Path, pickles: list[Any]) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(UsageError, match="of .* names the weights"):
        load(str(changed(folder, transformers_weights=named)))
    assert not pickles


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "model.safetensors",
             "additional_chat_templates/x.jinja", "merges.txt", "README.md", "mask.json", "pruning.json"],
)  # fmt: skip
def test_a_pipe_or_an_endless_device_is_refused(name: str, folder: Path, ask: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        for words in (
            ["inspect", folder],
            ["chat", folder, "x"],
            ["prune", folder, "-o", folder.parent / "out", "--params", "80%"],
        ):
            status, _, err = ask(*words)
            assert status == 2
            told = "device, a pipe or a socket" if name != "config.json" else "config.json"
            assert told in err
        path.unlink()


def test_a_file_that_is_too_large_to_be_read_whole(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(UsageError, match=r"tokenizer\.json has 268,435,457 bytes, and at most 268,435,456 are read"):
        load(str(folder))


def test_an_adapter_beside_the_weights_is_not_applied_in_silence(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    with pytest.raises(
        UsageError, match="has an adapter beside its weights .*; merge it with peft .* or remove adapter_config.json"
    ):
        load(str(folder))


FOREIGN = "somebody/kernel"
NAMING = [
    {"attn_implementation": FOREIGN}, {"_attn_implementation": FOREIGN}, {"_attn_implementation_internal": FOREIGN},
    {"attn_implementation": {"": FOREIGN}}, {"attn_implementation": f"{FOREIGN}@main:f"}, {"attn_implementation": f"paged|{FOREIGN}"},
    {"attn_implementation": "flash_attention_2"}, {"_experts_implementation": FOREIGN}, {"experts_implementation": "sonicmoe"},
    {"use_kernels": True}, {"kernel_config": {"kernel_mapping": {"RMSNorm": FOREIGN}}}, {"distributed_config": {"tp_size": 2}},
]  # fmt: skip


@pytest.mark.parametrize("fields", NAMING, ids=lambda fields: next(iter(fields)))
def test_kernels_that_a_config_names_are_neither_fetched_nor_passed_on(
    fields: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import hub_kernels

    asked: list[str] = []
    for name in ("get_kernel", "load_and_register_attn_kernel", "kernelize"):
        monkeypatch.setattr(hub_kernels, name, lambda *words, **_: asked.append(str(words)))
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", lambda *words, **_: asked.append(str(words)))
    plain = load(str(folder)).model.config
    for ours in (False, True):  # a config of unequal layers, which we build ourselves
        heterogeneous = {"per_layer_config": {"0": {"intermediate_size": plain.intermediate_size, **fields}}} if ours else {}
        if ours:
            (folder / "generation_config.json").unlink(missing_ok=True)
        changed(folder, **fields, **heterogeneous)
        loaded = load(str(folder))
        load_shapes(str(folder))
        assert not asked
        assert loaded.model.config._attn_implementation == plain._attn_implementation
        out = tmp_path / f"saved-{ours}"
        save(loaded.model, loaded.tokenizer, out, dtype=torch.float32)
        text = (out / "config.json").read_text()
        assert not any(
            word in text for word in (FOREIGN, "flash_attention", "sonicmoe", "use_kernels", "kernel_config", "tp_size")
        )


def test_fields_that_name_code_are_taken_out_at_any_depth() -> None:
    raw = {
        "a": {"b": [{"_attn_implementation": FOREIGN, "c": 1}]},
        "attn_implementation": "eager",
        "auto_map": {"AutoModel": "x.Y"},
    }
    assert without_code(raw) == {"a": {"b": [{"c": 1}]}, "attn_implementation": "eager"}
    assert code_in(raw) == [f"_attn_implementation: {FOREIGN}"]
    assert raw["a"]["b"][0]["_attn_implementation"] == FOREIGN, "the other is left as found"


def test_weights_quantised_deep_within_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"is quantised \(gptq\)"):
        load(str(changed(folder, text_config={"quantization_config": {"quant_method": "gptq"}})))


@pytest.mark.parametrize("kind", ["config", "tokenizer", "generate", "template"])
def test_code_of_a_folder_runs_with_the_flag_only(kind: str, folder: Path, tmp_path: Path, ask: Any) -> None:
    marker = tmp_path / "marker"
    code = (
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    )
    code += "class C(LlamaConfig): pass\nclass M(LlamaForCausalLM): pass\nclass T(PreTrainedTokenizerFast): pass\ndef generate(*a, **k): pass\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    if kind == "config":
        changed(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    elif kind == "tokenizer":
        changed(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]}, tokenizer_class="T")
    elif kind == "generate":
        (folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
        changed(folder, "generation_config.json", custom_generate=str(folder), auto_map={"AutoGeneration": "evil.C"})
    else:
        opens = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % marker  # noqa: UP031 (braces are the template's)
        (folder / "chat_template.jinja").write_text(opens, encoding="utf-8")
    status, _, err = ask("chat", folder, "hello", "--max-new-tokens", 2)
    assert not marker.exists(), err
    for words in (["inspect", folder], ["export", folder, "-o", tmp_path / "out", "--to", "padded"]):
        ask(*words)
        assert not marker.exists()
    if kind != "template":
        ask("chat", folder, "hello", "--max-new-tokens", 2, "--trust-remote-code")
        assert marker.exists() or (kind == "config" and status == 0), "the mark would be seen"


def test_what_names_code_does_not_travel_on_with_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Whoever loads our result with trust, which unequal layers need, has not looked at the code of a third."""
    changed(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "somebody/else--evil.T"]})
    changed(folder, auto_map={"AutoModelForSequenceClassification": "somebody/else--evil.M"})
    loaded = load(str(folder))
    save(loaded.model, loaded.tokenizer, tmp_path / "out", dtype=torch.float32)
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text(), path.name


def test_verify_looks_at_a_foreign_artefact_in_the_same_way(folder: Path, tmp_path: Path) -> None:
    """Its engine is stock transformers, which would follow all of it."""
    attacks: list[tuple[Any, str]] = [
        (lambda: changed(folder, attn_implementation=FOREIGN), "names code of the hub"),
        (lambda: changed(folder, "adapter_config.json", peft_type="LORA"), "has an adapter beside its weights"),
        (lambda: sharded(folder, "weights.bin"), "names the file 'weights.bin'"),
        (lambda: os.mkfifo(folder / "tokenizer.model"), "a device, a pipe or a socket"),
    ]
    for attack, said in attacks:
        attack()
        with pytest.raises(UsageError, match=said), opened(folder, context=8):
            pass
        shutil.rmtree(folder)
        tiny_model(vocab_size=VOCAB).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
