"""The forms of Taylor importance against plain loops over samples, heads and rows; what a gradient of each sequence costs."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from adapt_pruner import families
from adapt_pruner.score import weights
from adapt_pruner.score.calibrate import Evidence, evidence_needed, score
from conftest import LAYOUTS, in_two_processes, projections, tiny_model

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "element": lambda w, g, f: float((w * g).abs().sum()),
    "vector": lambda w, g, f: abs(float((w * g).sum())),
    "second": lambda w, g, f: float((w * w * f).sum()),
    "mixed": lambda w, g, f: float((w * g - w * w * f / 2).abs().sum()),
}
"""What one row is worth, from its weights, the gradient of the mean loss and the mean of the samples' squared gradients."""


def gradients_of(model: Any, batches: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of the mean loss, and the mean square of those of each sequence's mean loss, by transformers' own loss."""
    samples = [row[None] for batch in batches for row in batch]
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for ids in samples:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            mean[name] = mean.get(name, 0) + parameter.grad.double() / len(samples)
            square[name] = square.get(name, 0) + parameter.grad.double() ** 2 / len(samples)
    model.zero_grad()
    return mean, square


def slow_scores(
    model: Any, gradients: tuple[dict[str, Tensor], dict[str, Tensor]], form: str, *, kv_head_of: Callable[[int, int, int], int]
) -> dict[str, list[float]]:
    """Row by row; `kv_head_of(h, group, num_kv)` says which KV head query head h is credited to."""
    mean, square = gradients

    def row(name: str, index: int) -> float:
        return FORMS[form](model.get_parameter(name)[index].detach().double(), mean[name][index], square[name][index])

    def column(name: str, index: int) -> float:
        w = model.get_parameter(name)[:, index].detach().double()
        return FORMS[form](w, mean[name][:, index], square[name][:, index])

    expected = {}
    for i, layer in enumerate(model.model.layers):
        mlp, attention, held = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn", projections(model, i)

        def part(role: str, index: int, held: Any = held) -> float:
            return row(held[role][0], held[role][1].start + index)

        expected[f"layers.{i}.neurons"] = [
            part("gate", u) + part("up", u) + column(f"{mlp}.down_proj.weight", u) for u in range(layer.mlp.down_proj.in_features)
        ]
        dim = layer.self_attn.head_dim
        num_kv = model.config.num_key_value_heads
        group = model.config.num_attention_heads // num_kv
        heads = [0.0] * num_kv
        queries = [0.0] * (num_kv * group)
        for k in range(num_kv):
            for c in range(k * dim, (k + 1) * dim):
                heads[k] += part("k", c) + part("v", c)
        for h in range(num_kv * group):
            for c in range(h * dim, (h + 1) * dim):
                worth = part("q", c) + column(f"{attention}.o_proj.weight", c)
                heads[kv_head_of(h, group, num_kv)] += worth
                queries[h] += worth
        expected[f"layers.{i}.kv_heads"], expected[f"layers.{i}.query_heads"] = heads, queries
    writes = ("self_attn.o_proj", "mlp.down_proj")
    expected["residual"] = [
        sum(
            (row if any(part in name for part in writes) else column)(name, channel)
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1
        )
        for channel in range(48)
    ]
    return expected


def assert_close(found: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].tolist() == pytest.approx(values, rel=2e-3), name


def scores_of(model: Any, batches: list[Tensor], **options: Any) -> dict[str, Tensor]:
    return score(model, families.axes(model), batches, metrics=[partial(weights.taylor, **options)], dtype="float32")[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_every_form_is_its_formula(layout: tuple[str, str], batches: list[Tensor]) -> None:
    model = tiny_model(layout)
    gradients = gradients_of(model, batches)
    for form in FORMS:
        expected = slow_scores(model, gradients, form, kv_head_of=lambda h, group, num_kv: h // group)
        assert_close(scores_of(model, batches, form=form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_authors_fold_credits_query_head_h_to_h_mod_num_kv_heads(form: str, batches: list[Tensor]) -> None:
    model = tiny_model()
    expected = slow_scores(model, gradients_of(model, batches), form, kv_head_of=lambda h, group, num_kv: h % num_kv)
    found = scores_of(model, batches, form=form, authors_fold=True)
    assert_close(found, expected)
    straight = scores_of(model, batches, form=form)
    assert not torch.allclose(found["layers.0.kv_heads"], straight["layers.0.kv_heads"], rtol=1e-4), "two query heads a KV head"
    assert torch.equal(found["layers.0.neurons"], straight["layers.0.neurons"])


def test_the_folds_agree_where_every_kv_head_has_one_query_head(batches: list[Tensor]) -> None:
    model = tiny_model(("llama", "llama-mha-biased"))
    folded, straight = scores_of(model, batches, authors_fold=True), scores_of(model, batches)
    assert all(torch.allclose(folded[name], straight[name]) for name in straight)


def test_a_sample_is_a_sequence_however_the_text_is_split(batches: list[Tensor]) -> None:
    model = tiny_model()
    for form in ("second", "mixed"):
        apart, as_one = scores_of(model, batches, form=form), scores_of(model, [torch.cat(batches)], form=form)
        assert all(torch.allclose(apart[name], as_one[name], rtol=1e-4) for name in apart)


def test_metrics_beside_it_still_see_the_gradient_of_the_whole_text(batches: list[Tensor]) -> None:
    """With gradients of each sequence asked for, one pass a sequence, and the same sum for all others."""
    model = tiny_model()
    passes = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: passes.append(args[0].shape[0]))
    told = []

    def beside(model: Any, axes: Any) -> Any:
        gradients = {}
        while (name := (yield Evidence.GRADIENTS)) is not None:
            gradients[name] = model.get_parameter(name).grad.clone()
        return {"beside": gradients["model.layers.1.mlp.up_proj.weight"]}

    metrics = [partial(weights.taylor, form="second"), beside]
    both, loss = score(
        model, families.axes(model), batches, metrics=metrics, dtype="float32", on_batch=lambda *at: told.append(at)
    )
    assert passes == [1] * 6
    assert told == [(done, 6) for done in range(1, 7)]
    alone, same_loss = score(model, families.axes(model), batches, metrics=[beside], dtype="float32")
    assert passes[6:] == [2] * 6, "forwards, and once more backwards"
    assert torch.allclose(both["beside"], alone["beside"], atol=1e-7)
    assert loss == pytest.approx(same_loss, rel=1e-6)


def test_it_holds_one_buffer_of_the_size_of_the_gradients(batches: list[Tensor]) -> None:
    """All that lives on from one sequence to the next, beside the gradients themselves, which no Python object holds."""
    model = tiny_model()
    matrices = [p for name, p in model.named_parameters() if "proj.weight" in name]

    def held() -> int:
        gc.collect()
        shapes = {p.shape for p in matrices}
        real = (t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, FakeTensor))  # other tests' exports
        return sum(t.numel() for t in real if t.shape in shapes)

    seen = []
    before = held()
    score(
        model, families.axes(model), batches, metrics=[partial(weights.taylor, form="mixed")],
        on_batch=lambda done, of: seen.append(held() - before),
    )  # fmt: skip
    assert seen == [sum(p.numel() for p in matrices)] * 6
    assert held() == before


def test_scoring_leaves_no_hook_on_a_parameter(batches: list[Tensor]) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores_of(model, batches, form="mixed")
    with pytest.raises(IndexError):
        scores_of(model, [torch.full((1, 4), 10_000)], form="mixed")
    assert all(not parameter._backward_hooks and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_model_can_be_asked_what_it_needs() -> None:
    """Forecasts ask before any scoring has set what gets gradients."""
    model = tiny_model().requires_grad_(False)
    needs = {
        form: evidence_needed(model, families.axes(model), [partial(weights.taylor, form=form)]) for form in ("element", "second")
    }
    assert needs == {"element": Evidence.GRADIENTS, "second": Evidence.SAMPLE_GRADIENTS}
    assert all(not parameter._backward_hooks and not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_find_what_one_finds(form: str, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    alone = scores_of(model, batches, form=form)
    together = in_two_processes(monkeypatch, lambda: scores_of(model, batches, form=form))
    for name, scores in alone.items():
        assert torch.allclose(together[name], scores, rtol=1e-4)
