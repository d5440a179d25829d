"""Whole layers: which go, how many a budget asks for, and what follows them: names, debts, masks, plans and whole runs."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.axes import Axis, Gate, Mask, in_pattern
from adapt_pruner.core.model.budget import Budget, count_parameters
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce import units
from adapt_pruner.reduce.choose.allocate import Debt
from adapt_pruner.reduce.choose.depth import drop_layers
from adapt_pruner.reduce.units import metrics_of
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.run.forecast import dry_run
from adapt_pruner.score.calibrate import Evidence
from adapt_pruner.work import Work
from conftest import LAYOUTS, VOCAB, as_dicts, byte_tokenizer, read_json, tiny_model
from test_choose import NEURON, toy_axes

NORMS = 7  # parameters of a layer that lie on no axis


def stacked(neurons: tuple[int, ...], heads: tuple[int, ...] = (), *, kinds: str = "layers") -> list[Axis]:
    """The axes of made-up layers, of the kinds that may shrink, and `layers` with what each layer really holds."""
    inner = toy_axes(neurons, heads)
    costs = tuple(NORMS + sum(axis.size * axis.cost for axis in inner if axis.layer == i) for i in range(len(neurons)))
    depth = Axis("layers", len(neurons), sum(costs) // len(costs), Gate("", kind="whole"), costs=costs)
    return [axis for axis in inner if axis.kind in kinds] + [depth]


def asked_for(axes: list[Axis], excess: int, scores: list[float], *, step: float = 1.0) -> dict[str, int]:
    total = sum(axes[-1].costs)
    sizes, _ = drop_layers({"layers": torch.tensor(scores)}, axes, Budget(total - excess, total), debt=Debt.none(axes), step=step)
    return sizes


def test_as_many_layers_go_as_the_budget_asks_for_each_at_its_own_cost() -> None:
    axes = stacked((10, 50, 20, 30))  # 107, 507, 207, 307
    scores = [0.3, 0.9, 0.2, 0.1]  # they go in the order 3, 2, 0
    for excess, left in ((1, 3), (307, 3), (308, 2), (514, 2), (515, 1), (621, 1)):
        assert asked_for(axes, excess, scores) == {"layers": left}
    assert asked_for(axes, 515, scores, step=0.25) == {"layers": 3}, "one, and then they are measured again"
    assert asked_for(axes, 515, scores, step=0.5) == {"layers": 2}
    assert asked_for(axes, 1, scores, step=0.02) == {"layers": 3}, "at least one"


def blocks(costs: dict[str, tuple[int, ...]], *, kinds: str) -> list[Axis]:
    """The axes of made-up layers: whole blocks of these costs, neurons of NEURON each inside the MLPs, and `layers`."""
    num_layers = len(costs["attentions"])
    whole = [
        Axis(f"layers.{i}.{kind}", 1, of_kind[i], Gate("", kind="whole"), modules=("norm", kind), may_be_empty=True)
        for i in range(num_layers)
        for kind, of_kind in costs.items()
    ]
    inner = [
        Axis(f"layers.{i}.neurons", costs["mlps"][i] // NEURON, NEURON, Gate(""), enclosing=(f"layers.{i}.mlps",))
        for i in range(num_layers)
    ]
    each = tuple(sum(of_kind[i] for of_kind in costs.values()) for i in range(num_layers))
    depth = Axis("layers", num_layers, sum(each) // num_layers, Gate("", kind="whole"), costs=each)
    return [axis for axis in (*inner, *whole, depth) if axis.kind in kinds.split()]


COSTS = {"attentions": (100, 110, 120, 130), "mlps": (200, 210, 220, 230)}
WORTH = {
    "layers": torch.tensor([0.9, 0.2, 0.8, 0.7]),
    **{f"layers.{i}.attentions": torch.tensor([score]) for i, score in enumerate((0.4, 0.1, 0.3, 0.5))},
    **{f"layers.{i}.mlps": torch.tensor([score]) for i, score in enumerate((0.6, 0.15, 0.25, 0.05))},
}


def gone_of(axes: list[Axis], excess: int, *, step: float = 1.0, debt: Debt | None = None) -> dict[str, int]:
    """The axes that lose units, with what is left of each."""
    total = sum(COSTS["attentions"]) + sum(COSTS["mlps"])
    sizes, _ = drop_layers(WORTH, axes, Budget(total - excess, total), debt=debt or Debt.none(axes), step=step)
    return {axis.name: sizes[axis.name] for axis in axes if sizes[axis.name] < axis.size}


def test_blocks_go_in_one_line_with_layers_at_their_own_cost_and_the_last_of_a_kind_stays() -> None:
    attentions, both = blocks(COSTS, kinds="attentions"), blocks(COSTS, kinds="attentions mlps")
    a, m = (lambda i: {f"layers.{i}.attentions": 0}), (lambda i: {f"layers.{i}.mlps": 0})
    for excess, gone in ((110, a(1)), (111, a(1) | a(2)), (231, a(1) | a(2) | a(0)), (460, a(1) | a(2) | a(0))):
        assert gone_of(attentions, excess) == gone
    for excess, gone in ((230, m(3)), (231, m(3) | a(1)), (341, m(3) | a(1) | m(1))):
        assert gone_of(both, excess) == gone
    assert gone_of(both, 10**3, step=2 / 8) == m(3) | a(1), "two of eight, and then they are measured again"
    owing = Debt.none(blocks({kind: 2 * costs for kind, costs in COSTS.items()}, kinds="attentions mlps"))
    assert gone_of(both, 10**3, step=2 / 8, debt=owing) == m(3) | a(1) | m(1) | {"layers.2.mlps": 0}, "of those at the start"
    kept = gone_of(both, 10**4)
    assert set(kept) == {axis.name for axis in both} - {"layers.3.attentions", "layers.0.mlps"}
    everything = blocks(COSTS, kinds="attentions mlps layers")
    assert gone_of(everything, 551) == m(3) | a(1) | m(1) | {"layers": 3} | m(2), "layer 1 was empty, and is free"
    assert gone_of(everything, 10**4)["layers"] == 3, "layer 3 holds the last attention, and who is behind it in line stays too"


def test_neurons_in_what_stays_pay_what_is_less_than_a_block() -> None:
    axes = blocks(COSTS, kinds="attentions neurons mlps")
    inner = {axis.name for axis in axes if axis.kind == "neurons"}
    for excess, gone in ((60, set()), (230 + 60, {"layers.3.mlps"}), (230 + 110 + 55, {"layers.3.mlps", "layers.1.attentions"})):
        sizes = gone_of(axes, excess)
        assert {name for name, size in sizes.items() if size == 0} == gone
        paying = {name for name in sizes if name in inner}
        assert paying == {name for name in inner if name.replace("neurons", "mlps") not in gone}


def test_one_layer_stays() -> None:
    axes = stacked((10, 50, 20, 30))
    assert asked_for(axes, 1128, [0.3, 0.1, 0.2, 0.9]) == {"layers": 1}
    axes = stacked((10, 50, 20, 30), kinds="layers neurons")
    sizes = asked_for(axes, 1128, [0.3, 0.1, 0.2, 0.9])
    assert sizes["layers"] == 1
    assert [sizes[f"layers.{i}.neurons"] for i in range(4)] == [10, 50, 20, 1], "in the one that stays neurons go"


@pytest.mark.parametrize("excess", [3, 250, 507, 508, 530, 714, 760, 820, 1000, 1111])
@pytest.mark.parametrize("step", [0.02, 1.0])
def test_neurons_of_the_layers_that_stay_pay_what_is_less_than_a_layer(excess: int, step: float) -> None:
    axes = stacked((10, 50, 20, 30), kinds="layers neurons")
    scores, keep, debt = torch.tensor([0.3, 0.1, 0.2, 0.9]), sum(axes[-1].costs) - excess, Debt.none(axes)
    while (total := sum(axes[-1].costs)) > keep:
        sizes, debt = drop_layers({"layers": scores}, axes, Budget(keep, total), debt=debt, step=step)
        mask = Mask.of_sizes(axes[-1:], {"layers": scores}, sizes)
        scores, debt = scores[mask["layers"]], debt.after(mask)
        neurons = [sizes[axis.name] for axis in axes[:-1] if mask.renamed(axis.name)]
        assert any(sizes[axis.name] < axis.size for axis in axes)
        axes = stacked(tuple(neurons), kinds="layers neurons")
    assert keep - NEURON < total <= keep
    assert len(scores) == {3: 4, 250: 4, 507: 3, 508: 3, 530: 3, 714: 2, 760: 2, 820: 2, 1000: 1, 1111: 1}[excess]


def test_debts_and_names_follow_the_layers() -> None:
    axes = toy_axes((40, 41, 42, 43), (3, 3, 3, 3))
    axes.append(Axis("layers", 4, 1, Gate("", kind="whole")))
    debt = replace(Debt.none(axes), sparsity={axis.name: i / 100 for i, axis in enumerate(axes)})
    mask = Mask({"layers": torch.tensor([True, False, False, True]), "layers.3.neurons": torch.arange(43) > 3})
    moved = debt.after(mask)
    assert moved.start == {
        "layers.0.neurons": 40, "layers.1.neurons": 43, "layers.0.kv_heads": 3, "layers.1.kv_heads": 3, "layers": 4,
    }  # fmt: skip
    assert moved.sparsity["layers.1.neurons"] == debt.sparsity["layers.3.neurons"]
    assert moved.sparsity["layers.1.kv_heads"] == debt.sparsity["layers.3.kv_heads"]
    assert mask.renamed("layers.2.neurons") is None
    assert debt.after(Mask({"layers.3.neurons": torch.arange(43) > 3})) == debt


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_every_family_says_what_each_layer_costs(layout: tuple[str, str]) -> None:
    model = tiny_model(layout)
    axes = families.axes(model)
    cut(model, axes, Mask({"layers.1.neurons": torch.arange(40) < 7}))
    depth = next(axis for axis in families.axes(model) if axis.name == "layers")
    assert list(depth.costs) == [count_parameters(layer) for layer in model.get_submodule(depth.gate.module)]
    assert len(set(depth.costs)) == 2


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    tiny_model(vocab_size=VOCAB, num_hidden_layers=6).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(deep_folder: Path, text_file: Path) -> Recipe:
    return read({
        "method": "adapt-pruner",
        "model": str(deep_folder), "budget": "60%", "axes": ["layers"], "chooser": "depth.drop_layers", "step": 1, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    })  # fmt: skip


@pytest.mark.parametrize(
    "axes",
    [
        ["layers"],
        ["layers", "neurons"],
        ["layers", "neurons", "kv_heads"],
        ["mlps"],
        ["attentions", "mlps"],
        ["attentions", "neurons", "kv_heads"],
        ["layers", "attentions", "mlps", "neurons", "query_heads"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("step", [0.02, 1])
def test_whole_runs(axes: list[str], step: float, recipe: Recipe, tmp_path: Path) -> None:
    asked = read(recipe.model_dump() | {"axes": axes, "step": step, "budget": "80%" if axes == ["mlps"] else "60%"})
    outcome = prune(asked, tmp_path / "out")
    dense, left = load(asked.model).model, load(str(tmp_path / "out"))
    cost = {axis.kind: axis.cost for axis in families.axes(dense)}
    assert count_parameters(left.model) == outcome.figures["params_after"]
    within = (
        6 * cost["neurons"] if "neurons" in axes else max(cost[kind] for kind in axes)
    )  # one of each layer, where all are alike
    assert outcome.figures["budget"] - within < outcome.figures["params_after"] <= outcome.figures["budget"]
    # The mask is right through all iterations: the dense model cut by it at once is the model that came out.
    assert left.mask == outcome.mask
    cut(dense, families.axes(dense), outcome.mask)
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(ids).logits, left.model(ids).logits)
    # The plan knew how many iterations there would be; what settles the rest may take one more.
    planned = dry_run(asked)["stages"][0]["iterations"]
    assert abs(planned - outcome.figures["iterations"]) <= 1 + len({"attentions", "mlps"} & set(axes))
    assert (outcome.figures["iterations"] == 1) == (step == 1)


def test_the_layers_that_turn_their_input_least_go(recipe: Recipe, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    mask = prune(recipe, tmp_path / "out", listen=as_dicts(heard.append)).mask
    distances = next(event["distances"] for event in heard if event["event"] == "cut")
    gone = (~mask["layers"]).nonzero().flatten().tolist()
    assert sorted(range(6), key=lambda i: distances[i])[: len(gone)] == sorted(gone, key=lambda i: distances[i])


def test_the_attentions_that_turn_the_stream_least_go(recipe: Recipe, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    asked = read(recipe.model_dump() | {"axes": ["attentions"], "distance": "blocks.block_influence", "budget": "90%"})
    mask = prune(asked, tmp_path / "out", listen=as_dicts(heard.append)).mask
    worth = next(event["blocks"] for event in heard if event["event"] == "cut")
    assert len(worth) == 6
    gone = [name for name in mask if not mask[name].any()]
    assert 0 < len(gone) < 6
    assert sorted(worth, key=worth.__getitem__)[: len(gone)] == sorted(gone, key=worth.__getitem__)


@pytest.mark.parametrize("axes", [["layers"], ["attentions", "mlps"]], ids="+".join)
def test_a_distance_with_passes_of_its_own_ranks_alone(axes: list[str], recipe: Recipe, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    asked = read(recipe.model_dump() | {"distance": "blocks.loss_drop", "axes": axes})
    outcome = prune(asked, tmp_path / "out", listen=as_dicts(heard.append))
    assert outcome.figures["params_after"] <= outcome.figures["budget"]
    cut = next(event for event in heard if event["event"] == "cut")
    worth: dict[Any, float] = dict(enumerate(cut["distances"])) if axes == ["layers"] else cut["blocks"]
    shut = outcome.mask["layers"] if axes == ["layers"] else {name: kept.any() for name, kept in outcome.mask.kept.items()}
    gone = [unit for unit in worth if not shut[unit]]
    assert len(worth) == 6 * len(axes)
    assert gone
    assert sorted(gone, key=worth.__getitem__) == sorted(worth, key=worth.__getitem__)[: len(gone)]


def test_layers_alone_take_no_gradients(recipe: Recipe) -> None:
    model = tiny_model()
    needs = {next(metric(model, families.axes(model))) for metric in metrics_of(Work.of(model, recipe), seed=0)}
    assert needs == {Evidence.FORWARD}
    both = read(recipe.model_dump() | {"axes": ["layers", "neurons"]})
    assert len(metrics_of(Work.of(model, both), seed=0)) == 2


def test_a_run_in_stages_that_is_stopped_goes_on_to_the_same_model(recipe: Recipe, text_file: Path, tmp_path: Path) -> None:
    asked = read(
        recipe.model_dump()
        | {"axes": ["layers", "neurons"], "stages": 3, "step": 0.02}
        | {"training": {"source": str(text_file), "tokens": 3_000, "batch_tokens": 512, "length": 64, "lr": 1e-3}}
    )

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "cut" and event["stage"] == 3:
            raise KeyboardInterrupt

    whole = run(asked, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "stopped", listen=as_dicts(stop))
    went_on = run(asked, tmp_path / "stopped")
    assert whole is not None
    assert went_on is not None
    assert whole.mask == went_on.mask
    assert int(whole.mask["layers"].sum()) < 6
    debt = read_json(tmp_path / "whole" / "checkpoints" / "stage-2" / "state.json")["reduction"]["debt"]
    left = families.axes(load(str(tmp_path / "whole" / "checkpoints" / "stage-2")).model)
    assert set(debt["start"]) == {axis.name for axis in left if axis.kind in asked.axes}, "what layers owed went with them"
    one, other = whole.loaded.model.state_dict(), went_on.loaded.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"axes": ["neurons"]},
            "'depth.drop_layers' drops whole layers, attentions or mlps, and axes names none; add one of them",
        ),
        ({"chooser": "allocate.uniform"}, "chooser 'allocate.uniform' cannot drop; set chooser=depth.drop_layers"),
        (
            {"axes": ["attentions", "neurons", "mlps"], "chooser": "rank.per_parameter"},
            "axes names attentions and mlps, which chooser 'rank.per_parameter' cannot drop; set chooser=depth.drop_layers",
        ),
        ({"distance": None}, "chooser 'depth.drop_layers' needs a distance"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes: dict[str, Any], said: str, recipe: Recipe) -> None:
    with pytest.raises(UsageError, match=said):
        read(recipe.model_dump() | changes)


def test_a_budget_below_one_layer_is_refused_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"parameters remain when depth.drop_layers has removed all it can \(layers\); the smallest possible",
    ):
        prune(read(recipe.model_dump() | {"budget": "20%"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_chooser_that_has_nothing_left_to_give_ends_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layer stays is known only once it is measured; where layers are unequal the plan may have hoped for a smaller one."""
    monkeypatch.setattr(units, "params_of", lambda work, axes, sizes: 0)
    with pytest.raises(
        RunError,
        match=r"depth.drop_layers finds nothing more to remove at .* parameters, above the target [0-9,]+; raise the budget, or add to axes",
    ):
        prune(read(recipe.model_dump() | {"budget": "20%"}), tmp_path / "out")


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_in_a_pattern_has_the_highest_sum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pattern, scores = "ssgssgssg", torch.randn(9, generator=generator).tolist()
    for count in range(1, 10):
        fitting = [stay for stay in combinations(range(9), count) if [pattern[i] for i in stay] == list(pattern[:count])]
        best = max(fitting, key=lambda stay: sum(scores[i] for i in stay))
        assert in_pattern(pattern, scores, count) == list(best)
    assert in_pattern(pattern, [0.0] * 9, 6) == [0, 1, 2, 3, 4, 5], "of equal sums the first stay"


@pytest.mark.parametrize("kinds", ["layers", "layers neurons"])
def test_a_chooser_that_keeps_the_pattern_counts_the_layers_that_really_go(kinds: str) -> None:
    pattern = "ssgssg"
    axes = stacked((10, 10, 40, 10, 10, 80), kinds=kinds)
    axes[-1] = replace(axes[-1], pattern=tuple(pattern))
    scores = {"layers": torch.tensor([0.5, 0.6, 0.9, 0.1, 0.7, 0.2])}
    total = sum(axes[-1].costs)
    for excess in (1, 807, 808, 914, 1021, 1100, 1300):
        sizes, _ = drop_layers(scores, axes, Budget(total - excess, total), debt=Debt.none(axes), step=1.0, periodic=True)
        stay = Mask.of_sizes(axes[-1:], scores, sizes)["layers"].nonzero().flatten().tolist()
        assert [pattern[i] for i in stay] == list(pattern[: len(stay)])
        removed = sum(cost for i, cost in enumerate(axes[-1].costs) if i not in stay)
        removed += sum((axis.size - sizes[axis.name]) * axis.cost for axis in axes[:-1] if axis.layer in stay)
        assert excess <= removed
        if kinds == "layers neurons":
            assert removed < excess + NEURON
    least = {"layers": 3} if kinds == "layers" else {}
    sizes, _ = drop_layers(scores, axes, Budget(total - 1021, total), debt=Debt.none(axes), step=1.0, periodic=True)
    assert sizes.items() >= least.items()
