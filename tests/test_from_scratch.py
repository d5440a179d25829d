"""`init: random`: the control of pruning, a model of the same shape that begins with random weights on the same text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.with_card import run
from conftest import VOCAB, assert_same_model, break_off, byte_tokenizer, half, tiny_model


def recipe_of(folder: Path, text: Path, **changes: Any) -> Recipe:
    training = {"source": str(text), "tokens": 2048, "batch_tokens": 128, "length": 32, "lr": 1e-2} | changes.pop("training", {})
    keys = {
        "model": str(folder), "init": "random", "budget": "100%", "method": "magnitude-all", "dtype": "float32", "device": "cpu",
        "checkpoint_minutes": 0, "training": training, "evaluation": {"source": str(text), "window": 32, "max_windows": 4},
    }  # fmt: skip
    return read(keys | changes)


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A pruned model with layers of unequal widths, of which the weights are gone."""
    model = tiny_model(vocab_size=VOCAB)
    mask = half(families.axes(model))
    mask.kept["layers.1.neurons"][:] = True
    cut(model, families.axes(model), mask)
    save(model, byte_tokenizer(), tmp_path / "shape", mask=mask, dtype=torch.float32)
    (tmp_path / "shape" / "model.safetensors").unlink()
    return tmp_path / "shape"


def test_a_shape_is_trained_from_random_weights(shape: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = run(recipe_of(shape, text_file), tmp_path / "run")
    assert outcome is not None
    sizes = families.sizes(load(str(tmp_path / "run" / "model")).model)
    assert [sizes[f"layers.{i}.neurons"] for i in range(3)] == [20, 40, 20], "the shape stays"
    first, last = outcome.figures["perplexities"]
    assert VOCAB / 2 < first < VOCAB * 3, "it began by knowing nothing"
    assert last < first / 4
    assert outcome.mask.num_removed() == 0


def test_the_seed_draws_the_weights(tiny_folder: Path, shape: Path) -> None:
    one, other, third = (load(str(tiny_folder), fresh=seed).model.state_dict() for seed in (1, 1, 2))
    trained = load(str(tiny_folder)).model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], other[name])
    assert not torch.equal(one[name], third[name])
    assert not torch.equal(one[name], trained[name])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(str(shape), fresh=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_killed_run_goes_on_bit_equal(shape: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(shape, text_file)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="step", nth=5)
    run(recipe, tmp_path / "broken")
    assert_same_model(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(("changes", "said"), [
    ({"training": {"source": None, "tokens": 0}}, "init random begins with a model that knows nothing, and the recipe trains nothing"),
    ({"training": {"objective": "objectives.distil"}}, "would be taught by the random model itself; name a training.teacher"),
    ({"calibration": {"source": "self"}}, "init random has no model that could write calibration text"),
    ({"init": "zeros"}, "init"),
])  # fmt: skip
def test_what_has_no_sense_is_refused(changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(UsageError) as refused:
        recipe_of(tiny_folder, text_file, **changes)
    assert said in str(refused.value)
