"""Repairs in closed form, against slow solutions of the same equations, and what they promise: less damage after the cut."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.core.model.gram import PANEL, add_gram, complete
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.reduce.repair import closed_form
from adapt_pruner.reduce.repair.closed_form import RIDGES, least_squares, mean_bias
from adapt_pruner.reduce.units import repaired
from adapt_pruner.report.with_card import prune
from adapt_pruner.work import Work
from conftest import LAYOUTS, VOCAB, as_dicts, byte_tokenizer, half, tiny_model
from strangers import ask_a_stranger

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from memory_foreseen import Tensors


@pytest.fixture
def text() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 97, (4, 16), generator=generator) for _ in range(8)]


def inputs(model: Any, name: str, text: list[Tensor]) -> Tensor:
    """What enters a linear layer over the text: float64 [tokens, features]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        for ids in text:
            model(ids)
    handle.remove()
    return torch.cat(seen)


def fitted(weight: Tensor, x: Tensor, z: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """The columns that stay, by ordinary least squares with the ridge as further rows of data."""
    z = z[:, keep]
    pull = (ridge * z.square().sum(0).mean()).sqrt()
    rows = torch.cat([z, pull * torch.eye(z.shape[1], dtype=z.dtype)])
    targets = torch.cat([x @ weight.double().t(), pull * weight[:, keep].double().t()])
    return torch.linalg.lstsq(rows, targets).solution.t()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one[1])
def test_least_squares_is_least_squares(layout: tuple[str, str], text: list[Tensor]) -> None:
    model = tiny_model(layout)
    dense = copy.deepcopy(model)
    axes = families.axes(model)
    mask = half(axes, ("neurons", "kv_heads"))
    least_squares(model, axes, mask, text, ridge=0.1, dtype="float32")
    for axis in axes:
        if axis.name in mask:
            name = axis.gate.module
            x, keep = inputs(dense, name, text), mask[axis.name].repeat_interleave(axis.gate.width)
            weight = dense.get_submodule(name).weight.detach()
            found = model.get_submodule(name).weight.detach()
            assert torch.allclose(found[:, keep].double(), fitted(weight, x, x, keep, 0.1), atol=2e-4), name
            assert torch.equal(found[:, ~keep], weight[:, ~keep])
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "whole", [{}, {"layers": [False, True, True]}, {"layers.0.mlps": [False], "layers.1.attentions": [False]}],
    ids=["units", "a layer", "blocks"],
)  # fmt: skip
def test_sequential_reads_what_the_pruned_layers_below_give(whole: dict[str, list[bool]], text: list[Tensor]) -> None:
    """Of a layer, attention or MLP that goes too, nothing is left to repair, and it gives nothing to those above it."""
    model = tiny_model()
    dense = copy.deepcopy(model)
    axes = families.axes(model)
    gone = {
        "layers.0.mlps": ["layers.0.neurons"],
        "layers.1.attentions": ["layers.1.kv_heads"],
        "layers": ["layers.0.neurons", "layers.0.kv_heads"],
    }
    below = {name for key in whole for name in gone[key]}
    units = {name: keep for name, keep in half(axes, ("neurons", "kv_heads")).kept.items() if name not in below}
    mask = Mask({**units, **{name: torch.tensor(keep) for name, keep in whole.items()}})
    least_squares(model, axes, mask, text, ridge=0.1, sequential=True, dtype="float32")
    slow = copy.deepcopy(dense)
    for axis in axes:  # in the order in which they run
        if axis.name in units:
            name = axis.gate.module
            keep = mask[axis.name].repeat_interleave(axis.gate.width)
            with gated(slow, axes, mask):
                z = inputs(slow, name, text)
            x = inputs(dense, name, text)
            with torch.no_grad():
                weight = slow.get_submodule(name).weight
                weight[:, keep] = fitted(weight, x, z, keep, 0.1).float()
            assert torch.allclose(model.get_submodule(name).weight[:, keep], weight[:, keep], atol=1e-3), name


@pytest.mark.parametrize(
    ("options", "most"), [({}, 3.8), ({"ridge": None}, 5.9), ({"sequential": True}, 5.3)], ids=["fixed", "chosen", "sequential"]
)  # fmt: skip
def test_a_repair_holds_few_gram_matrices(
    options: dict[str, Any], most: float, text: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its float32 sums: one Gram matrix, two if the ridge is chosen, two if it is sequential; a system takes 2.6 or more.

    The layer is as narrow against its neurons as that of Llama 8B, and nine of ten neurons stay, as in a step of pruning.
    """
    monkeypatch.setattr(closed_form, "ROWS", 32)  # as few against the neurons as in a large model
    model = tiny_model(hidden_size=224, intermediate_size=784, num_hidden_layers=1)
    keep = torch.arange(784) < 705
    with Tensors() as tensors:
        least_squares(model, families.axes(model), Mask({"layers.0.neurons": keep}), text[:3], dtype="float32", **options)
    held = sum(weight.nbytes for weight in model.model.layers.parameters())  # the gauge sees them, too
    assert tensors.most() - held < most * 4 * 784 * 705


@pytest.mark.parametrize("sequential", [False, True])
def test_a_repair_brings_the_logits_nearer(sequential: bool, text: list[Tensor]) -> None:
    model = tiny_model()
    axes = families.axes(model)
    mask = half(axes)

    def damage(one: Any) -> float:
        with torch.no_grad(), gated(one, axes, mask):
            return float(sum((one(ids).logits - whole).square().sum() for ids, whole in zip(text, logits, strict=True)))

    with torch.no_grad():
        logits = [model(ids).logits for ids in text]
    before = damage(model)
    least_squares(model, axes, mask, text, ridge=0.05, sequential=sequential, dtype="float32")
    assert damage(model) < 0.9 * before


def test_a_repair_between_training_steps_drops_nothing(text: list[Tensor]) -> None:
    """As it must not, if a model with dropout is repaired while it trains."""
    models = []
    for training in (False, True):
        model = tiny_model(attention_dropout=0.5).train(training)
        axes = families.axes(model)
        recipe = read(
            {"model": "x", "budget": "80%", "method": "uniform", "repair": "closed_form.least_squares", "dtype": "float32"}
        )
        repaired(Work.of(model, recipe), half(axes, ("neurons", "kv_heads")), text)
        assert model.training is training
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_strong_ridge_leaves_the_weights_that_stay(text: list[Tensor]) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    least_squares(model, families.axes(model), half(families.axes(model)), text, ridge=1e9, dtype="float32")
    assert all(torch.allclose(tensor, before[name], atol=1e-6) for name, tensor in model.state_dict().items())


def test_neurons_that_can_be_said_by_others_cost_nothing(text: list[Tensor]) -> None:
    """Two pairs of neurons alike: without a ridge, cutting one of each changes nothing; the Gram matrix of what stays is fine."""
    model = tiny_model()
    with torch.no_grad():
        for projection in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            projection.weight[1], projection.weight[3] = projection.weight[0], projection.weight[2]
    axes = families.axes(model)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[1, 3]] = False
    mask = Mask({"layers.1.neurons": keep})
    with torch.no_grad():
        whole = model(text[0]).logits
    least_squares(model, axes, mask, text, ridge=0.0, dtype="float32")
    cut(model, axes, mask)
    with torch.no_grad():
        assert torch.allclose(model(text[0]).logits, whole, atol=2e-3)


def test_a_singular_gram_matrix_is_no_obstacle(text: list[Tensor]) -> None:
    """Neurons that stay and are alike, or always zero, make it singular: nothing is done along what is not known."""
    model = tiny_model()
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight[4] = 0
        for neuron, factor in ((6, 0.3), (10, 0.7), (12, 1.1)):  # of neuron 8, to rounding
            mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = mlp.gate_proj.weight[8], factor * mlp.up_proj.weight[8]
    axes = families.axes(model)
    mask, name = half(axes), "model.layers.0.mlp.down_proj"
    before, x, keep = model.get_submodule(name).weight.detach().double(), inputs(model, name, text), mask["layers.0.neurons"]
    assert {4, 6, 8, 10, 12} <= set(keep.nonzero().flatten().tolist())
    least_squares(model, axes, mask, text, ridge=0.0, dtype="float32")
    change = model.get_submodule(name).weight[:, keep].double() - before[:, keep]
    # the least change that fits: lstsq's, whose rank is told by the values of x, not of its square
    gone = x[:, ~keep] @ before[:, ~keep].t()
    least = torch.linalg.lstsq(x[:, keep], gone, rcond=1e-3, driver="gelsd").solution.t()
    assert torch.allclose(x[:, keep] @ change.t(), x[:, keep] @ least.t(), atol=1e-3)
    assert change.norm() < 1.5 * least.norm()


def test_a_feature_a_thousand_times_the_others_leaves_them_known(text: list[Tensor]) -> None:
    """Massive activations are common in front of `down_proj`."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[4] *= 3000
    axes = families.axes(model)
    mask, name = half(axes), "model.layers.0.mlp.down_proj"
    before, x, keep = model.get_submodule(name).weight.detach().double(), inputs(model, name, text), mask["layers.0.neurons"]
    least_squares(model, axes, mask, text, ridge=0.0, dtype="float32")
    wanted = x @ before.t()
    left = x[:, keep] @ model.get_submodule(name).weight[:, keep].double().t() - wanted
    best = x[:, keep] @ fitted(before, x, x, keep, 0.0).t() - wanted
    untouched = x[:, keep] @ before[:, keep].t() - wanted
    assert best.norm() < 0.95 * untouched.norm()
    assert untouched.norm() - left.norm() > 0.9 * (untouched.norm() - best.norm())


def test_the_ridge_is_chosen_by_what_was_held_out(text: list[Tensor]) -> None:
    model = tiny_model()
    axes = families.axes(model)
    mask = half(axes)
    dense = copy.deepcopy(model)
    least_squares(model, axes, mask, text, ridge=None, dtype="float32")
    held = [ids for number, ids in enumerate(text) if number % 4 == 1]
    rest = [ids for number, ids in enumerate(text) if number % 4 != 1]
    name, keep = "model.layers.1.mlp.down_proj", mask["layers.1.neurons"]
    weight = dense.get_submodule(name).weight.detach()
    x, unseen, everything = (inputs(dense, name, part) for part in (rest, held, text))
    errors = {
        ridge: float((unseen[:, keep] @ fitted(weight, x, x, keep, ridge).t() - unseen @ weight.double().t()).square().sum())
        for ridge in RIDGES
    }
    best = min(errors, key=errors.__getitem__)
    expected = fitted(weight, everything, everything, keep, best)
    assert torch.allclose(model.get_submodule(name).weight[:, keep].double(), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("ridge", "raised", "sentence"),
    [
        (0.1, 0.4, "their ridge was raised by the same factor; set"),
        (0.0, 4.0, "their ridge is 1 times that factor instead of 0; set"),
    ],
)
def test_too_few_tokens_raise_the_ridge_and_say_so(ridge: float, raised: float, sentence: str) -> None:
    """A ridge of 0 cannot be raised: another takes its place."""
    model, same = tiny_model(), tiny_model()
    axes = families.axes(model)
    mask = half(axes)
    few = [torch.randint(3, 97, (1, 10), generator=torch.Generator().manual_seed(1))]
    said: list[str] = []
    least_squares(model, axes, mask, few, ridge=ridge, dtype="float32", warn=said.append)
    assert len(said) == 1
    assert "10 calibration tokens are few for a repair of layers with up to 4.0 times as many inputs" in said[0]
    assert sentence in said[0]
    x, keep = inputs(same, "model.layers.0.mlp.down_proj", few), mask["layers.0.neurons"]
    expected = fitted(same.model.layers[0].mlp.down_proj.weight.detach(), x, x, keep, raised)
    assert torch.allclose(model.model.layers[0].mlp.down_proj.weight[:, keep].double(), expected, atol=1e-3)


def test_a_layer_with_tokens_enough_keeps_a_ridge_of_0() -> None:
    """44 tokens are enough for 40 neurons and few for 48 features of heads."""
    model, same = tiny_model(), tiny_model()
    axes = families.axes(model)
    mask = half(axes, ("neurons", "kv_heads"))
    few = [torch.randint(3, 97, (1, 44), generator=torch.Generator().manual_seed(1))]
    said: list[str] = []
    least_squares(model, axes, mask, few, ridge=0.0, dtype="float32", warn=said.append)
    assert len(said) == 1
    x, keep = inputs(same, "model.layers.0.mlp.down_proj", few), mask["layers.0.neurons"]
    expected = fitted(same.model.layers[0].mlp.down_proj.weight.detach(), x, x, keep, 0.0)
    assert torch.allclose(model.model.layers[0].mlp.down_proj.weight[:, keep].double(), expected, atol=2e-3)


def test_two_batches_are_enough_to_choose_a_ridge_on() -> None:
    """The second is held out, so that noise is not fitted: the ridge is not the smallest one."""
    model, same = tiny_model(), tiny_model()
    axes = families.axes(model)
    mask = half(axes)
    batches = [torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    least_squares(model, axes, mask, batches, ridge=None, dtype="float32")
    name, keep = "model.layers.0.mlp.down_proj", mask["layers.0.neurons"]
    weight, got = same.get_submodule(name).weight.detach(), model.get_submodule(name).weight[:, keep].double()
    x, unseen, both = (inputs(same, name, part) for part in (batches[:1], batches[1:], batches))

    def error(ridge: float) -> float:
        return float((unseen[:, keep] @ fitted(weight, x, x, keep, ridge).t() - unseen @ weight.double().t()).square().sum())

    best = min(RIDGES, key=error)
    assert best > min(RIDGES), "or this test tells nothing"
    assert torch.allclose(got, fitted(weight, both, both, keep, best), atol=1e-3)


@pytest.mark.parametrize("repair", [least_squares, mean_bias])
def test_no_text_is_refused(repair: Any) -> None:
    model = tiny_model()
    axes = families.axes(model)
    with pytest.raises(UsageError, match="needs calibration text"):
        repair(model, axes, half(axes), [], dtype="float32")


def test_one_batch_to_choose_a_ridge_on_takes_a_stronger_one_and_says_so(text: list[Tensor]) -> None:
    model, same = tiny_model(), tiny_model()
    axes = families.axes(model)
    mask = half(axes)
    said: list[str] = []
    least_squares(model, axes, mask, text[:1], ridge=None, dtype="float32", warn=said.append)
    assert said == [
        "64 calibration tokens make one batch, and choosing a ridge takes two; the ridge is 1; set calibration.samples higher"
    ]
    x, keep = inputs(same, "model.layers.0.mlp.down_proj", text[:1]), mask["layers.0.neurons"]
    expected = fitted(same.model.layers[0].mlp.down_proj.weight.detach(), x, x, keep, 1.0)
    assert torch.allclose(model.model.layers[0].mlp.down_proj.weight[:, keep].double(), expected, atol=1e-3)


def test_a_run_with_too_little_text_says_so_once_a_stage(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    recipe = read({
        "model": str(tiny_folder), "budget": "60%", "method": "adaptive-ls-v1", "dtype": "float32", "stages": 2,
        "calibration": {"source": str(text_file), "samples": 1, "length": 32, "self_generated": 0},
    })  # fmt: skip
    prune(recipe, tmp_path / "out", listen=as_dicts(heard.append))
    said = [event["message"] for event in heard if event["event"] == "warning"]
    for stage in (1, 2):
        assert sum(event["event"] == "cut" and event["stage"] == stage for event in heard) > 1
        its = [message for message in said if message.startswith(f"stage {stage}: ")]
        assert sum("calibration tokens are few for a repair" in message for message in its) == 1
        assert sum("to fit and 1 sequence to test" in message for message in its) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one[1])
def test_mean_bias_keeps_the_mean(layout: tuple[str, str], text: list[Tensor]) -> None:
    """What a layer gives is, on average over the text, what it gave."""
    model = tiny_model(layout)
    axes = families.axes(model)
    mask = half(axes, ("neurons", "kv_heads"))
    gates = [axis for axis in axes if axis.name in mask]
    expected = {}
    for axis in gates:
        module, x = model.get_submodule(axis.gate.module), inputs(model, axis.gate.module, text)
        bias = 0 if module.bias is None else module.bias.detach().double()
        expected[axis.name] = (module.weight.detach().double() @ x.mean(0) + bias, x)
    mean_bias(model, axes, mask, text, dtype="float32")
    for axis in gates:
        module = model.get_submodule(axis.gate.module)
        mean, x = expected[axis.name]
        shut = x * mask[axis.name].repeat_interleave(axis.gate.width)
        assert torch.allclose(module.weight.detach().double() @ shut.mean(0) + module.bias.detach().double(), mean, atol=1e-5)


def test_biases_that_a_repair_made_are_saved_and_load_in_stock_transformers(text: list[Tensor], tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB)
    axes = families.axes(model)
    mask = Mask({axis.name: torch.arange(axis.size) < 20 for axis in axes if axis.kind == "neurons"})  # equal sizes, too
    mean_bias(model, axes, mask, text, dtype="float32")
    cut(model, axes, mask)
    with torch.no_grad():
        logits = model(text[0]).logits
    save(model, byte_tokenizer(), tmp_path / "out", mask=mask, dtype=torch.float32)
    again = load(str(tmp_path / "out")).model
    with torch.no_grad():
        assert torch.equal(again(text[0]).logits, logits)
    code = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.double().sum().item()))"
    )
    said = ask_a_stranger(code, tmp_path / "out", json.dumps(text[0].tolist()), folder=tmp_path)
    assert json.loads(said) == pytest.approx(float(logits.double().sum()), rel=1e-6)


@pytest.mark.parametrize("features", [5, PANEL, PANEL + 3, 2 * PANEL + 1])
def test_the_sums_of_products_are_those_of_the_whole_matrix(features: int) -> None:
    text = torch.randn(2, 40, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(features, features, dtype=torch.float64)
    for values in text:
        add_gram(total, values)
    whole = text.flatten(0, 1)
    torch.testing.assert_close(complete(total), whole.T @ whole)
    assert torch.equal(complete(total.clone()), total)
