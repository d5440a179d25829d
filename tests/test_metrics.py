"""Scores against slow, independent implementations; and what scoring leaves behind: nothing."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import families
from adapt_pruner.core.model.task import CAUSAL_LM
from adapt_pruner.errors import RunError
from adapt_pruner.score import blocks, weights
from adapt_pruner.score.calibrate import Evidence, score
from conftest import LAYOUTS, projections, tiny_model


def mean_loss(model: Any, batches: list[torch.Tensor]) -> torch.Tensor:
    """The mean next-token cross-entropy over all tokens of all batches, by transformers' own forward."""
    logits = [model(ids).logits[:, :-1].flatten(0, 1) for ids in batches]
    targets = [ids[:, 1:].flatten() for ids in batches]
    return F.cross_entropy(torch.cat(logits), torch.cat(targets))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_taylor_is_the_sum_of_weight_times_gradient(layout: tuple[str, str], batches: list[torch.Tensor]) -> None:
    model = tiny_model(layout)
    scores, loss = score(model, families.axes(model), batches, metrics=[weights.taylor], dtype="float32")
    expected_loss = mean_loss(model, batches)
    expected_loss.backward()
    assert loss == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    for i, layer in enumerate(model.model.layers):
        attention, held = layer.self_attn, projections(model, i)

        def worth(role: str, rows: Any, held: Any = held) -> float:
            """The sum of |w · g| over rows of a matrix, or of the part of one that plays this role."""
            name, part = held[role]
            parameter = model.get_parameter(name)
            return float((parameter[part][rows] * parameter.grad[part][rows]).detach().abs().sum())

        def column(linear: Any, columns: Any) -> float:
            return float((linear.weight[:, columns] * linear.weight.grad[:, columns]).detach().abs().sum())

        for u in (0, 7, 39):
            expected = worth("gate", u) + worth("up", u) + column(layer.mlp.down_proj, u)
            assert float(scores[f"layers.{i}.neurons"][u]) == pytest.approx(expected, rel=1e-4)
        dim = attention.head_dim
        num_kv = model.config.num_key_value_heads
        group = model.config.num_attention_heads // num_kv
        for g in range(num_kv):
            rows = slice(g * dim, (g + 1) * dim)
            expected = worth("k", rows) + worth("v", rows)
            for head in range(num_kv * group):
                if head // group == g:  # the query heads that read this KV head
                    rows = slice(head * dim, (head + 1) * dim)
                    expected += worth("q", rows) + column(attention.o_proj, rows)
            assert float(scores[f"layers.{i}.kv_heads"][g]) == pytest.approx(expected, rel=1e-4)
        assert scores[f"layers.{i}.query_heads"].shape == (num_kv * group,), "one for every head, group by group"
        for head in range(num_kv * group):
            rows = slice(head * dim, (head + 1) * dim)
            expected = worth("q", rows) + column(attention.o_proj, rows)
            assert float(scores[f"layers.{i}.query_heads"][head]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", [weights.magnitude, weights.taylor])
def test_a_fused_matrix_is_worked_out_once(metric: Any, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values of Phi-3 are rows of one matrix, gate and up of another."""
    model = tiny_model(("phi3", "phi3"))
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "kv_heads", "query_heads")]
    seen: list[tuple[int, int]] = []
    sums = weights._sums

    def counted(parameter: torch.Tensor, dims: set[int], terms: Any) -> Any:
        seen.extend((id(parameter), dim) for dim in dims)
        return sums(parameter, dims, terms)

    monkeypatch.setattr(weights, "_sums", counted)
    score(model, axes, batches, metrics=[metric], dtype="float32")
    matrices = {
        (piece.parameter, piece.dim) for axis in axes for piece in axis.slices if piece.dim == 1 or "proj" in piece.parameter
    }
    assert len(seen) == len(set(seen)) == len(matrices) == 4 * model.config.num_hidden_layers


def test_taylor_takes_the_absolute_value_after_summing_over_batches(batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    axes = families.axes(model)
    together, _ = score(model, axes, batches, metrics=[weights.taylor], dtype="float32")
    as_one, _ = score(model, axes, [torch.cat(batches)], metrics=[weights.taylor], dtype="float32")
    singly = [score(model, axes, [batch], metrics=[weights.taylor], dtype="float32")[0] for batch in batches]
    for name, scores in together.items():
        assert torch.allclose(scores, as_one[name], rtol=1e-4), "how the text is split into batches does not matter"
        summed = sum(single[name] for single in singly) / len(batches)
        assert (summed > scores * 1.01).any(), "the sum of absolute values is another, larger thing"


def test_block_distances_are_those_between_input_and_output_of_whole_layers(batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    with torch.no_grad():
        entered, left = [[] for _ in range(3)], [[] for _ in range(3)]
        for ids in batches:
            stream = model.model.embed_tokens(ids)
            position = model.model.rotary_emb(stream, torch.arange(ids.shape[1])[None])
            for i, layer in enumerate(model.model.layers):
                entered[i].append(stream.flatten(0, 1))
                stream = layer(stream, attention_mask=None, position_embeddings=position)
                left[i].append(stream.flatten(0, 1))
    for metric, distance in (
        (blocks.cosine, lambda x, y: -(x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)),
        (blocks.euclidean, lambda x, y: (x - y).square().sum(1).sqrt()),
        (blocks.manhattan, lambda x, y: (x - y).abs().sum(1)),
    ):
        expected = torch.stack([distance(torch.cat(x), torch.cat(y)).mean() for x, y in zip(entered, left, strict=True)])
        found, _ = score(model, families.axes(model), batches, metrics=[metric], dtype="float32")
        assert torch.allclose(found["layers"], expected, rtol=1e-4)


@pytest.mark.parametrize("metric", [blocks.cosine, blocks.euclidean, blocks.manhattan])
def test_a_layer_that_changes_nothing_is_worth_least(metric: Any, batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    found, _ = score(model, families.axes(model), batches, metrics=[metric], dtype="float32")
    assert int(found["layers"].argmin()) == 1


def test_scores_and_distances_share_the_passes(batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    passes = {"forward": 0, "backward": 0}
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda *_: passes.__setitem__("forward", passes["forward"] + 1))
    layer.mlp.register_full_backward_hook(lambda *_: passes.__setitem__("backward", passes["backward"] + 1))
    scores, _ = score(model, families.axes(model), batches, metrics=[weights.taylor, blocks.cosine])
    assert passes == {"forward": 2 * len(batches), "backward": len(batches)}, "backwards each layer runs again"
    assert {"layers", "layers.0.neurons", "layers.2.kv_heads"} <= scores.keys()


def test_scoring_leaves_the_model_as_found(batches: list[torch.Tensor]) -> None:
    model = tiny_model().train()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    kept_gradient = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept_gradient
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    score(model, families.axes(model), batches, metrics=[weights.taylor, blocks.cosine])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert model.model.norm.weight.grad is kept_gradient
    assert all(p.grad is None for name, p in model.named_parameters() if name != "model.norm.weight")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_hooks_come_off_when_scoring_fails() -> None:
    model = tiny_model()
    with pytest.raises(IndexError):
        score(model, families.axes(model), [torch.full((1, 4), 10_000)], metrics=[weights.taylor, blocks.cosine])
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_a_number_is_refused(batches: list[torch.Tensor]) -> None:
    model = tiny_model()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunError, match="loss on the calibration text is nan"):
        score(model, families.axes(model), batches, metrics=[weights.taylor])


def test_magnitude_needs_no_text() -> None:
    model = tiny_model()
    axes = families.axes(model)
    mlp = model.model.layers[1].mlp
    for norm, power in (("l1", 1), ("l2", 2)):
        scores, loss = score(model, axes, [], metrics=[partial(weights.magnitude, norm=norm)])
        expected = sum(
            float(w.detach().abs().pow(power).sum())
            for w in (mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5])
        )
        assert float(scores["layers.1.neurons"][5]) == pytest.approx(expected, rel=1e-5)
        assert loss != loss, "no pass, no loss"


def test_random_is_fixed_by_its_seed() -> None:
    model = tiny_model()
    axes = families.axes(model)
    one, same, other = (score(model, axes, [], metrics=[partial(weights.random, seed=seed)])[0] for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.neurons"], other["layers.0.neurons"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_chunked_loss_is_the_loss(layout: tuple[str, str], chunk: int, batches: list[torch.Tensor]) -> None:
    """For every family, value and gradient of the pieces equal those of transformers' own full logits."""
    model, twin = tiny_model(layout), tiny_model(layout)
    ids = batches[0]
    num_predicted = ids.shape[0] * (ids.shape[1] - 1)
    total = CAUSAL_LM.loss(model, ids, chunk=chunk)
    (total / num_predicted).backward()
    expected = twin(ids, labels=ids).loss
    expected.backward()
    assert float(total.detach()) / num_predicted == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4), name


def test_a_metric_says_what_it_needs() -> None:
    model = tiny_model()
    needs = {metric: next(metric(model, families.axes(model))) for metric in (weights.taylor, weights.magnitude, blocks.cosine)}
    assert list(needs.values()) == [Evidence.GRADIENTS, Evidence.WEIGHTS, Evidence.FORWARD]


def test_loss_drop_is_the_loss_with_the_unit_taken_out(batches: list[torch.Tensor]) -> None:
    """Against weights set to zero by hand: no v, no contribution of the head."""
    model = tiny_model()
    axes = [axis for axis in families.axes(model) if axis.kind in ("kv_heads", "query_heads")]
    found = blocks.loss_drop(model, axes, batches, dtype="float32")
    assert found.keys() == {axis.name for axis in axes}
    for layer, head in ((0, 1), (2, 2)):
        twin = tiny_model()
        dim = twin.model.layers[layer].self_attn.head_dim
        twin.model.layers[layer].self_attn.v_proj.weight.data[head * dim : (head + 1) * dim] = 0
        assert float(found[f"layers.{layer}.kv_heads"][head]) == pytest.approx(float(mean_loss(twin, batches).detach()), rel=1e-5)
        twin = tiny_model()  # and for a single query head: nothing of it is read
        query = 2 * head + 1
        twin.model.layers[layer].self_attn.o_proj.weight.data[:, query * dim : (query + 1) * dim] = 0
        expected = float(mean_loss(twin, batches).detach())
        assert float(found[f"layers.{layer}.query_heads"][query]) == pytest.approx(expected, rel=1e-5)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
