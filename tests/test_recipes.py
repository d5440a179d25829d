"""The five published runs: their recipes say what the authors' scripts do, and plan on the real models' shapes alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapt_pruner.api.arguments import as_overrides
from adapt_pruner.checkpoint.load import has_weights, load_shapes
from adapt_pruner.checkpoint.save import save
from adapt_pruner.compare.request import Request
from adapt_pruner.core.model.budget import count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import builtin, differing, methods, parts, read
from adapt_pruner.recipe.prune_recipe import to_prune
from adapt_pruner.run.forecast import dry_run
from conftest import byte_tokenizer
from test_checkpoint import pruned
from test_cli import call

CONFIGS = Path(__file__).parent / "configs"

# model's folder, its parameters with tied weights once, stages, target in the script, target with tied weights once, min LR / LR
PUBLISHED = {
    "mobilellm-350m-to-125m": ("mobilellm-350m", 345_355_200, 20, 143_100_000, 143_100_000 - 32_000 * 960, 0.0),
    "mobilellm-600m-to-350m": ("mobilellm-600m", 603_188_352, 9, 376_000_000, 376_000_000, 0.1),
    "mobilellm-1b-to-600m": ("mobilellm-1b", 1_005_461_760, 10, 603_188_352, 603_188_352, 0.1),
    "qwen2.5-0.5b-to-350m": ("qwen2.5-0.5b", 494_032_768, 5, 376_100_000, 376_100_000, 0.1),
    "deepseek-r1-distill-qwen-1.5b-to-1b": (
        "deepseek-r1-distill-qwen-1.5b", 1_777_088_000, 11, 1_005_461_760, 1_005_461_760, 0.1,
    ),
}  # fmt: skip


def config_of(name: str) -> str:
    return str(CONFIGS / PUBLISHED[name][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_says_what_the_script_does(name: str) -> None:
    _, _, stages, _, _, floor = PUBLISHED[name]
    found = read(name)
    assert (found.stages, found.training.floor) == (stages, floor)
    assert (found.step, found.amplitude, found.debt, found.moments, found.head_metric) == (0.02, 0.02, "reset", "reset", None)
    assert (found.metric, found.distance, found.chooser) == ("weights.taylor", "blocks.cosine", "allocate.adaptive")
    assert found.calibration.model_dump(include={"source", "samples", "length"}) == {
        "source": "hub:DKYoon/SlimPajama-6B", "samples": 512, "length": 64,
    }  # fmt: skip
    asked = found.training
    assert (asked.lr, asked.schedule, asked.warmup, asked.decay, asked.shards) == (2e-5, "schedules.wsd", 0.05, 0.1, "linear")
    assert (asked.batch_tokens // asked.length, asked.length, asked.weight_decay, asked.clip) == (128, 1024, 0, 1)
    assert isinstance(asked.source, dict)
    assert len(asked.source) == 9
    assert sum(asked.source.values()) == 7_714_363, "all their samples"


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_plans_on_shapes_alone(name: str) -> None:
    _, dense, stages, in_script, target, _ = PUBLISHED[name]
    planned = dry_run(read(name, values={"model": config_of(name)}))
    assert planned["params_before"] == dense
    assert planned["params_after"] == planned["stages"][-1]["params"] == target <= in_script
    assert len(planned["stages"]) == stages
    assert [row["params"] for row in planned["stages"]] == [dense - (dense - target) * k // stages for k in range(1, stages + 1)]
    assert all(row["iterations"] > 0 and row["steps"] > 0 and row["seconds"] > 0 for row in planned["stages"])
    tokens = [row["tokens"] for row in planned["stages"]]
    assert sum(tokens) == 5_000_000_000
    assert tokens == pytest.approx([5e9 * 2 * k / (stages * (stages + 1)) for k in range(1, stages + 1)], abs=stages)
    assert planned["time_by"] == "assumption"
    assert "989 TFLOP/s" in planned["speed"]


def test_every_published_run_has_a_recipe() -> None:
    assert set(PUBLISHED) <= set(builtin())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_arithmetic_in_the_comment_is_right(name: str) -> None:
    text = builtin()[name].read_text(encoding="utf-8")
    numbers = {
        "mobilellm-350m-to-125m": (345_355_200 + 32_000 * 960, 124_635_456 + 32_000 * 576, (345_355_200 - 112_380_000) // 20),
        "mobilellm-600m-to-350m": (32_000 * 1152, 345_355_200 + 32_000 * 960),
        "mobilellm-1b-to-600m": (1_005_461_760, 603_188_352),
        "qwen2.5-0.5b-to-350m": (151_936 * 896, 345_355_200 + 32_000 * 960),
        "deepseek-r1-distill-qwen-1.5b-to-1b": (151_936 * 1536,),
    }[name]
    for number in numbers:
        assert f"{number:,}" in text
    assert f"{PUBLISHED[name][4]:,}" in text
    assert count_parameters(load_shapes(str(CONFIGS / "mobilellm-125m"))) == 124_635_456


def test_a_budget_out_of_reach_is_refused_on_shapes_alone() -> None:
    with pytest.raises(UsageError, match="budget 40,000,000 is too small: 46,603,200 parameters remain"):
        dry_run(read("mobilellm-350m-to-125m", values={"model": config_of("mobilellm-350m-to-125m"), "budget": "40M"}))


def test_from_the_command_line_nothing_but_the_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "qwen2.5-0.5b" / "config.json").read_text())
    assert not has_weights(str(tmp_path))
    words = ["run", "qwen2.5-0.5b-to-350m", "--set", f"model={tmp_path}", "--dry-run"]
    monkeypatch.chdir(tmp_path)
    status, out, err = call(monkeypatch, capsys, *words)
    assert status == 0, err
    assert "376,100,000" in out
    assert "the time assumes: an H100 at 40 % of its 989 TFLOP/s" in out
    assert "nothing was written" in out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    planned: dict[str, Any] = json.loads(call(monkeypatch, capsys, *words, "--json")[1])
    assert set(planned["memory"]) == {"pruning", "training"}


def test_a_step_is_a_share_of_what_a_stage_begins_with() -> None:
    """Where sparsities begin anew in every stage the same 11.65 M take more and more iterations."""
    counted = {
        debt: [
            row["iterations"]
            for row in dry_run(
                read("mobilellm-350m-to-125m", values={"model": config_of("mobilellm-350m-to-125m"), "debt": debt})
            )["stages"]
        ]
        for debt in ("reset", "carry")
    }
    assert counted["carry"] == [2] * 20, "11.65 M of 2 % of 314.6 M"
    assert counted["reset"][0] == 2
    assert counted["reset"][-1] == 7, "11.65 M of 2 % of the last 93.3 M, which is 6.2 times"


def test_a_model_already_pruned_is_planned_from_its_config(tmp_path: Path) -> None:
    model, mask = pruned(("llama", "llama"))
    save(model, byte_tokenizer(), tmp_path / "pruned", mask=mask, dtype=torch.float32)
    (tmp_path / "pruned" / "model.safetensors").unlink()
    shapes = load_shapes(str(tmp_path / "pruned"))
    assert shapes.config.is_heterogeneous
    assert count_parameters(shapes) == count_parameters(model)


def test_best_stands_for_a_method_with_a_version() -> None:
    """Whoever writes `best` has the versioned name in the recipe that is kept, so a later version does not change the run."""
    for of_it in (read({"method": "best"}), read("best"), read({})):
        assert differing(of_it, read({"method": "adaptive-ls-v1"})) == []
        assert "method: adaptive-ls-v1\n" in of_it.to_yaml()
    assert "best" not in methods(), "one row, one name"
    asked = Request(model="m", methods=("best", "adaptive-ls-v1", "random"), params=("80%",), texts=("python-docs",)).checked()
    assert asked.methods == ("adaptive-ls-v1", "random")


@pytest.mark.parametrize(("asked", "override", "said"), [
    ({"calibration.source": "a.txt"}, "calibration={samples: 8}", "would replace the whole table, and drop calibration.source"),
    ({"calibration.samples": 4}, "calibration.samples=8", "set by its own option and by --set"),
    ({}, "model=other", "model is set by its own option and by --set"),
    ({"seed": 5}, "seed=3", "seed is set by its own option and by --set"),
    ({"calibration.ids": "ids.json"}, "calibration.redraw=false", "calibration.redraw would be ignored, since calibration.ids fixes every token; leave it out, or leave calibration.ids out"),
    ({"calibration.ids": "ids.json"}, "calibration.samples=8", "calibration.samples would be ignored, since calibration.ids fixes every token; leave it out, or leave calibration.ids out"),
])  # fmt: skip
def test_what_an_option_has_set_is_not_set_again(asked: dict[str, Any], override: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        to_prune({"model": "x", "budget": "80%"} | asked, overrides=[override])
    assert to_prune({"model": "x", "budget": "80%", "seed": None}, overrides=["seed=3"]).seed == 3, "nobody gave another"


@pytest.mark.parametrize(("recipe", "overrides", "lost"), [
    ({}, ["calibration.samples=3", "calibration={length: 16}"], "calibration.samples"),
    ({}, ["calibration={length: 16}", "calibration.samples=3"], "calibration.samples"),
    ({"calibration": {"source": "a.txt"}}, ["calibration={length: 16}"], "calibration.source"),
    ({"training": {"lora": {"rank": 8}}}, ["training.lora={alpha: 4}"], "training.lora.rank"),
    ({"vocabulary": {"source": "a.txt", "keep": 300}}, ["vocabulary=null", "vocabulary.keep=400"], "vocabulary.keep"),
])  # fmt: skip
def test_no_table_drops_keys_that_are_set(recipe: dict[str, Any], overrides: list[str], lost: str) -> None:
    with pytest.raises(UsageError, match=f"would replace the whole table, and drop {lost}"):
        read(recipe, overrides=overrides)


def test_a_table_is_merged_with_that_of_the_method_and_may_be_taken_away(tmp_path: Path) -> None:
    for recipe in ({}, "adaptive-ls-v1", "best"):
        calibration = read(recipe, overrides=["calibration={length: 16}"]).calibration
        assert (calibration.length, calibration.self_generated) == (16, 128), "the method's own key stays"
    kept = {"vocabulary": {"source": "a.txt", "keep": 300}, "evaluation": {"source": "b.txt"}}
    assert read(kept, overrides=["vocabulary=null"]).vocabulary is None
    assert read(kept, overrides=["evaluation.source={c.txt: 1}"]).evaluation.source == {"c.txt": 1}, "a mixture is one value"


def test_characters_beyond_two_bytes_are_read_as_json_writes_them() -> None:
    asked = read({}, overrides=as_overrides({"evaluation.prompts": ["Say hi 😀"]}))
    assert list(asked.evaluation.prompts) == ["Say hi 😀"]
    spelled = parts.check("feed", "dynamic(references=/d/😀.json)")
    assert parts.bind("feed", spelled).keywords["references"] == "/d/😀.json"


def test_settings_take_paths_and_numbers_of_numpy() -> None:
    assert as_overrides({"a": Path("x"), "b": np.float32(0.5), "c": {Path("y"): np.int64(2)}, "d": [None, True]}) == [
        'a="x"', "b=0.5", 'c={"y": 2}', "d=[null, true]",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"settings\['a'\] <object object at .*> is an object; give text, a number"):
        as_overrides({"a": object()})


def test_calibration_is_set_once() -> None:
    asked = {"model": "m", "methods": ("random",), "params": ("80%",), "texts": ("t",), "calibration_samples": 4}
    for override, said in (
        ("calibration.samples=8", "by its own option and by --set"),
        ("calibration={length: 64}", "the whole table"),
    ):
        with pytest.raises(UsageError, match=said):
            Request(**asked, overrides=(override,)).checked()
