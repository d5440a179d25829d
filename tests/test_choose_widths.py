"""Widths that other tools want: multiples, and layers all alike, whatever chooser asks, and never above the budget."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families, recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Axis, Gate
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.export.padding import layer_sizes
from adapt_pruner.recipe import read
from adapt_pruner.recipe.overrides import keys_of
from adapt_pruner.reduce.choose.widths import fitting, levelled
from adapt_pruner.reduce.units import params_of, prunable, sizes_alike
from adapt_pruner.report import with_card
from adapt_pruner.report.with_card import prune
from adapt_pruner.work import Work
from conftest import VOCAB, byte_tokenizer, tiny_model

METHODS = ("adapt-pruner", "uniform", "magnitude-all", "flap", "shortgpt")


def axis(layer: int, kind: str, size: int, cost: int) -> Axis:
    return Axis(f"layers.{layer}.{kind}", size, cost, Gate("x"))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    tiny_model(vocab_size=VOCAB, intermediate_size=128, num_hidden_layers=4).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pruned(folder: Path, out: Path, text: Path, *overrides: str, method: str = "magnitude-all", budget: str = "60%") -> Any:
    values = {
        "model": str(folder), "budget": budget, "method": method, "calibration.source": str(text), "calibration.samples": 4,
        "calibration.length": 24, "repair": None, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    with_card.prune(recipe.read({}, values=values, overrides=overrides, shared=True).fitted(keys_of(overrides)), out)
    return load(str(out)).model


@pytest.mark.parametrize("method", [*METHODS, "self-pruner"])
def test_neurons_stay_multiples_and_within_the_budget(method: str, wide_folder: Path, text_file: Path, tmp_path: Path) -> None:
    before = count_parameters(load(str(wide_folder)).model)
    extra = ["axes=[layers,neurons]"] if method == "shortgpt" else []
    model = pruned(wide_folder, tmp_path / "out", text_file, "multiple_of=16", *extra, method=method)
    widths = [size.neurons for size in layer_sizes(model)]
    assert all(width % 16 == 0 for width in widths), widths
    assert min(widths) < 128
    after, unit = count_parameters(model), 16 * 3 * 48
    assert 0.6 * before - unit - 4 * 48 * 48 <= after <= 0.6 * before, "no more is lost than a multiple and a head in some layers"


@pytest.mark.parametrize("method", METHODS)
def test_equal_widths_make_a_plain_folder(method: str, wide_folder: Path, text_file: Path, tmp_path: Path) -> None:
    before = count_parameters(load(str(wide_folder)).model)
    extra = ["axes=[layers,neurons]"] if method == "shortgpt" else []
    model = pruned(wide_folder, tmp_path / "out", text_file, "multiple_of=8", "equal_widths=true", *extra, method=method)
    (size,) = set(layer_sizes(model))
    assert size.neurons % 8 == 0
    assert not (tmp_path / "out" / "modeling_pruned.py").exists()
    num_layers, after = len(layer_sizes(model)), count_parameters(model)
    assert 0.6 * before - (8 * 3 * 48 + 64 * 48) * num_layers <= after <= 0.6 * before
    if size.kv_heads == 3:  # neurons alone paid, so one multiple more in each layer would not have fitted
        assert after + 8 * 3 * 48 * num_layers > 0.6 * before


def test_what_is_rounded_up_is_what_lost_most() -> None:
    axes = [axis(i, "neurons", 128, 1) for i in range(3)]
    wanted = {"layers.0.neurons": 65, "layers.1.neurons": 100, "layers.2.neurons": 127}  # 292 to keep: four multiples and a half
    found = fitting(wanted, axes, scores={}, multiple_of=64)
    assert found == {"layers.0.neurons": 64, "layers.1.neurons": 64, "layers.2.neurons": 128}
    found = fitting(wanted | {"layers.0.neurons": 93}, axes, scores={}, multiple_of=64)
    assert found == {"layers.0.neurons": 64, "layers.1.neurons": 128, "layers.2.neurons": 128}


def test_layers_that_go_are_not_asked() -> None:
    axes = [*(axis(i, "neurons", 128, 1) for i in range(3)), Axis("layers", 3, 1, Gate("x", kind="whole"), costs=(1, 1, 1))]
    wanted = {"layers.0.neurons": 128, "layers.1.neurons": 90, "layers.2.neurons": 70, "layers": 2}
    scores = {"layers": torch.tensor([0.0, 1.0, 2.0])}
    found = fitting(wanted, axes, scores=scores, multiple_of=16, equal_widths=True)
    assert found == {"layers.0.neurons": 128, "layers.1.neurons": 80, "layers.2.neurons": 80, "layers": 2}


def test_neurons_pay_for_heads_that_stay_for_the_sake_of_equality() -> None:
    axes = [axis(i, kind, size, cost) for i in range(2) for kind, size, cost in (("kv_heads", 3, 40), ("neurons", 100, 1))]
    wanted = {"layers.0.kv_heads": 3, "layers.1.kv_heads": 2, "layers.0.neurons": 100, "layers.1.neurons": 90}
    found = fitting(wanted, axes, scores={}, equal_widths=True)
    assert found == {"layers.0.kv_heads": 3, "layers.1.kv_heads": 3, "layers.0.neurons": 75, "layers.1.neurons": 75}
    wanted = {"layers.0.kv_heads": 1, "layers.1.kv_heads": 2, "layers.0.neurons": 10, "layers.1.neurons": 10}
    found = fitting(wanted, axes, scores={}, equal_widths=True, multiple_of=30)
    assert found == {"layers.0.kv_heads": 1, "layers.1.kv_heads": 1, "layers.0.neurons": 30, "layers.1.neurons": 30}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["multiple_of=256"], "multiple_of 256 is above the 128 neurons that a layer has"),
        (["multiple_of=0"], "multiple_of 0 is not a width; write auto, or a whole number from 1 to 1,048,576"),
        (["multiple_of=8", "axes=[kv_heads]"], "multiple_of 8 counts neurons, and axes does not name neurons"),
        (["equal_widths=true", "reduce=slice"], "equal_widths would be ignored"),
    ],
)
def test_what_cannot_be_is_refused(override: list[str], said: str, wide_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        pruned(wide_folder, tmp_path / "out", text_file, *override)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_multiples_cannot_reach_names_the_nearest(wide_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the smallest possible budget is"):
        pruned(wide_folder, tmp_path / "out", text_file, "multiple_of=128", "axes=[neurons]", budget="70%")


@pytest.mark.parametrize("equal", [False, True])
def test_what_lies_in_a_block_that_goes_pays_for_nothing_else(equal: bool) -> None:
    """Neurons of an MLP that goes go with it; that they keep their number there is no parameter that is left."""
    neurons = [replace(axis(layer, "neurons", 40, 3), enclosing=(f"layers.{layer}.mlps",)) for layer in range(3)]
    mlps = [replace(axis(layer, "mlps", 1, 120), modules=("m",), may_be_empty=True) for layer in range(3)]
    sizes = {"layers.0.neurons": 40, "layers.1.neurons": 29, "layers.2.neurons": 31} | {
        f"layers.{i}.mlps": int(i > 0) for i in range(3)
    }
    found = fitting(sizes, [*mlps, *neurons], scores={}, multiple_of=4, equal_widths=equal)

    def removed(of: dict[str, int]) -> int:
        return sum((40 - of[one.name]) * 3 for one in neurons if one.layer)

    assert removed(found) >= removed(sizes)
    assert {found[one.name] % 4 for one in neurons if one.layer} == {0}


@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("method", ["best", "adapt-pruner", "shortgpt", "flap"])
def test_heads_go_where_neurons_are_at_their_least(
    method: str, multiple: int, wide_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """What the plan says can be had can be had, and what lies a little above it: nothing asks for neurons that must stay."""
    words = [
        f"multiple_of={multiple}",
        "calibration.self_generated=0",
        *(["axes=[layers,neurons]"] if method == "shortgpt" else []),
        *(["step=0.1"] if method == "adapt-pruner" else []),  # as best has it
    ]
    with pytest.raises(UsageError, match="smallest possible budget is") as refused:
        pruned(wide_folder, tmp_path / "none", text_file, *words, method=method, budget="2")
    least = int(str(refused.value).split()[-1].replace(",", ""))
    for above in (0, 6, 15):
        budget = least * (100 + above) // 100
        model = pruned(wide_folder, tmp_path / str(above), text_file, *words, method=method, budget=str(budget))
        assert count_parameters(model) <= budget
        assert all(size.neurons % multiple == 0 for size in layer_sizes(model))


@pytest.mark.parametrize("chooser", ["allocate.uniform", "rank.per_parameter"])
def test_the_least_count_is_that_of_a_unit_of_every_axis(chooser: str, wide_folder: Path) -> None:
    """A weight that a channel and a neuron own together goes once."""
    model = load(str(wide_folder)).model
    values = {"model": "m", "budget": "50%", "method": "uniform", "axes": ["residual", "neurons", "kv_heads"], "chooser": chooser}
    asked = recipe.read({}, values=values | {"head_metric": None})
    axes = prunable(Work.of(model, asked))
    one_of_each = params_of(Work.of(model, asked), axes, {axis.name: 1 for axis in axes})
    assert params_of(Work.of(model, asked), axes, sizes_alike(Work.of(model, asked), keep=0)) == one_of_each < 1000


@pytest.mark.parametrize(("neurons", "multiple"), [(40, 1), (255, 1), (256, 32), (1023, 32), (1024, 64), (1100, 64)])
def test_best_keeps_widths_that_others_can_use(neurons: int, multiple: int, text_file: Path, tmp_path: Path) -> None:
    """Multiples of 64 by default, 32 where layers are narrow; 1 is an option, and what the row of a paper has."""
    tiny_model(vocab_size=VOCAB, intermediate_size=neurons).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    asked: dict[str, Any] = {
        "model": str(tmp_path / "m"), "budget": "80%", "dtype": "float32", "device": "cpu", "step": 0.3,
        "calibration": {"source": str(text_file), "samples": 4, "length": 16, "self_generated": 0}, "repair": None,
    }  # fmt: skip
    outcome = prune(read(asked), tmp_path / "out")
    sizes = families.sizes(outcome.loaded.model)
    widths = [size for name, size in sizes.items() if name.endswith("neurons")]
    assert min(widths) < neurons
    assert all(width % multiple == 0 or width == neurons for width in widths)
    assert Work.of(outcome.loaded.model, read(asked | {"multiple_of": 1})).multiple_of == 1
    assert Work.of(outcome.loaded.model, read(asked | {"method": "llm-pruner"})).multiple_of == 1


def test_a_run_that_began_with_any_width_goes_on_with_it(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """`auto` was no default once: a recipe that says nothing goes on with a run whose recipe.yaml says 1."""
    from adapt_pruner.run.folder import RunFolder

    said = {"model": str(tiny_folder), "budget": "80%"}
    (tmp_path / "recipe.yaml").write_text(read(said | {"multiple_of": 1}).to_yaml(), encoding="utf-8")
    (tmp_path / "log.jsonl").write_text('{"time": 1.0, "event": "start"}\n', encoding="utf-8")
    folder = RunFolder(tmp_path)
    assert folder.as_begun(read(said)).multiple_of == 1
    assert folder.check(read(said), force=False) == []
    with pytest.raises(UsageError, match="differs in multiple_of"):
        folder.check(read(said | {"multiple_of": 8}), force=False)


def test_one_neuron_of_difference_costs_no_plainness(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Uniform shares end a neuron apart, since the budget is met to the neuron: then all layers get the lower width."""
    asked: dict[str, Any] = {
        "model": str(tiny_folder), "method": "magnitude-all", "axes": ["neurons"], "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    left = []
    for budget in range(45_000, 45_000 + 3 * 144, 144):  # a neuron owns 144 parameters
        outcome = prune(read(asked | {"budget": str(budget)}), tmp_path / str(budget))
        sizes = families.sizes(outcome.loaded.model)
        assert len({sizes[f"layers.{i}.neurons"] for i in range(3)}) == 1
        assert budget - 3 * 144 < outcome.figures["params_after"] <= budget
        assert "per_layer_config" not in (tmp_path / str(budget) / "config.json").read_text()
        left.append(outcome.figures["params_after"])
    assert len(set(left)) < 3, "some of these budgets would have left one neuron more in a layer"
    sizes = {"layers.0.neurons": 9, "layers.1.neurons": 8}
    axes = [axis(i, "neurons", 10, 3) for i in range(2)]
    heads = [axis(i, "kv_heads", 3, 9) for i in range(2)]
    assert levelled(sizes, axes) == dict.fromkeys(sizes, 8)
    assert levelled(sizes | {"layers.0.kv_heads": 2}, [*axes, *heads]) == sizes | {"layers.0.kv_heads": 2}, (
        "not plain in any case"
    )
    assert levelled({"layers.0.neurons": 9, "layers.1.neurons": 7}, axes)["layers.0.neurons"] == 9
    assert levelled({"layers.0.neurons": 9}, axes) == {"layers.0.neurons": 9}, "the other layer may not shrink"
