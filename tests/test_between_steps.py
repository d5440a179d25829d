"""`reduce: between_steps`: units go by the gradients of the step, without a further pass, and a killed run goes on bit-equal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import Budget, count_parameters
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce import between_steps
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.rank import per_parameter
from adapt_pruner.report.with_card import run
from adapt_pruner.score.calibrate import Evidence, score
from adapt_pruner.score.weights import taylor
from conftest import LAYOUTS, VOCAB, assert_refused, assert_same_model, break_off, byte_tokenizer, log_of, tiny_model


def recipe_of(folder: Path, text: Path, **changes: Any) -> Recipe:
    training = {"source": str(text), "tokens": 1024, "batch_tokens": 64, "length": 32, "lr": 1e-3}
    keys = {
        "model": str(folder), "budget": "80%", "method": "efficientllm", "dtype": "float32", "device": "cpu", "checkpoint_minutes": 0,
        "training": training | changes.pop("training", {}), "keep_checkpoints": 99,
    }  # fmt: skip
    return read(keys | changes)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout[1])
def any_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_model(request.param, vocab_size=VOCAB).save_pretrained(tmp_path / "any")
    byte_tokenizer().save_pretrained(tmp_path / "any")
    return tmp_path / "any"


def test_the_budget_is_met_halfway_and_training_goes_on(any_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(any_folder, text_file, checkpoint_minutes=60)
    outcome = run(recipe, tmp_path / "run")
    assert outcome is not None
    cuts, steps = log_of(tmp_path / "run", "cut"), log_of(tmp_path / "run", "step")
    assert len(steps) == 16
    assert len(cuts) == 2, "after steps 4 and 8"
    assert cuts[-1]["params"] == count_parameters(outcome.loaded.model) <= outcome.figures["budget"]
    start, budget = outcome.figures["params_before"], outcome.figures["budget"]
    for cut, done in zip(cuts, (4, 8), strict=True):
        due = round(start - (start - budget) * done / 8)
        assert cut["params"] <= due, "parameters fall linearly with the rows read"
    again = load(str(tmp_path / "run" / "model")).model
    assert count_parameters(again) == cuts[-1]["params"]


def test_what_goes_is_what_the_gradients_of_the_step_say(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The first cut against scores worked out on the rows of the first step, and one pass a step for model and scores together."""
    recipe = recipe_of(tiny_folder, text_file, axes=["neurons", "kv_heads"], reduce="between_steps")
    model, rows, passes = load(str(tiny_folder)).model, [], []
    layer = torch.nn.Module.__call__

    def counted(self: Any, *args: Any, **others: Any) -> Any:
        if type(self).__name__ == "LlamaModel":
            passes.append(1)
            rows.append(args[0] if args else others["input_ids"])
        return layer(self, *args, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", counted)
        run(recipe, tmp_path / "run")
    assert len(passes) == 16, "a step has one pass, and nothing else reads text"
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "kv_heads")]
    scores, _ = score(model, families.axes(model), [rows[0]], metrics=[taylor], dtype="float32")
    start = count_parameters(model)
    budget, due = Budget(keep=int(start * 0.8), total=start), round((start - int(start * 0.8)) / 8)
    step = due / sum(axis.size * axis.cost for axis in axes)
    sizes, _ = per_parameter(scores, axes, budget, debt=Debt.none(axes), step=step)
    assert log_of(tmp_path / "run", "cut")[0]["sizes"] == sizes
    first = sorted((tmp_path / "run" / "checkpoints").glob("stage-1-cut-1"))
    assert load(str(first[0])).mask == Mask.of_sizes(axes, {axis.name: scores[axis.name] for axis in axes}, sizes)


def test_heads_that_are_worth_least_go_first_even_if_one_costs_more_than_is_due(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of eight removals may take an eighth of what goes, which is less than a head."""

    def heads_are_worth_nothing(work: Any, *, seed: int) -> list[Any]:
        def metric(model: Any, axes: Any) -> Any:
            yield Evidence.WEIGHTS
            return {axis.name: torch.rand(axis.entries) * (1e-6 if axis.kind == "kv_heads" else 1.0) for axis in axes}

        return [metric]

    monkeypatch.setattr(between_steps, "metrics_of", heads_are_worth_nothing)
    run(recipe_of(tiny_folder, text_file, budget="95%", reduce="between_steps", axes=["neurons", "kv_heads"]), tmp_path / "run")
    start, cuts = load(str(tiny_folder)).model, log_of(tmp_path / "run", "cut")
    head = next(axis.cost for axis in families.axes(start) if axis.kind == "kv_heads")
    total = count_parameters(start)
    goes = total - int(total * 0.95)
    assert goes / 8 < head < goes, "a head costs more than is due at once"
    whole = families.sizes(start)
    first = cuts[0]["sizes"]
    assert {name.rpartition(".")[2] for name in first if first[name] < whole[name]} == {"kv_heads"}
    assert total - goes - head < cuts[-1]["params"] <= total - goes


@pytest.fixture(
    scope="module",
    params=[("", {}), ("(every=3, batches=2, share=0.75)", {}), ("(every=2)", {"stages": 2, "debt": "reset"})],
    ids=["each", "every third", "stages"],
)
def whole(
    request: pytest.FixtureRequest, tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe, and its run that nothing stopped."""
    options, changes = request.param
    recipe = recipe_of(tiny_folder, text_file, reduce=f"between_steps{options}", **changes)
    folder = tmp_path_factory.mktemp("between-steps") / "whole"
    run(recipe, folder)
    return recipe, folder


@pytest.mark.parametrize(("kind", "nth"), [("step", 3), ("cut", 3), ("step", 12)])
def test_a_killed_run_goes_on_bit_equal(kind: str, nth: int, whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, reference = whole
    broken = tmp_path / "broken"
    break_off(recipe, broken, kind=kind, nth=nth)
    run(recipe, broken)
    logs = []
    for folder in (reference, broken):
        lines = [log_of(folder, kind) for kind in ("step", "cut")]
        keep = ("step", "loss", "iteration", "params", "sizes", "lr")
        logs.append([[{key: line.get(key) for key in keep} for line in kind] for kind in lines])
    assert logs[0] == logs[1]
    assert_same_model(reference, broken)


def test_stages_and_a_repair(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"source": str(text_file), "samples": 4, "length": 16}
    recipe = recipe_of(
        tiny_folder, text_file, stages=2, axes=["neurons"], budget="90%", repair="closed_form.least_squares", calibration=calibration,
        training={"tokens": 2048},
    )  # fmt: skip
    outcome = run(recipe, tmp_path / "run")
    assert outcome is not None
    cuts = log_of(tmp_path / "run", "cut")
    assert {cut["stage"] for cut in cuts} == {1, 2}
    assert outcome.figures["params_after"] <= outcome.figures["budget"]
    assert outcome.figures["seconds_repair"] > 0


def test_biases_that_a_repair_adds_are_trained_at_once(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A killed run takes them from its checkpoint, so it tells if the whole run left them out until the cuts were over."""
    calibration = {"source": str(text_file), "samples": 4, "length": 16}
    recipe = recipe_of(
        tiny_folder, text_file, axes=["neurons"], budget="90%", repair="closed_form.mean_bias", calibration=calibration
    )
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="step", nth=5)
    run(recipe, tmp_path / "broken")
    norms = [[line["gradient_norm"] for line in log_of(tmp_path / name, "step")] for name in ("whole", "broken")]
    assert norms[0] == norms[1]
    assert_same_model(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(("changes", "said"), [
    ({"training": {"source": None, "tokens": 0}}, "reduce 'between_steps(every=4)' works while the model trains, and the recipe trains nothing"),
    ({"training": {"lora": {"rank": 2}}}, "does not work with training.lora; leave it out"),
    ({"training": {"compile": True}, "moments": "reset"}, "does not work with training.compile and moments=reset; leave them out"),
    ({"metric": "activations.wanda", "axes": ["neurons"]}, "between_steps uses only scores from gradients of weights; set metric=weights.taylor"),
    ({"chooser": "allocate.adaptive", "distance": "blocks.cosine", "axes": ["neurons"]}, "uses only scores from gradients of weights"),
    ({"head_metric": "blocks.loss_drop"}, "head_metric would be ignored, since reduce 'between_steps' does not read it"),
    ({"reduce": "between_steps(batches=3)"}, "adds up the scores of 3 steps and cuts after every 1; raise every, or lower batches"),
    ({"budget": "1000", "axes": ["neurons"]}, "budget 1,000 is too small: "),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, **changes), tmp_path / "run", said)
