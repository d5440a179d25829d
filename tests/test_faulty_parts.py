"""Parts that do what no part may do are named in one sentence, and nothing is saved."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapt_pruner.core.budget import Budget
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import parts, read
from adapt_pruner.reduce import allocate, closed_form, units
from adapt_pruner.reduce.allocate import Debt
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run import results


@pytest.fixture
def pruned(tiny_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., None]:
    """Prune the tiny model by a recipe with these keys; whatever happens, no result may be left."""

    def start(**keys: Any) -> None:
        calibration = {"source": str(text_file), "samples": 4, "length": 16}
        plain = {"model": str(tiny_folder), "budget": "70% of decoder", "method": "uniform", "step": 1, "dtype": "float32"}
        try:
            prune(read({**plain, "calibration": calibration, **keys}), tmp_path / "out")
        finally:
            assert not (tmp_path / "out").exists()

    return start


def without_values(model: nn.Module, axes: Sequence[Any], mask: Any, batches: Any, **_: Any) -> None:
    gate = next(axis.gate.module for axis in axes if axis.gate.is_linear)
    model.get_parameter(f"{gate}.weight").data[0, 0] = torch.nan


def with_biases(model: nn.Module, axes: Sequence[Any], mask: Any, batches: Any, **_: Any) -> None:
    module: Any = model.get_submodule(next(axis.gate.module for axis in axes if axis.gate.is_linear))
    module.bias = nn.Parameter(torch.zeros(module.out_features))


def narrower(model: nn.Module, axes: Sequence[Any], mask: Any, batches: Any, **_: Any) -> None:
    module: Any = model.get_submodule(next(axis.gate.module for axis in axes if axis.gate.is_linear))
    module.weight = nn.Parameter(module.weight.data[:, 1:].clone())


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (
            without_values,
            r"repair 'closed_form.least_squares' leaves NaN or infinity in model\.layers\.0\.\S+\.weight; set repair=null",
        ),
        (with_biases, r"changed the shape of \S+\.bias from none to \(48,\), .* declares needs=\{'biases'\}"),
        (narrower, r"changed the shape of \S+\.weight from \(48, (\d+)\) to \(48, \d+\), and it may change only values$"),
    ],
)
def test_a_repair_changes_values_only(does: Any, said: str, pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "least_squares", does)
    with pytest.raises(RunError, match=said):
        pruned(repair="closed_form.least_squares")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers.0.neurons": 41}, "gives layers.0.neurons the size 41; sizes are whole numbers from 1 to 40"),
        ({"layers.0.neurons": 0}, "gives layers.0.neurons the size 0; sizes are whole numbers from 1 to 40"),
        ({"layers.0.neurons": 20.0}, "gives layers.0.neurons the size 20.0; sizes are whole numbers"),
        ({"layers.9.neurons": 20}, "gives a size for layers.9.neurons, which is not among the axes"),
    ],
)
def test_a_chooser_gives_sizes_that_there_are(
    wrong: dict[str, Any], said: str, pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "uniform", lambda scores, axes, budget, *, debt, step, amplitude=0.0: (wrong, debt))
    with pytest.raises(RunError, match=f"chooser 'allocate.uniform' {said}"):
        pruned(chooser="allocate.uniform")


def test_scores_have_the_shape_of_their_axis(pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    real = units.score

    def short(*args: Any, **keywords: Any) -> Any:
        scores, loss = real(*args, **keywords)
        return {**scores, "layers.1.neurons": scores["layers.1.neurons"][:3]}, loss

    monkeypatch.setattr(units, "score", short)
    with pytest.raises(RunError, match=r"gives layers\.1\.neurons scores of shape \(3,\); it has 40 units"):
        pruned()


def test_a_reduction_that_stops_above_its_budget_is_no_success(
    pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units.Units, "steps", lambda self, work, target: iter(()))
    with pytest.raises(
        RunError, match=r"reduce 'units' finds nothing more to remove at [\d,]+ parameters, above the target [\d,]+; raise"
    ):
        pruned()


def test_a_result_without_a_loss_is_not_saved(pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.5, float("nan")])
    monkeypatch.setattr(results, "mean_loss", lambda *args, **keywords: next(losses))
    with pytest.raises(RunError, match="the loss on the calibration text is nan"):
        pruned()


def test_a_class_that_comes_with_the_model_is_refused_before_any_work(
    pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "__module__", "transformers_modules.lemma.modeling_lemma")
    with pytest.raises(UsageError, match="comes with the model's own files, and a pruned checkpoint would not load with it"):
        pruned()


def test_a_reduction_that_trains_needs_text_to_train_on(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reduce 'between_steps\(every=4\)' works while the model trains"):
        run(read({"model": str(tiny_folder), "budget": "80%", "method": "efficientllm"}), tmp_path / "run")


def test_nothing_to_shrink_is_nothing_to_do() -> None:
    debt = Debt.none(())
    assert allocate.advance((), Budget(keep=5, total=9), debt, {}) == ({}, debt)


@pytest.mark.parametrize(
    ("decorator", "said"),
    [
        ('@part("metrics")', "@part of mine names 'metrics', which is not known; did you mean 'metric'?"),
        ('@part("metric", needs={"txt"})', "@part of mine names 'txt', which is not known; did you mean 'text'?"),
        ('@part("metric", needs=NEEDS)', "@part of mine is read without running it, so write its keys and needs as literals"),
    ],
)
def test_a_wrong_declaration_is_named(decorator: str, said: str) -> None:
    import ast

    node = ast.parse(f"{decorator}\ndef mine(): ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    with pytest.raises(UsageError) as refused:
        parts._declared("metric", node)
    assert said in str(refused.value)
