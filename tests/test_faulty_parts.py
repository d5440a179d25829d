"""Parts that do what no part may do are named in one sentence, and nothing is saved."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapt_pruner.core.model.budget import Budget
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import parts, read
from adapt_pruner.reduce import units
from adapt_pruner.reduce.choose import allocate
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.repair import closed_form
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run import results
from adapt_pruner.run.start import plan
from adapt_pruner.score import blocks, weights
from adapt_pruner.work import Work
from conftest import VOCAB, byte_tokenizer, tiny_model


@pytest.fixture
def pruned(tiny_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., None]:
    """Prune the tiny model by a recipe with these keys; a result may be left only where one is expected."""

    def start(*, saved: bool = False, **keys: Any) -> None:
        calibration = {"source": str(text_file), "samples": 4, "length": 16}
        plain = {"model": str(tiny_folder), "budget": "70% of decoder", "method": "uniform", "step": 1, "dtype": "float32"}
        try:
            prune(read({**plain, "calibration": calibration, **keys}), tmp_path / "out")
        finally:
            assert (tmp_path / "out").exists() == saved
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    return start


def without_values(model: nn.Module, axes: Sequence[Any], mask: Any, batches: Any, **_: Any) -> None:
    gate = next(axis.gate.module for axis in axes if axis.gate.is_linear)
    model.get_parameter(f"{gate}.weight").data[0, 0] = torch.nan


def without_what_goes(model: nn.Module, axes: Sequence[Any], mask: Any, batches: Any, **_: Any) -> None:
    for axis in axes:
        if axis.gate.is_linear and axis.name in mask:
            columns = ~mask[axis.name].repeat_interleave(axis.gate.width)
            model.get_parameter(f"{axis.gate.module}.weight").data[:, columns] = torch.nan


def test_what_a_repair_leaves_in_columns_that_go_does_not_matter(
    pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_form, "least_squares", without_what_goes)
    pruned(saved=True, repair="closed_form.least_squares")


def in_a_norm(model: Any, axes: Sequence[Any], mask: Any, batches: Any, **_: Any) -> None:
    model.model.norm.weight.data[0] = torch.inf


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
        (in_a_norm, r"leaves NaN or infinity in model\.norm\.weight"),
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
        ({"layers.0.neurons": 41}, "gives layers.0.neurons the size 41; a size is a Python int from 1 to 40"),
        ({"layers.0.neurons": 0}, "gives layers.0.neurons the size 0; a size is a Python int from 1 to 40"),
        ({"layers.0.neurons": 20.0}, "gives layers.0.neurons the size 20.0; a size is a Python int"),
        ({"layers.9.neurons": 20}, "gives a size for layers.9.neurons, which is not among the axes"),
    ],
)
def test_a_chooser_gives_sizes_that_there_are(
    wrong: dict[str, Any], said: str, pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "uniform", lambda scores, axes, budget, *, debt, step, amplitude=0.0: (wrong, debt))
    with pytest.raises(RunError, match=f"chooser 'allocate.uniform' {said}"):
        pruned(chooser="allocate.uniform")


def by_distance(scores: Any, axes: Sequence[Any], budget: Budget, *, debt: Debt, step: float, amplitude: float = 0.0) -> Any:
    """A rule that divides by the distances, which are zero in a plan."""
    shares = scores["layers"] / scores["layers"].sum()
    return allocate.advance(axes, budget, debt, {axis.name: step * float(shares[axis.layer]) for axis in axes})


def by_a_quotient(scores: Any, axes: Sequence[Any], budget: Budget, *, debt: Debt, step: float, amplitude: float = 0.0) -> Any:
    return allocate.advance(axes, budget, debt, {axis.name: step / float(scores["layers"].sum()) for axis in axes})


def with_lost_debt(scores: Any, axes: Sequence[Any], budget: Budget, *, debt: Debt, step: float, amplitude: float = 0.0) -> Any:
    return {axis.name: axis.size - 1 for axis in axes}, Debt(debt.start, dict.fromkeys(debt.sparsity, float("nan")))


@pytest.mark.parametrize(
    ("chooser", "said"),
    [
        (by_distance, r"fails: the increment of layers\.0\.\w+ is nan, not a finite number; in a plan all scores are zero"),
        (by_a_quotient, "fails: float division by zero"),
        (with_lost_debt, r"gives layers\.0\.\w+ the debt nan; a debt is a share from 0 to 1"),
    ],
)
def test_a_chooser_that_gives_no_numbers_is_named_and_ends(
    chooser: Any, said: str, pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "adaptive", chooser)
    with pytest.raises(RunError, match=f"^chooser 'allocate.adaptive' {said}"):
        pruned(chooser="allocate.adaptive", distance="blocks.cosine")


def test_a_chooser_that_makes_no_progress_ends(pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(scores: Any, axes: Sequence[Any], budget: Budget, *, debt: Debt, step: float, amplitude: float = 0.0) -> Any:
        going = step == 1.0 and not budget.keep  # only the plan is told of something that can go
        return {axis.name: 1 if going else axis.size for axis in axes}, debt

    monkeypatch.setattr(allocate, "uniform", idle)
    with pytest.raises(RunError, match=r"allocate.uniform finds nothing more to remove at [\d,]+ parameters"):
        pruned(chooser="allocate.uniform", step=0.5)


@pytest.mark.parametrize(("key", "module", "name"), [
    ("metric", weights, "taylor"), ("distance", blocks, "cosine"), ("distance", blocks, "loss_drop"), ("head_metric", blocks, "loss_drop"),
])  # fmt: skip
def test_scores_that_are_no_numbers_are_said_to_be_those_of_their_part(
    key: str, module: Any, name: str, pruned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(module, name)

    def spoilt(scores: Any) -> Any:
        return {axis: torch.full_like(values, torch.inf) for axis, values in scores.items()}

    def generated(model: Any, axes: Any, **options: Any) -> Any:
        return spoilt((yield from real(model, axes, **options)))

    generated.__name__ = name
    wrong = generated if name in ("taylor", "cosine") else lambda *given, **options: spoilt(real(*given, **options))
    monkeypatch.setattr(module, name, wrong)
    said = f"{Path(__file__).stem}.{name}" if wrong is generated else f"{key} '{module.__name__.rpartition('.')[2]}.{name}'"
    keys = {key: f"{module.__name__.rpartition('.')[2]}.{name}"}
    chooser = {"chooser": "allocate.adaptive"} if key == "distance" else {}
    with pytest.raises(RunError, match=rf"^{said} gives NaN or infinity as score of layers"):
        pruned(**{"distance": None, "head_metric": None, **chooser, **keys})


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
    with pytest.raises(RunError, match="the loss of the pruned model on the calibration text is nan; set dtype"):
        pruned()


@pytest.mark.parametrize("write", [prune, run])
def test_a_model_that_holds_no_numbers_has_no_result(write: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(vocab_size=VOCAB)
    model.model.embed_tokens.weight.data[7, 7] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    recipe = read({"model": str(tmp_path / "dense"), "budget": "80%", "method": "magnitude-all", "dtype": "float32"})
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"was not written: model.embed_tokens.weight holds nan.*get them again"):
        write(recipe, out)
    assert not out.exists() if write is prune else not (out / "model").exists()


def test_a_class_that_only_the_models_folder_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    work = Work.of(tiny_model(), read({"model": "lemma", "budget": "80%", "method": "uniform"}))
    monkeypatch.setattr(LlamaForCausalLM, "__module__", "transformers_modules.lemma.modeling_lemma")
    plan(work)  # transformers has a class for this type
    monkeypatch.delitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llama")
    with pytest.raises(UsageError, match="only code in the folder of lemma builds a model of type 'llama'"):
        plan(work)


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
