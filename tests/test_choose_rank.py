"""All units in one line: by score per parameter and by standardised score, by hand, against plain loops, and in whole runs."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Axis, Gate, Scores
from adapt_pruner.core.model.budget import Budget, count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import read
from adapt_pruner.reduce.choose.allocate import Debt, uniform
from adapt_pruner.reduce.choose.rank import per_parameter, per_structure, standardised
from adapt_pruner.reduce.units import prunable
from adapt_pruner.report.with_card import prune
from adapt_pruner.score.calibrate import score
from adapt_pruner.score.weights import taylor
from adapt_pruner.work import Work
from conftest import LAYOUTS, as_dicts, tiny_model
from test_choose import HEAD, NEURON, after, size_of, toy_axes

STRUCTURES: list[dict[str, Any]] = [
    {"structure": "AL-AM"},
    {"structure": "AL-MM", "heads": 0.3},
    {"structure": "UL-MM", "heads": 0.34},
    {"structure": "UL-UM"},
]


def drawn(axes: list[Axis], *, seed: int = 0) -> Scores:
    """Scores drawn by lot, in every axis of another scale."""
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator) * 10 ** (i % 3) for i, axis in enumerate(axes)}


def shot(chooser: Any, scores: Scores, axes: list[Axis], keep: int, **options: Any) -> dict[str, int]:
    sizes, _ = chooser(scores, axes, Budget(keep, size_of(axes)), debt=Debt.none(axes), step=1.0, **options)
    return dict(sizes)


def test_a_head_goes_before_a_neuron_where_it_is_worth_less_a_parameter() -> None:
    axes = toy_axes((4, 4), (3, 2))
    scores = {
        "layers.0.neurons": torch.tensor([5.0, 1.0, 9.0, 2.0]),  # a parameter: 0.5, 0.1, 0.9, 0.2
        "layers.1.neurons": torch.tensor([0.3, 7.0, 6.0, 8.0]),  # 0.03, 0.7, 0.6, 0.8
        "layers.0.kv_heads": torch.tensor([150.0, 400.0, 900.0]),  # 0.15, 0.4, 0.9
        "layers.1.kv_heads": torch.tensor([800.0, 50.0]),  # 0.8, 0.05
    }
    total = size_of(axes)
    # lowest first: neuron of 1 (0.03), head of 1 (0.05), neuron of 0 (0.1), head of 0 (0.15), neuron of 0 (0.2), head of 0 (0.4)
    for excess, lost in (
        (10, (0, 1, 0, 0)), (1010, (0, 1, 0, 1)), (1020, (1, 1, 0, 1)), (2030, (2, 1, 1, 1)), (3030, (2, 1, 2, 1)),
    ):  # fmt: skip
        sizes = shot(per_parameter, scores, axes, total - excess)
        assert tuple(axis.size - sizes[axis.name] for axis in axes) == lost


def test_a_head_that_would_take_too_much_is_passed_over_for_neurons() -> None:
    axes = toy_axes((200,), (3,))
    scores = {"layers.0.kv_heads": torch.tensor([0.0, 1e9, 1e9]), "layers.0.neurons": torch.arange(200).float() + 1}
    sizes = shot(per_parameter, scores, axes, size_of(axes) - 905)
    assert sizes == {"layers.0.neurons": 200 - 91, "layers.0.kv_heads": 3}
    # Where there are not enough neurons a head goes after all, and the best of the neurons stay.
    axes = toy_axes((50,), (3,))
    scores = {"layers.0.kv_heads": torch.full((3,), 1e9), "layers.0.neurons": torch.arange(50).float() + 1}
    sizes = shot(per_parameter, scores, axes, size_of(axes) - 1205)
    assert sizes == {"layers.0.neurons": 50 - 21, "layers.0.kv_heads": 2}


def plainly(worth: dict[str, list[float]], axes: list[Axis], excess: int) -> dict[str, int]:
    """One unit after the other, the lowest of all that still fit; for axes of which neurons can pay the rest."""
    left = {axis.name: sorted(worth[axis.name]) for axis in axes}
    cost = {axis.name: axis.cost for axis in axes}
    removed = 0
    while removed < excess:
        fitting = [n for n in left if len(left[n]) > 1 and (cost[n] == NEURON or removed + cost[n] <= excess)]
        lowest = min(fitting, key=lambda n: left[n][0])
        left[lowest].pop(0)
        removed += cost[lowest]
    return {name: len(units) for name, units in left.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
def test_both_lines_are_those_of_a_plain_loop(seed: int, share: float) -> None:
    axes = toy_axes((150, 90, 220), (3, 2, 4))
    scores, excess = drawn(axes, seed=seed), size_of(axes) - int(size_of(axes) * share)
    by_parameter = {axis.name: [value / axis.cost for value in scores[axis.name].tolist()] for axis in axes}
    assert shot(per_parameter, scores, axes, size_of(axes) - excess) == plainly(by_parameter, axes, excess)
    by_deviation = {}
    for axis in axes:
        values = scores[axis.name].tolist()
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        by_deviation[axis.name] = [(value - mean) / deviation for value in values]
    assert shot(standardised, scores, axes, size_of(axes) - excess) == plainly(by_deviation, axes, excess)


def test_a_standardised_line_does_not_know_scales_and_one_by_parameter_does() -> None:
    axes = toy_axes((60, 60), (3, 3))
    scores = drawn(axes)
    scaled = scores | {"layers.0.neurons": scores["layers.0.neurons"] * 1e4 + 7}
    keep = int(size_of(axes) * 0.7)
    assert shot(standardised, scores, axes, keep) == shot(standardised, scaled, axes, keep)
    assert shot(per_parameter, scores, axes, keep) != shot(per_parameter, scaled, axes, keep)
    alike = scores | {"layers.0.neurons": torch.full((60,), 3.0), "layers.0.kv_heads": torch.full((3,), 0.1)}
    assert sum(shot(standardised, alike, axes, keep).values()) < 126, "scores that are all alike stand at 0"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_a_structure_is_worth_its_score_over_the_size_that_gisp_gives_it(layout: tuple[str, str]) -> None:
    """Heads over 4 · head_dim · hidden, channels over 3 · intermediate; biases and the number of groups change nothing."""
    model = tiny_model(layout)
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "query_heads")]
    depth = max(axis.layer or 0 for axis in axes) + 1
    generator, scores, line = torch.Generator().manual_seed(5), {}, []
    for axis in axes:
        size = 3 * axis.size if axis.kind == "neurons" else 4 * axis.gate.width * model.config.hidden_size
        worth = torch.rand(axis.entries, generator=generator)
        scores[axis.name] = worth * size
        if depth // 3 <= (axis.layer or 0) < depth - 1:
            ranked = worth.view(axis.groups, axis.size).sort(dim=1).values.mean(dim=0)
            line += [(float(value), axis.name) for value in ranked[:-1]]
    line.sort()
    cost = {axis.name: axis.cost for axis in axes}
    if any(axis.size > 1 for axis in axes if axis.kind == "query_heads"):
        assert {name.rpartition(".")[2] for _, name in line[:-1]} == {"neurons", "query_heads"}
    for count in range(1, len(line)):
        gone = [name for _, name in line[:count]]
        excess = sum(cost[name] for name in gone)
        sizes = shot(per_structure, scores, axes, size_of(axes) - excess, first=0.334, last=1)
        lost = {axis.name: axis.size - sizes[axis.name] for axis in axes}
        assert lost == {axis.name: gone.count(axis.name) for axis in axes}, "none of the first and the last layer"


def test_a_step_is_a_share_of_all_structures_whatever_they_cost() -> None:
    model = tiny_model(num_hidden_layers=12)
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "query_heads")]
    number = sum(axis.entries for axis in axes)
    scores = {axis.name: torch.full((axis.entries,), 1.0 if axis.kind == "neurons" else 0.0) for axis in axes}
    sizes, debt = per_structure(scores, axes, Budget(1, size_of(axes)), debt=Debt.none(axes), step=0.05)
    lost = sum((axis.size - sizes[axis.name]) * axis.groups for axis in axes)
    widest = max(axis.groups for axis in axes)
    assert 0.05 * number <= lost < 0.05 * number + widest
    heads = [axis for axis in axes if axis.kind == "query_heads" and 1 <= (axis.layer or 0) < 11]
    assert all(sizes[axis.name] == 1 for axis in heads), (
        "heads, worth nothing, go first, though each costs as much as many channels"
    )
    smaller = [replace(axis, size=sizes[axis.name]) for axis in axes]
    zeros = {axis.name: torch.zeros(axis.entries) for axis in smaller}
    again, _ = per_structure(zeros, smaller, Budget(1, size_of(smaller)), debt=debt, step=0.05)
    lost = sum((axis.size - again[axis.name]) * axis.groups for axis in smaller)
    assert 0.05 * number <= lost < 0.05 * number + widest, "a share of the structures at the start, not of those left"


def test_standardised_by_kind_an_axis_of_three_heads_need_not_lose_one() -> None:
    """Within an axis of three, the lowest z lies between -1.155 and -0.577; over a kind, a layer's heads may all be worth much."""
    axes = toy_axes((8, 8, 8), (3, 3, 3))
    scores = {axis.name: torch.linspace(1, 2, axis.size) for axis in axes}
    for layer, worth in enumerate((1.0, 30.0, 40.0)):
        scores[f"layers.{layer}.kv_heads"] = torch.tensor([worth, worth + 0.2, worth + 0.4])
    heads = [f"layers.{layer}.kv_heads" for layer in range(3)]
    sizes = [shot(standardised, scores, axes, size_of(axes) - 2 * HEAD, by=by) for by in ("unit", "kind")]
    assert sorted(sizes[0][name] for name in heads) == [2, 2, 3], "each layer's worst head"
    assert [sizes[1][name] for name in heads] == [1, 3, 3], "the two that are worth least of all nine"
    few = shot(standardised, scores, axes, size_of(axes) - 2 * NEURON, by="kind")
    assert [few[name] for name in heads] == [3, 3, 3], "the lowest z of the neurons, -1.5, is below that of the heads, -1.3"


def test_scores_standardised_by_feature_are_taken_as_they_come() -> None:
    """Heads that features' means have drawn together toward 0 stay there, as in FLAP, and neurons go before them."""
    axes = toy_axes((1000,), (8,))
    features = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    neurons = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    scores = {"layers.0.neurons": neurons, "layers.0.kv_heads": ((features - features.mean()) / features.std()).mean(dim=1)}
    by = {
        name: shot(standardised, scores, axes, size_of(axes) - 3_000, by=name)["layers.0.kv_heads"]
        for name in ("unit", "feature")
    }
    assert by["unit"] < by["feature"] == 8


def test_under_al_mm_the_lowest_heads_of_all_layers_go_as_many_as_told() -> None:
    axes = toy_axes((100, 100, 100), (4, 4, 2))
    scores = {axis.name: torch.rand(axis.size) for axis in axes} | {
        "layers.0.kv_heads": torch.tensor([-9.0, -8.0, 1.0, 2.0]),  # two far below the mean
        "layers.1.kv_heads": torch.tensor([1.0, 1.1, 0.9, -5.0]),  # one
        "layers.2.kv_heads": torch.tensor([0.0, 1.0]),
    }
    sizes = shot(standardised, scores, axes, size_of(axes) - 3_500, structure="AL-MM", heads=0.3)
    assert [sizes[f"layers.{i}.kv_heads"] for i in range(3)] == [2, 3, 2]
    assert sum(sizes[f"layers.{i}.neurons"] for i in range(3)) == 250, "neurons pay the rest"


def test_under_ul_mm_every_layer_loses_the_same() -> None:
    axes = toy_axes((100, 100, 100), (4, 4, 4))
    sizes = shot(standardised, drawn(axes), axes, size_of(axes) - 3_600, structure="UL-MM", heads=0.3)
    assert [sizes[axis.name] for axis in axes] == [80, 80, 80, 3, 3, 3]
    # Heads that the budget does not pay for stay; it is not the first layers alone that lose theirs.
    axes = toy_axes((100,) * 6, (4,) * 6)
    sizes = shot(standardised, drawn(axes), axes, size_of(axes) - 3_600, structure="UL-MM", heads=0.3)
    losing = [i for i in range(6) if sizes[f"layers.{i}.kv_heads"] < 4]
    assert len(losing) == 3
    assert losing[-1] > 2
    assert sum(sizes[f"layers.{i}.neurons"] for i in range(6)) == 540


def test_ul_um_takes_the_shares_that_uniform_takes() -> None:
    axes = toy_axes((120, 60, 90))
    for keep in (0.9, 0.7, 0.5):
        one = shot(standardised, drawn(axes), axes, int(size_of(axes) * keep), structure="UL-UM")
        other = shot(uniform, {}, axes, int(size_of(axes) * keep))
        assert all(abs(one[axis.name] - other[axis.name]) <= 1 for axis in axes)
    axes = toy_axes((1200, 600, 900), (6, 3, 2))
    for keep in (0.7, 0.45):
        sizes = shot(standardised, drawn(axes), axes, int(size_of(axes) * keep), structure="UL-UM")
        shares = [sizes[axis.name] / axis.size for axis in axes if axis.kind == "neurons"]
        assert max(shares) - min(shares) <= 1 / 600
        for axis in axes[3:]:
            assert abs(sizes[axis.name] / axis.size - shares[0]) <= 1 / axis.size + 0.05


@pytest.mark.parametrize("options", [{}, {"floor": 0.25}, *STRUCTURES], ids=str)
@pytest.mark.parametrize("share", [0.99, 0.9, 0.71, 0.55])
@pytest.mark.parametrize("step", [0.02, 0.13, 1.0])
def test_the_budget_is_met_from_below_within_one_neuron(options: dict[str, Any], share: float, step: float) -> None:
    chooser = standardised if "structure" in options else per_parameter
    axes = toy_axes((250, 90, 233), (3, 2, 4))
    keep, debt, count = int(size_of(axes) * share), Debt.none(axes), 0
    while size_of(axes) > keep:
        scores = drawn(axes, seed=count)
        sizes, debt = chooser(scores, axes, Budget(keep, size_of(axes)), debt=debt, step=step, **options)
        assert any(sizes[axis.name] < axis.size for axis in axes), "every iteration gets somewhere"
        axes, count = after(axes, sizes), count + 1
    assert keep - NEURON < size_of(axes) <= keep
    assert count == 1 if step == 1.0 else count <= math.ceil((1 - share) / step)
    if step == 0.02 and share == 0.55:
        assert count >= 10, "units are ranked anew along the way"


def test_where_only_heads_may_go_the_budget_is_met_within_one_head() -> None:
    axes = toy_axes((), (3, 2, 4))
    for chooser in (per_parameter, standardised):
        sizes = shot(chooser, drawn(axes), axes, 5_500)
        assert sum(sizes.values()) * HEAD == 5_000


def test_a_floor_is_a_share_of_the_size_at_the_start() -> None:
    axes = toy_axes((10, 100))
    scores = {"layers.0.neurons": torch.zeros(10), "layers.1.neurons": torch.ones(100)}
    debt = Debt.none(axes)
    for keep in (1_060, 900):
        sizes, debt = per_parameter(scores, axes, Budget(keep, size_of(axes)), debt=debt, step=1.0, floor=0.55)
        axes = after(axes, sizes)
        scores = {axis.name: scores[axis.name][: axis.size] for axis in axes}
    assert [axis.size for axis in axes] == [6, 84]


def test_levelled_axes_differ_by_their_spread_and_half_levelled_ones_by_less_than_they_did() -> None:
    axes = toy_axes((40, 40), (4, 4))
    drawn_once = drawn(axes)
    spread = {"layers.0.neurons": drawn_once["layers.0.neurons"] + 1, "layers.1.neurons": drawn_once["layers.0.neurons"] + 1}
    heads = {"layers.0.kv_heads": torch.full((4,), 3e3), "layers.1.kv_heads": torch.full((4,), 3e5)}
    dear = spread | heads | {"layers.1.neurons": spread["layers.1.neurons"] * 16}
    keep = size_of(axes) - 30 * NEURON

    def lost(scores: Scores, level: float) -> list[int]:
        sizes = shot(per_parameter, scores, axes, keep, level=level)
        return [40 - sizes["layers.0.neurons"], 40 - sizes["layers.1.neurons"]]

    assert lost(dear, 0) == [30, 0]
    assert lost(dear, 1) == [15, 15] == lost(spread | heads, 0)
    a_quarter_dearer = {**spread, **heads, "layers.1.neurons": spread["layers.1.neurons"] * 4}
    assert lost(dear, 0.5) == lost(a_quarter_dearer, 0), "16 to the half is 4"
    # Neurons and heads are levelled among themselves, so a head stays as dear against a neuron as it was.
    axes = toy_axes((400, 400), (4, 4))
    dear_heads = {axis.name: torch.full((axis.size,), 1e9 if axis.cost == HEAD else 1.0) for axis in axes}
    sizes = shot(per_parameter, dear_heads, axes, size_of(axes) - 2 * HEAD, level=1)
    assert [sizes[axis.name] for axis in axes if axis.cost == HEAD] == [4, 4]


@pytest.mark.parametrize("level", [0.3, 1.0])
def test_a_unit_worth_nothing_goes_first_and_does_not_upset_the_levels(level: float) -> None:
    axes = toy_axes((30, 30))
    scores = {"layers.0.neurons": torch.ones(30), "layers.1.neurons": torch.cat([torch.zeros(1), torch.ones(29)])}
    assert shot(per_parameter, scores, axes, size_of(axes) - NEURON, level=level) == {
        "layers.0.neurons": 30,
        "layers.1.neurons": 29,
    }


def test_scores_below_zero_are_not_levelled() -> None:
    axes = toy_axes((30, 30))
    scores = {axis.name: torch.linspace(-1, 1, 30) for axis in axes}
    with pytest.raises(UsageError, match=r"level=0.5 .* layers.0.neurons has one of -1; leave it out"):
        shot(per_parameter, scores, axes, size_of(axes) - NEURON, level=0.5)


@pytest.mark.parametrize(
    ("chooser", "options", "left"),
    [
        (per_parameter, {}, 4 * (NEURON + HEAD)),
        (per_parameter, {"floor": 0.5}, 4 * (25 * NEURON + 2 * HEAD)),
        (standardised, {}, 4 * (NEURON + HEAD)),
        (standardised, {"structure": "UL-UM"}, 4 * (NEURON + HEAD)),
        (standardised, {"structure": "UL-MM", "heads": 0.45}, 4 * NEURON + 12 * HEAD),
        (standardised, {"structure": "AL-MM", "heads": 0.45}, 4 * NEURON + 9 * HEAD),
    ],
)
def test_asked_for_everything_they_give_all_they_may(chooser: Any, options: dict[str, Any], left: int) -> None:
    axes = toy_axes((50,) * 4, (4,) * 4)
    assert size_of(after(axes, shot(chooser, drawn(axes), axes, 0, **options))) == left


def test_a_unit_of_several_groups_is_worth_the_sum_of_those_that_go_together() -> None:
    """Which one goes is ranked within its group, so the lowest of all groups go first, together."""
    queries = Axis("layers.0.query_heads", 3, 20, Gate(""), groups=2)
    neurons = Axis("layers.0.neurons", 4, NEURON, Gate(""))
    scores = {
        "layers.0.query_heads": torch.tensor([9.0, 1.0, 5.0, 2.0, 3.0, 30.0]),  # lowest first: (1, 2), (5, 3), (9, 30)
        "layers.0.neurons": torch.tensor([1.2, 1.6, 3.9, 4.1]),  # a parameter: 0.12, 0.16, 0.39, 0.41; heads 3 / 20, 8 / 20
    }
    axes = [queries, neurons]
    for excess, lost in ((10, (0, 1)), (30, (1, 1)), (40, (1, 2)), (50, (1, 3)), (70, (2, 3))):
        sizes = shot(per_parameter, scores, axes, size_of(axes) - excess)
        assert (3 - sizes[queries.name], 4 - sizes[neurons.name]) == lost


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("rank.per_parameter(floor=1.5)", "floor=1.5 of rank.per_parameter is not a share"),
        ("rank.per_parameter(level=2)", "level=2 of rank.per_parameter is not a share"),
        ("rank.standardised(structure=AL-MM)", "needs the share of heads that goes; write it like heads=0.2"),
        ("rank.standardised(heads=0.2)", "heads=0.2 is for the structures UL-MM and AL-MM, not for AL-AM"),
        ("rank.standardised(structure=UL-MM, heads=1)", "heads=1 .* write it from 0 to below 1"),
        (
            "rank.per_parameter(floor=0.9)",
            r"when rank.per_parameter\(floor=0.9\) has removed all it can \(kv_heads, neurons\); the smallest possible",
        ),
        (
            "allocate.uniform(first=2, last=1)",
            r"can remove nothing \(kv_heads, neurons\) from a model of 3 layers, so set another method or chooser; the smallest possible budget is 50,784",
        ),
        ("allocate.uniform(first=-1)", r"option 'first' of chooser 'allocate.uniform' is -1; give a whole number \(0 or more\)"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(written: str, said: str, tiny_folder: Path, tmp_path: Path) -> None:
    asked = {"model": str(tiny_folder), "budget": "80%", "metric": "weights.magnitude", "head_metric": None, "chooser": written}
    heard: list[dict[str, Any]] = []
    with pytest.raises(UsageError, match=said):
        prune(read(asked | {"distance": None, "device": "cpu"}), tmp_path / "out", listen=as_dicts(heard.append))
    assert {event["event"] for event in heard} <= {"load", "loaded"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "written",
    [
        "rank.per_parameter",
        "rank.per_parameter(floor=0.3)",
        "rank.standardised",
        "rank.standardised(structure=AL-MM, heads=0.3)",
        "rank.standardised(structure=UL-MM, heads=0.34)",
        "rank.standardised(structure=UL-UM)",
        "allocate.uniform(first=1, last=1)",
    ],
)
@pytest.mark.parametrize("step", [0.1, 1])
def test_whole_runs_end_within_one_neuron(written: str, step: float, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = read({
        "method": "adapt-pruner",
        "model": str(tiny_folder), "budget": "80%", "metric": "weights.taylor", "distance": None, "chooser": written,
        "step": step, "dtype": "float32", "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    })  # fmt: skip
    figures = prune(asked, tmp_path / "out").figures
    left = load(str(tmp_path / "out")).model
    neuron = min(axis.cost for axis in prunable(Work.of(left, asked)))
    alike = len({axis.size for axis in prunable(Work.of(left, asked)) if axis.kind == "neurons"}) == 1  # of each layer, then
    within = neuron * (3 if alike else 1)
    assert figures["budget"] - within < count_parameters(left) == figures["params_after"] <= figures["budget"]
    assert (figures["iterations"] == 1) == (step == 1)


def test_what_goes_from_a_model_is_what_the_loss_needs_least_a_parameter() -> None:
    """On a model: no unit that went is worth more a parameter than one that stayed, single units passed over aside."""
    model = tiny_model(("llama", "qwen2"))
    axes = [axis for axis in families.axes(model) if axis.kind in ("neurons", "kv_heads")]
    ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    scores, _ = score(model, families.axes(model), [ids], metrics=[taylor], dtype="float32")
    total = count_parameters(model)
    sizes, _ = per_parameter(scores, axes, Budget(int(total * 0.7), total), debt=Debt.none(axes), step=1.0)
    gone, stayed = [], []
    for axis in axes:
        worth = sorted((scores[axis.name] / axis.cost).tolist())
        num = axis.size - sizes[axis.name]
        gone += worth[:num]
        stayed += worth[num:] if axis.kind == "neurons" else []
    assert max(gone) <= min(stayed)
    assert len({sizes[axis.name] for axis in axes if axis.kind == "neurons"}) > 1, "layers lose what they can spare"
