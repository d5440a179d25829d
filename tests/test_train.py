"""The training loop: what a step minimises, its schedules and shards, the divergence guard, and going on exactly."""

import itertools
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from adapt_pruner.core.model.shards import stage_tokens
from adapt_pruner.core.system import world
from adapt_pruner.data.fixed import Span
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import read
from adapt_pruner.report import with_card
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.train.loop import Step, TrainConfig, TrainState, _Batch, make_optimizer, steps, whole_batches
from adapt_pruner.train.objectives import lm
from adapt_pruner.train.schedules import cosine, wsd
from adapt_pruner.train.spread import full_state, load_moments
from conftest import InOrder, as_dicts, log_of, tiny_model, train


@dataclass
class Text:
    """Rows of training text: ids, which of them count, and how long each row is without its padding."""

    ids: Tensor
    predicted: Tensor | None = None
    lengths: Tensor | None = None

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.ids[start:stop].long(), None if self.predicted is None else self.predicted[start:stop]

    def num_tokens(self, start: int, stop: int) -> int:
        return self.ids[start:stop].numel() if self.lengths is None else int(self.lengths[start:stop].sum())


def run(model: Any, text: Tensor | Text, **changes: Any) -> list[Step]:
    text = text if isinstance(text, Text) else Text(text)
    steps: list[Step] = []
    settings: dict[str, Any] = {
        "optimizer": make_optimizer(model, lr=1e-2, weight_decay=0.0), "objective": lm, "schedule": lambda progress: 1.0, "lr": 1e-2,
        "total_tokens": max(1, text.ids.numel()), "until": len(text.ids), "batch_rows": 4, "progress": TrainState(), "dtype": "float32",
        "on_step": steps.append,
    }  # fmt: skip
    train(model, text, **settings | changes)
    return steps


@pytest.fixture
def blocks() -> Tensor:
    """Sequences that count upwards: easy to learn."""
    starts = torch.arange(40)[:, None]
    return (3 + (starts + torch.arange(16)) % 90).int()


@pytest.fixture
def chats(blocks: Tensor) -> Text:
    """Rows of which few tokens or many count, some of them padded."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(8, 17, (40,), generator=generator)
    lengths[4] = 16
    inside = torch.arange(16) < lengths[:, None]
    share = torch.where(torch.arange(40) % 6 < 2, 0.1, 0.8)[:, None]  # two rows with few, four with many
    predicted = (torch.rand(40, 16, generator=generator) < share) & inside
    predicted[:, 0] = True  # token 0 cannot be predicted, whatever is said of it
    return Text(blocks.where(inside, 0), predicted, lengths)


def same_weights(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


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
    assert stage_tokens(1000, stages=5, shards="last=0.8") == [50, 50, 50, 50, 800]
    assert stage_tokens(1000, stages=3, shards=[1, 0, 4]) == [200, 0, 800], "numbers in proportion, so percents too"
    assert stage_tokens(1000, stages=1, shards="last=0.8") == [1000]
    for shards in ("linear", "constant", "cosine", "last=0.3", (1, 2, 3, 4, 5, 6, 7)):
        assert sum(stage_tokens(997, stages=7, shards=shards)) == 997


@pytest.mark.parametrize(("shards", "trouble"), [
    ("lineal", "training.shards 'lineal' is not known; write linear, constant, cosine, last=0.8 for the share of the last stage, or a list"),
    ("last", "training.shards 'last' is not known"),
    ("last=80%", r"training.shards 'last=80%' has no share; write a number above 0 and below 1, like last=0.8"),
    ("last=1.2", r"training.shards 'last=1.2' has no share"),
    ("last=nan", r"training.shards 'last=nan' has no share"),
    ([1, -1, 2], r"training.shards \[1, -1, 2\] has a share of -1; write numbers of 0 or more, the last above 0"),
    ([1, 2, 0], r"training.shards \[1, 2, 0\] gives the last stage nothing; write numbers of 0 or more, the last above 0"),
    ([1, "x", 2], r"has a share of 'x'; write numbers"),
    ([True, 1, 2], r"has a share of True; write numbers"),
    ([1, float("inf"), 2], r"has a share of inf; write numbers"),
    ([], r"training.shards \[\] gives the last stage nothing"),
    (0.8, r"training.shards 0.8 is not known"),
    ([1, 4], r"training.shards \[1, 4\] has 2 shares and stages is 3; give one for each stage, or write last=0.8"),
])  # fmt: skip
def test_shards_that_are_none_are_refused(shards: Any, trouble: str) -> None:
    with pytest.raises(UsageError, match=trouble):
        read({"stages": 3, "training": {"source": "x", "tokens": 9_000, "shards": shards}})


def test_shards_are_written_as_they_are_read() -> None:
    training = {"source": "x", "tokens": 9_000}
    for shards, kept in (([5, 5.5, 80], (5, 5.5, 80)), ("last = 0.8", "last=0.8"), ("last=.80", "last=0.8")):
        recipe = read({"stages": 3, "training": {**training, "shards": shards}})
        assert recipe.training.shards == kept
        assert read(yaml.safe_load(recipe.to_yaml())) == recipe
    given = read({"stages": 3, "training": training}, overrides=["training.shards=[1, 1, 8]"])
    assert given.training.shards == (1, 1, 8)


def test_stages_train_where_the_recipe_puts_tokens(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Planned and trained alike; a stage without tokens only prunes."""
    asked = {
        "model": str(tiny_folder), "budget": "70%", "method": "magnitude-all", "stages": 3, "dtype": "float32",
        "training": {
            "source": str(text_file), "tokens": 640, "batch_tokens": 64, "length": 32, "shards": [1, 0, 4], "max_rise": 20,
        },
    }  # fmt: skip
    told: list[dict[str, Any]] = []
    assert [stage["tokens"] for stage in dry_run(read(asked))["stages"]] == [128, 0, 512]
    with_card.run(read(asked), tmp_path / "run", listen=as_dicts(told.append))
    steps = [event["stage"] for event in told if event["event"] == "step"]
    assert steps == [1] * 2 + [3] * 8
    assert {event["stage"] for event in told if event["event"] == "cut"} == {1, 2, 3}


def test_stages_end_with_whole_batches_and_the_run_with_its_last_row() -> None:
    ends = [104, 313, 626, 1044, 1566]  # five linear stages of 400,896 tokens in rows of 256
    moved = whole_batches(ends, batch_rows=8)
    assert moved == [104, 312, 624, 1048, 1566]
    assert [end % 8 for end in moved[:-1]] == [0, 0, 0, 0]
    assert whole_batches([5, 13, 25], batch_rows=8) == [5, 13, 25], "a stage shorter than a batch would lose its rows"
    assert whole_batches([8, 8, 20], batch_rows=8) == [8, 8, 20]
    assert whole_batches([12, 20, 28], batch_rows=8) == [16, 24, 28], "each keeps a row, also from the middle between two batches"
    assert whole_batches([25], batch_rows=8) == [25]
    assert whole_batches([], batch_rows=8) == []


def test_betas_are_those_asked_for(blocks: Tensor) -> None:
    model = tiny_model()
    assert [group["betas"] for group in make_optimizer(model, lr=1e-3, weight_decay=0.0).param_groups] == [(0.9, 0.999)] * 2
    asked = make_optimizer(model, lr=1e-3, weight_decay=0.0, betas=(0.8, 0.95))
    run(model, blocks, optimizer=asked)
    first = next(iter(asked.state.values()))
    assert [group["betas"] for group in asked.param_groups] == [(0.8, 0.95)] * 2
    assert first["step"] > 0


def test_training_lowers_the_loss(blocks: Tensor) -> None:
    model = tiny_model()
    steps = run(model, blocks.repeat(5, 1), batch_rows=8)
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert [step.step for step in steps] == list(range(1, 26))
    assert steps[-1].tokens == blocks.numel() * 5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_follows_the_clipped_gradient_of_the_mean_loss(blocks: Tensor) -> None:
    """Against torch's own pieces; plain gradient descent, since Adam's first step hides the size of a gradient."""
    model, twin = tiny_model(), tiny_model()
    batch = blocks[:8]
    steps = run(model, batch, batch_rows=8, clip=0.5, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
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


@pytest.mark.parametrize("by_default", [True, False])
def test_accumulation_changes_nothing(by_default: bool, blocks: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 of 12 sequences at a time: uneven parts."""
    passes: list[int] = []

    def counted(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        passes.append(len(ids))
        return lm(model, ids, predicted)

    whole, parts = tiny_model(), tiny_model()
    one = run(whole, blocks[:12], batch_rows=12)
    if by_default:
        monkeypatch.setattr(sys.modules["adapt_pruner.train.loop"], "MICRO_TOKENS", {"cpu": 80})
    other = run(parts, blocks[:12], batch_rows=12, objective=counted, micro_tokens=None if by_default else 80)
    assert passes == [5, 5, 2]
    assert len(one) == len(other) == 1
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-5)
    assert one[0].gradient_norm == pytest.approx(other[0].gradient_norm, rel=1e-4)
    passes.clear()
    run(tiny_model(), blocks[:2], objective=counted, micro_tokens=3)
    assert passes == [1, 1], "a row is never split"


def test_the_loss_is_the_mean_over_the_predicted_tokens_of_the_whole_batch(chats: Text) -> None:
    """Against full logits in one pass, although the passes here have few predicted tokens or many."""
    model, twin = tiny_model(), tiny_model()
    assert chats.predicted is not None
    counted = chats.predicted[:6, 1:]
    per_pass = [int(counted[rows].sum()) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert per_pass[0] < per_pass[1] / 3, "a mean of means would be another number"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = run(model, chats, until=6, batch_rows=6, micro_tokens=32, clip=math.inf, optimizer=optimizer)

    ids = chats.ids[:6].long()
    loss = F.cross_entropy(twin(ids).logits[:, :-1][counted], ids[:, 1:][counted])
    loss.backward()
    assert steps[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    before = dict(tiny_model().named_parameters())
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(before[name] - ours, 1e-2 * theirs.grad, atol=1e-6, rtol=1e-2), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_row_is_learnt_from_once_in_as_many_passes_by_all(size: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows there are for the processes; who has none looks at one again and predicts nothing of it."""
    monkeypatch.setattr(world, "size", lambda: size)
    monkeypatch.setattr(world, "sum_in_place", lambda *tensors: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    for num_rows, micro_tokens in itertools.product(range(1, 8), (1, 8, 1000)):
        ids = torch.arange(100, 110)[:, None].expand(10, 4)  # a row is known by its token
        text = Text(ids, torch.ones(10, 4, dtype=torch.bool) if masked else None)
        passes, learnt = [], []
        for rank in range(size):
            monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
            how = TrainConfig(objective=lm, schedule=lambda done: 1.0, lr=0.0, batch_rows=num_rows, micro_tokens=micro_tokens)
            parts = _Batch(Span(text, 2, 2 + num_rows), how, device=torch.device("cpu")).parts
            passes.append(len(parts))
            for rows, counts in ((part.ids, part.predicted) for part in parts):
                assert 0 < rows.numel() <= max(4, micro_tokens)
                learnt += rows[:, 1:].flatten().tolist() if counts is None else rows[:, 1:][counts[:, 1:]].tolist()
        assert len(set(passes)) == 1, (num_rows, micro_tokens)
        assert sorted(learnt) == sorted(3 * list(range(102, 102 + num_rows))), (num_rows, micro_tokens)


def test_padding_counts_neither_as_tokens_nor_in_the_rate(chats: Text) -> None:
    assert chats.lengths is not None
    total = int(chats.lengths.sum())
    steps = run(tiny_model(), chats, batch_rows=10, schedule=lambda progress: progress, total_tokens=total)
    seen = chats.lengths.view(4, 10).sum(1).cumsum(0)
    assert [step.tokens for step in steps] == seen.tolist()
    middles = (seen - chats.lengths.view(4, 10).sum(1) / 2) / total
    assert [step.lr for step in steps] == pytest.approx((1e-2 * middles).tolist())


def test_a_batch_in_which_nothing_is_predicted_moves_nothing(blocks: Tensor) -> None:
    model = tiny_model(("llama", "qwen3-untied"))
    steps = run(model, Text(blocks[:4], torch.zeros(4, 16, dtype=torch.bool)))
    assert [(step.loss, step.gradient_norm) for step in steps] == [(0.0, 0.0)]
    assert same_weights(model, tiny_model(("llama", "qwen3-untied")))


def test_a_stage_ends_at_its_row_and_the_next_begins_there(blocks: Tensor) -> None:
    """The last batch of a stage may be smaller; no row is passed over or read twice."""
    read: list[Tensor] = []

    def noting(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        read.append(ids)
        return lm(model, ids, predicted)

    model, progress = tiny_model(), TrainState()
    for until in (6, 6, 17):
        run(model, blocks, until=until, progress=progress, objective=noting, total_tokens=1000)
    assert [len(ids) for ids in read] == [4, 2, 4, 4, 3]
    assert torch.equal(torch.cat(read), blocks[:17].long())
    assert asdict(progress) | {"smoothed": None, "lowest": None} == {
        "tokens": 17 * 16, "steps": 5, "rows": 17, "smoothed": None, "lowest": None,
    }  # fmt: skip


def test_one_curve_spans_all_stages(blocks: Tensor) -> None:
    model, progress = tiny_model(), TrainState()
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0)
    schedule = partial(wsd, warmup=0.5, decay=0.25, floor=0.0)
    rates = []
    for until in (20, 40):
        steps = run(model, blocks, until=until, optimizer=optimizer, progress=progress, schedule=schedule)
        rates += [step.lr for step in steps]
        assert [group["lr"] for group in optimizer.param_groups] == [steps[-1].lr] * 2
    assert rates == pytest.approx([1e-2 * schedule((k - 0.5) / 10) for k in range(1, 11)])


def test_the_curve_is_never_asked_beyond_its_end(blocks: Tensor) -> None:
    """A run whose last row goes over its tokens, or one that goes on with a recipe of fewer."""
    steps = run(tiny_model(), blocks[:8], total_tokens=70, schedule=lambda progress: progress)
    assert [step.lr for step in steps] == pytest.approx([1e-2 * 32 / 70, 1e-2])


def test_gradients_are_of_the_step_alone_and_gone_when_it_is_told(blocks: Tensor) -> None:
    """Nothing that was left on the model counts, and a listener that saves has their memory."""
    model, twin, held = tiny_model(), tiny_model(), []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    run(model, blocks[:8], on_step=lambda step: held.extend(p.grad for p in model.parameters() if p.grad is not None))
    run(twin, blocks[:8])
    assert same_weights(model, twin)
    assert not held


def test_weight_decay_spares_norms_and_biases() -> None:
    model = tiny_model(("llama", "qwen2"))
    groups = make_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)
    groups = make_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    assert [group["params"] for group in groups] == [[model.model.norm.weight]], "what is frozen is left out"


def test_a_loss_that_is_not_a_number_stops_before_it_touches_a_weight(blocks: Tensor) -> None:
    model = tiny_model()

    def spoilt(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        return lm(model, ids, predicted) * float("nan")

    with pytest.raises(RunError, match=r"loss became nan .* at step 1; lower training.lr \(now 0.01\)"):
        run(model, blocks, objective=spoilt)
    assert same_weights(model, tiny_model())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops_too(blocks: Tensor) -> None:
    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *outer: Any) -> Tensor:
            return outer[0] * math.inf

    model = tiny_model()
    with pytest.raises(RunError, match=r"loss became \d.* \(gradient norm (nan|inf)\) at step 1"):
        run(model, blocks, objective=lambda *given: Spoils.apply(lm(*given)))
    assert same_weights(model, tiny_model())


def at_levels(levels: list[float]) -> Any:
    """An objective whose mean in step k is levels[k], and whose gradient moves every weight."""
    coming = iter(levels)

    def objective(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        nll = lm(model, ids, predicted)
        return nll - nll.detach() + next(coming) * ids.shape[0] * (ids.shape[1] - 1)

    return objective


def test_an_exploding_loss_stops_before_the_step_that_it_would_spoil(blocks: Tensor) -> None:
    """Smoothed with 0.9: 3, 2.9, 2.81, 5.529; 2.719 above its lowest."""
    model, progress, kept = tiny_model(), TrainState(), {}

    def keep(step: Step) -> None:
        kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    levels = [3.0, 2.0, 2.0, 30.0, 2.0]
    message = (
        r"exploded: 5.53 \(smoothed\) is more than training.max_rise 2.7 above 2.81, the lowest of this stage, "
        r"at step 4; lower training.lr \(now 0.01\)"
    )
    with pytest.raises(RunError, match=message):
        run(model, blocks, objective=at_levels(levels), max_rise=2.7, progress=progress, on_step=keep)
    assert (progress.steps, progress.rows, progress.tokens) == (3, 12, 192)
    assert not same_weights(model, tiny_model())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items()), "the weights of step 3"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(run(tiny_model(), blocks[:20], objective=at_levels(levels), max_rise=2.73)) == 5, "a spike within max_rise"


def test_a_slow_climb_stops_too(blocks: Tensor) -> None:
    """The limit is above the lowest of the stage, not above the step before."""
    with pytest.raises(RunError, match="exploded"):
        run(tiny_model(), blocks, objective=at_levels([2.0 + 0.3 * k for k in range(10)]), max_rise=0.9)


def test_a_new_stage_may_begin_with_a_higher_loss(blocks: Tensor) -> None:
    for begins, stops in ((True, False), (False, True)):
        progress = TrainState()
        run(tiny_model(), blocks, until=8, objective=at_levels([2.0, 2.0]), max_rise=2.0, progress=progress)
        assert (progress.smoothed, progress.lowest) == pytest.approx((2.0, 2.0))
        if begins:
            progress.forget_losses()
            assert (progress.smoothed, progress.lowest) == (None, math.inf)
            assert (progress.steps, progress.rows, progress.tokens) == (2, 8, 128), "the position stays"
        try:
            run(tiny_model(), blocks, until=12, objective=at_levels([30.0]), max_rise=2.0, progress=progress)
        except RunError:
            assert stops
        else:
            assert not stops


def test_a_rate_far_too_high_is_caught(blocks: Tensor) -> None:
    with pytest.raises(RunError, match="exploded|became"):
        run(tiny_model(), blocks.repeat(5, 1), lr=30.0, max_rise=2.0)


def test_bfloat16_training_keeps_float32_weights(blocks: Tensor) -> None:
    model = tiny_model()
    steps = run(model, blocks.repeat(5, 1), dtype="bfloat16", batch_rows=8)
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_stage_without_a_row_is_passed_over(blocks: Tensor) -> None:
    model = tiny_model()
    assert run(model, blocks[:0], total_tokens=100) == []
    assert run(model, blocks, until=8, progress=TrainState(rows=8)) == []


class Stopped(Exception):  # noqa: N818 (not an error)
    pass


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_that_was_stopped_goes_on_exactly(dropout: float, chats: Text) -> None:
    """With weights, moments and progress alone, in a fresh model, whatever was drawn in between."""
    total = int(chats.lengths.sum()) if chats.lengths is not None else 0
    same = {"total_tokens": total, "schedule": partial(wsd, warmup=0.3, decay=0.3, floor=0.0), "max_rise": 50.0, "seed": 5}

    def fresh() -> tuple[Any, Any]:
        model = tiny_model(attention_dropout=dropout)
        return model, make_optimizer(model, lr=1e-2, weight_decay=0.1)

    whole, optimizer = fresh()
    straight = run(whole, chats, optimizer=optimizer, **same)

    model, optimizer = fresh()
    progress, checkpoint = TrainState(), {}

    def save_and_stop(step: Step) -> None:
        if step.step == 4:
            weights, moments = full_state(model, optimizer)
            for name, tensors in (("weights", weights), ("moments", moments)):
                checkpoint[name] = {key: tensor.clone() for key, tensor in tensors.items()}
            checkpoint["progress"] = asdict(progress)
            raise Stopped

    with pytest.raises(Stopped):
        run(model, chats, optimizer=optimizer, progress=progress, on_step=save_and_stop, **same)

    torch.rand(7)
    resumed, optimizer = fresh()
    resumed.load_state_dict(checkpoint["weights"] | {"lm_head.weight": checkpoint["weights"]["model.embed_tokens.weight"]})
    load_moments(resumed, optimizer, checkpoint["moments"])
    progress = TrainState(**checkpoint["progress"])
    assert progress.rows == 16
    rest = run(resumed, chats, optimizer=optimizer, progress=progress, **same)
    assert rest == straight[4:], "to the last bit"
    assert same_weights(resumed, whole)


def test_dropout_is_drawn_from_the_seed_and_the_step_alone(blocks: Tensor) -> None:
    def trained(cuts: tuple[int, ...], *, seed: int, dropout: float = 0.3) -> Any:
        model, progress = tiny_model(attention_dropout=dropout), TrainState()
        optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0)
        for until in cuts:
            torch.rand(int(torch.randint(1, 100, ())))  # somebody else draws
            run(model, blocks, until=until, optimizer=optimizer, progress=progress, seed=seed)
        return model

    whole = trained((40,), seed=1)
    assert same_weights(whole, trained((40,), seed=1))
    assert same_weights(whole, trained((12, 20, 40), seed=1)), "also when it is called twice"
    assert not same_weights(whole, trained((40,), seed=2))
    assert not same_weights(whole, trained((40,), seed=1, dropout=0.0)), "there is dropout"
    twice = torch.full((8, 16), 5)
    first, second = run(tiny_model(attention_dropout=0.3), twice, lr=0.0)
    assert first.loss != second.loss, "each step draws its own"


def test_training_leaves_mode_and_random_state_as_found(blocks: Tensor) -> None:
    modes = []

    def noting(model: Any, ids: Tensor, predicted: Tensor | None) -> Tensor:
        modes.append(model.training)
        return lm(model, ids, predicted)

    for mode in (True, False):
        model = tiny_model(attention_dropout=0.3).train(mode)
        state = torch.get_rng_state()
        run(model, blocks[:4], objective=noting)
        assert model.training is mode
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(RunError):
            run(model, blocks, objective=at_levels([math.nan]))
        assert model.training is mode
        assert torch.equal(torch.get_rng_state(), state)
    assert modes == [True, True]


HOW = {"schedule": lambda progress: 1.0, "lr": 1e-2, "batch_rows": 4, "dtype": "float32"}


def test_the_caller_has_the_word_between_backward_and_step(blocks: Tensor) -> None:
    """Gradients are in place and may be changed, weights are those of before; a step is taken once, by whoever comes first."""
    model, twin, progress = tiny_model(), tiny_model(), TrainState()
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0)
    names = []
    for step in steps(model, InOrder(Text(blocks), 0, 640), optimizer, progress, TrainConfig(lm, **HOW), until=8):
        names += [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert progress.steps == step.step - 1
        if step.step == 1:
            assert same_weights(model, twin)
            for parameter in model.parameters():
                parameter.grad = None  # then nothing is learnt
            step.take()
            assert same_weights(model, twin)
            step.take()
            assert (progress.steps, progress.rows) == (1, 4)
    assert not names
    assert (progress.steps, progress.rows) == (2, 8)
    assert not same_weights(model, twin)


def test_other_parameters_learn_along_and_may_ascend(blocks: Tensor) -> None:
    """A multiplier whose loss is its square: it falls, or climbs where its group says maximize, at its own rate."""
    for maximize in (False, True):
        model, multiplier = tiny_model(), torch.nn.Parameter(torch.ones(()))
        optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0)
        optimizer.add_param_group({"params": [multiplier], "maximize": maximize, "scale": 3.0, "weight_decay": 0.0})

        def objective(model: Any, ids: Tensor, predicted: Tensor | None, of: Tensor = multiplier) -> Tensor:
            return lm(model, ids, predicted) + of.square()

        for step in steps(model, InOrder(Text(blocks), 0, 640), optimizer, TrainState(), TrainConfig(objective, **HOW), until=4):
            assert multiplier.grad is not None
            step.take()
        assert float(multiplier.detach()) == pytest.approx(1 + (0.03 if maximize else -0.03), abs=1e-4)


class InTurn(Span):
    def domains(self, start: int, stop: int) -> list[str]:
        return ["odd" if row % 2 else "even" for row in range(self.first + start, self.first + stop)]


class Split(InOrder):
    """Rows of two texts in turn, whose losses the feed wants to hear."""

    def take(self, num_rows: int) -> Any:
        span = super().take(num_rows)
        return InTurn(span.rows, span.first, span.last)

    def tell(self, losses: Any) -> None:
        self.heard = [*getattr(self, "heard", []), losses]


def test_a_feed_hears_the_loss_of_each_text(blocks: Tensor, chats: Text) -> None:
    """The step is the same as if nobody asked, but for the order of its sums."""
    for text in (Text(blocks), chats):
        model, twin = tiny_model(), tiny_model()
        feed, plain = Split(text, 0, 640, wants_losses=True), InOrder(text, 0, 640)
        found = []
        for one, other in ((model, feed), (twin, plain)):
            optimizer = make_optimizer(one, lr=1e-2, weight_decay=0.0)
            found.append([step.loss for step in steps(one, other, optimizer, TrainState(), TrainConfig(lm, **HOW), until=8)])
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        assert [set(losses) for losses in feed.heard] == [{"odd", "even"}] * 2
        for losses, loss in zip(feed.heard, found[0], strict=True):
            nats, tokens = map(sum, zip(*losses.values(), strict=True))
            assert nats / tokens == pytest.approx(loss, rel=1e-6)


def test_a_step_reads_whole_rows(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """100 tokens are one row of 64, so 640 tokens take ten steps, and that is said."""
    training = {"source": str(text_file), "tokens": 640, "batch_tokens": 100, "length": 64}
    asked = read({"model": str(tiny_folder), "budget": "80%", "method": "magnitude-all", "training": training, "device": "cpu"})
    assert [stage["steps"] for stage in dry_run(asked)["stages"]] == [10]
    heard: list[dict[str, Any]] = []
    with_card.run(asked, tmp_path / "run", listen=as_dicts(heard.append))
    assert len(log_of(tmp_path / "run", "step")) == 10
    said = "a step reads 64 tokens, since training.batch_tokens 100 is no multiple of training.length 64"
    assert any(said in event["message"] for event in heard if event["event"] == "warning")
