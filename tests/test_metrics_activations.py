"""Scores by activations against plain loops over units, features, sequences and tokens; layers by influence and by loss."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Axis, Gate, Mask, Slice
from adapt_pruner.core.model.cut import gated
from adapt_pruner.data.windows import calibration_feed
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import parts, read
from adapt_pruner.report.with_card import prune
from adapt_pruner.score import activations, blocks, weights
from adapt_pruner.score.calibrate import score, score_sequentially
from adapt_pruner.work import Work
from conftest import LAYOUTS, VOCAB, as_dicts, byte_tokenizer, in_two_processes, tiny_model

Samples = list[list[list[float]]]
"""Sequence, token, feature."""


def inputs_of(model: Any, batches: list[Tensor]) -> dict[str, Samples]:
    """What enters `o_proj` and `down_proj` of every layer, each sequence run by itself."""
    taken: dict[str, Samples] = {}
    for i, layer in enumerate(model.model.layers):
        heads = [(f"layers.{i}.{kind}", layer.self_attn.o_proj) for kind in ("kv_heads", "query_heads")]
        for name, module in (*heads, (f"layers.{i}.neurons", layer.mlp.down_proj)):

            def take(entering: Tensor, name: str = name, forward: Callable[[Tensor], Tensor] = module.forward) -> Tensor:
                taken.setdefault(name, []).append(entering[0].tolist())
                return forward(entering)

            module.forward = take
    with torch.no_grad():
        for batch in batches:
            for row in batch:
                model(row[None])
    for layer in model.model.layers:
        del layer.self_attn.o_proj.forward, layer.mlp.down_proj.forward
    return taken


def weight_of(model: Any, name: str) -> list[list[float]]:
    layer = model.model.layers[int(name.split(".")[1])]
    module = layer.self_attn.o_proj if name.endswith("_heads") else layer.mlp.down_proj
    return module.weight.tolist()


def norm(samples: Samples, j: int) -> float:
    return math.sqrt(sum(token[j] ** 2 for sequence in samples for token in sequence))


def wanda_of(samples: Samples, weight: list[list[float]], j: int) -> float:
    return sum(abs(row[j]) for row in weight) / len(weight) * norm(samples, j)


def variance(samples: Samples, j: int) -> float:
    values = [token[j] for sequence in samples for token in sequence]
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(samples) - 1)


def authors_variance(samples: Samples, j: int) -> float:
    """The released update, written out: the baseline is renewed before it is read, so old and new are one."""
    baseline, fluctuation = 0.0, 0.0
    for seen, sequence in enumerate(samples):
        baseline = baseline * seen / (seen + 1) + sum(token[j] for token in sequence) / len(sequence) / (seen + 1)
        if seen > 0:
            fluctuation *= (seen - 1) / seen
            fluctuation += sum((token[j] - baseline) * (token[j] - baseline) for token in sequence) / (seen + 1)
    return fluctuation


def squared_weight(weight: list[list[float]], j: int) -> float:
    return sum(row[j] ** 2 for row in weight)


CHANNELS: dict[str, Callable[[Samples, list[list[float]], int], float]] = {
    "WIFV": lambda samples, weight, j: variance(samples, j) * squared_weight(weight, j),
    "IFV": lambda samples, weight, j: variance(samples, j),
    "WIFN": wanda_of,
    "authors": lambda samples, weight, j: authors_variance(samples, j) * squared_weight(weight, j),
}


def fluctuation_of(values: list[float], is_head: bool) -> float:
    return sum(value**2 for value in values) / len(values) if is_head else values[0]


def magnitude_of(samples: Samples, features: range) -> float:
    means = [[sum(abs(token[j]) for token in sequence) / len(sequence) for j in features] for sequence in samples]
    return math.sqrt(sum(mean**2 for sample in means for mean in sample))


def features_of(model: Any, name: str, samples: Samples) -> list[range]:
    """The features of each unit at the gate: one of a neuron, those of a head; of a KV head those of all query heads that read it."""
    num_features = len(samples[0][0])
    heads = {"kv_heads": model.config.num_key_value_heads, "query_heads": model.config.num_attention_heads}
    units = heads.get(name.split(".")[2], num_features)
    width = num_features // units
    return [range(u * width, (u + 1) * width) for u in range(units)]


def scores_of(model: Any, batches: list[Tensor], metric: Any, **options: Any) -> dict[str, Tensor]:
    return score(model, families.axes(model), batches, metrics=[partial(metric, **options)], dtype="float32")[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_every_metric_is_its_formula(layout: tuple[str, str], batches: list[Tensor]) -> None:
    model = tiny_model(layout)
    taken = inputs_of(model, batches)
    found = {
        "wanda": scores_of(model, batches, activations.wanda),
        "magnitude": scores_of(model, batches, activations.magnitude),
        "WIFV": scores_of(model, batches, activations.fluctuation),
        "IFV": scores_of(model, batches, activations.fluctuation, form="IFV"),
        "WIFN": scores_of(model, batches, activations.fluctuation, form="WIFN"),
        "authors": scores_of(model, batches, activations.fluctuation, authors_mean=True),
    }
    for name, samples in taken.items():
        weight, units = weight_of(model, name), features_of(model, name, samples)
        expected = {
            "wanda": [sum(wanda_of(samples, weight, j) for j in unit) for unit in units],
            "magnitude": [magnitude_of(samples, unit) for unit in units],
        }
        for form, channel in CHANNELS.items():
            values = [[channel(samples, weight, j) for j in unit] for unit in units]
            expected[form] = [fluctuation_of(unit, name.endswith("_heads")) for unit in values]
        for metric, values in expected.items():
            assert found[metric][name].dtype == torch.float32
            assert found[metric][name].tolist() == pytest.approx(values, rel=1e-3), (metric, name)
    for metric, scores in found.items():
        of_the_stream = {"residual"} if metric == "magnitude" else set()
        assert scores.keys() == taken.keys() | of_the_stream, f"{metric} scores what enters one linear layer"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_channels_of_the_stream_have_the_sum_of_what_norms_give(layout: tuple[str, str], batches: list[Tensor]) -> None:
    """Of Minitron: over the norms in the layers, those of Gemma 3 behind a block too; not those inside heads, nor the last."""
    model = tiny_model(layout)
    norms = [module for layer in model.model.layers for name, module in layer.named_children() if name.endswith("norm")]
    assert len(norms) == len(model.model.layers) * (4 if "gemma" in layout[1] else 2)
    given: dict[int, Samples] = {}
    for number, module in enumerate(norms):

        def take(entering: Tensor, number: int = number, forward: Callable[[Tensor], Tensor] = module.forward) -> Tensor:
            out = forward(entering)
            given.setdefault(number, []).append(out[0].tolist())
            return out

        module.forward = take
    with torch.no_grad():
        for row in torch.cat(batches):
            model(row[None])
    for module in norms:
        del module.forward
    expected = [
        sum(magnitude_of(samples, range(j, j + 1)) for samples in given.values()) for j in range(model.config.hidden_size)
    ]
    found = scores_of(model, batches, activations.magnitude)["residual"]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    beside, _ = score(model, families.axes(model), batches, metrics=[weights.taylor, activations.magnitude], dtype="float32")
    assert beside["residual"].tolist() == pytest.approx(expected, rel=1e-3), "gradients in the same pass change nothing"


def test_minitron_takes_the_width_too(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The channels with the least scores, by another computation of them."""
    axes = ["neurons", "query_heads", "residual"]
    asked = recipe_with(tiny_folder, text_file, method="minitron", axes=axes, budget="60%", step=1)
    heard: list[dict[str, Any]] = []
    outcome = prune(asked, tmp_path / "out", listen=as_dicts(heard.append))
    assert outcome.figures["params_after"] <= outcome.figures["budget"]
    first = next(event["sizes"]["residual"] for event in heard if event["event"] == "cut")
    model = load(str(tiny_folder)).model
    batches = calibration_feed(model, byte_tokenizer(), source=str(text_file), samples=8, length=32, ids=None, seed=0)(1)
    scores = scores_of(model, batches, activations.magnitude)["residual"]
    kept = set(outcome.mask["residual"].nonzero().flatten().tolist())
    assert 0 < len(kept) <= first < 48
    assert kept <= set(scores.topk(first).indices.tolist()), "what one more iteration takes is ranked anew"


def test_standardised_channels_have_mean_0_and_deviation_1_before_heads_are_made_of_them(batches: list[Tensor]) -> None:
    model = tiny_model()
    found = scores_of(model, batches, activations.fluctuation, standardised=True)
    for name, samples in inputs_of(model, batches).items():
        weight, units = weight_of(model, name), features_of(model, name, samples)
        power = 2 if name.endswith("_heads") else 1
        values = [[CHANNELS["WIFV"](samples, weight, j) ** power for j in unit] for unit in units]
        flat = [value for unit in values for value in unit]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / (len(flat) - 1))
        expected = [sum((value - mean) / deviation for value in unit) / len(unit) for unit in values]
        assert found[name].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_features_that_are_all_alike_are_standardised_to_0(batches: list[Tensor]) -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    found = scores_of(model, batches, activations.fluctuation, standardised=True)
    assert torch.equal(found["layers.1.neurons"], torch.zeros(40))


ALL = {
    "wanda": activations.wanda,
    "WIFV": activations.fluctuation,
    "WIFN": partial(activations.fluctuation, form="WIFN"),
    "authors": partial(activations.fluctuation, authors_mean=True),
    "magnitude": activations.magnitude,
}


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
def test_a_sample_is_a_sequence_however_the_text_is_split(metric: Any, batches: list[Tensor]) -> None:
    """Also where a metric beside it has the sequences run one by one."""
    model = tiny_model()
    apart, as_one = scores_of(model, batches, metric), scores_of(model, [torch.cat(batches)], metric)
    beside = score(
        model, families.axes(model), batches, metrics=[partial(weights.taylor, form="second"), metric], dtype="float32"
    )[0]
    for name in apart:
        assert torch.allclose(apart[name], as_one[name], rtol=1e-4)
        assert torch.allclose(apart[name], beside[name], rtol=1e-4)


@pytest.mark.parametrize("metric", [*ALL.values(), blocks.block_influence], ids=[*ALL, "block_influence"])
def test_looking_leaves_no_hook_and_no_changed_weight(metric: Any, batches: list[Tensor]) -> None:
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores_of(model, batches, metric)
    with pytest.raises(IndexError):
        scores_of(model, [torch.full((2, 4), 10_000)], metric)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("metric", [ALL["wanda"], ALL["WIFV"], ALL["WIFN"], ALL["magnitude"], blocks.block_influence])
def test_two_processes_find_what_one_finds(metric: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    alone = scores_of(model, batches, metric)
    together = in_two_processes(monkeypatch, lambda: scores_of(model, batches, metric))
    for name, scores in alone.items():
        assert torch.allclose(together[name], scores, rtol=1e-4)


def test_the_authors_mean_is_for_one_process(batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="which 2 processes share out; run it in one process"):
        in_two_processes(monkeypatch, lambda: scores_of(tiny_model(), batches, ALL["authors"]))


def test_axes_may_share_a_gate_and_have_units_of_any_width(batches: list[Tensor]) -> None:
    """Single query heads, say, beside the KV heads whose features they are part of."""
    model = tiny_model()
    heads = Axis(
        "layers.0.query_heads", 6, 1, Gate("model.layers.0.self_attn.o_proj", 8),
        (Slice("model.layers.0.self_attn.o_proj.weight", 1, 8),),
    )  # fmt: skip
    both, _ = score(model, [*families.axes(model), heads], batches, metrics=[activations.wanda], dtype="float32")
    pairs = both["layers.0.query_heads"].view(3, 2).sum(dim=1)
    assert torch.allclose(pairs, both["layers.0.kv_heads"]), "two query heads make up a KV head"


def test_what_fluctuation_cannot_do_it_says(batches: list[Tensor]) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="has no mean for authors_mean"):
        scores_of(model, batches, activations.fluctuation, form="WIFN", authors_mean=True)
    for authors_mean in (False, True):
        with pytest.raises(UsageError, match=r"over 1 calibration sequence is not defined; set calibration\.samples to 2"):
            scores_of(model, [batches[0][:1]], activations.fluctuation, authors_mean=authors_mean)


def test_block_influence_is_one_more_than_the_cosine_distance(batches: list[Tensor]) -> None:
    """And is taken on each layer's own output: the last one's is not that behind the final norm."""
    model = tiny_model()
    found = scores_of(model, batches, blocks.block_influence)["layers"]
    assert torch.allclose(found, 1 + scores_of(model, batches, blocks.cosine)["layers"], atol=1e-6)
    model.model.norm.weight.data.mul_(torch.linspace(-3, 3, 48))
    assert torch.equal(scores_of(model, batches, blocks.block_influence)["layers"], found)


def test_loss_drop_of_a_layer_is_the_loss_without_it(batches: list[Tensor]) -> None:
    model = tiny_model()
    found = blocks.loss_drop(model, [families.axes(model)[-1]], batches, dtype="float32")
    assert found.keys() == {"layers"}
    for layer in range(3):
        twin = tiny_model()
        torch.nn.init.zeros_(twin.model.layers[layer].self_attn.o_proj.weight)  # adds nothing to the residual stream
        torch.nn.init.zeros_(twin.model.layers[layer].mlp.down_proj.weight)
        ids = torch.cat(batches)
        assert float(found["layers"][layer]) == pytest.approx(float(twin(ids, labels=ids).loss.detach()), rel=1e-5)


def test_loss_drop_of_the_only_layer_is_0(batches: list[Tensor]) -> None:
    model = tiny_model(num_hidden_layers=1)
    assert blocks.loss_drop(model, [families.axes(model)[-1]], batches, dtype="float32") == {"layers": torch.zeros(1)}


def recipe_with(tiny_folder: Path, text_file: Path, **changes: Any) -> Any:
    return read({
        "method": "adapt-pruner",
        "model": str(tiny_folder), "budget": "80%", "step": 0.1, "dtype": "float32", "head_metric": None,
        "calibration": {"source": str(text_file), "samples": 8, "length": 32}, **changes,
    })  # fmt: skip


def test_a_recipe_may_rank_layers_by_the_loss_without_them(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The distances of the first iteration are the losses on its batches, and the chooser goes by them."""
    recipe = recipe_with(tiny_folder, text_file, distance="blocks.loss_drop", metric="weights.magnitude")
    dense = tiny_model(vocab_size=VOCAB)
    assert Work.of(dense, recipe).reads_text, "the metric reads none, the distance does"
    heard: list[dict[str, Any]] = []
    prune(recipe, tmp_path / "out", listen=as_dicts(heard.append))
    first = next(event for event in heard if event["event"] == "cut")
    feed = calibration_feed(dense, byte_tokenizer(), source=str(text_file), samples=8, length=32, ids=None, seed=0)
    expected = blocks.loss_drop(dense, [families.axes(dense)[-1]], feed(1), dtype="float32")["layers"]
    assert first["distances"] == pytest.approx(expected.tolist(), rel=1e-5)
    kept = [first["sizes"][f"layers.{i}.neurons"] for i in range(3)]
    assert max(kept) == kept[int(expected.argmax())] > kept[int(expected.argmin())]


@pytest.mark.parametrize("metric", ["activations.wanda", "activations.fluctuation(standardised=true)", "taylor(form=mixed)"])
def test_a_recipe_may_name_it(metric: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_with(tiny_folder, text_file, metric=metric, distance="blocks.block_influence")
    figures = prune(recipe, tmp_path / "out").figures
    assert figures["params_after"] <= figures["budget"]


def test_sequential_scoring_measures_each_layer_on_what_pruned_layers_give_it(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Held against whole passes under gates, a pass a layer; and not what the dense model says."""
    changes = {"metric": "activations.wanda", "chooser": "allocate.uniform", "distance": None, "step": 1, "budget": "60%"}
    recipe = recipe_with(tiny_folder, text_file, sequential_scoring=True, **changes)
    found = prune(recipe, tmp_path / "out").mask
    at_once = prune(recipe_with(tiny_folder, text_file, **changes), tmp_path / "at-once").mask
    model = tiny_model(vocab_size=VOCAB)
    axes = [axis for axis in families.axes(model) if axis.kind in ("kv_heads", "neurons")]
    feed = calibration_feed(model, byte_tokenizer(), source=str(text_file), samples=8, length=32, ids=None, seed=0)
    below = Mask()
    for layer in range(3):
        inside = [axis for axis in axes if axis.layer == layer]
        with gated(model, axes, below):
            scores, _ = score(model, inside, feed(1), metrics=[activations.wanda], dtype="float32")
        here = Mask.of_sizes(inside, scores, {axis.name: int(found[axis.name].sum()) for axis in inside})
        below = Mask({name: mask[name] for mask in (below, here) for name in mask})
    for axis in axes:
        assert torch.equal(found[axis.name], below[axis.name]), axis.name
        assert int(found[axis.name].sum()) == int(at_once[axis.name].sum()) < axis.size
    assert torch.equal(found["layers.0.neurons"], at_once["layers.0.neurons"])
    assert any(not torch.equal(found[axis.name], at_once[axis.name]) for axis in axes)


@pytest.mark.parametrize("goes", ["layers", "layers.0.mlps", "layers.1.attentions", "residual"])
def test_sequential_scoring_measures_without_what_goes_whole(goes: str, batches: list[torch.Tensor]) -> None:
    """The same as where a gate shuts it from outside; and not what layers are worth that still have it below them."""
    model = tiny_model()
    axes = families.axes(model)
    shut = next(axis for axis in axes if axis.name == goes)
    inside = {axis.name: axis.size // 2 for axis in axes if axis.layer is not None and axis.kind == "neurons"}
    known = {goes: torch.arange(float(shut.entries))}
    sizes = inside | {goes: shut.size - 1 if shut.size < 10 else shut.size // 2}
    settings = {"metric": activations.wanda, "dtype": "float32"}
    found = score_sequentially(model, axes, sizes, batches, known=known, **settings)
    with gated(model, axes, Mask.of_sizes([shut], known, sizes)):
        expected = score_sequentially(model, axes, inside, batches, known={}, **settings)
    assert found.keys() == inside.keys()
    assert all(torch.equal(found[name], expected[name]) for name in inside)
    still_there = score_sequentially(model, axes, inside, batches, known={}, **settings)
    assert not torch.allclose(found["layers.2.neurons"], still_there["layers.2.neurons"], rtol=1e-3)


def test_behind_needs_no_gradients(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"layer by layer from activations, and weights\.taylor does not use activations; set metric"
    ):
        prune(recipe_with(tiny_folder, text_file, sequential_scoring=True), tmp_path / "out")
    with pytest.raises(UsageError, match=r"weights\.random does not use activations"):
        prune(recipe_with(tiny_folder, text_file, sequential_scoring=True, metric="weights.random"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_behind_needs_units_inside_layers(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    whole = {"axes": ["layers"], "chooser": "depth.drop_layers", "distance": "blocks.loss_drop"}
    with pytest.raises(UsageError, match="sequential_scoring=true scores units inside layers, and axes has only layers"):
        prune(recipe_with(tiny_folder, text_file, sequential_scoring=True, **whole), tmp_path / "out")
    width = {"axes": ["residual"], "method": "minitron"}
    with pytest.raises(UsageError, match="sequential_scoring=true scores units inside layers, and axes has only residual"):
        prune(recipe_with(tiny_folder, text_file, sequential_scoring=True, **width), tmp_path / "out")


def test_names_that_two_files_share_have_to_be_whole() -> None:
    assert parts.check("metric", "fluctuation(form=IFV)") == 'activations.fluctuation(form="IFV")'
    with pytest.raises(
        UsageError, match=r"'magnitude' is the name of several parts; write one of activations\.magnitude, weights\.magn"
    ):
        parts.check("metric", "magnitude")


def test_a_switch_is_true_or_false() -> None:
    with pytest.raises(UsageError, match="option 'authors_fold' of metric 'weights.taylor' is 'maybe'; give true or false"):
        parts.check("metric", "weights.taylor(authors_fold=maybe)")
