"""`reduce: hard_concrete`: folded equals masked, the shape is reached, multipliers ascend, and a killed run goes on bit-equal."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce import hard_concrete
from adapt_pruner.reduce.hard_concrete import HardConcrete, expected_open, fold, sampled, settled
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run.start import begin, prepare
from adapt_pruner.work import Work
from conftest import LAYOUTS, as_dicts, assert_refused, assert_same_model, break_off, log_of, read_json, tiny_model


def test_a_draw_is_open_as_often_as_is_expected() -> None:
    torch.manual_seed(0)
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 1.0, 5.0])
    drawn = torch.stack([sampled(log_alpha) for _ in range(4000)])
    assert torch.allclose((drawn > 0).float().mean(dim=0), expected_open(log_alpha), atol=0.03)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert float((drawn == 1).float().mean()) > 0.1, "it reaches its ends"
    z = settled(log_alpha, 2)
    assert z.tolist() == pytest.approx([0, 0, 0, 1 / (1 + math.exp(-1.2)), 1 / (1 + math.exp(-6.0))])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize(
    "kinds", [("neurons", "kv_heads"), ("layers",), ("residual",), ("residual", "kv_heads", "neurons", "layers")]
)
def test_folded_and_cut_is_what_was_masked(layout: tuple[str, str], kinds: tuple[str, ...], batches: list[torch.Tensor]) -> None:
    model = tiny_model(layout).double()
    axes = families.axes(model)
    kinds = tuple(kind for kind in kinds if any(axis.kind == kind for axis in axes))
    torch.manual_seed(1)
    z = {}
    for kind in kinds:
        rows = hard_concrete._rows_of(axes, kind)
        keep = max(1, rows.shape[1] * 2 // 3)
        z[kind] = settled(torch.randn(rows.shape), keep).double()
    small = copy.deepcopy(model)
    fold(small, axes, z)
    cut(small, axes, hard_concrete._mask(axes, z))
    with torch.no_grad(), gated(model, axes, hard_concrete._gates(axes, z)):
        expected = model(batches[0]).logits
    with torch.no_grad():
        found = small(batches[0]).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), float(
        (found - expected).abs().max()
    )
    with torch.no_grad():
        assert not torch.allclose(found, model(batches[0]).logits, rtol=1e-2), "the masks do something"


def recipe_of(folder: Path, text: Path, **changes: Any) -> Recipe:
    training = {"source": str(text), "tokens": 2048, "batch_tokens": 64, "length": 32, "lr": 1e-3} | changes.pop("training", {})
    keys = {
        "model": str(folder), "budget": "75%", "method": "sheared", "dtype": "float32", "device": "cpu", "checkpoint_minutes": 0,
        "training": training, "keep_checkpoints": 99,
    }  # fmt: skip
    return read(keys | changes)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run that nothing stopped, and what came of it."""
    folder = tmp_path_factory.mktemp("hard-concrete") / "whole"
    return folder, run(recipe_of(tiny_folder, text_file), folder)


def test_a_loss_that_rises_while_masks_close_is_no_divergence(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tiny_folder, text_file, reduce="hard_concrete(share=1.0)", training={"max_rise": 1e-6}, checkpoint_minutes=60
    )
    outcome = run(recipe, tmp_path / "run")
    assert outcome is not None
    losses = [step["loss"] for step in log_of(tmp_path / "run", "step")]
    assert max(losses[1:]) > losses[0] + 1e-6, "which would have ended a training without masks"


def test_the_shape_is_reached_and_plain(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    shape = "hard_concrete(residual=36, kv_heads=2, neurons=30, layers=2, lr=0.2, share=0.8)"
    outcome = run(
        recipe_of(tiny_folder, text_file, reduce=shape, training={"tokens": 8192}, checkpoint_minutes=60), tmp_path / "run"
    )
    assert outcome is not None
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["intermediate_size"], config["num_hidden_layers"]) == (
        36,
        2,
        30,
        2,
    )
    assert config["architectures"] == ["LlamaForCausalLM"]
    learnt = log_of(tmp_path / "run", "masks_learnt")
    rounds = [one["sizes"] for one in learnt]
    assert rounds[0]["residual"] > 47, "masks begin open"
    for name, size in (("residual", 36), ("layers.0.neurons", 30), ("layers", 2)):  # around which multipliers of few steps swing
        assert min(abs(one[name] - size) for one in rounds[2:]) < abs(rounds[0][name] - size) / 2, f"{name} moves to its target"
        assert max(one[name] for one in rounds[-3:]) < rounds[0][name]
    assert len(log_of(tmp_path / "run", "cut")) == 1
    assert len(log_of(tmp_path / "run", "step")) > 120, "the rest of the tokens trains the small model"


def test_masks_that_end_far_from_their_target_are_told_of(whole: tuple[Path, Any], tiny_folder: Path) -> None:
    """16 steps are too few; the figures are those of the last report."""
    last = log_of(whole[0], "masks_learnt")[-1]["sizes"]
    (told,) = [line["message"] for line in log_of(whole[0], "warning") if "the masks close another share" in line["message"]]
    assert told.startswith("stage 1: after 16 steps ")
    left, dense = families.sizes(whole[1].loaded.model), families.sizes(load(str(tiny_folder)).model)
    named = dict(re.findall(r"(\w+) (\d\.\d\d for \d\.\d\d)", told))
    assert named
    for kind in ("residual", "kv_heads", "neurons", "layers"):
        sizes = [name for name in dense if name.rpartition(".")[2] == kind]
        expected = 1 - sum(last[name] for name in sizes) / sum(dense[name] for name in sizes)
        cut = 1 - left[sizes[0]] / dense[sizes[0]]
        assert (kind in named) is (abs(expected - cut) > 0.02), kind
        assert named.get(kind, f"{expected:.2f} for {cut:.2f}") == f"{expected:.2f} for {cut:.2f}"


def test_masks_that_end_at_their_target_are_not_told_of(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Also: they are learnt in `steps` steps, however long the training is."""
    recipe = recipe_of(tiny_folder, text_file, reduce="hard_concrete(neurons=30)", budget="95%")
    work = begin(recipe, lambda event: None)
    prepare(work)
    assert work.span(0.5, first=0, steps=8).steps_left(0) == 8
    assert work.span(0.5, first=0, steps=400).steps_left(0) == 16
    how = work.reduction
    assert isinstance(how, HardConcrete)
    how._held = {"neurons": torch.full((3, 40), 9.0)}
    how._held["neurons"][:, :10] = -9.0
    heard: list[str] = []
    work.warn_of_stage = heard.append  # type: ignore[method-assign]
    how._warn_if_off(work, {"neurons": 0.25}, steps=8)
    assert heard == []
    how._warn_if_off(work, {"neurons": 0.28}, steps=8)
    assert len(heard) == 1
    assert "neurons 0.25 for 0.28" in heard[0]


def test_a_shape_is_found_for_a_budget(whole: tuple[Path, Any]) -> None:
    _, outcome = whole
    assert outcome is not None
    assert outcome.figures["budget"] * 0.85 < outcome.figures["params_after"] <= outcome.figures["budget"]
    sizes = families.sizes(outcome.loaded.model)
    assert len({sizes[name] for name in sizes if name.endswith("neurons")}) == 1


def test_a_budget_a_little_below_the_model_takes_no_whole_layer_or_head() -> None:
    """Kinds of few units are rounded up, so that those of many pay."""
    model = tiny_model(num_hidden_layers=4, hidden_size=192, intermediate_size=640)
    work = Work.of(model, read({"model": "x", "budget": "97%", "method": "sheared", "training": {"source": "x", "tokens": 100}}))
    dense = {axis.kind: axis.size for axis in work.axes}
    found = HardConcrete()._found(work, work.num_params * 97 // 100)
    assert {kind: dense[kind] - size for kind, size in found.items() if kind in ("kv_heads", "layers")} == {
        "kv_heads": 0,
        "layers": 0,
    }
    assert all(found[kind] < dense[kind] for kind in ("neurons", "residual"))


def test_a_budget_that_only_one_unit_of_each_meets_has_a_shape() -> None:
    model = tiny_model(num_hidden_layers=1, hidden_size=192, intermediate_size=2048)
    work = Work.of(model, read({"model": "x", "budget": "97%", "method": "sheared", "training": {"source": "x", "tokens": 100}}))
    least, _ = HardConcrete().floor(work)
    assert set(HardConcrete()._found(work, least).values()) == {1}


@pytest.mark.parametrize("nth", [3, 12, 20])
def test_a_killed_run_goes_on_bit_equal(
    nth: int, whole: tuple[Path, Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe, broken = recipe_of(tiny_folder, text_file), tmp_path / "broken"
    break_off(recipe, broken, kind="step", nth=nth)
    run(recipe, broken)
    for kind, keys in (("step", ("step", "loss", "lr")), ("cut", ("sizes", "params"))):
        one, other = ([[line.get(key) for key in keys] for line in log_of(folder, kind)] for folder in (whole[0], broken))
        assert one == other
    assert_same_model(whole[0], broken)


@pytest.mark.parametrize(("changes", "said"), [
    ({"training": {"source": None, "tokens": 0}}, "reduce 'hard_concrete' works while the model trains, and the recipe trains nothing"),
    ({"training": {"gradient_checkpointing": True}}, "does not work with training.gradient_checkpointing; leave it out"),
    ({"reduce": "hard_concrete(residual=64)"}, "the shape has 64 residual, and the model has 48; give that many or fewer"),
    ({"reduce": "hard_concrete(layers=0)"}, "option 'layers' of reduce 'hard_concrete' is 0; give a whole number (1 or more) or null"),
    ({"reduce": "hard_concrete(kv_heads=3)", "budget": "50%"}, "parameters remain when the model has the shape that"),
    ({"axes": ["neurons", "query_heads"]}, "hard_concrete masks residual, kv_heads, neurons, layers, and axes names query_heads"),
    ({"stages": 2}, "can run only once, and stages is 2; set stages to 1"),
    ({"budget": "100"}, "budget 100 is too small: "),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, **changes), tmp_path / "run", said)


def test_layers_of_unequal_size_are_refused_before_any_work_but_may_be_trained(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    prune(
        read({"model": str(tiny_folder), "method": "random", "chooser": "rank.per_parameter", "budget": "90%"}),
        tmp_path / "uneven",
    )
    heard: list[dict[str, Any]] = []
    measured = {"evaluation": {"source": str(text_file), "window": 32, "max_windows": 2}}
    with pytest.raises(UsageError, match="needs layers of equal size, and the .* of this model differ"):
        run(recipe_of(tmp_path / "uneven", text_file, **measured), tmp_path / "run", listen=as_dicts(heard.append))
    assert {event["event"] for event in heard} <= {"load", "loaded"}
    run(recipe_of(tmp_path / "uneven", text_file, budget="100%", checkpoint_minutes=60), tmp_path / "trained")
    assert log_of(tmp_path / "trained", "step")
    assert not log_of(tmp_path / "trained", "cut")
    run(
        recipe_of(tmp_path / "uneven", text_file, reduce="hard_concrete(layers=2)", budget="100%", checkpoint_minutes=60),
        tmp_path / "fewer",
    )
    assert read_json(tmp_path / "fewer" / "model" / "config.json")["num_hidden_layers"] == 2


def test_a_shape_is_met_where_the_budget_asks_for_nothing(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run(recipe_of(tiny_folder, text_file, reduce="hard_concrete(layers=2)", budget="100%"), tmp_path / "run")
    assert read_json(tmp_path / "run" / "model" / "config.json")["num_hidden_layers"] == 2
