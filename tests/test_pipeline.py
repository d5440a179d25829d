"""Whole runs on tiny models: the loop, its folders, its log, and what it does when something breaks."""

import gc
import io
import json
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.checkpoint.state import load_state
from adapt_pruner.core.events import Event
from adapt_pruner.core.model import modeling_pruned
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.data.selfwritten import selfwritten_windows
from adapt_pruner.data.windows import calibration_feed
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate.anatomy import anatomy
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce.repair import closed_form
from adapt_pruner.reduce.units import scored
from adapt_pruner.report import screen
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run import resume, start
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.run.start import stage_targets
from adapt_pruner.score.blocks import loss_drop
from adapt_pruner.score.calibrate import mean_loss
from adapt_pruner.work import Work
from conftest import VOCAB, as_dicts, assert_same_model, break_off, read_json, suited

Heard = tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]


@pytest.fixture
def recipe(tiny_folder: Path, text_file: Path) -> Recipe:
    return read({
        "method": "adapt-pruner",
        "model": str(tiny_folder), "budget": "70%", "stages": 3, "step": 0.1, "amplitude": 0.05, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        "training": {"source": str(text_file), "tokens": 6_000, "batch_tokens": 512, "length": 64, "lr": 3e-3},
        "evaluation": {"source": str(text_file), "window": 64, "max_windows": 5},
    })  # fmt: skip


def without_training(recipe: Recipe, **changes: Any) -> Recipe:
    data = recipe.model_dump() | {"training": {}, "evaluation": {}, "stages": 1} | changes
    return suited(data)


def cost_of_a_neuron(folder: Path) -> int:
    return next(axis.cost for axis in families.axes(load(str(folder)).model) if axis.kind == "neurons")


def test_an_interleaved_run(recipe: Recipe, tmp_path: Path, events: Heard) -> None:
    heard, listen = events
    outcome = run(recipe, tmp_path / "run", listen=as_dicts(listen))
    figures = outcome.figures
    dense = figures["params_before"]
    neuron = cost_of_a_neuron(Path(recipe.model))

    # linear parameter targets, each met from below within one neuron
    targets = stage_targets(dense, int(dense * 0.7), 3)
    measured = [event for event in heard if event["event"] == "evaluation"]
    assert [(event["stage"], event["after_cuts"]) for event in measured] == [
        (0, False), *((stage, cut) for stage in (1, 2, 3) for cut in (True, False))
    ]  # fmt: skip
    evaluations = [event for event in measured if not event["after_cuts"]]
    cut = figures["perplexities_after_cuts"]
    assert cut == [None, *(event["perplexity"] for event in measured if event["after_cuts"])]
    assert all(after > trained for after, trained in zip(cut[1:], figures["perplexities"][1:], strict=True))
    for target, event in zip(targets, evaluations[1:], strict=True):
        assert target - neuron < event["params"] <= target

    # tokens 1 : 2 : 3 over the stages in whole batches of 512, on one rate curve that ends low
    steps = [event for event in heard if event["event"] == "step"]
    tokens = [max(e["tokens"] for e in steps if e["stage"] == k) for k in (1, 2, 3)]
    assert tokens == [1024, 3072, 6016]
    assert figures["trained_tokens"] == tokens[-1]
    assert steps[-1]["lr"] < 0.5 * max(event["lr"] for event in steps)

    # training brings the quality back
    assert figures["perplexities"][-1] < 0.7 * figures["perplexities"][0]

    # the folder
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".adapt-pruner",
        ".lock",
        "recipe.yaml",
        "log.jsonl",
        "checkpoints",
        "model",
        "report.html",
    }
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["stage-2", "stage-3-pruned"]
    assert read(str(tmp_path / "run" / "recipe.yaml")) == recipe
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in log[:4]] == ["warning", "warning", "start", "evaluation"]
    assert all("of the evaluation text (" in event["message"] for event in log[:2])  # the recipe reads one text for all
    assert log[-1]["params_after"] == figures["params_after"]
    assert load(str(tmp_path / "run" / "checkpoints" / "stage-2")).mask is not None

    # the model
    saved = load(str(tmp_path / "run" / "model"))
    assert count_parameters(saved.model) == figures["params_after"]
    assert saved.mask == outcome.mask
    pruning = read_json(tmp_path / "run" / "model" / "pruning.json")
    assert pruning["recipe"]["budget"] == "70%"
    assert pruning["dense_params"] == dense
    assert "torch" in pruning["made_by"]


def test_a_loss_that_is_no_cross_entropy_says_what_it_is(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands beside perplexities, of which it is not the logarithm: on the screen, in the log and on the page."""
    monkeypatch.setattr(screen, "_EVERY", 0.0)
    asked = recipe.model_dump() | {"stages": 1}
    shown = screen.Screen(Console(file=io.StringIO(), width=200), moves=False)
    for name, objective in (("plain", "objectives.lm"), ("taught", "objectives.distil(temperature=1)")):
        training = recipe.training.model_dump() | {"tokens": 1024, "objective": objective}
        run(read(asked | {"training": training}), tmp_path / name, listen=shown)
    for name, label in (("plain", None), ("taught", "KL to the dense model")):
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        steps = [event for event in log if event["event"] == "step"]
        assert len(steps) == 2
        assert {event.get("loss_is") for event in steps} == {label}
        assert ("It is KL to the dense model." in (tmp_path / name / "report.html").read_text()) == (label is not None)
    *_, plain, taught = re.findall("training, 1,024 tokens, loss .*?, lr", shown._console.file.getvalue())  # type: ignore[attr-defined]
    assert re.fullmatch(r"training, 1,024 tokens, loss [\d.]+, lr", plain)
    assert re.fullmatch(r"training, 1,024 tokens, loss [\d.]+ \(KL to the dense model\), lr", taught)


def test_the_same_seed_gives_the_same_model_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    one = run(recipe, tmp_path / "one")
    other = run(recipe, tmp_path / "other")
    another = run(read(recipe.model_dump() | {"seed": 1}), tmp_path / "another")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "other")]
    assert one.mask == other.mask
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.mask != another.mask, "another seed draws another text"


def test_pruning_a_pruned_model_keeps_the_mask_against_the_dense_one(recipe: Recipe, tmp_path: Path) -> None:
    prune(without_training(recipe, budget="80%"), tmp_path / "first")
    first = load(str(tmp_path / "first"))
    prune(without_training(recipe, model=str(tmp_path / "first"), budget="80%"), tmp_path / "second")
    second = load(str(tmp_path / "second"))
    dense = load(recipe.model).model
    assert second.dense_params == first.dense_params == count_parameters(dense)
    # the dense model cut by the composed mask is the result (no training: the weights are the dense ones)
    from adapt_pruner.core.model.cut import cut

    assert second.mask is not None
    cut(dense, families.axes(dense), second.mask)
    ids = torch.randint(3, 200, (1, 16))
    assert torch.equal(dense(ids).logits, second.model(ids).logits)


def test_a_carried_debt_takes_heads_and_a_reset_one_does_not(recipe: Recipe, tmp_path: Path) -> None:
    common = {"stages": 6, "step": 0.05, "chooser": "allocate.uniform", "budget": "72%"}
    heads = {}
    for debt in ("carry", "reset"):
        prune(without_training(recipe, debt=debt, **common), tmp_path / debt)
        heads[debt] = sum(axis.size for axis in families.axes(load(str(tmp_path / debt)).model) if axis.kind == "kv_heads")
    assert heads["carry"] < heads["reset"] == 9


def test_moments_are_carried_or_reset(recipe: Recipe, tmp_path: Path) -> None:
    seen = {}
    for moments in ("carry", "reset"):
        events: list[dict[str, Any]] = []
        run(read(recipe.model_dump() | {"moments": moments}), tmp_path / moments, listen=as_dicts(events.append))
        seen[moments] = [event["loss"] for event in events if event["event"] == "step"]
    first_of_stage_2 = sum(1 for _ in range(2))  # two steps of 512 tokens fill stage 1
    assert seen["carry"][: first_of_stage_2 + 1] == seen["reset"][: first_of_stage_2 + 1]
    assert seen["carry"][first_of_stage_2 + 2 :] != seen["reset"][first_of_stage_2 + 2 :]


def test_only_what_may_go_goes(recipe: Recipe, tmp_path: Path) -> None:
    prune(without_training(recipe, axes=["kv_heads"], budget="90%", chooser="allocate.uniform"), tmp_path / "heads")
    axes = families.axes(load(str(tmp_path / "heads")).model)
    assert all(axis.size == 40 for axis in axes if axis.kind == "neurons")
    with pytest.raises(
        UsageError,
        match=r"is too small: .* parameters remain when .* has removed all it can \(kv_heads\); the smallest possible",
    ):
        prune(without_training(recipe, axes=["kv_heads"], budget="50%"), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_heads_are_measured_before_one_goes(recipe: Recipe, tmp_path: Path) -> None:
    """The head that the loss needs least goes, whatever the first-order score says of it."""
    heads_only = {"axes": ["kv_heads"], "budget": "88%", "chooser": "allocate.uniform", "step": 0.34}
    measured = prune(without_training(recipe, **heads_only), tmp_path / "measured").mask
    scored = prune(without_training(recipe, **heads_only, head_metric=None), tmp_path / "scored").mask
    assert measured.num_removed() == scored.num_removed() == 3
    assert measured != scored, "on this model the two disagree"
    loaded = load(recipe.model)
    batches = calibration_feed(
        loaded.model,
        loaded.tokenizer,
        **recipe.calibration.model_dump(exclude={"redraw", "self_generated", "repair_samples"}),
        seed=0,
    )(1)
    axes = [axis for axis in families.axes(loaded.model) if axis.kind == "kv_heads"]
    for name, losses in loss_drop(loaded.model, axes, batches, dtype="float32").items():
        assert not measured[name][losses.argmin()]


def test_a_loss_that_is_not_a_number_names_the_last_good_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    training = recipe.training.model_dump()
    wild = read(recipe.model_dump() | {"training": training | {"lr": 1e30, "warmup": 0.5, "clip": 1e9}})
    break_off(recipe, tmp_path / "run", kind="saved", nth=3)
    with pytest.raises(RunError, match=r"became .*lower training.lr .*; the last complete checkpoint is ") as error:
        run(wild, tmp_path / "run", force_recipe=True)
    named = Path(str(error.value).rpartition("checkpoint is ")[2])
    assert named == tmp_path / "run" / "checkpoints" / "stage-2-pruned"
    assert all(weight.isfinite().all() for weight in load(str(named)).model.state_dict().values())
    assert not (tmp_path / "run" / "model").exists()


def test_a_dry_run_writes_nothing_and_plans_what_happens(recipe: Recipe, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    planned = dry_run(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    outcome = run(recipe, tmp_path / "run")
    assert planned["params_before"] == outcome.figures["params_before"]
    assert planned["stages"][-1]["params"] == outcome.figures["budget"]
    assert [stage["tokens"] for stage in planned["stages"]] == [1000, 2000, 3000]
    assert abs(sum(stage["iterations"] for stage in planned["stages"]) - outcome.figures["iterations"]) <= 3
    assert planned["seconds"] > 0
    assert planned["peak_bytes"] > 10**8


def test_calibration_by_self_and_by_ids(recipe: Recipe, tmp_path: Path) -> None:
    ids = torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "ids.json").write_text(json.dumps({"input_ids": ids}))
    masks = []
    for name, calibration in (
        ("self", {"source": "self", "samples": 8, "length": 32}),
        ("ids", {"ids": str(tmp_path / "ids.json")}),
    ):
        masks.append(prune(without_training(recipe, calibration=calibration), tmp_path / name).mask)
    assert masks[0] != masks[1]


def test_a_repair_alone_reads_what_the_model_writes_for_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units that go are the same without it; the weights that stay are not; a run keeps the text, and asks for it no more."""
    least_squares, read_by_it = closed_form.least_squares, []

    def watched(model: Any, axes: Any, mask: Any, batches: Any, **others: Any) -> None:
        read_by_it.append([tuple(batch.shape) for batch in batches])
        least_squares(model, axes, mask, batches, **others)

    def slowly(*model_and_tokenizer: Any, **asked: Any) -> Tensor:
        time.sleep(0.3)
        return selfwritten_windows(*model_and_tokenizer, **asked)

    monkeypatch.setattr(closed_form, "least_squares", watched)
    monkeypatch.setattr(start, "selfwritten_windows", slowly)
    common = {"model": recipe.model, "budget": "85%", "method": "adaptive-ls-v1", "step": 1, "dtype": "float32"}
    text = recipe.calibration.model_dump()
    asked, more = (read({**common, "calibration": text | {"self_generated": own}}) for own in (0, 6))
    plain = prune(asked, tmp_path / "plain")
    helped = prune(more, tmp_path / "helped")
    assert plain.mask == helped.mask
    assert 0.3 < helped.figures["seconds_repair"] < helped.figures["seconds"], "what it takes to write is time of the repair"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "helped")]
    assert {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])} == {
        name
        for name in weights[0]
        if "down_proj" in name or "o_proj" in name  # factors too
    }
    length = asked.calibration.length
    assert sum(rows for rows, _ in read_by_it[1]) - sum(rows for rows, _ in read_by_it[0]) == 6
    assert all(columns == length for _, columns in read_by_it[1])
    run(more, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "repair_self.json").read_text())
    assert (len(kept["input_ids"]), len(kept["input_ids"][0])) == (6, length)
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights[1].items()), "a run reads what prune reads"


def test_a_repair_reads_further_sequences_of_the_text(recipe: Recipe, tmp_path: Path) -> None:
    """Beside those that score; the mask stays the same, and a run that goes on reads them again."""
    least_squares, read_by_it = closed_form.least_squares, list[set[tuple[int, ...]]]()

    def watched(model: Any, axes: Any, mask: Any, batches: list[Tensor], **others: Any) -> None:
        read_by_it.append({tuple(row) for batch in batches for row in batch.tolist()})
        least_squares(model, axes, mask, batches, **others)

    common = {"model": recipe.model, "budget": "85%", "method": "adaptive-ls-v1", "step": 1, "dtype": "float32"}
    text = recipe.calibration.model_dump() | {"self_generated": 0, "samples": 4, "length": 16}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(closed_form, "least_squares", watched)
        asked, more = (read({**common, "calibration": text | {"repair_samples": number}}) for number in (0, 6))
        plain, helped = prune(asked, tmp_path / "plain"), prune(more, tmp_path / "helped")
    assert plain.mask == helped.mask
    alone, all_of_it = read_by_it
    assert alone < all_of_it
    assert (len(alone), len(all_of_it)) == (4, 10)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "helped")]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed, "the repair is another one"
    assert all("down_proj" in name or "o_proj" in name for name in changed)
    assert "6 further sequences of this text" in (tmp_path / "helped" / "README.md").read_text()
    asked = more.model_copy(update={"step": 0.1, "checkpoint_minutes": 0.0})
    run(asked, tmp_path / "whole")
    break_off(asked, tmp_path / "run", kind="cut", nth=1)
    run(asked, tmp_path / "run")
    assert_same_model(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("further", [{"ids": "a.json"}, {"source": "self"}])
def test_further_sequences_need_a_text(further: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="repair_samples are drawn from the text in calibration.source; name a text there"):
        read({"calibration": {"source": "a.txt", "repair_samples": 6} | further})


def test_the_loss_before_and_after_is_of_the_same_text(recipe: Recipe, tmp_path: Path) -> None:
    rows = torch.randint(3, VOCAB, (70, 32), generator=torch.Generator().manual_seed(3))
    (tmp_path / "ids.json").write_text(json.dumps({"input_ids": rows.tolist()}))
    asked = without_training(recipe, calibration={"ids": str(tmp_path / "ids.json")}, budget="90%")
    figures = prune(asked, tmp_path / "out").figures
    first = [rows[:64]]  # 2,048 tokens
    for name, loss in zip((recipe.model, str(tmp_path / "out")), figures["calibration_losses"], strict=True):
        assert mean_loss(load(name).model, first, dtype="float32") == pytest.approx(loss, rel=1e-6)
    scoreless = prune(
        without_training(
            recipe,
            metric="weights.magnitude",
            axes=["neurons"],
            distance=None,
            head_metric=None,
            chooser="allocate.uniform",
            budget="90%",
        ),
        tmp_path / "unread",
    ).figures
    assert "calibration_losses" not in scoreless, "no text is read"


def test_all_that_takes_long_says_how_far_it_is(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_EVERY", 0.0)
    heard: list[dict[str, Any]] = []
    shown = screen.Screen(Console(file=io.StringIO(), width=200))

    def listen(event: Event) -> None:
        heard.append(event.to_dict())
        shown(event)

    heads_only = {"axes": ["kv_heads"], "budget": "88%", "chooser": "allocate.uniform", "step": 0.34}
    own = {"repair": "closed_form.least_squares", "calibration": recipe.calibration.model_dump() | {"self_generated": 33}}
    asked = without_training(recipe, **heads_only, **own)
    dry_run(asked, listen=listen)
    for itself in ("self", {"self": 1.0}):
        dry_run(without_training(recipe, calibration=recipe.calibration.model_dump() | {"source": itself}), listen=listen)
    assert not [event for event in heard if event["event"] == "progress"], "a plan writes nothing"
    prune(asked, tmp_path / "out", listen=listen)
    layers = load(recipe.model).model.config.num_hidden_layers
    told = [(event["phase"], event["done"], event["of"]) for event in heard if event["event"] == "progress"]
    written, of = [done for phase, done, _ in told if phase == "write"], 33 * recipe.calibration.length
    assert written == sorted(written)
    assert (written[0], written[-1]) == (0, of)
    assert {32 * 8, 32 * 16} < set(written), "of the first batch, a few tokens at a time"
    for phase in ("heads", "repair"):
        assert [one for one in told if one[0] == phase] == [(phase, 0, 0), *((phase, done + 1, layers) for done in range(layers))]
    said = shown._console.file.getvalue()  # type: ignore[attr-defined]
    assert f"writing repair text {of:,}/{of:,}" in said
    assert "writing calibration text" not in said, "which is read from a file here"
    assert f"stage 1, iteration 1: switching heads off one by one {layers}/{layers}" in said
    assert f"stage 1, iteration 1: repairing {layers}/{layers}" in said


@pytest.mark.parametrize("source", ["self", {"self": 1.0}], ids=["named", "with its weight"])
def test_a_run_keeps_the_text_that_the_model_writes_for_scoring(source: Any, recipe: Recipe, tmp_path: Path) -> None:
    """Later the model is another, and would write another text."""
    asked = without_training(recipe, calibration=recipe.calibration.model_dump() | {"source": source})
    run(asked, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "calibration_self.json").read_text())
    assert len(kept["input_ids"]) == recipe.calibration.samples


@pytest.mark.parametrize("method", ["adapt-pruner", "uniform", "magnitude-all", "random"])
def test_every_method_prunes(method: str, recipe: Recipe, tmp_path: Path) -> None:
    common = {
        "model": recipe.model,
        "budget": "80%",
        "calibration": recipe.calibration.model_dump(),
        "method": method,
        "dtype": "float32",
    }
    figures = prune(suited(common), tmp_path / method).figures
    assert figures["method"] == method
    assert figures["budget"] - cost_of_a_neuron(Path(recipe.model)) < figures["params_after"] <= figures["budget"]


@pytest.mark.parametrize("method", ["magnitude-all", "random"])
def test_methods_that_read_no_text_ask_for_none(method: str, recipe: Recipe, tmp_path: Path) -> None:
    nowhere = {"source": str(tmp_path / "nothing.txt")}
    prune(read({"model": recipe.model, "budget": "80%", "method": method}), tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        prune(read({"model": recipe.model, "budget": "80%", "calibration": nowhere}), tmp_path / "other")


def test_a_refused_run_leaves_its_folder_free(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smallest possible budget"):
        run(read(recipe.model_dump() | {"budget": "1000"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_is_a_row_of_defaults() -> None:
    by_name = Recipe(method="flap", calibration={"samples": 3})
    assert (by_name.metric, by_name.chooser, by_name.head_metric, by_name.calibration.samples) == (
        'activations.fluctuation(form="WIFV", standardised=true)', 'rank.standardised(structure="AL-AM", by="feature")', None, 3,
    )  # fmt: skip
    assert Recipe(method="magnitude", step=0.5).step == 0.5, "what is given goes above the row"
    assert read(by_name.model_dump()) == by_name
    assert read({"metric": "weights.magnitude(norm='l2')"}).metric == 'weights.magnitude(norm="l2")'
    for method in ("nonsense", ["a"], None):
        with pytest.raises(UsageError, match="method .* is not known"):
            read({"method": method})
    with pytest.raises(UsageError, match="head_metric"):
        read({"head_metric": ""})


@pytest.mark.parametrize("axes", [["query_heads"], ["neurons", "kv_heads", "query_heads"]])
def test_query_heads_go_and_the_budget_is_met(axes: list[str], recipe: Recipe, tmp_path: Path) -> None:
    """Also where KV heads and query heads shrink at once, so that the chooser counts some heads twice."""
    budget = "92%" if axes == ["query_heads"] else "60%"
    outcome = prune(without_training(recipe, axes=axes, budget=budget), tmp_path / "out")
    loaded = load(str(tmp_path / "out"))
    assert loaded.mask == outcome.mask
    assert any(name.endswith(".query_heads") and not loaded.mask[name].all() for name in loaded.mask)
    cost = min(axis.cost for axis in families.axes(loaded.model) if axis.kind in axes)
    assert outcome.figures["budget"] - cost < outcome.figures["params_after"] <= outcome.figures["budget"]
    layers = anatomy(loaded.model, mask=loaded.mask)["layers"]
    for layer, dense in zip(layers, anatomy(load(recipe.model).model)["layers"], strict=True):
        assert layer["share_of_dense"] == pytest.approx(layer["params"] / dense["params"])
        assert layer["heads"] % layer["kv_heads"] == 0


@pytest.mark.parametrize("axes", [["residual"], ["neurons", "residual"]])
def test_the_width_of_the_stream_shrinks_under_a_budget(axes: list[str], recipe: Recipe, tmp_path: Path) -> None:
    changes = {"axes": axes, "chooser": "allocate.uniform", "distance": None, "budget": "70%", "head_metric": None}
    outcome = prune(without_training(recipe, **changes), tmp_path / "out")
    loaded = load(str(tmp_path / "out"))
    assert loaded.mask == outcome.mask
    assert loaded.model.config.hidden_size < 48
    cost = min(axis.cost for axis in families.axes(loaded.model) if axis.kind in axes)
    assert outcome.figures["budget"] - cost < outcome.figures["params_after"] <= outcome.figures["budget"]
    layers = anatomy(loaded.model, mask=loaded.mask)["layers"]
    for layer, dense in zip(layers, anatomy(load(recipe.model).model)["layers"], strict=True):
        assert layer["share_of_dense"] == pytest.approx(layer["params"] / dense["params"])
    with pytest.raises(UsageError, match=r"metric 'activations.wanda' gives no scores for residual; set metric to another"):
        prune(without_training(recipe, **changes | {"metric": "activations.wanda"}), tmp_path / "unscored")
    with pytest.raises(
        UsageError, match="'allocate.adaptive' prunes layer by layer, and the axis residual is in no layer; set chooser"
    ):
        without_training(recipe, axes=axes)


def test_a_family_whose_unequal_layers_cannot_be_saved_is_refused_at_the_start(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(name: str) -> Any:
        raise AttributeError(name)

    monkeypatch.setattr(modeling_pruned, "__getattr__", lacking)
    refused = "LlamaForCausalLM has no class in core/model/modeling_pruned.py, .*; set equal_widths=true, or prune whole layers"
    with pytest.raises(UsageError, match=refused):
        prune(without_training(recipe), tmp_path / "out")
    blocks = {"axes": ["mlps"], "chooser": "depth.drop_layers", "equal_widths": True}
    with pytest.raises(UsageError, match="could not be saved; prune whole layers"):
        prune(without_training(recipe, **blocks), tmp_path / "out")
    equal = prune(without_training(recipe, equal_widths=True), tmp_path / "out")
    assert equal.figures["params_after"] < equal.figures["params_before"]


def test_only_what_may_shrink_gets_gradients(recipe: Recipe) -> None:
    """The embeddings lie on the stream's axis: their gradients are not to be paid for where it may not shrink."""
    model = load(recipe.model).model
    asked = {piece.parameter for axis in scored(Work.of(model, recipe)) for piece in axis.slices}
    assert not any("embed" in name or "norm" in name for name in asked)
    assert {axis.kind for axis in scored(Work.of(model, recipe))} == {"neurons", "kv_heads", "layers"}


def test_moments_of_the_checkpoint_are_let_go(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on holds what it has read no longer than one that was never stopped."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "saved" and event["path"].endswith("stage-1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", listen=as_dicts(stop))
    read_again: list[Any] = []
    still_there: list[int] = []

    def loading(*others: Any, **settings: Any) -> Any:
        loaded, tensors = load_state(*others, **settings)
        read_again.extend(weakref.ref(tensor) for name, tensor in tensors.items() if "down_proj" in name and "step" not in name)
        return loaded, tensors

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "cut" and event["stage"] == 2:
            gc.collect()
            still_there.append(sum(tensor() is not None for tensor in read_again))

    monkeypatch.setattr(resume, "load_state", loading)
    run(recipe, tmp_path / "run", listen=as_dicts(look))
    assert len(read_again) == 6, "of three layers, which all lose neurons"
    assert still_there[-1] == 0, "by the last cut all layers have lost neurons, and with them these moments"
