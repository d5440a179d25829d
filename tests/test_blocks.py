"""Whole attentions and MLPs: what they are worth, and models whose layers lack some in all that walks layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.save import save
from adapt_pruner.cli import app
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.anatomy import anatomy
from adapt_pruner.recipe import read
from adapt_pruner.reduce.repair.closed_form import least_squares, mean_bias
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run.estimate import shapes
from adapt_pruner.score import blocks
from adapt_pruner.score.calibrate import mean_loss, score
from adapt_pruner.score.weights import magnitude, taylor
from adapt_pruner.train.kernels import kernels
from conftest import LAYOUTS, VOCAB, as_dicts, byte_tokenizer, read_json, tiny_model
from test_rotate import floor_of

GONE = Mask({f"layers.{name}": torch.tensor([False]) for name in ("0.attentions", "1.mlps")})


def lacking(layout: tuple[str, str] = ("llama", "llama"), **changes: Any) -> Any:
    """A tiny model whose first layer has no attention and whose second no MLP."""
    model = tiny_model(layout, **changes)
    cut(model, families.axes(model), GONE)
    return model


def stream_at_norms(model: Any, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What enters every norm that reads the stream before a block, and what leaves the last layer."""
    layers, seen = model.model.layers, {}
    norms = {f"{i}.attentions": layer.input_layernorm for i, layer in enumerate(layers)}
    for i, layer in enumerate(layers):
        norms[f"{i}.mlps"] = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    norms["end"] = model.model.norm
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(streams) for name, streams in seen.items()}


@pytest.mark.parametrize("layout", [("llama", "llama-mha-biased"), ("gemma3", "gemma3-grouped")], ids=lambda layout: layout[1])
def test_distances_of_blocks_are_those_between_streams(layout: tuple[str, str], batches: list[torch.Tensor]) -> None:
    model = tiny_model(layout)
    measured, _ = score(model, families.axes(model), batches, metrics=[blocks.block_influence], dtype="float32")
    assert set(measured) == {"layers", *(f"layers.{i}.{kind}" for i in range(3) for kind in ("attentions", "mlps"))}
    streams = stream_at_norms(model, batches)
    order = [*(f"{i}.{kind}" for i in range(3) for kind in ("attentions", "mlps")), "end"]
    for entering, leaving in zip(order[:-1], order[1:], strict=True):
        expected = 1 - torch.cosine_similarity(streams[entering], streams[leaving], dim=-1).mean()
        assert measured[f"layers.{entering}"].tolist() == pytest.approx([float(expected)], abs=1e-5)
    euclidean, _ = score(model, families.axes(model), batches, metrics=[blocks.euclidean], dtype="float32")
    assert float(euclidean["layers.1.mlps"]) == pytest.approx(
        float((streams["2.attentions"] - streams["1.mlps"]).norm(dim=-1).mean())
    )


def test_a_layer_and_its_only_block_are_worth_the_same(batches: list[torch.Tensor]) -> None:
    model = lacking()
    measured, _ = score(model, families.axes(model), batches, metrics=[blocks.block_influence], dtype="float32")
    assert float(measured["layers"][0]) == pytest.approx(float(measured["layers.0.mlps"]), abs=1e-6)
    assert float(measured["layers"][1]) == pytest.approx(float(measured["layers.1.attentions"]), abs=1e-6)


def test_loss_drop_is_the_loss_without_the_block(batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    axes = [axis for axis in families.axes(model) if axis.modules]
    measured = blocks.loss_drop(model, axes, batches, dtype="float32")
    for axis in axes:
        smaller = tiny_model()
        cut(smaller, families.axes(smaller), Mask({axis.name: torch.tensor([False])}))
        assert measured[axis.name].tolist() == pytest.approx([mean_loss(smaller, batches, dtype="float32")], rel=1e-6)
    assert len({float(value) for value in measured.values()}) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_loss_drop_runs_no_layer_below_the_unit(layout: tuple[str, str], dtype: str, batches: list[torch.Tensor]) -> None:
    """And gives the loss of the whole model with the unit shut, to the last bit, whatever kind of unit it is."""
    model, ran, told = tiny_model(layout), [0] * 3, []
    axes = [axis for axis in families.axes(model) if axis.kind in ("kv_heads", "mlps", "layers")]
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, number=number: ran.__setitem__(number, ran[number] + 1))
    found = blocks.loss_drop(model, axes, batches, dtype=dtype, on_axis=lambda *done: told.append(done))
    units = [1 + 1 + sum(axis.size for axis in axes if axis.kind == "kv_heads" and axis.layer == n) for n in range(3)]
    whole = 1  # on the way to the next layer; a shut layer or block may be run, too
    assert [count <= len(batches) * (sum(units[: n + 1]) + whole) for n, count in enumerate(ran)] == [True] * 3
    assert told == [(done, len(axes)) for done in range(1, len(axes) + 1)]
    for axis in axes:
        for entry in range(axis.entries) if axis.size > axis.least else ():
            with gated(model, axes, Mask({axis.name: torch.arange(axis.entries) != entry})):
                expected = mean_loss(model, batches, dtype=dtype)
            assert found[axis.name][entry] == torch.tensor(expected), axis.name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_everything_that_walks_layers_copes(layout: tuple[str, str], batches: list[torch.Tensor], tmp_path: Path) -> None:
    model = lacking(layout, vocab_size=VOCAB)
    axes = families.axes(model)
    scores, _ = score(model, axes, batches, metrics=[taylor], dtype="float32")
    weights, _ = score(model, axes, batches, metrics=[magnitude])
    assert set(scores) == set(weights) == {axis.name for axis in axes if axis.slices and axis.kind != "vocabulary"}
    found = anatomy(model, mask=GONE, dense_params=count_parameters(tiny_model(layout, vocab_size=VOCAB)))
    told = [(bool(row["heads"]), bool(row["kv_heads"]), bool(row["neurons"]), row["share_of_dense"]) for row in found["layers"]]
    assert told == [(False, False, True, None), (True, True, False, None), (True, True, True, 1.0)]
    assert sum(row["params"] for row in found["layers"]) == found["decoder_params"]
    assert shapes(model).neurons == 80
    with kernels(model, gradient_checkpointing=True, compiled=False, liger=False):
        model.train()
        model(batches[0], labels=batches[0]).loss.backward()
        model.eval()

    mask = Mask({axis.name: torch.arange(axis.size) % 4 > 0 for axis in axes if axis.kind == "neurons"})
    mask = Mask({**mask.kept, "layers.2.attentions": torch.tensor([False])})
    least_squares(model, axes, mask, batches, sequential=True, dtype="float32")
    mean_bias(model, axes, mask, batches, dtype="float32")
    axes = families.axes(model)  # with the biases
    cut(model, axes, mask)
    save(model, byte_tokenizer(), tmp_path / "model", mask=GONE.then(mask, families.axes(model)), dtype=torch.float32)
    loaded = load(str(tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded.model(batches[0]).logits, model(batches[0]).logits)
    assert loaded.mask == GONE.then(mask, families.axes(model))


def test_a_model_that_lacks_blocks_is_not_sliced() -> None:
    with pytest.raises(UsageError, match="layer 0 has no attention or no MLP, and slicing changes the basis at both; set reduce"):
        floor_of(lacking())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "six-layers"
    tiny_model(vocab_size=VOCAB, num_hidden_layers=6).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_command_line_drops_attentions(folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ["--set", "axes=[attentions]", "--set", "chooser=depth.drop_layers", "--set", "distance=blocks.block_influence"]
    asked += ["--set", "calibration.self_generated=0"]
    text = ["--calibration", str(text_file), "--calibration-samples", "4", "--calibration-length", "32"]
    done = CliRunner().invoke(app, ["prune", str(folder), "--params", "80%", "-o", str(tmp_path / "out"), *asked, *text])
    assert done.exit_code == 0, done.output
    mask = Mask.from_json(read_json(tmp_path / "out" / "mask.json"))
    assert all(name.endswith(".attentions") for name in mask)
    assert 1 <= sum(not mask[name].any() for name in mask) < 6
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output


def test_a_product_goes_on_in_another_run_and_its_mask_is_against_the_dense_model(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    common = {
        "method": "adapt-pruner", "chooser": "depth.drop_layers", "step": 1, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    }  # fmt: skip
    prune(read({"model": str(folder), "budget": "85%", "axes": ["attentions"], **common}), tmp_path / "one")
    prune(read({"model": str(tmp_path / "one"), "budget": "80%", "axes": ["layers", "neurons"], **common}), tmp_path / "two")
    prune(read({"model": str(tmp_path / "two"), "budget": "80%", "axes": ["mlps", "attentions"], **common}), tmp_path / "three")
    dense, last = load(str(folder)).model, load(str(tmp_path / "three"))
    assert last.mask is not None
    cut(dense, families.axes(dense), last.mask)
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(ids).logits, last.model(ids).logits)
    assert last.dense_params == count_parameters(load(str(folder)).model)


def test_a_run_that_trains_goes_on_to_the_same_model(folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = read({
        "method": "adapt-pruner",
        "model": str(folder), "budget": "65%", "axes": ["attentions", "mlps", "neurons"], "chooser": "depth.drop_layers", "stages": 3,
        "dtype": "float32", "calibration": {"source": str(text_file), "samples": 4, "length": 32},
        "training": {"source": str(text_file), "tokens": 3_000, "batch_tokens": 512, "length": 64, "lr": 1e-3},
    })  # fmt: skip

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "cut" and event["stage"] == 3:
            raise KeyboardInterrupt

    whole = run(asked, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "stopped", listen=as_dicts(stop))
    went_on = run(asked, tmp_path / "stopped")
    assert whole is not None
    assert went_on is not None
    assert whole.mask == went_on.mask
    assert any(not whole.mask[name].any() for name in whole.mask)
    one, other = whole.loaded.model.state_dict(), went_on.loaded.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
