"""What goes under a budget: the adaptive rule by hand, the debt, and the budget met within one unit."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner import families
from adapt_pruner.core.model.axes import Axis, Gate, Mask
from adapt_pruner.core.model.budget import Budget, count_parameters, parse_count
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import parts, read
from adapt_pruner.reduce.choose.allocate import Debt, adaptive, advance, layer_importance, uniform
from adapt_pruner.work import Work
from conftest import tiny_model

NEURON, HEAD = 10, 1000


def toy_axes(neurons: tuple[int, ...], heads: tuple[int, ...] = ()) -> list[Axis]:
    axes = [Axis(f"layers.{i}.neurons", size, NEURON, Gate("")) for i, size in enumerate(neurons)]
    return axes + [Axis(f"layers.{i}.kv_heads", size, HEAD, Gate("")) for i, size in enumerate(heads)]


def toy_scores(axes: list[Axis], importance: list[float]) -> dict[str, torch.Tensor]:
    return {axis.name: torch.arange(axis.size).float() for axis in axes} | {"layers": torch.tensor(importance)}


def after(axes: list[Axis], sizes: dict[str, int]) -> list[Axis]:
    assert all(1 <= sizes[axis.name] <= axis.size for axis in axes)
    return [Axis(axis.name, sizes[axis.name], axis.cost, axis.gate) for axis in axes]


def size_of(axes: list[Axis]) -> int:
    return sum(axis.size * axis.cost for axis in axes)


def test_importance_is_centred_and_scaled_to_one() -> None:
    found = layer_importance(torch.tensor([-1.0, -0.9, -0.2]))
    # mean -0.7; deviations -0.3, -0.2, 0.5; over 0.5
    assert found == pytest.approx([-0.6, -0.4, 1.0], abs=1e-6)
    assert layer_importance(torch.tensor([0.3, 0.3, 0.3])) == [0.0, 0.0, 0.0]


def test_importance_on_a_log_scale() -> None:
    """log(0.001, 0.01, 1) is -6.9, -4.6, 0: where distances differ by their scale, the middle layer no longer counts as the lowest."""
    found = layer_importance(torch.tensor([0.001, 0.01, 1.0]), scale="log")
    logs = [math.log(value) for value in (0.001, 0.01, 1.0)]
    mean = sum(logs) / 3
    assert found == pytest.approx([(value - mean) / -mean for value in logs], abs=1e-6)
    assert layer_importance(torch.tensor([0.001, 0.01, 1.0]))[1] < -0.49 < found[1]
    # A distance of 0 counts as a thousandth of the largest; of zeros alone nothing is known.
    assert layer_importance(torch.tensor([0.0, 0.01, 1.0]), scale="log") == pytest.approx(found, abs=1e-6)
    assert layer_importance(torch.zeros(3), scale="log") == [0.0, 0.0, 0.0]
    assert layer_importance(torch.tensor([5e-4, 5e-3, 0.5]), scale="log") == pytest.approx(found, abs=1e-6), "its unit is nothing"


def test_a_log_scale_refuses_distances_below_zero() -> None:
    axes = toy_axes((100, 100))
    with pytest.raises(
        UsageError, match=r"needs distances of 0 or more, and the lowest is -0.99; set distance=blocks.block_infl"
    ):
        adaptive(
            toy_scores(axes, [-0.99, -0.1]), axes, Budget(0, size_of(axes)), debt=Debt.none(axes), step=0.1, amplitude=0.1,
            scale="log",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("chooser", "gone"), [("allocate.adaptive", [0.0306, 0.0294, 0]), ("allocate.adaptive(scale=log)", [0.04, 0.0191, 0.0009])]
)
def test_a_recipe_may_take_the_log_of_distances(chooser: str, gone: list[float]) -> None:
    axes = toy_axes((10_000, 10_000, 10_000))
    choose = parts.bind("chooser", read({"chooser": chooser}).chooser, step=0.02, amplitude=0.02)
    _, debt = choose(toy_scores(axes, [0.001, 0.04, 0.99]), axes, Budget(0, size_of(axes)), debt=Debt.none(axes))
    assert [debt.sparsity[axis.name] for axis in axes] == pytest.approx(gone, abs=1e-4)


def test_one_adaptive_step_by_hand() -> None:
    axes = toy_axes((990, 990, 990))
    budget = Budget(keep=0, total=size_of(axes))
    sizes, debt = adaptive(toy_scores(axes, [-1.0, -0.9, -0.2]), axes, budget, debt=Debt.none(axes), step=0.02, amplitude=0.02)
    # s = 0.02 - 0.02 · (-0.6, -0.4, 1.0) = 0.032, 0.028, 0
    assert [debt.sparsity[axis.name] for axis in axes] == pytest.approx([0.032, 0.028, 0.0], abs=1e-6)
    assert list(sizes.values()) == [959, 963, 990]
    mask = Mask.of_sizes(axes, toy_scores(axes, []), sizes)
    assert not mask["layers.0.neurons"][:31].any(), "the worst-scored units go"
    assert mask["layers.0.neurons"][31:].all()


def test_the_amplitude_acts_on_every_step_and_importance_is_taken_anew() -> None:
    axes = toy_axes((1000, 1000))
    debt = Debt.none(axes)
    for importance in ([0.0, 1.0], [1.0, 0.0], [0.0, 1.0]):
        sizes, debt = adaptive(toy_scores(axes, importance), axes, Budget(0, size_of(axes)), debt=debt, step=0.02, amplitude=0.01)
        axes = after(axes, sizes)
    assert [debt.sparsity[axis.name] for axis in axes] == pytest.approx([0.03 + 0.01 + 0.03, 0.01 + 0.03 + 0.01])
    assert [axis.size for axis in axes] == [930, 950], "shares are of the size at the start"


def test_amplitude_zero_is_uniform() -> None:
    axes = toy_axes((100, 60, 80), (4, 4, 4))
    scores = toy_scores(axes, [0.1, 0.5, 0.9])
    budget = Budget(keep=9_000, total=size_of(axes))
    debts = [Debt.none(axes)] * 2
    one = adaptive(scores, axes, budget, debt=debts[0], step=0.3, amplitude=0.0)[0]
    other = uniform(scores, axes, budget, debt=debts[1], step=0.3)[0]
    assert one == other


@pytest.mark.parametrize("keep", [2_000_000, 1_200_000, 400_000])
def test_heads_of_uniform_wait_as_those_of_adaptive_do(keep: int) -> None:
    """So what adaptive gains over the first layer whole is due to its shares, and not to when heads go."""
    axes = toy_axes((30_000, 60_000, 90_000), (300, 300, 300))
    budget, ends = Budget(keep=keep, total=size_of(axes)), {}
    for name, first in (("whole", 1), ("shared", 0)):
        debt = Debt.none(axes)
        paying = [axis for axis in axes if axis.layer != 0] if first else axes
        alike = adaptive(
            toy_scores(axes, [0.0] * 3), paying, budget, debt=Debt.none(paying), step=1, amplitude=0, heads_after=0.5
        )[0]
        sizes, _ = uniform({}, axes, budget, debt=debt, step=1, first=first, heads_after=0.5)
        assert sizes == {axis.name: axis.size for axis in axes} | alike
        ends[name] = sizes
    assert ends["whole"]["layers.0.neurons"] == 30_000
    assert ends["shared"]["layers.0.neurons"] < 30_000
    lost = 1 - ends["shared"]["layers.2.neurons"] / 90_000
    assert (ends["shared"]["layers.2.kv_heads"] < 300) == (lost > 0.51)


def test_a_head_goes_once_a_whole_one_is_owed() -> None:
    """With 3 heads and steps of 0.02 the first goes at step 17 (0.34 ≥ 1/3): the debt is carried until then."""
    axes = toy_axes((1000,), (3,))
    debt, went_at = Debt.none(axes), 0
    for step in range(1, 20):
        sizes, debt = uniform(toy_scores(axes, [0.0]), axes, Budget(0, size_of(axes)), debt=debt, step=0.02)
        axes = after(axes, sizes)
        if axes[1].size == 2:
            went_at = step
            break
    assert went_at == 17


@pytest.mark.parametrize(("heads_after", "began_at"), [(0.0, 34), (0.5, 67), (0.7, 80)])
def test_heads_that_are_spared_begin_when_a_share_of_the_neurons_is_gone(heads_after: float, began_at: int) -> None:
    """3 heads: the first is owed where (s - h) / (1 - h) ≥ 1/3, in steps of 0.01; neurons go on as if there were none."""
    axes = toy_axes((1000,), (3,))
    debt, sizes, gone = Debt.none(axes), {}, []
    for _ in range(90):
        sizes, debt = adaptive(
            toy_scores(axes, [0.0]), axes, Budget(0, size_of(axes)), debt=debt, step=0.01, amplitude=0.0, heads_after=heads_after
        )
        axes = after(axes, sizes)
        gone.append(3 - axes[1].size)
    assert gone.index(1) + 1 == began_at
    assert gone[-1] == math.floor(3 * (0.9 - heads_after) / (1 - heads_after))
    assert axes[0].size == 100


@pytest.mark.parametrize("value", [1, -0.1, True, float("nan")])
def test_a_share_that_is_none_is_refused(value: Any) -> None:
    axes = toy_axes((100,), (3,))
    for chooser, more in ((adaptive, {"amplitude": 0}), (uniform, {})):
        with pytest.raises(UsageError, match=rf"heads_after={value} of allocate.{chooser.__name__} is not a share"):
            chooser(
                toy_scores(axes, [0.0]), axes, Budget(0, size_of(axes)), debt=Debt.none(axes), step=0.1, heads_after=value, **more
            )


def test_a_debt_reset_each_stage_never_takes_a_head() -> None:
    axes = toy_axes((1000,), (3,))
    for _ in range(10):
        debt = Debt.none(axes)
        for _ in range(5):
            sizes, debt = uniform(toy_scores(axes, [0.0]), axes, Budget(0, size_of(axes)), debt=debt, step=0.02)
            axes = after(axes, sizes)
    assert axes[1].size == 3
    assert axes[0].size < 600


def test_a_share_of_the_decoder_leaves_the_rest_whole() -> None:
    parsed = [
        Budget.parse(text, dense=268, decoder=100, outside=168).keep
        for text in ("80%", "80% of decoder", "100% of decoder", "200")
    ]
    assert parsed == [214, 248, 268, 200]
    assert Budget.parse("50% of decoder", dense=268, decoder=100, outside=90).keep == 140, "tokens that go are not made up for"
    with pytest.raises(
        UsageError, match="'80% of layers' is not a share of the dense model; write it like 80% or '80% of decoder'"
    ):
        Budget.parse("80% of layers", dense=268, decoder=100, outside=168)


@pytest.mark.parametrize(
    ("chooser", "options"),
    [(uniform, {}), (adaptive, {"amplitude": 0.02}), (adaptive, {"amplitude": 0.02, "heads_after": 0.5})],
    ids=["uniform", "adaptive", "heads-later"],
)
@pytest.mark.parametrize("neurons", [(50, 50, 50), (7, 90, 33)])
@pytest.mark.parametrize("share", [0.99, 0.9, 0.71, 0.5, 0.31, 0.295])
@pytest.mark.parametrize("step", [0.02, 0.13, 1.0])
def test_the_budget_is_met_from_below_within_one_neuron(
    chooser: Any, options: dict[str, float], neurons: tuple[int, ...], share: float, step: float
) -> None:
    axes = toy_axes(neurons, (3, 2, 4))
    keep = int(size_of(axes) * share)
    debt = Debt.none(axes)
    for _ in range(500):
        total = size_of(axes)
        if total <= keep:
            break
        sizes, debt = chooser(toy_scores(axes, [0.2, 0.9, 0.4]), axes, Budget(keep, total), debt=debt, step=step, **options)
        assert any(sizes[axis.name] < axis.size for axis in axes), "every iteration gets somewhere"
        axes = after(axes, sizes)
    assert keep - NEURON < size_of(axes) <= keep


def test_where_only_heads_may_go_the_budget_is_met_within_one_head() -> None:
    axes = toy_axes((), (3, 2, 4))
    debt, keep = Debt.none(axes), 5_500
    for _ in range(100):
        if size_of(axes) <= keep:
            break
        sizes, debt = uniform(toy_scores(axes, [0.0] * 3), axes, Budget(keep, size_of(axes)), debt=debt, step=0.02)
        axes = after(axes, sizes)
    assert size_of(axes) == 5_000


def test_ranking_is_local_and_ties_keep_the_first() -> None:
    axes = toy_axes((10, 10))
    scores = {"layers.0.neurons": torch.ones(10), "layers.1.neurons": torch.arange(10).float() * 1e6}
    mask = Mask.of_sizes(axes, scores, {"layers.0.neurons": 7, "layers.1.neurons": 7})
    assert mask["layers.0.neurons"].tolist() == [True] * 7 + [False] * 3
    assert mask["layers.1.neurons"].tolist() == [False] * 3 + [True] * 7


def test_scores_that_are_missing_are_refused() -> None:
    axes = toy_axes((10,))
    with pytest.raises(ValueError, match=r"layers\.0\.neurons has 10 units but scores None"):
        Mask.of_sizes(axes, {}, {"layers.0.neurons": 7})


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_increment_that_is_no_number_ends_the_choice(wrong: float) -> None:
    """The bisection over the number of steps would never end."""
    axes = toy_axes((10, 10))
    with pytest.raises(ValueError, match=rf"the increment of layers\.1\.neurons is {wrong}, not a finite number"):
        advance(axes, Budget(keep=1, total=20), Debt.none(axes), {"layers.0.neurons": 0.1, "layers.1.neurons": wrong})


def shrink_in_stages(
    axes: list[Axis], keep: int, *, stages: int, step: float, chooser: Any = uniform, importance: Any = (0.0,) * 99
) -> list[list[Axis]]:
    """The axes after each of some stages with linear targets, the debt carried."""
    debt, start, reached = Debt.none(axes), size_of(axes), []
    options = {"amplitude": step} if chooser is adaptive else {}
    scores = {"layers": torch.tensor(importance[: max(axis.layer or 0 for axis in axes) + 1])}
    for k in range(1, stages + 1):
        target = start - (start - keep) * k // stages
        for _ in range(1000):
            if size_of(axes) <= target:
                break
            sizes, debt = chooser(scores, axes, Budget(target, size_of(axes)), debt=debt, step=step, **options)
            axes = after(axes, sizes)
        assert target - NEURON < size_of(axes) <= target
        reached.append(axes)
    return reached


@pytest.mark.parametrize("stages", [1, 5, 20, 40])
@pytest.mark.parametrize("chooser", [uniform, adaptive], ids=["uniform", "adaptive"])
def test_heads_owed_by_all_layers_at_once_are_paid_as_stages_can_afford_them(stages: int, chooser: Any) -> None:
    """30 layers cross 1/3 together and no small stage can pay for 30 heads: each pays for some, and in the end they are gone."""
    axes = toy_axes((400,) * 30, (3,) * 30)
    importance = [0.1 * (i % 3) for i in range(30)]
    last = shrink_in_stages(axes, int(size_of(axes) * 0.55), stages=stages, step=0.02, chooser=chooser, importance=importance)[-1]
    heads = [axis.size for axis in last if axis.kind == "kv_heads"]
    assert sum(heads) <= 70


@pytest.mark.parametrize(
    ("beyond", "heads", "neurons"), [(0, 0, 600), (300, 0, 630), (900, 0, 690), (1000, 1, 600), (2500, 2, 650)]
)
def test_a_budget_just_beyond_the_share_that_costs_heads_takes_no_head_for_neurons(beyond: int, heads: int, neurons: int) -> None:
    """At a third 600 neurons are gone and 6 heads are owed at once; what lies beyond pays for as many heads as it can, not for all six."""
    axes = toy_axes((300,) * 6, (3,) * 6)
    keep = size_of(axes) - 600 * NEURON - beyond
    sizes, _ = uniform({}, axes, Budget(keep, size_of(axes)), debt=Debt.none(axes), step=1.0)
    gone = {kind: sum(axis.size - sizes[axis.name] for axis in axes if axis.kind == kind) for kind in ("neurons", "kv_heads")}
    assert gone == {"neurons": neurons, "kv_heads": heads}


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_layers_at_the_ends_stay_whole_and_the_others_pay(step: float) -> None:
    axes = toy_axes((90,) * 6, (3,) * 6)
    debt, keep, others = Debt.none(axes), size_of(axes) - 6_105, ("layers.2", "layers.3", "layers.4")
    before = axes
    while size_of(axes) > keep:
        sizes, debt = uniform({}, axes, Budget(keep, size_of(axes)), debt=debt, step=step, first=2, last=1)
        axes = after(axes, sizes)
    assert keep - NEURON < size_of(axes) <= keep
    for old, new in zip(before, axes, strict=True):
        assert (new.size < old.size) == old.name.startswith(others)
    for ends in ((3, 3), (2, 1)):
        axes, debt = before, Debt.none(before)
        for _ in range(3):
            sizes, debt = uniform({}, axes, Budget(0, size_of(axes)), debt=debt, step=1.0, first=ends[0], last=ends[1])
            axes = after(axes, sizes)
        assert size_of(axes) == (size_of(before) if ends == (3, 3) else 3 * 3_900 + 3 * 1_010), "all that may go, and no more"


def test_a_layer_whose_increment_is_zero_does_not_stop_the_others() -> None:
    """The most important layer has increment 0 (step = amplitude) and may hold an unpaid head: the walk still ends."""
    axes = toy_axes((40, 40), (3, 3))
    debt = Debt(start={axis.name: axis.size for axis in axes}, sparsity={axis.name: 0.34 for axis in axes})
    sizes, _ = adaptive(
        {"layers": torch.tensor([0.0, 1.0])},
        axes,
        Budget(size_of(axes) - 15, size_of(axes)),
        debt=debt,
        step=0.02,
        amplitude=0.02,
    )
    assert sum((axis.size - sizes[axis.name]) * axis.cost for axis in axes) == 20


def test_far_budgets_take_few_iterations() -> None:
    """Once most axes stand at their limit, steps lengthen instead of removing one neuron each."""
    axes = toy_axes((300,) * 6, (3,) * 6)
    floor = 6 * (NEURON + HEAD)
    debt, count = Debt.none(axes), 0
    while size_of(axes) > floor + 50:
        sizes, debt = adaptive(
            {"layers": torch.tensor([1.0, 0, 0, 0, 0, 0])},
            axes,
            Budget(floor + 50, size_of(axes)),
            debt=debt,
            step=0.02,
            amplitude=0.02,
        )
        axes, count = after(axes, sizes), count + 1
    assert count < 120


@pytest.mark.parametrize("heads", ["kv_heads", "query_heads"])
def test_the_count_a_chooser_promises_is_the_count_after_the_cut(heads: str) -> None:
    model = tiny_model(("llama", "qwen2"))
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", heads)]
    total = count_parameters(model)
    sizes, _ = uniform({}, axes, Budget(int(total * 0.8), total), debt=Debt.none(axes), step=1.0)
    cut(model, families.axes(model), Mask.of_sizes(axes, {axis.name: torch.rand(axis.entries) for axis in axes}, sizes))
    cost = min(axis.cost for axis in axes)
    assert int(total * 0.8) - cost < count_parameters(model) <= int(total * 0.8)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("110M", 110_000_000),
        ("110_000_000", 110_000_000),
        ("1.5B", 1_500_000_000),
        ("12k", 12_000),
        ("110,000,000", 110_000_000),
        ("1,500.5k", 1_500_500),
        (7, 7),
    ],
)
def test_counts_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["1,5M", "12,34", "1,2345", ",5", "0", "-3", "many"])
def test_what_is_no_count_is_refused(text: str) -> None:
    """A comma that parts no thousands would be read as ten times as many."""
    with pytest.raises(UsageError, match="is not a count; write it like 110M"):
        parse_count(text)


def test_budgets() -> None:
    assert Budget.parse("80%", dense=1000, decoder=600, outside=400) == Budget(keep=800, total=1000)
    assert Budget.parse("113.3M", dense=134_515_008, decoder=106_202_880, outside=28_312_128).keep == 113_300_000
    for text, said in (
        ("2k", "above the 1,000"),
        ("30%less", "'30%less' says what goes, and a budget is what stays; write 70%"),
        ("30 % smaller", "write 70%"),
        ("-12.5%", "write 87.5%"),
        ("100% off", "write it like 70%"),
        ("0%", "not a share"),
        ("130%", "not a share"),
        ("many", "neither a count nor a share"),
        ("-5", "neither a count nor a share"),
    ):
        with pytest.raises(UsageError, match=said):
            Budget.parse(text, dense=1000, decoder=600, outside=400)
    axes = toy_axes((50, 50), (3, 3))
    with pytest.raises(UsageError, match="smallest possible budget is 3,020"):
        Budget(keep=3_000, total=1_000 + size_of(axes)).check_reachable(3_020, when="nothing more can go")
    Budget(keep=3_020, total=1_000 + size_of(axes)).check_reachable(3_020, when="nothing more can go")


@pytest.mark.parametrize(("step", "wanted"), [(0.1, [2, 2, 2]), (0.05, [3, 3, 3])])
def test_a_chooser_that_keeps_heads_at_first_takes_more_steps(step: float, wanted: list[int]) -> None:
    """As `smollm2-demo` does: the first step removes a tenth of the neurons, 8.0 M of the 9.8 M that a stage removes."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    work = Work.of(model, read({"method": "best", "model": "smollm2", "step": step}))
    targets = [134_515_008, 124_676_672, 114_838_336, 105_000_000]
    found = [
        work.reduction.num_steps(work, start=targets[0], reached=reached, target=target)
        for reached, target in zip(targets, targets[1:], strict=False)
    ]
    assert found == wanted
    late = [
        work.reduction.num_steps(work, start=targets[0], reached=reached, target=reached - 10**7)
        for reached in (92_000_000, 134_515_008)
    ]
    assert late[0] < late[1], "heads go along"
