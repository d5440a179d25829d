"""Likelihoods of continuations are those of whole passes, one at a time, whatever form the model has."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.evaluate.task_sources import find_tasks
from adapt_pruner.evaluate.tasks import evaluate_tasks, harness_model, set_shots
from adapt_pruner.reduce.slice import slice_to
from conftest import LAYOUTS, VOCAB, byte_tokenizer, tiny_model
from test_tasks import ask, close, folder, needs_lm_eval, uneven

pytestmark = needs_lm_eval
__all__ = ["ask", "folder"]  # fixtures


def pairs_of(num_vocab: int, *, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts of many lengths, each with choices of many lengths, and pairs whose blank lies in the context."""
    draw = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [draw.randrange(3, num_vocab) for _ in range(draw.randint(low, high))]

    pairs = []
    for _ in range(5):
        context = some(1, 30)
        pairs += [(context, some(1, 8)) for _ in range(4)]
        pairs += [(context, [token]) for token in some(2, 2)]
    for _ in range(3):
        start, end = some(3, 12), some(2, 6)
        pairs += [(start + some(1, 3), end) for _ in range(2)]
    return pairs


@torch.no_grad()
def plainly(model: Any, pairs: Any, *, max_length: int = 512) -> list[tuple[float, bool]]:
    """One whole forward pass a pair."""
    answers = []
    for context, continuation in pairs:
        ids = (context + continuation)[-(max_length + 1) :][:-1]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(continuation) :].log_softmax(-1)
        wanted = torch.tensor(continuation)
        value = float(logits.gather(1, wanted[:, None]).double().sum())
        answers.append((value, bool((logits.argmax(-1) == wanted).all())))
    return answers


def likelihoods(model: Any, pairs: Any) -> list[tuple[float, bool]]:
    requests = [(None, context, continuation) for context, continuation in pairs]
    answers: list[tuple[float, bool]] = harness_model(model, byte_tokenizer())._loglikelihood_tokens(requests, disable_tqdm=True)
    return answers


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_likelihoods_are_those_of_whole_passes(layout: tuple[str, str]) -> None:
    """In every family, windows of sliding attention shorter than the contexts included, whatever is batched with what."""
    model = tiny_model(layout)
    pairs, before = pairs_of(model.config.vocab_size), model.config.to_dict()
    close(likelihoods(model, pairs), plainly(model, pairs))
    assert model.config.to_dict() == before, "the config is left as it was"


def test_layers_of_different_sizes_and_without_blocks() -> None:
    model, pairs = uneven(), pairs_of(VOCAB)
    close(likelihoods(model, pairs), plainly(model, pairs))


def test_a_sliced_model() -> None:
    model, pairs = tiny_model(vocab_size=VOCAB), pairs_of(VOCAB)
    batches = [torch.randint(3, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))]
    slice_to(model, 32, batches, dtype="float32")
    close(likelihoods(model, pairs), plainly(model, pairs))


def test_what_is_too_long_is_cut_on_the_left() -> None:
    model = tiny_model(max_position_embeddings=9)
    pairs = pairs_of(model.config.vocab_size)
    close(likelihoods(model, pairs), plainly(model, pairs, max_length=9))


@pytest.mark.parametrize(("num_vocab", "sequences"), [(259, 32), (2**15, 4), (2**20, 1)])
def test_a_large_vocabulary_takes_fewer_sequences_at_a_time(num_vocab: int, sequences: int) -> None:
    """So that the logits of a pass stay small."""
    assert harness_model(tiny_model(vocab_size=num_vocab), byte_tokenizer()).batch_size == sequences


def test_models_of_no_known_family_are_measured_too(
    ask: Any, folder: Path, text_file: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=128, init_std=0.3)
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    text = ["--text", str(text_file), "--window", "32", "--max-windows", "3", "--dtype", "float32"]
    asked = ["--tasks", "tiny_choices", "--task-dir", str(folder), "--trust-remote-code", "--cache-dir", str(tmp_path / "cache")]
    code, out, err = ask("eval", str(tmp_path / "opt"), *text, *asked, "--json")
    assert code == 0, err
    row = json.loads(out)
    windows = held_out_windows(byte_tokenizer(), source=str(text_file), window=32, max_windows=3)
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in windows]
    assert math.log(row["perplexity"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert row["decoder_params"] is None
    assert row["params"] == sum(parameter.numel() for parameter in model.parameters())
    wanted = find_tasks("tiny_choices", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, None)
    whole = evaluate_tasks(model, byte_tokenizer(), wanted, cache=tmp_path / "other")
    assert row["tasks"][0]["value"] == whole[0].value
    code, _, err = ask("prune", str(tmp_path / "opt"), "-o", str(tmp_path / "out"), "--params", "80%")
    assert code != 0
    assert "cannot be pruned" in err
