"""MobileLLM: a checkpoint that brings its own code is loaded, pruned and saved as a Llama, and its code is never run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from adapt_pruner.checkpoint.load import load, load_shapes
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.families.mobilellm import stock_config
from conftest import VOCAB, byte_tokenizer, read_json, tiny_model

ON_THE_HUB = {
    "architectures": ["MobileLLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    },
    "model_type": "mobilellm",
    "layer_sharing": False,
    "share_embedding": True,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random MobileLLM as the hub has it, whose code leaves a trace when it is run."""
    path = tmp_path / "mobilellm"
    tiny_model(("mobilellm", "mobilellm"), vocab_size=VOCAB).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    config = read_json(path / "config.json")
    config |= ON_THE_HUB | {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("configuration_mobilellm", "modeling_mobilellm"):
        (path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return path


def test_it_is_a_llama(folder: Path) -> None:
    ids = torch.randint(3, VOCAB, (2, 24))
    for trust in (False, True):
        loaded = load(str(folder), trust_remote_code=trust)
        assert type(loaded.model) is LlamaForCausalLM
        assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight, "share_embedding is tied embeddings"
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, tiny_model(("mobilellm", "mobilellm"), vocab_size=VOCAB)(ids).logits)
    assert not (folder.parent / "ran").exists()


def test_pruned_from_the_command_line_it_is_an_ordinary_llama(folder: Path, text_file: Path, tmp_path: Path) -> None:
    from adapt_pruner.cli import app

    out = tmp_path / "out"
    words = ["prune", folder, "-o", out, "--params", "75%", "--calibration", text_file, "--calibration-samples", 4]
    asked = ["--calibration-length", 16, "--set", "calibration.self_generated=0", "--set", "step=0.2"]
    said = CliRunner().invoke(app, [str(word) for word in [*words, *asked]])
    assert said.exit_code == 0, said.output
    config = read_json(out / "config.json")
    assert config["model_type"] == "pruned_llama", (
        "which stock transformers does not take for a Llama without --trust-remote-code"
    )
    assert config["tie_word_embeddings"]
    assert not {"share_embedding", "layer_sharing"} & set(config)
    assert all("mobilellm" not in where for where in config.get("auto_map", {}).values())
    again = load(str(out))
    assert count_parameters(again.model) <= 0.75 * count_parameters(load(str(folder)).model)
    assert not (folder.parent / "ran").exists()


def test_separate_heads_stay_separate() -> None:
    raw = {**ON_THE_HUB, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    assert stock_config(raw).tie_word_embeddings
    assert not stock_config(raw | {"share_embedding": False}).tie_word_embeddings
    assert stock_config(raw | {"share_embedding": False, "tie_word_embeddings": True}).tie_word_embeddings
    assert stock_config(raw | {"torch_dtype": "float16"}).dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_sharing": True}, r"runs every layer twice .*use a MobileLLM without -LS"),
        ({"intermediate_size": [40, 30, 20]}, r"intermediate_size of this MobileLLM is a list"),
    ],
)
def test_what_no_llama_computes_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | change))
    for read in (load, load_shapes):
        with pytest.raises(UsageError, match=said):
            read(str(folder))
