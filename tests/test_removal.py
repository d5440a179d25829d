"""The drop of the task's own measure without a unit, and the reduction that goes by it: width first, then depth, tower by tower."""

from pathlib import Path
from typing import Any

import pytest
import torch

import adapt_pruner as ap
from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import gated
from adapt_pruner.core.model.kinds import tower_of
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.data.contrastive import Contrastive
from adapt_pruner.errors import UsageError
from adapt_pruner.report.charts import anatomy
from adapt_pruner.report.figures import figures_of
from adapt_pruner.report.record import read_record
from adapt_pruner.report.with_card import run
from adapt_pruner.score import calibrate, weights
from adapt_pruner.score.removal import drop
from conftest import VOCAB, assert_same_model, break_off, log_of, read_json, suited, tiny_model
from pictures import picture_folder
from test_towers import LAYOUTS, tiny_processor, tiny_towers

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])


@every_layout
def test_a_drop_is_that_of_the_whole_measure(layout: tuple[str, str], tmp_path: Path) -> None:
    """By running both towers again without each head, layer and group of neurons, the most important neurons together."""
    model, task = tiny_towers(layout, vocab_size=VOCAB), Contrastive()
    source = picture_folder(tmp_path / "pictures", number=40)
    batches = task.calibration(None, tiny_processor(), source=str(source), samples=40, seed=0)(1)
    axes = [
        axis for axis in families.axes(model) if axis.name.startswith(("text.layers.1.", "vision.layers.2.", "vision.layers"))
    ]
    axes = [axis for axis in axes if axis.kind == "layers" or "layers.1." in axis.name or "layers.2." in axis.name]
    found = drop(model, axes, batches, groups=4, task=task, dtype="float32")
    order, _ = calibrate.score(
        model, [axis for axis in axes if axis.kind == "neurons"], batches, metrics=[lambda m, a: weights.taylor(m, a, form="vector")],
        task=task, dtype="float32",
    )  # fmt: skip

    @torch.no_grad()
    def merit() -> float:
        recalls = task.judged(model, torch.cat(batches))
        return sum(float(value) for name, value in recalls.items() if "R@" in name) / 40 / 6

    whole = merit()
    for axis in axes:
        units = torch.arange(axis.entries).split(1)
        if axis.kind == "neurons":
            units = order[axis.name].argsort(descending=True, stable=True).tensor_split(4)
        for unit in units:
            keep = torch.ones(axis.entries, dtype=torch.bool)
            keep[unit] = False
            with gated(model, axes, Mask({axis.name: keep})):
                expected = whole - merit()
            assert torch.allclose(found[axis.name][unit], torch.tensor(expected), atol=2e-6), axis.name


def test_neurons_of_equal_drop_go_by_their_gradients(tmp_path: Path) -> None:
    model, task = tiny_towers(vocab_size=VOCAB), Contrastive()
    batches = task.calibration(None, tiny_processor(), source=str(picture_folder(tmp_path / "p")), samples=24, seed=0)(1)
    axes = [axis for axis in families.axes(model) if axis.name == "text.layers.1.neurons"]
    found = drop(model, axes, batches, groups=2, task=task, dtype="float32")["text.layers.1.neurons"]
    order, _ = calibrate.score(
        model, axes, batches, metrics=[lambda m, a: weights.taylor(m, a, form="vector")], task=task, dtype="float32"
    )
    best = order["text.layers.1.neurons"].argsort(descending=True)[:20]
    assert torch.equal(found[best].argsort(descending=True), torch.arange(20))


def test_of_a_causal_lm_it_is_the_rise_of_the_loss(batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    axes = [axis for axis in families.axes(model) if axis.kind in ("kv_heads", "layers")]
    found = drop(model, axes, batches, task=CAUSAL_LM, dtype="float32")
    whole = calibrate.mean_loss(model, batches, dtype="float32")
    for axis in axes:
        for unit in range(axis.size):
            with gated(model, axes, Mask({axis.name: torch.arange(axis.size) != unit})):
                rise = calibrate.mean_loss(model, batches, dtype="float32") - whole
            assert float(found[axis.name][unit]) == pytest.approx(rise, abs=1e-4)


def keys(model: Path, source: Path, **more: Any) -> dict[str, Any]:
    return {
        "method": "mope-clip",
        "model": str(model),
        "budget": "60%",
        "calibration": {"source": str(source), "samples": 12},
    } | more


def test_width_goes_before_depth_and_one_tower_before_the_other(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    """Of the vision tower alone, the text tower stays as it is; the layer that goes is that of the lowest drop, measured after the width."""
    seen: list[dict[str, Any]] = []
    result = ap.prune(
        str(clip_folder), tmp_path / "small", params="75%", method="mope-clip", text=str(shown), listen=lambda event: seen.append(event),
        settings={"calibration.samples": 32, "reduce": "towers(tower=vision)"},
    )  # fmt: skip
    cuts = [event["sizes"] for event in seen if event["event"] == "cut"]
    assert all(tower_of(name) == "vision." for sizes in cuts for name in sizes)
    kinds = [{name.rpartition(".")[2] for name in sizes} for sizes in cuts]
    assert kinds[0] == {"neurons", "kv_heads"}
    assert {"layers"} in kinds
    assert result.figures["params_after"] <= 0.75 * 95385
    cuts.clear()
    seen.clear()
    ap.prune(
        str(clip_folder), tmp_path / "both", params="50%", method="mope-clip", text=str(shown), listen=lambda event: seen.append(event),
        settings={"calibration.samples": 32},
    )  # fmt: skip
    towers = [{tower_of(name) for name in event["sizes"]} for event in seen if event["event"] == "cut"]
    assert towers == sorted(towers, key=sorted), "text first, vision then"
    assert {"text."} in towers
    assert {"vision."} in towers


def test_a_run_goes_on_where_it_was_killed(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    training = {"source": str(shown), "length": 26, "tokens": 1664, "batch_tokens": 832}
    recipe = suited(keys(clip_folder, shown, budget="85%", stages=2, training=training, reduce="towers(tower=vision)"))
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "killed", kind="cut", nth=2)
    run(recipe, tmp_path / "killed")
    assert_same_model(tmp_path / "whole", tmp_path / "killed")
    assert [cut["sizes"] for cut in log_of(tmp_path / "whole", "cut")] == [
        cut["sizes"] for cut in log_of(tmp_path / "killed", "cut")
    ]


def test_the_page_shows_the_layers_of_both_towers(clip_folder: Path, shown: Path, tmp_path: Path) -> None:
    run(suited(keys(clip_folder, shown, budget="45%")), tmp_path / "run")
    chart = anatomy(figures_of(read_record(tmp_path / "run")))
    assert chart is not None
    mask = Mask.from_json(read_json(tmp_path / "run" / "model" / "mask.json")).kept
    depths = [len(mask[f"{tower}.layers"]) for tower in ("text", "vision")]
    assert chart.layers == list(range(sum(depths)))
    left = [
        int(layer) for tower, begin in (("text", 0), ("vision", depths[0])) for layer in begin + mask[f"{tower}.layers"].nonzero()
    ]
    for panel, kind in ((panel, {"MLP neurons": "neurons", "KV heads": "kv_heads"}[panel.name]) for panel in chart.panels):
        names = [
            f"{tower}.layers.{i}.{kind}" for tower, depth in zip(("text", "vision"), depths, strict=True) for i in range(depth)
        ]
        kept = [int(mask[name].sum()) if number in left else 0 for number, name in enumerate(names)]
        assert panel.left == kept
    assert f"layers 0 to {depths[0] - 1} are the text tower" in chart.about
    assert "whole layer" in chart.about
    assert chart.about in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_tower_that_there_is_not_is_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is for models of two towers"):
        ap.prune(str(tiny_folder), tmp_path / "small", params="70%", method="mope-clip", text=str(text_file), settings={
            "calibration.samples": 4, "calibration.length": 32, "reduce": "towers(tower=text)",
        })  # fmt: skip
