"""`reduce: sparse_training`: what a step learns, the masks at the end, runs that are broken off, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.modeling_pruned import add_block_sums
from adapt_pruner.core.model.pattern import Pattern
from adapt_pruner.core.model.weight_mask import WeightMask, largest, linear_layers, oriented
from adapt_pruner.errors import UsageError
from adapt_pruner.export import export
from adapt_pruner.export.loading import no_gguf
from adapt_pruner.recipe import read
from adapt_pruner.reduce.sparse_training import masked
from adapt_pruner.report.with_card import prune, run
from conftest import assert_refused, assert_same_model, break_off, log_of, read_json, tiny_model
from strangers import ask_a_stranger

TWO_OF_FOUR = Pattern.parse("2:4")


def recipe_of(folder: Path, text: Path, **more: Any) -> Any:
    training = {"source": str(text), "tokens": 1024, "batch_tokens": 128, "length": 32, "lr": 3e-3, "micro_batch_tokens": 64}
    return read({
        "model": str(folder), "method": "ast", "dtype": "float32", "reduce": "sparse_training(every=2)",
        "calibration": {"source": str(text), "samples": 8, "length": 32}, "training": training | more.pop("training", {}), **more,
    })  # fmt: skip


def test_masked_weights_do_not_count_and_learn_all_the_same() -> None:
    model, twin = tiny_model(), tiny_model()
    mask = WeightMask(
        {name: largest(oriented(module).abs(), TWO_OF_FOUR) for name, module in linear_layers(model).items()}, TWO_OF_FOUR
    )
    mask.apply(twin)
    ids = torch.arange(3, 27)[None]
    with masked(model, mask):
        logits = model(ids).logits
    expected = twin(ids).logits
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name  # type: ignore[arg-type]
    name = "model.layers.1.mlp.down_proj"
    assert model.get_submodule(name).weight.grad[~mask.kept[name]].abs().max() > 0
    assert list(dict(model.named_parameters())) == list(dict(twin.named_parameters()))
    assert not torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("scores", ["magnitude", "wanda"])
def test_it_ends_with_exact_masks_and_a_killed_run_ends_the_same(
    scores: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_folder, text_file, reduce=f"sparse_training(every=3, scores={scores})", checkpoint_minutes=0)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="step", nth=5)
    run(recipe, tmp_path / "broken")
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    loaded = load(str(tmp_path / "whole" / "model"))
    assert loaded.weight_mask is not None
    assert loaded.weight_mask.broken(loaded.model) == []
    assert loaded.weight_mask.unmasked(loaded.model) == []
    assert loaded.weight_mask == load(str(tmp_path / "broken" / "model")).weight_mask
    told = log_of(tmp_path / "whole", "masks_learnt")
    assert [line["done"] for line in told] == [3, 6, 8]
    assert all(0 < line["flipped"] < 0.5 for line in told)


def test_masks_are_not_learnt_again_once_they_are_final(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file, reduce="sparse_training(every=2, share=0.5)", checkpoint_minutes=0)
    run(recipe, tmp_path / "whole")
    (saves,) = [n for n, line in enumerate(log_of(tmp_path / "whole", "saved"), 1) if line["path"].endswith("stage-1-cut-1")]
    break_off(recipe, tmp_path / "broken", kind="saved", nth=saves)
    run(recipe, tmp_path / "broken")
    assert len(log_of(tmp_path / "broken", "cut")) == 1
    assert_same_model(tmp_path / "whole", tmp_path / "broken")


def test_masks_rest_for_the_rest_of_the_rows(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run(recipe_of(tiny_folder, text_file, reduce="sparse_training(every=2, share=0.5)"), tmp_path / "run")
    assert [line["done"] for line in log_of(tmp_path / "run", "masks_learnt")] == [2, 4]
    assert [line["step"] for line in log_of(tmp_path / "run", "step")] == list(range(1, 9))
    loaded = load(str(tmp_path / "run" / "model"))
    assert loaded.weight_mask is not None
    assert loaded.weight_mask.broken(loaded.model) == []


def test_decay_acts_on_masked_weights_alone_and_rises(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """With gradients that are next to nothing beside it, decay brings masked weights down step by step and leaves the others."""
    from adapt_pruner.reduce.sparse_training import SparseTraining, _draw_to_zero

    model = tiny_model()
    mask = WeightMask({"model.layers.0.mlp.down_proj": torch.arange(48 * 40).view(48, 40) % 4 < 2}, TWO_OF_FOUR)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.grad = torch.ones_like(weight)
    _draw_to_zero(model, mask, 0.5)
    keep = mask.kept["model.layers.0.mlp.down_proj"]
    assert torch.equal(weight.grad[keep], torch.ones(int(keep.sum())))
    assert torch.allclose(weight.grad[~keep], 1 + 0.5 * weight.detach()[~keep])
    learner = SparseTraining(decay=1.0, ramp=0.5)
    assert [learner._strength(read) for read in (0, 0.25, 0.5, 1)] == [0.0, 0.5, 1.0, 1.0]
    assert SparseTraining(decay=1.0, ramp=0.0)._strength(0) == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"source": None, "tokens": 0}}, "the recipe trains nothing; set training.source"),
        ({"training": {"lora": {"rank": 2}}}, "does not work with training.lora; leave it out"),
        ({"training": {"compile": True, "gradient_checkpointing": True}}, "training.compile and training.gradient_checkpointing"),
        ({"parallel": "fsdp"}, "does not work with parallel=fsdp"),
        ({"moments": "reset"}, "does not work with moments=reset"),
        ({"sparsity": "8:32"}, "which is not a multiple of 32"),
        ({"reduce": "sparse_training(slorb=16)"}, "mlp.down_proj has 40 inputs, which is not a multiple of slorb=16"),
        ({"budget": "80%"}, "makes weights zero and removes none"),
    ],
)
def test_what_masks_do_not_go_with_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, **changes), tmp_path / "run", said)


def test_a_sparse_model_is_no_start(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    start = read({"model": str(tiny_folder), "method": "magnitude-sparse", "sparsity": "2:4"})
    prune(start, tmp_path / "sparse")
    assert_refused(
        lambda: recipe_of(tmp_path / "sparse", text_file),
        tmp_path / "run",
        "has zeros already (2:4), and ast needs dense weights",
    )


STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(sum(parameter.numel() for parameter in model.parameters()), float(model(torch.arange(3, 27)[None]).logits.double().abs().sum()))
"""


def test_sums_of_blocks_stay_in_the_checkpoint_and_load_anywhere(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file, reduce="sparse_training(every=3, slorb=8)", checkpoint_minutes=0)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="step", nth=5)
    run(recipe, tmp_path / "broken")
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    made, dense = load(str(tmp_path / "whole" / "model")), load(str(tiny_folder)).model
    assert made.weight_mask is not None
    assert made.weight_mask.broken(made.model) == []
    weights = sum(keep.numel() for keep in made.weight_mask.kept.values())
    assert count_parameters(made.model) == count_parameters(dense) + weights // 8
    figures = read_json(tmp_path / "whole" / "model" / "pruning.json")["figures"]
    assert figures["params_after"] == count_parameters(made.model)
    assert figures["nonzero_after"] == figures["params_after"] - weights // 2
    said = ask_a_stranger(STRANGER, tmp_path / "whole" / "model", folder=tmp_path).split()
    with torch.no_grad():
        logits = made.model(torch.arange(3, 27)[None]).logits
    assert int(said[0]) == count_parameters(made.model)
    assert float(said[1]) == pytest.approx(float(logits.double().abs().sum()), rel=1e-5)
    again = {
        "method": "uniform",
        "budget": "80%",
        "sparsity": "",
        "reduce": "units",
        "repair": None,
        "training": {"objective": "lm"},
    }
    assert_refused(lambda: recipe_of(tmp_path / "whole" / "model", text_file, **again), tmp_path / "no", "which cannot be cut")  # type: ignore[arg-type]
    card = (tmp_path / "whole" / "model" / "README.md").read_text(encoding="utf-8")
    assert "--to gguf" not in card
    assert "vllm serve" not in card
    assert no_gguf(read_json(tmp_path / "whole" / "model" / "config.json")) is not None
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"ast made \d+\.\d% of the parameters zero", page)
    with pytest.raises(UsageError, match=r"SLoRB matrices beside its zeros, and a stock class has no place"):
        export(made, tmp_path / "plain", to="uniform")


def test_sums_of_blocks_come_with_the_first_masks_or_never(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file, checkpoint_minutes=0)
    break_off(recipe, tmp_path / "run", kind="step", nth=4)
    other = recipe_of(tiny_folder, text_file, reduce="sparse_training(every=3, slorb=8)", checkpoint_minutes=0)
    with pytest.raises(UsageError, match="this run began with slorb=0, and now the recipe says slorb=8"):
        run(other, tmp_path / "run", force_recipe=True)


def test_sums_of_blocks_begin_as_what_comes_nearest_to_the_masked_weights() -> None:
    model = tiny_model()
    layer = model.model.layers[1]
    add_block_sums(layer, 8)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, tiny_model()(ids).logits, atol=1e-5)
        module, sums = layer.mlp.down_proj, layer.mlp.block_sums.down_proj
        x = torch.randn(5, 40)
        sums.copy_(torch.arange(48 * 5).view(48, 5).float())
        wide = module.weight + sums.repeat_interleave(8, dim=1)  # what it would be, folded into the weight
        assert torch.allclose(module(x), x @ wide.t(), rtol=1e-4, atol=1e-2)
