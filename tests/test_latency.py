"""A budget by speed: the table foretells, pruning goes as far as it says, and what was reached is measured and kept."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, parse_latency, read
from adapt_pruner.reduce.units import prunable
from adapt_pruner.report import with_card
from adapt_pruner.run import forecast, latency
from adapt_pruner.work import Work
from conftest import as_dicts, read_json, tiny_model
from test_cli import call

COSTS = {"neurons": 3.0, "kv_heads": 40.0, "other": 400.0}


def seconds(model: Any) -> float:
    """What a model takes on a machine where every neuron and every KV head has its price."""
    axes = families.axes(model)
    return COSTS["other"] + sum(COSTS.get(axis.kind, 0.0) * axis.size for axis in axes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Time by `COSTS`, ten times as much for writing, and a machine that gets slower by the call; the models it was asked about."""
    asked: list[Any] = []

    def timed(model: Any, ids: torch.Tensor, count: int) -> tuple[float, float]:
        asked.append(model)
        drift = 1 + 0.0001 * len(asked)
        return seconds(model) * drift, 10 * seconds(model) * drift * (count > 0)

    monkeypatch.setattr(latency, "reading_and_writing", timed)
    return asked


def recipe_for(folder: Path, text: Path, **values: Any) -> Recipe:
    calibration = {"source": str(text), "samples": 4, "length": 16}
    asked = {"method": "adapt-pruner", "model": str(folder), "latency": "0.7x", "step": 0.1, "dtype": "float32"}
    return read({**asked, "calibration": calibration, **values})


@pytest.mark.parametrize("of", ["prefill", "decode"])
@pytest.mark.parametrize("method", ["adapt-pruner", "uniform"])
def test_the_model_takes_what_was_asked(
    of: str, method: str, machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tiny_folder, text_file, latency_of=of, method=method)
    outcome = with_card.prune(recipe, tmp_path / "out")
    found = outcome.figures["latency"]
    dense = load(str(tiny_folder)).model
    assert 0.6 < seconds(outcome.loaded.model) / seconds(dense) <= 0.72
    assert found["reached"] == pytest.approx(seconds(outcome.loaded.model) / seconds(dense), rel=0.001)
    assert found["reached_low"] <= found["reached"] <= found["reached_high"]
    assert found["predicted"] == pytest.approx(0.7, abs=0.02)
    assert (found["asked"], found["of"]) == (0.7, of)
    assert outcome.figures["params_after"] <= found["params"] == outcome.figures["budget"]
    assert read_json(tmp_path / "out" / "pruning.json")["figures"]["latency"]["reached"] == found["reached"]
    assert read_json(tmp_path / "out" / "pruning.json")["recipe"]["latency"] == "0.7x"


def test_a_prediction_is_what_each_kind_saves_by_its_share() -> None:
    model = tiny_model()
    recipe = read({"model": "x", "latency": "0.7x"})
    axes = prunable(Work.of(model, recipe))
    table = {"neurons": [(0.0, 0.4), (0.5, 0.8), (1.0, 1.0)], "kv_heads": [(0.5, 0.9), (1.0, 1.0)]}
    whole = {axis.name: axis.size for axis in axes}
    assert latency.predicted(table, axes, whole) == pytest.approx(1.0)
    halved = {axis.name: axis.size // 2 if axis.kind == "neurons" else axis.size for axis in axes}
    assert latency.predicted(table, axes, halved) == pytest.approx(0.8, abs=0.02)
    first = next(axis for axis in axes if axis.kind == "neurons")
    layers = sum(axis.kind == "neurons" for axis in axes)
    one = whole | {first.name: first.size // 2}
    assert latency.predicted(table, axes, one) == pytest.approx(1 - 0.2 / layers, abs=0.01)
    heads = {axis.name: axis.size // 2 if axis.kind == "kv_heads" else axis.size for axis in axes}
    both = {name: min(halved[name], heads[name]) for name in whole}
    assert latency.predicted(table, axes, both) == pytest.approx(0.7, abs=0.02), "savings add up"


@pytest.mark.parametrize("multiple", [1, 4])
def test_widths_that_are_timed_are_those_that_a_chooser_leaves(machine: list[Any], multiple: int) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    table = latency.table_of(Work.of(model, read({"model": "x", "latency": "0.7x", "multiple_of": multiple})))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is left as it was"
    sizes = {(axis.kind, axis.size) for one in machine for axis in families.axes(one) if axis.layer is not None}
    dense = {axis.size for axis in families.axes(model) if axis.kind == "neurons"}
    widths = {size for kind, size in sizes if kind == "neurons"} - dense
    assert len(widths) == 4
    assert all(width % multiple == 0 if multiple > 1 else width % 2 == 1 for width in widths)
    assert set(table) == {"neurons", "kv_heads"}
    for points in table.values():
        assert points == sorted(points)
        assert points[-1] == (1.0, 1.0)
    smaller = seconds_at(model, "neurons", table["neurons"][0][0])
    assert table["neurons"][0][1] == pytest.approx(smaller / seconds(model), rel=0.001)


def seconds_at(model: Any, kind: str, share: float) -> float:
    return seconds(model) - sum(COSTS[kind] * axis.size * (1 - share) for axis in families.axes(model) if axis.kind == kind)


def test_out_of_reach_names_what_can_be_reached(machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"latency 0\.05x is out of reach: prefill takes 0\.\d\dx") as refused:
        with_card.prune(recipe_for(tiny_folder, text_file, latency="0.05x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    reachable = str(refused.value).partition("ask for ")[2].partition(" ")[0]
    outcome = with_card.prune(recipe_for(tiny_folder, text_file, latency=reachable), tmp_path / "out")
    assert outcome.figures["latency"]["predicted"] <= parse_latency(reachable)


def test_a_latency_above_one_is_a_speed(machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """1.25 times as fast takes 0.8 of the time, and the run says what it took it for."""
    heard: list[dict[str, Any]] = []
    recipe = recipe_for(tiny_folder, text_file, latency="1.25x")
    outcome = with_card.prune(recipe, tmp_path / "out", listen=as_dicts(heard.append))
    assert outcome.figures["latency"]["asked"] == pytest.approx(0.8)
    assert outcome.figures["latency"]["predicted"] <= 0.8
    warnings = [event["message"] for event in heard if event["event"] == "warning"]
    assert "latency 1.25x is taken as that many times as fast, which is 0.8x of the dense model's time" in warnings


@pytest.mark.parametrize("written", ["1x", "0x", "0.0x", "-0.5x", "fast", "0.7", "x", "70%", "nanx"])
def test_what_is_no_latency_is_refused(written: str) -> None:
    with pytest.raises(UsageError, match="not a share of the dense model's time; write it like 0.7x"):
        read({"model": "x", "latency": written})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget": "80%"}, "both say how far to prune; leave one of them out"),
        ({"axes": ["neurons", "query_heads"]}, "the recipe also has axes query_heads; set budget instead"),
        ({"axes": ["layers"], "chooser": "depth.drop_layers"}, "the recipe also has axes layers"),
        ({"reduce": "slice"}, "the recipe also has reduce slice"),
        ({"vocabulary": {"source": "python-docs:train", "keep": 100}}, "the recipe also has vocabulary"),
        ({"latency_of": "training"}, "'prefill' or 'decode'"),
    ],
)
def test_what_does_not_go_with_a_latency_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        read({"model": "x", "latency": "0.7x", **values})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_recipe_says_how_far_in_one_way() -> None:
    with pytest.raises(UsageError, match="names no budget; .* or a latency like 0.7x"):
        read({"model": "x"}).ready()
    assert read({"model": "x", "latency": "0.7x"}).ready().latency == "0.7x"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--latency", "1.0x"], "'1.0x' is not a share"),
        (["--latency", "0.7x", "--params", "80%"], "--params 80% and --latency 0.7x both say"),
        ([], "prune needs a size or a speed to reach; add --params 80% or --latency 0.7x"),
        (
            ["--params", "80%", "--latency-of", "decode"],
            "latency_of would be ignored, since there is no latency to reach; leave it out, or set latency, for example to 0.7x",
        ),
        (["--latency", "0.7x", "--latency-of", "chat"], "'prefill' or 'decode'"),
    ],
)
def test_the_command_refuses_in_a_sentence(ask: Any, words: list[str], said: str, tmp_path: Path) -> None:
    status, out, err = ask("prune", "nowhere", "-o", tmp_path / "out", *words)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_the_command_says_what_was_reached(
    ask: Any, machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["--calibration", text_file, "--calibration-samples", 4, "--calibration-length", 16, "--latency", "0.8x"]
    status, out, err = ask("prune", tiny_folder, "-o", tmp_path / "out", "--method", "adapt-pruner", *words)
    assert status == 0, err
    assert "prefill takes 0.80x of the dense model's time" in out or "prefill takes 0.79x of the dense model's time" in out
    assert "asked 0.8x, predicted 0." in out


def test_a_run_that_goes_on_does_not_measure_again(
    machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 64, "length": 32}
    recipe = recipe_for(tiny_folder, text_file, stages=2, training=training)

    def stopping(event: dict[str, Any]) -> None:
        if event["event"] == "saved" and event.get("stage") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_card.run(recipe, tmp_path / "run", listen=as_dicts(stopping))
    broken: Callable[..., Any] = lambda *_, **__: pytest.fail("the dense model is gone")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(latency, "table_of", broken)
        other = recipe_for(tiny_folder, text_file, stages=2, training=training, latency="0.6x")
        with pytest.raises(UsageError, match="leave latency as it was"):
            with_card.run(other, tmp_path / "run", force_recipe=True)
        outcome = with_card.run(recipe, tmp_path / "run")
    assert outcome is not None
    found = outcome.figures["latency"]
    assert outcome.figures["params_after"] <= found["params"]
    assert found["reached"] == pytest.approx(0.7, abs=0.03)


def test_a_dry_run_measures_too(machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    planned = forecast.dry_run(recipe_for(tiny_folder, text_file))
    assert planned["params_after"] < planned["params_before"]
    shapes_only = tmp_path / "config-only"
    shapes_only.mkdir()
    (shapes_only / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(UsageError, match="weights of .* are not on this machine; set a budget"):
        forecast.dry_run(recipe_for(shapes_only, text_file))


def test_a_noisy_round_does_not_decide(machine: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, calls = latency.reading_and_writing, itertools.count()

    def noisy(model: Any, ids: torch.Tensor, count: int) -> tuple[float, float]:
        read, written = quiet(model, ids, count)
        return (9 * read, written) if next(calls) % 7 == 0 else (read, written)

    monkeypatch.setattr(latency, "reading_and_writing", noisy)
    model = tiny_model()
    table = latency.table_of(Work.of(model, read({"model": "x", "latency": "0.7x"})))
    for share, time in table["neurons"]:
        assert time == pytest.approx(seconds_at(model, "neurons", share) / seconds(model), rel=0.001)


@pytest.mark.parametrize("failure", [MemoryError("no memory for a second model"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
def test_a_result_is_not_lost_with_its_last_figure(
    failure: BaseException,
    machine: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is pruned, and only the time that it reached is yet to be measured."""

    def fail(*others: Any, **settings: Any) -> Any:
        raise failure

    monkeypatch.setattr(latency, "measured", fail)
    heard: list[dict[str, Any]] = []
    recipe = recipe_for(tiny_folder, text_file)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            with_card.prune(recipe, tmp_path / "out", listen=as_dicts(heard.append))
    else:
        with_card.prune(recipe, tmp_path / "out", listen=as_dicts(heard.append))
        (said,) = [event["message"] for event in heard if event["event"] == "warning"]
        assert said == "the latency of the pruned model could not be measured: no memory for a second model"
    assert load(str(tmp_path / "out")).mask is not None
    assert "reached" not in read_json(tmp_path / "out" / "pruning.json")["figures"]["latency"]


def test_a_run_interrupted_at_its_last_figure_says_that_its_result_is_there(
    machine: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*others: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measured", stop)
    heard: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        with_card.run(recipe_for(tiny_folder, text_file), tmp_path / "run", listen=as_dicts(heard.append))
    result = tmp_path / "run" / "model"
    assert heard[-1] == {"event": "interrupted", "message": f"the result is complete in {result}", "path": str(result)}
    assert (tmp_path / "run" / "report.html").is_file()
    assert with_card.run(recipe_for(tiny_folder, text_file), tmp_path / "run") is None, "it is finished"
