"""Growth: each way computes what the model did, loads in stock transformers and learns; what cannot grow is refused in a sentence."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.families import admission
from adapt_pruner.grow import deeper, more_tokens, wider, with_experts
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.page import page
from adapt_pruner.report.record import read_record
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run.conversations import dense_again
from adapt_pruner.run.start import begin
from adapt_pruner.train.objectives import lm
from conftest import VOCAB, assert_same_model, break_off, byte_tokenizer, log_of, saved, tiny_model, tiny_moe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from inheritance import CODE, ENGLISH, larger_tokenizer

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
LAYOUTS = [
    ("llama", "llama"), ("llama", "llama-mha-biased"), ("llama", "qwen2"), ("llama", "qwen3-untied"), ("phi3", "phi3"), ("gemma3", "gemma3"),
]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def wide_logits(model: Any) -> torch.Tensor:
    """In float64 throughout, norms included."""
    wide = copy.deepcopy(model).double()
    wide.config._experts_implementation = "eager"  # the others know no float64
    with admission.Wide():
        return logits(wide)


def longer_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with four more tokens: two of bytes, one of these, and a special one."""
    old = byte_tokenizer()
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary = {**old.get_vocab()}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    longer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    longer.add_tokens(["<code>"], special_tokens=True)
    return longer


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize(("kind", "times"), [("neurons", 1.5), ("kv_heads", 2), ("residual", 3)])
def test_a_wider_model_computes_the_same_and_its_copies_learn_apart(layout: tuple[str, str], kind: str, times: float) -> None:
    model = tiny_model(layout)
    size = next(axis.size for axis in families.axes(model) if axis.kind == kind)
    if layout[0] == "gemma3" and kind == "residual":
        with pytest.raises(
            UsageError, match="cannot have more residual by copying, or their layers differ; leave grow.residual out"
        ):
            wider(model, kind, 2 * size)
        return
    if layout[1] == "llama-mha-biased" and kind == "kv_heads":
        with pytest.raises(UsageError, match="no model of type 'llama' can have this size .* not a multiple"):
            wider(model, kind, 7)
    before = copy.deepcopy(model)
    larger = wider(model, kind, int(times * size))
    assert torch.equal(logits(model), logits(before)), "the model is left as found"
    assert {axis.size for axis in families.axes(larger) if axis.kind == kind} == {int(times * size)}
    assert float((logits(larger) - logits(model)).abs().max()) <= 1e-5
    exact = wider(copy.deepcopy(model).double(), kind, int(times * size))
    assert float((wide_logits(exact) - wide_logits(model)).abs().max()) <= 1e-9
    lm(larger, IDS).backward()
    axis = next(axis for axis in families.axes(larger) if axis.kind == kind)
    name, dim, width = next(
        (p.parameter, p.dim, p.width) for p in axis.slices if "bias" not in p.parameter and "norm" not in p.parameter
    )
    gradient = larger.get_parameter(name).grad
    assert gradient is not None
    first, copied = (gradient.narrow(dim, start * width, width).flatten() for start in (0, size))
    assert float(torch.cosine_similarity(first, copied, dim=0)) < 0.999, "AdamW would move equal gradients of any length alike"


@pytest.mark.parametrize(("layout", "kind"), [
    (("llama", "llama"), "mixtral"), (("llama", "mistral"), "mixtral"), (("llama", "qwen3"), "qwen3_moe"), (("llama", "qwen3-untied"), "qwen3_moe"),
])  # fmt: skip
@pytest.mark.parametrize(("experts", "per_token"), [(4, 2), (3, 1)])
def test_copied_experts_compute_what_the_mlp_did(
    layout: tuple[str, str], kind: str, experts: int, per_token: int, tmp_path: Path
) -> None:
    model = tiny_model(layout)
    larger = with_experts(model, experts, per_token)
    assert larger.config.model_type == kind
    assert float((logits(larger) - logits(model)).abs().max()) <= 1e-5
    exact = with_experts(copy.deepcopy(model).double(), experts, per_token)
    assert float((wide_logits(exact) - wide_logits(model)).abs().max()) <= 1e-6, "routers normalise in float32"
    larger.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(larger))
    routed = {(axis.size, axis.per_token) for axis in families.declared(larger) if axis.kind == "experts"}
    assert routed == {(experts, per_token)}


def test_stacked_layers_are_copies_and_say_that_they_compute_something_else(tmp_path: Path) -> None:
    model = tiny_model(("gemma3", "gemma3"))
    kinds, depth = model.config.layer_types, len(model.model.layers)
    larger = deeper(model, depth + 2)
    assert larger.config.layer_types == [*kinds, *kinds[:2]]
    for place in range(depth + 2):
        for ours, theirs in zip(
            larger.model.layers[place].parameters(), model.model.layers[place % depth].parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert not torch.allclose(logits(larger), logits(model), atol=1e-2)
    assert larger.model.layers[-1].self_attn.layer_idx == depth + 1
    told: list[Any] = []
    prune(read({"model": str(saved(tmp_path / "m", tiny_model(vocab_size=VOCAB), byte_tokenizer())), "grow": {"layers": 5}}),
          tmp_path / "out", listen=told.append)  # fmt: skip
    line = next(event.line() for event in told if event.kind == "grew")
    assert line.endswith("(layers 5); copied layers compute something else until they are trained")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 5


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_starts_as_the_mean_of_its_pieces(tied: bool) -> None:
    """Old tokens keep their rows and logits, also where the embedding has rows to spare."""
    old, new = byte_tokenizer(), longer_tokenizer()
    model = tiny_model(vocab_size=VOCAB + 1, tie_word_embeddings=tied)
    larger = more_tokens(model, old, new)
    assert larger.config.vocab_size == len(new) == VOCAB + 4
    whole, at = new.get_vocab(), old.get_vocab()
    for matrix, before in (
        (larger.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (larger.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ):
        assert torch.equal(matrix[:VOCAB], before[:VOCAB])
        assert torch.allclose(matrix[whole["the"]], before[[at["t"], at["h"], at["e"]]].mean(0))
        assert torch.allclose(matrix[whole["<code>"]], before[[at[letter] for letter in "<code>"]].mean(0))
    assert torch.equal(logits(larger)[..., :VOCAB], logits(model)[..., :VOCAB])
    assert (larger.get_input_embeddings().weight is larger.get_output_embeddings().weight) == tied
    with pytest.raises(UsageError, match="has no token that the model lacks; leave grow.vocabulary out"):
        more_tokens(model, old, old)
    with pytest.raises(UsageError, match="the model's token '.*' has number .*, and the tokenizer in words lacks it"):
        more_tokens(larger, new, old, name="words")


def grow_recipe(folder: Path, text: Path, **keys: Any) -> Recipe:
    return read({
        "model": str(folder), "grow": {"experts": 4, "neurons": 64}, "dtype": "float32",
        "training": {"source": f"{text}#train", "tokens": 1024, "batch_tokens": 256, "length": 64, "lr": 0.01},
        "evaluation": {"source": f"{text}#heldout", "window": 64, "max_windows": 4}, **keys,
    })  # fmt: skip


def test_a_run_grows_trains_shows_the_use_of_experts_and_goes_on_after_a_kill(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = grow_recipe(tiny_folder, text_file)
    assert (recipe.method, recipe.budget, recipe.reduce) == ("cpm-2", "100%", "nothing")
    outcome = run(recipe, tmp_path / "whole")
    assert outcome is not None
    figures, dense = outcome.figures, load(str(tiny_folder)).model
    assert figures["grown_from"] == count_parameters(dense) < figures["params_after"] == count_parameters(outcome.loaded.model)
    assert figures["perplexities"][1] < figures["perplexities"][0]
    assert {step["loss_is"] for step in log_of(tmp_path / "whole", "step")} == {"cross-entropy + balance of experts"}
    used = log_of(tmp_path / "whole", "evaluation")[-1]["used"]
    assert {len(shares) for shares in used.values()} == {4}
    assert all(sum(shares) == pytest.approx(2) for shares in used.values())
    shown = page(read_record(tmp_path / "whole"))
    assert "How often each expert was used" in shown
    assert "Share of the held-out tokens that the router of a layer sent to an expert, busiest first, at the end" in shown
    assert "grown to" in (tmp_path / "whole" / "model" / "README.md").read_text()

    break_off(recipe, tmp_path / "killed", kind="step", nth=3)
    run(recipe, tmp_path / "killed")
    assert_same_model(tmp_path / "killed", tmp_path / "whole")
    with pytest.raises(UsageError, match="has grown already, and the recipe now asks for another one; leave grow as it was"):
        break_off(recipe, tmp_path / "third", kind="step", nth=3)
        run(grow_recipe(tiny_folder, text_file, grow={"experts": 2}), tmp_path / "third", force_recipe=True)


def test_growth_and_cuts_in_one_run(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A budget with `grow` is of the grown model; the teacher and what is written again are the grown model, too."""
    grown_and_cut = read({
        "model": str(tiny_folder), "grow": {"neurons": 64}, "method": "magnitude-all", "budget": "90%",
        "training": {"source": str(text_file), "tokens": 256, "batch_tokens": 128, "length": 32, "objective": "objectives.distil"},
    })  # fmt: skip
    figures = prune(grown_and_cut, tmp_path / "out").figures
    assert figures["grown_from"] < figures["params_before"]
    assert figures["params_after"] <= 0.9 * figures["params_before"]
    work = begin(grown_and_cut, lambda event: None)
    again = dense_again(work, "a text is lost")
    assert torch.equal(logits(again), logits(work.model)), "growth is the same each time"


def test_tokens_are_added_by_a_recipe(tiny_folder: Path, tmp_path: Path) -> None:
    longer_tokenizer().save_pretrained(tmp_path / "words")
    recipe = read({"model": str(tiny_folder), "grow": {"vocabulary": str(tmp_path / "words")}})
    prune(recipe, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the code")["input_ids"][0] == len(byte_tokenizer()) + 1
    ids, first = torch.tensor([[5, 6, 7]]), load_file(tmp_path / "out" / "model.safetensors")
    model, dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), load(str(tiny_folder)).model
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[..., :VOCAB], dense(ids).logits, atol=1e-5)
    assert max(tensor.shape[0] for tensor in first.values()) == len(longer_tokenizer())


def test_the_balance_is_that_of_transformers() -> None:
    model = tiny_moe()
    with torch.no_grad():
        whole = model(IDS, labels=IDS, output_router_logits=True)
    assert model.config.router_aux_loss_coef > 0
    expected = whole.loss.double() * IDS[:, 1:].numel()
    found = lm(model, IDS, balance=model.config.router_aux_loss_coef)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.detach()) > float(lm(model, IDS).detach())
    found.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    dense = tiny_model()
    assert torch.equal(lm(dense, IDS, balance=0.1), lm(dense, IDS))


@pytest.mark.parametrize(("keys", "said"), [
    ({"grow": {"neurons": 30}}, "grow.neurons 30 is not above the 40 that the model has; raise it"),
    ({"grow": {"layers": 3}}, "grow.layers 3 is not above the 3 that the model has; raise it"),
    ({"grow": {"residual": 100}}, "grow.residual 100 is no whole multiple of the model's 48, so norms would compute something else; set it to 96"),
    ({"grow": {}, "budget": "100%"}, "grow names nothing that grows; set one of its keys, for example grow.experts to 4"),
    ({"grow": {"experts": 2, "experts_per_token": 3}}, "grow.experts_per_token 3 is above grow.experts 2; lower it"),
    ({"grow": {"layers": 4, "experts_per_token": 1}}, "grow.experts_per_token 1 would be ignored without experts; set grow.experts"),
    ({"grow": {"vocabulary": "nowhere"}}, "grow.vocabulary 'nowhere' is no folder with a tokenizer.json"),
    ({"grow": {"layers": 4}, "offload": "disk"}, "grow makes new weights in memory, so offload 'disk' cannot work; set offload to none"),
    ({"method": "cpm-2"}, "the recipe neither grows nor trains the model; set grow"),
    ({"method": "cpm-2", "grow": {"layers": 4}, "budget": "90%"}, "remain when reduce nothing removes nothing"),
])  # fmt: skip
def test_what_cannot_grow_is_refused(keys: dict[str, Any], said: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        prune(read({"model": str(tiny_folder), **keys}), tmp_path / "out")
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_models_without_a_class_with_experts_are_refused() -> None:
    with pytest.raises(
        UsageError, match="no class of transformers has the layers of a 'qwen2' model with experts .* llama, mistral, qwen3"
    ):
        with_experts(tiny_model(("llama", "qwen2")), 4, 2)
    with pytest.raises(UsageError, match=r"does not hold the grown weights: 'model.layers.0.* such as biases"):
        with_experts(tiny_model(("llama", "llama-mha-biased")), 4, 2)


def test_knowledge_is_inherited_in_stages_by_the_recipes_of_cpm_2(text_file: Path, tmp_path: Path) -> None:
    """The three recipes as they come, on tiny texts; the tokenizer as benchmarks/inheritance.py makes it."""
    code = [f"def area_{i}(width, height):\n    return width * height + {i}\n" for i in range(300)]
    old = byte_tokenizer()
    larger = larger_tokenizer(old, code, added=20)
    assert {token: larger.get_vocab()[token] for token in old.get_vocab()} == old.get_vocab()
    assert len(larger) == len(old) + 20
    assert larger.decode(larger(code[7])["input_ids"]) == code[7]
    assert len(larger(code[7])["input_ids"]) < 0.6 * len(old(code[7])["input_ids"])
    saved(tmp_path / "first", tiny_model(vocab_size=VOCAB), old)
    larger.save_pretrained(tmp_path / "second")
    (tmp_path / ENGLISH).write_text(
        "\n".join(json.dumps({"text": text_file.read_text()[i : i + 500]}) for i in range(0, 20000, 500))
    )
    (tmp_path / CODE).write_text("\n".join(json.dumps({"text": "\n".join(code[i : i + 5])}) for i in range(0, 300, 5)))
    small = {"tokens": 512, "batch_tokens": 256, "length": 32}
    values: dict[str, Any] = {f"training.{key}": value for key, value in small.items()} | {
        "evaluation.max_windows": 4,
        "evaluation.window": 32,
    }
    values["evaluation.source"] = {f"{tmp_path / name}#heldout": 1 for name in (ENGLISH, CODE)}
    models, model = [], tmp_path / "first"
    for stage in ("first", "second", "experts"):
        text = {f"{tmp_path / name}#train": 1 for name in ((ENGLISH,) if stage == "first" else (ENGLISH, CODE))}
        grow = {"grow.vocabulary": str(tmp_path / "second")} if stage == "second" else {}
        outcome = run(
            read(f"cpm-2-{stage}", values=values | grow | {"model": str(model), "training.source": text}),
            tmp_path / "runs" / stage,
        )
        assert outcome is not None
        models.append(outcome.loaded.model)
        model = tmp_path / "runs" / stage / "model"
    assert [found.config.vocab_size for found in models] == [len(old), len(larger), len(larger)]
    assert [found.config.model_type for found in models] == ["llama", "llama", "mixtral"]
    assert {name.rpartition("/")[2] for name in log_of(tmp_path / "runs" / "experts", "evaluation")[-1]["by_text"]} == {
        f"{ENGLISH}#heldout",
        f"{CODE}#heldout",
    }
