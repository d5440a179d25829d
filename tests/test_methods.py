"""Every row in methods/, found by being there, prunes to one budget and says where it comes from."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import differing, methods, parts, read
from adapt_pruner.report.with_card import prune
from adapt_pruner.run.start import begin, prepare
from conftest import VOCAB, byte_tokenizer, saved, suited, tiny_model, tiny_moe

SHORTER = {
    "grasprune": {"reduce": "greedy_gates(updates=4, scale_updates=4)"},
    "ddp": {"reduce": "free_gates(updates=8)"},
    "bypass": {"reduce": "policy_gradient(updates=20)"},
    "self-pruner": {"reduce": "search(rounds=2)"},
    "ast": {"training": {"source": "TEXT", "tokens": 1024, "batch_tokens": 128, "length": 32}},
    "sheared": {"training": {"source": "TEXT", "tokens": 1024, "batch_tokens": 128, "length": 32, "max_rise": 20}},
    "efficientllm": {"training": {"source": "TEXT", "tokens": 1024, "batch_tokens": 128, "length": 32}},
    "evopress": {"reduce": "search(proposals=mutation, starts=8, population=1, offspring=8, rounds=2, fitness=kl, redraw=true)"},
}
"""Of rows that search for long."""


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers: enough for a row that leaves six of them whole."""
    model = tiny_model(vocab_size=VOCAB, num_hidden_layers=12)
    return saved(tmp_path_factory.mktemp("models") / "deep-llama", model, byte_tokenizer())


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "moe", tiny_moe(), byte_tokenizer())


@pytest.mark.parametrize("name", methods())
def test_every_row_names_its_paper_and_meets_the_budget(
    name: str, deep_folder: Path, moe_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    row = yaml.safe_load(methods()[name].read_text(encoding="utf-8"))
    assert row["method"] == name
    assert "arXiv:" in row["paper"] or name == "random"
    kind = "experts" if "experts" in row.get("axes", ()) else "neurons"
    folder = moe_folder if kind == "experts" else deep_folder
    zeros = "sparsity" in parts.needs("reduce", row.get("reduce", "units"))
    grows = row.get("reduce") == "nothing"
    size = {"sparsity": "2:4"} if zeros else {"grow": {"neurons": 64}} if grows else {"budget": "85%"}
    calibration = {"source": str(text_file), "samples": 4, "length": 32}
    if "self_generated" in row.get("calibration", {}):
        calibration["self_generated"] = 4
    asked = suited({
        "model": str(folder), **size, "method": name, "dtype": "float32", "calibration": calibration, **SHORTER.get(name, {}),
    })  # fmt: skip
    if "training" in SHORTER.get(name, {}):
        asked = asked.model_copy(update={"training": asked.training.model_copy(update={"source": str(text_file)})})
    figures = prune(asked, tmp_path / "out").figures
    if zeros:
        made = load(str(tmp_path / "out"))
        assert made.weight_mask is not None
        assert made.weight_mask.broken(made.model) == []
        assert figures["params_after"] == figures["params_before"]
        return
    if grows:
        assert figures["params_after"] == figures["params_before"] > count_parameters(load(str(folder)).model)
        return
    costs = {axis.kind: axis.cost for axis in families.axes(load(str(folder)).model)}
    unit = costs[kind if kind in asked.axes else "layers"]
    left = load(str(tmp_path / "out")).model
    assert count_parameters(left) == figures["params_after"] <= figures["budget"]
    if (
        not asked.reduce.startswith(("slice", "hard_concrete")) and name != "self-pruner"
    ):  # which goes by widths that are multiples of 8
        widths = {axis.size for axis in families.axes(left) if axis.kind == kind}
        within = unit * (12 if kind in asked.axes and len(widths) == 1 else 1)  # of each layer, where all are alike
        assert figures["budget"] - within < figures["params_after"]


@pytest.mark.parametrize("method", ["llm-pruner", "magnitude"])
def test_llm_pruner_and_its_baseline_leave_the_ends_whole_and_say_so_where_nothing_else_is_left(
    method: str, deep_folder: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "budget": "85%", "method": method, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    }  # fmt: skip
    prune(suited(asked | {"model": str(deep_folder)}), tmp_path / "out")
    sizes = {axis.name: axis.size for axis in families.axes(load(str(tmp_path / "out")).model)}
    for i in range(12):
        assert (sizes[f"layers.{i}.neurons"] < 40) == (4 <= i < 10)
    with pytest.raises(UsageError, match=r"can remove nothing \(kv_heads, neurons\) from a model of 3 layers, so set another"):
        prune(suited(asked | {"model": str(tiny_folder)}), tmp_path / "none")


def test_flap_takes_one_cut_with_the_biases_it_adds(deep_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Biases are parameters too: the budget is met with them, in one shot, or refused before any work."""
    asked = {
        "model": str(deep_folder), "method": "flap", "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    }  # fmt: skip
    outcome = prune(read(asked | {"budget": "85%"}), tmp_path / "out")
    assert len(outcome.history) == 1
    biases = sum(parameter.numel() for name, parameter in outcome.loaded.model.named_parameters() if name.endswith("_proj.bias"))
    assert biases > 0
    with pytest.raises(UsageError, match="the smallest possible budget is") as refused:
        prune(read(asked | {"budget": "1%"}), tmp_path / "none")
    least = int(re.search(r"possible budget is ([\d,]+)", str(refused.value))[1].replace(",", ""))  # type: ignore[index]
    outcome = prune(read(asked | {"budget": str(least)}), tmp_path / "least")
    assert outcome.figures["params_after"] <= least


def test_gisp_protects_the_ends_and_reads_the_same_text_in_every_step(deep_folder: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"source": str(text_file), "samples": 4, "length": 32}
    recipe = read(
        {
            "model": str(deep_folder),
            "budget": "80%",
            "method": "gisp",
            "step": 0.1,
            "dtype": "float32",
            "calibration": calibration,
        }
    )
    outcome = prune(recipe, tmp_path / "out")
    assert len(outcome.history) > 1
    axes = [axis for axis in families.axes(outcome.loaded.model) if axis.layer is not None]
    began = {axis.name: axis.size for axis in families.axes(load(str(deep_folder)).model)}
    lost = {axis.name: began[axis.name] - axis.size for axis in axes}
    assert not any(lost[f"layers.{i}.{kind}"] for i in (0, 11) for kind in ("neurons", "query_heads"))
    assert not any(lost[f"layers.{i}.kv_heads"] for i in range(12)), "keys and values stay"
    assert any(lost[f"layers.{i}.query_heads"] for i in range(12)) or all(lost[f"layers.{i}.neurons"] for i in range(1, 11))
    for redraw, alike in ((False, True), (True, False)):
        asked = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"redraw": redraw})})
        work = begin(asked, lambda event: None)
        prepare(work)
        assert torch.equal(work.batches()[0], work.batches(ahead=1)[0]) is alike


def test_minitron_leaves_as_many_kv_groups_as_there_were(deep_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = {"source": str(text_file), "samples": 4, "length": 32}
    recipe = read({"model": str(deep_folder), "budget": "70%", "method": "minitron", "dtype": "float32", "calibration": asked})
    left = prune(recipe, tmp_path / "out").loaded.model
    axes = families.axes(left)
    assert {axis.size for axis in axes if axis.kind == "kv_heads"} == {3}
    assert {axis.size for axis in axes if axis.kind == "query_heads"} == {1, 2}, "of two in a group"


@pytest.mark.parametrize(("control", "of"), [("first-layer-whole", "adapt-pruner"), ("first-layer-whole-ls", "adaptive-ls-v1")])
def test_the_control_of_shares_differs_in_shares_alone(control: str, of: str) -> None:
    """Same metric, heads, steps, repair and text; only its first layer stays whole, and the others stay alike."""
    row, other = read({"method": control}), read({"method": of})
    about = {"about", "paper", "method"}
    assert set(differing(row, other)) - about - {"amplitude"} == {"chooser", "distance"}
    waits = ", heads_after=0.5" if "heads_after=0.5" in other.chooser else ""
    assert row.chooser == f"allocate.uniform(first=1{waits})"
