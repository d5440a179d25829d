"""`reduce: search`: swaps keep the budget, candidates are what cutting gives, and a killed search goes on bit-equal."""

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import families
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.core.model.cut import cut, gated
from adapt_pruner.core.model.layers import Stream
from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.reduce import search
from adapt_pruner.reduce.propose.proposals import Candidate, Space, evolution, mutation
from adapt_pruner.reduce.propose.proposals import random as at_random
from adapt_pruner.reduce.repair.closed_form import least_squares
from adapt_pruner.reduce.search import Search
from adapt_pruner.reduce.units import params_of, prunable, sizes_alike
from adapt_pruner.report.with_card import prune, run
from adapt_pruner.work import RunData, Stage, Work
from conftest import LAYOUTS, as_dicts, assert_refused, assert_same_model, break_off, log_of, tiny_model

SMALL = {"population": 4, "offspring": 4, "rounds": 2, "tokens": 24, "finalists": 2}


def work_of(model: Any, batches: list[torch.Tensor], **keys: Any) -> Work:
    recipe = {
        "model": "x",
        "budget": "80%",
        "method": "self-pruner",
        "dtype": "float32",
        "calibration": {"samples": 6, "length": 12},
    }
    work = Work.of(model, read(recipe | keys))
    work.stages = [Stage(1, work.num_params * 8 // 10, 1, 0, 0, 0)]
    work.data = RunData(calibration=lambda iteration: [batch.roll(iteration, 0) for batch in batches])
    return work


def space_of(work: Work) -> Space:
    return Space.around(prunable(work), sizes_alike(work, keep=work.stages[0].params), level=0.1)


def losses_of(candidates: list[Candidate]) -> list[float]:
    return [candidate.loss for candidate in candidates]


def measured_by(monkeypatch: pytest.MonkeyPatch, loss: Callable[[dict[str, int], Any], float]) -> None:
    """Candidates have this loss for their sizes and the text that they are measured on."""

    def measured(self: Any, candidates: Any, text: Any, tell: Any) -> list[Candidate]:
        return [Candidate(dict(sizes), loss(dict(sizes), text)) for sizes in candidates]

    monkeypatch.setattr(search._Judge, "_measured", measured)


@pytest.mark.parametrize("propose", [evolution, at_random])
def test_widths_of_candidates_stay_multiples(propose: Any, batches: list[torch.Tensor]) -> None:
    work = work_of(tiny_model(intermediate_size=64), batches, multiple_of=8)
    base = sizes_alike(work, keep=work.stages[0].params)
    space, draw = Space.around(prunable(work), base, level=0.1, multiple=work.multiple_of), random.Random(0)
    population = [Candidate(space.swapped(space.base, draw, 3), float(n)) for n in range(4)]
    found = [*(one.sizes for one in population), *propose(population, space, draw, 12)]
    widths = {size for sizes in found for name, size in sizes.items() if name.endswith("neurons")}
    assert len(widths) > 2
    assert all(width % 8 == 0 and width >= 8 for width in widths)


@pytest.mark.parametrize("propose", [evolution, at_random])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_candidates_have_the_budget_of_the_start(layout: tuple[str, str], propose: Any, batches: list[torch.Tensor]) -> None:
    work = work_of(tiny_model(layout), batches)
    space, draw, axes = space_of(work), random.Random(0), prunable(work)
    population = [Candidate(space.swapped(space.base, draw, 3), float(n)) for n in range(4)]
    found = [*(one.sizes for one in population), *propose(population, space, draw, 12)]
    start = params_of(work, axes, space.base)
    assert start <= work.stages[0].params
    for sizes in found:
        assert params_of(work, axes, sizes) == start
        assert all(axis.least <= sizes[axis.name] <= axis.size for axis in axes)
    assert len({tuple(sizes.values()) for sizes in found}) > 4


def test_a_crossing_is_mended_to_as_many_units() -> None:
    names = ("layers.0.neurons", "layers.1.neurons", "layers.2.neurons")
    space = Space(dict.fromkeys(names, 20), {"neurons": names}, {"neurons": 4}, dict.fromkeys(names, 1), dict.fromkeys(names, 40))
    assert space.levels(names[0]) == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    mended = space.mended(dict(zip(names, (36, 33, 4), strict=True)), random.Random(1))
    assert sum(mended.values()) == 60
    assert all(size in space.levels(name) for name, size in mended.items())


def test_a_candidate_on_repaired_weights_is_what_the_cut_will_be(batches: list[torch.Tensor]) -> None:
    """Its loss is that of the model once repaired and cut; the model itself is left as it was."""
    work = work_of(tiny_model(), batches, repair="closed_form.least_squares(factors=1)")
    axes, space = prunable(work), space_of(work)
    scores = {axis.name: torch.rand(axis.entries, generator=torch.Generator().manual_seed(3)) for axis in axes}
    before = {name: weight.clone() for name, weight in work.model.state_dict().items()}
    weights = search._repaired_weights(work, axes, scores, space, batches)
    judge = search._Judge(work, axes, scores, batches, Search(**SMALL), weights)
    sizes = space.swapped(space.base, random.Random(2), 3)
    assert sizes != space.base
    (measured,) = losses_of(judge.whole([sizes]))
    assert all(torch.equal(weight, before[name]) for name, weight in work.model.state_dict().items())
    mask = Mask.of_sizes(axes, scores, sizes)
    unrepaired = work.loss(mask, batches)
    least_squares(work.model, work.axes, mask, batches, dtype="float32")
    cut(work.model, work.axes, mask)
    work._axes = None
    assert measured == pytest.approx(work.loss(Mask(), batches), rel=1e-4)
    assert measured != pytest.approx(unrepaired, rel=1e-3)


def test_divergence_is_from_the_whole_model(batches: list[torch.Tensor]) -> None:
    work = work_of(tiny_model(), batches)
    axes, space = prunable(work), space_of(work)
    scores = {axis.name: torch.rand(axis.entries) for axis in axes}
    judge = search._Judge(work, axes, scores, batches, Search(fitness="kl", **SMALL), {})
    everything = {axis.name: axis.size for axis in axes}
    assert losses_of(judge.whole([everything])) == pytest.approx([0], abs=1e-6)
    model, mask = work.model, Mask.of_sizes(axes, scores, space.base)
    with torch.no_grad():
        whole = [model(ids).logits[:, :-1].log_softmax(-1) for ids in batches]
        with gated(model, work.axes, mask):
            small = [model(ids).logits[:, :-1].log_softmax(-1) for ids in batches]
    expected = sum(F.kl_div(b, a, log_target=True, reduction="sum") for a, b in zip(whole, small, strict=True)) / (6 * 11)
    assert losses_of(judge.whole([space.base])) == pytest.approx([float(expected)], rel=1e-4)
    first = F.kl_div(small[0], whole[0], log_target=True, reduction="sum") / 22
    assert losses_of(judge.little([space.base], print)) == pytest.approx([float(first)], rel=1e-4), "24 tokens are one batch"


def test_evolution_goes_where_the_loss_is_lower(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that wants wide first layers: after as many evaluations evolution is nearer than chance, and better than the start."""
    work = work_of(tiny_model(num_hidden_layers=12), batches, axes=["neurons"])
    measured_by(monkeypatch, lambda sizes, text: -sum(size / (n + 1) for n, size in enumerate(sizes.values())))
    found = {}
    for proposals in ("evolution", "random"):
        how = Search(proposals=proposals, population=8, offspring=8, rounds=15, finalists=8)
        steps = list(how.steps(work, work.stages[0].params))
        found[proposals] = steps[-2].best
        first = steps[0].best
    assert found["evolution"] < found["random"] < 0
    assert found["evolution"] < first


def blocks_work(batches: list[torch.Tensor], **keys: Any) -> Work:
    """Twelve layers, of which blocks may go, by the settings of `evopress`."""
    work = work_of(tiny_model(num_hidden_layers=12), batches, **{"method": "evopress", "chooser": "depth.drop_layers"} | keys)
    work.stages = [Stage(1, work.num_params * 7 // 10, 1, 0, 0, 0)]
    return work


def gone(sizes: dict[str, int], kind: str) -> set[str]:
    return {name for name, size in sizes.items() if name.endswith(kind) and not size}


def test_mutations_are_one_to_three_swaps_of_a_block_that_goes_for_one_that_stays(batches: list[torch.Tensor]) -> None:
    work = blocks_work(batches)
    space = space_of(work)
    parent = Candidate(space.swapped(space.base, random.Random(1), 40), 1.0)
    found = mutation([parent], space, random.Random(0), 32)
    assert len({tuple(sizes.values()) for sizes in [*found, parent.sizes]}) == 33, (
        "32 that differ from each other and from the parent"
    )
    swaps = [sum(len(gone(sizes, kind) - gone(parent.sizes, kind)) for kind in ("attentions", "mlps")) for sizes in found]
    assert set(swaps) == {1, 2, 3}
    assert swaps.count(1) > swaps.count(3)
    for sizes in found:
        assert all(len(gone(sizes, kind)) == len(gone(space.base, kind)) for kind in ("attentions", "mlps"))


def test_the_search_begins_with_the_best_of_many_random_models(
    batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the model without its last blocks, which is what the chooser gives where all scores are equal."""
    work, measured = blocks_work(batches), []
    base = space_of(work).base
    last = gone(base, "mlps")
    assert all(f"layers.{i}.mlps" in last for i in range(12 - len(last), 12))

    def judged(sizes: dict[str, int], text: Any) -> float:
        measured.append(dict(sizes))
        return float(
            sum(name.startswith("layers.0.") and not size for name, size in sizes.items()) + len(gone(sizes, "mlps") & last)
        )

    measured_by(monkeypatch, judged)
    how = Search(proposals="mutation", starts=64, population=1, offspring=4, rounds=1, finalists=2)
    first = next(iter(how.steps(work, work.stages[0].params)))
    assert first.evaluations == 66
    assert len({tuple(sizes.values()) for sizes in measured[:64]}) == 64
    assert base not in measured[:64]
    for name in (*base,):
        assert 0.1 < sum(not sizes[name] for sizes in measured[:64]) / 64 < 0.7, "every block goes in some and stays in some"


def test_text_is_drawn_anew_in_every_round_and_the_parent_measured_again(
    batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = blocks_work(batches)
    texts: list[tuple[tuple[int, ...], ...]] = []

    def judged(sizes: dict[str, int], text: Any) -> float:
        texts.append(tuple(tuple(row.tolist()) for ids, _ in text for row in ids))
        return float(len(texts))  # so that whatever is measured first is the best

    measured_by(monkeypatch, judged)
    how = Search(
        proposals="mutation", starts=4, population=1, offspring=3, rounds=2, finalists=2, redraw=True, tokens=24, final_tokens=36
    )
    list(how.steps(work, work.stages[0].params))
    rounds = [texts[:6], texts[6:12], texts[12:18]]
    assert [len({*measured}) for measured in rounds] == [2, 2, 2], "one draw for all of a round, another for the finalists"
    assert len({draw for measured in rounds for draw in measured}) == 6
    assert [len(measured[0]) for measured in rounds] == [2, 2, 2]
    assert [len(measured[-1]) for measured in rounds] == [3, 3, 3]
    assert [measured.count(measured[-1]) for measured in rounds] == [2, 3, 3], (
        "two finalists, and the parent from the second round on"
    )
    pool = {tuple(row.tolist()) for batch in batches for row in batch}
    assert all(set(draw) <= pool and len(set(draw)) == len(draw) for draw in texts)


def test_the_number_of_rounds_follows_from_the_blocks(batches: list[torch.Tensor]) -> None:
    work = blocks_work(batches)
    base = space_of(work).base
    k = max(len(gone(base, kind)) for kind in ("attentions", "mlps"))
    phases = Search(starts=2, rounds=0).phases(work, work.stages[0].params)
    assert phases["search"].times == int(k * (12 - k) / 1.5) + 1
    with pytest.raises(
        UsageError,
        match=r"rounds=0\) counts the attentions and mlps that go, and axes names neither; give a number, such as rounds=20",
    ):
        Search(rounds=0).check(work_of(tiny_model(), batches))


def test_blocks_of_a_model_that_was_cut_before_are_searched_within_the_budget(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Blocks of layers cut before differ in size, so a swap may leave the budget; such candidates are left out."""
    calibration = {"source": str(text_file), "samples": 4, "length": 16}
    common = {"dtype": "float32", "calibration": calibration}
    narrower = {"model": str(tiny_folder), "method": "adapt-pruner", "budget": "85%", "step": 0.2, "amplitude": 0.2, **common}
    first = prune(read(narrower), tmp_path / "narrower")
    blocks = {axis.name: axis.cost for axis in families.axes(first.loaded.model) if axis.kind == "mlps"}
    assert len(set(blocks.values())) > 1
    short = "search(proposals=mutation, starts=12, population=1, rounds=2, offspring=6, fitness=kl, redraw=true)"
    shallower = {"model": str(tmp_path / "narrower"), "method": "evopress", "budget": "70%", "reduce": short, **common}
    second = prune(read(shallower), tmp_path / "shallower")
    assert second.figures["params_after"] <= second.figures["budget"] < first.figures["params_after"]
    assert second.figures["budget"] - second.figures["params_after"] < max(blocks.values())


def test_drawn_text_is_measured_as_the_model_is_after_the_cut(batches: list[torch.Tensor]) -> None:
    """The divergence on a draw is that on the same rows in a batch of their own."""
    work = blocks_work(batches)
    axes, space = prunable(work), space_of(work)
    zeros = {axis.name: torch.zeros(axis.entries) for axis in axes}
    judge = search._Judge(work, axes, zeros, batches, Search(fitness="kl", redraw=True, tokens=24, final_tokens=36), {})
    judge.draw(random.Random(3))
    sizes = space.swapped(space.base, random.Random(2), 9)
    drawn = losses_of(judge.little([sizes], print))
    rows = torch.cat([ids for ids, _ in judge._little])
    alone = search._Judge(work, axes, zeros, [rows], Search(fitness="kl"), {})
    assert drawn == pytest.approx(losses_of(alone.whole([sizes])), rel=1e-4)


@pytest.mark.parametrize("fitness", ["loss", "kl"])
def test_candidates_measured_together_are_as_one_by_one(
    fitness: Any, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are alike up to a layer share its output; few at a time give the same."""
    work = blocks_work(batches)
    axes, space = prunable(work), space_of(work)
    zeros = {axis.name: torch.zeros(axis.entries) for axis in axes}
    candidates = [space.swapped(space.base, random.Random(seed), 2) for seed in range(6)] + [space.base, space.base]
    judge = search._Judge(work, axes, zeros, batches, Search(fitness=fitness), {})
    runs = Counter[int]()
    through = Stream.run
    monkeypatch.setattr(
        Stream, "run", lambda self, layer, index, hidden: (runs.update([index]), through(self, layer, index, hidden))[1]
    )
    together = losses_of(judge.whole(candidates))
    alike = runs.copy()
    assert len(set(together)) > 4
    assert together == [loss for sizes in candidates for loss in losses_of(judge.whole([sizes]))]
    assert alike[0] <= 4 * len(batches), "a layer has its two blocks or not"
    assert sum(alike.values()) < 0.8 * (sum(runs.values()) - sum(alike.values()))
    monkeypatch.setattr(search, "HIDDEN_BYTES", 16 * 2 * 4 * judge._width * sum(map(torch.numel, batches)))
    assert losses_of(judge.whole(candidates)) == together


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
def test_the_budget_is_met(layout: tuple[str, str], batches: list[torch.Tensor]) -> None:
    work = work_of(tiny_model(layout), batches)
    target = work.stages[0].params
    searched = []
    for step in Search(**SMALL).steps(work, target):
        if hasattr(step, "mask"):
            work.apply(step)
        else:
            searched.append(step)
    cheapest = min(axis.cost for axis in work.axes if axis.kind == "neurons")
    assert target - 3 * cheapest < count_parameters(work.model) <= target, "uniform leaves a neuron a layer"
    assert [step.done for step in searched] == [1, 2, 3]
    assert [step.best for step in searched] == sorted((step.best for step in searched), reverse=True), "the best stay"
    assert math.isfinite(work.state.history[-1]["loss"])
    assert work.state.figures["calibration_tokens"] == 2 * sum(batch.numel() for batch in batches), (
        "scores and losses have a draw each"
    )


def test_no_candidate_with_a_finite_loss(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(tiny_model(), batches)
    measured_by(monkeypatch, lambda sizes, text: math.nan)
    with pytest.raises(RunError, match=r"none of \d candidates has a finite loss; set dtype=float32, or keep more of the model"):
        list(Search(**SMALL).steps(work, work.stages[0].params))


def recipe_of(folder: Path, text: Path, **changes: Any) -> Recipe:
    options = ", ".join(f"{key}={value}" for key, value in SMALL.items())
    keys = {
        "model": str(folder), "budget": "85%", "method": "self-pruner", "dtype": "float32", "device": "cpu", "checkpoint_minutes": 0,
        "reduce": f"search({options}, repaired=true)", "repair": "closed_form.least_squares", "stages": 2,
        "calibration": {"source": str(text), "samples": 4, "length": 16},
    }  # fmt: skip
    return read(keys | changes)


def test_a_killed_search_goes_on_bit_equal(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, text_file)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(recipe, whole)
    break_off(recipe, broken, kind="searched", nth=5)  # the second round of the second stage
    told: list[dict[str, Any]] = []
    run(recipe, broken, listen=as_dicts(told.append))
    assert [event["done"] for event in told if event["event"] == "searched"] == [2, 3], "what was done is not done again"
    assert_same_model(whole, broken)
    logs = [[line | {"time": 0} for line in log_of(run_dir, "searched")] for run_dir in (whole, broken)]
    assert logs[0] == logs[1]
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "The search" in page
    assert "best, stage 2" in page
    assert "What it settled on" in page


@pytest.mark.parametrize(("changes", "said"), [
    ({"axes": ["neurons", "residual"]}, "reduce search moves units from one layer to another, and the model has only one axis of residual"),
    ({"reduce": "search(proposals=evolutoin)"}, "proposal 'evolutoin' is not known; did you mean 'proposals.evolution'"),
    ({"reduce": "search(population=0)"}, "option 'population' of reduce 'search' is 0; give a whole number (1 or more)"),
    ({"method": "evopress", "reduce": "search", "repair": None, "stages": 1, "distance": "blocks.cosine"}, "distance would be ignored, since reduce 'search' does not read it; leave it out"),
    ({"repair": None}, "measures candidates with repaired weights, and the recipe has no repair"),
    ({"repair": "closed_form.mean_bias"}, "measures candidates with repaired weights, and the recipe has no repair"),
    ({"head_metric": "blocks.loss_drop"}, "head_metric would be ignored, since reduce 'search' does not read it; leave it out"),
    ({"equal_widths": True}, "equal_widths would be ignored, since reduce 'search' does not read it; leave it out"),
    ({"equal_widths": True, "sequential_scoring": True}, "equal_widths and sequential_scoring would be ignored, since reduce 'search' does not read them"),
    ({"chooser": "allocate.uniform(first=1)"}, "so first=1 of chooser 'allocate.uniform(first=1)' would not hold; leave that out"),
    ({"budget": "1000"}, "budget 1,000 is too small: "),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(
    changes: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert_refused(lambda: recipe_of(tiny_folder, text_file, **changes), tmp_path / "run", said)


def test_a_metric_that_reads_no_text_leaves_the_loss_of_the_cut(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = prune(recipe_of(tiny_folder, text_file, metric="weights.magnitude", stages=1), tmp_path / "out")
    assert math.isfinite(outcome.history[0]["loss"])


@pytest.mark.parametrize(
    ("source", "metric", "warned"),
    [("self", "activations.wanda", True), ("self", "weights.magnitude", False), (None, "activations.wanda", False)],
)
def test_candidates_measured_on_the_text_of_the_scores_are_told_of(
    source: str | None, metric: str, warned: bool, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = {"source": source or str(text_file), "samples": 4, "length": 16}
    short = f"search({', '.join(f'{key}={value}' for key, value in SMALL.items())})"
    recipe = recipe_of(
        tiny_folder, text_file, stages=1, repair="closed_form.mean_bias", reduce=short, calibration=calibration, metric=metric
    )
    told: list[dict[str, Any]] = []
    outcome = run(recipe, tmp_path / "run", listen=as_dicts(told.append))
    warnings = [event["message"] for event in told if event["event"] == "warning"]
    assert any("measures candidates on the text that the scores have read" in one for one in warnings) is warned
    assert outcome is not None
    assert outcome.figures["params_after"] <= outcome.figures["budget"], "biases that the repair adds are counted"


def test_scores_that_read_no_text_leave_text_for_the_candidates(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tiny_folder,
        text_file,
        metric="weights.magnitude",
        repair=None,
        reduce="search(population=2, offspring=2, rounds=1, tokens=16)",
    )
    outcome = run(recipe, tmp_path / "run")
    assert outcome is not None
    assert outcome.figures["params_after"] <= outcome.figures["budget"]
