"""The training loop, its schedules and shards."""

from functools import partial
from typing import Any

import pytest
import torch

from adapt_pruner.errors import RunError
from adapt_pruner.train.loop import Progress, Step, make_optimizer, stage_tokens, train
from adapt_pruner.train.objectives import lm
from adapt_pruner.train.schedules import cosine, wsd
from conftest import tiny_model


def run(model: Any, blocks: torch.Tensor, **changes: Any) -> list[Step]:
    steps: list[Step] = []
    settings: dict[str, Any] = {
        "optimizer": make_optimizer(model, lr=1e-2, weight_decay=0.0), "objective": lm, "schedule": lambda progress: 1.0, "lr": 1e-2,
        "total_tokens": blocks.numel(), "batch_tokens": 64, "progress": Progress(), "dtype": "float32", "on_step": steps.append,
    }  # fmt: skip
    train(model, blocks, **settings | changes)
    return steps


@pytest.fixture
def blocks() -> torch.Tensor:
    """Sequences that count upwards: easy to learn."""
    starts = torch.arange(40)[:, None]
    return (3 + (starts + torch.arange(16)) % 90).int()


def test_wsd() -> None:
    curve = partial(wsd, warmup=0.05, decay=0.10, floor=0.1)
    assert [curve(x) for x in (0.0, 0.025, 0.05, 0.5, 0.9)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert [curve(x) for x in (0.95, 1.0)] == pytest.approx([0.55, 0.1])
    assert wsd(0.0, warmup=0.0, decay=0.1, floor=0.0) == 1.0


def test_cosine() -> None:
    curve = partial(cosine, warmup=0.2, floor=0.1)
    assert [curve(x) for x in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_tokens_of_the_stages() -> None:
    assert stage_tokens(1000, stages=4, shards="linear") == [100, 200, 300, 400]
    assert stage_tokens(1000, stages=4, shards="constant") == [250] * 4
    assert stage_tokens(1000, stages=2, shards="cosine") == [292, 708]
    for shards in ("linear", "constant", "cosine"):
        assert sum(stage_tokens(997, stages=7, shards=shards)) == 997


def test_training_lowers_the_loss(blocks: torch.Tensor) -> None:
    model = tiny_model()
    steps = run(model, blocks.repeat(5, 1), batch_tokens=128)
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert [step.step for step in steps] == list(range(1, 26))
    assert steps[-1].tokens == blocks.numel() * 5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_follows_the_clipped_gradient_of_the_mean_loss(blocks: torch.Tensor) -> None:
    """Against torch's own pieces; plain gradient descent, since Adam's first step hides the size of a gradient."""
    model, twin = tiny_model(), tiny_model()
    batch = blocks[:8]
    steps = run(model, batch, batch_tokens=batch.numel(), clip=0.5, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    loss = twin(batch.long(), labels=batch.long()).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    assert norm > 1, "there is something to clip"
    optimizer.step()
    assert steps[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert steps[0].gradient_norm == pytest.approx(float(norm), rel=1e-4)
    before = dict(tiny_model().named_parameters())
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours - before[name], theirs - before[name], atol=1e-6, rtol=1e-2), name


def test_accumulation_changes_nothing(blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tiny_model(), tiny_model()
    one = run(whole, blocks[:12], batch_tokens=192)
    monkeypatch.setattr("adapt_pruner.train.loop._MICRO_TOKENS", 80)  # 5 of 12 sequences at a time: uneven parts
    other = run(parts, blocks[:12], batch_tokens=192)
    assert len(one) == len(other) == 1
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-5)
    assert one[0].gradient_norm == pytest.approx(other[0].gradient_norm, rel=1e-4)


def test_one_curve_spans_all_stages(blocks: torch.Tensor) -> None:
    model, progress = tiny_model(), Progress()
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0)
    schedule = partial(wsd, warmup=0.5, decay=0.25, floor=0.0)
    rates = []
    for stage in (blocks[:20], blocks[20:]):
        steps = run(model, stage, optimizer=optimizer, progress=progress, schedule=schedule, total_tokens=blocks.numel())
        rates += [step.lr for step in steps]
    assert rates == pytest.approx([1e-2 * schedule((k - 0.5) / 10) for k in range(1, 11)])


def test_weight_decay_spares_norms_and_biases() -> None:
    groups = make_optimizer(tiny_model(("llama", "qwen2")), lr=1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])


def test_a_loss_that_is_not_a_number_stops_before_it_touches_a_weight(blocks: torch.Tensor) -> None:
    model = tiny_model()

    def spoilt(model: Any, ids: torch.Tensor, *, share: float) -> torch.Tensor:
        return lm(model, ids, share=share) * float("nan")

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RunError, match=r"loss became nan .* at step 1; lower training.lr \(now 0.01\)"):
        run(model, blocks, objective=spoilt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bfloat16_training_keeps_float32_weights(blocks: torch.Tensor) -> None:
    model = tiny_model()
    steps = run(model, blocks.repeat(5, 1), dtype="bfloat16", batch_tokens=128)
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_stage_without_a_block_is_passed_over(blocks: torch.Tensor) -> None:
    model = tiny_model()
    assert run(model, blocks[:0], total_tokens=100) == []
