"""`reduce: masks`: a model is cut once to the units that another run kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.model.cut import cut
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.with_card import prune, run
from conftest import as_dicts, assert_same_model, read_json, tiny_model


@pytest.fixture(scope="module")
def first(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, which trains between its cuts."""
    folder = tmp_path_factory.mktemp("first") / "run"
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 32}
    run(read({
        "model": str(tiny_folder), "budget": "70%", "method": "adapt-pruner", "step": 0.2, "amplitude": 0.2, "stages": 2, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32}, "training": training,
    }), folder)  # fmt: skip
    return folder


def transfer(model: Path, source: Path, **keys: Any) -> Recipe:
    named = {
        "model": str(model),
        "budget": "75%",
        "method": "magnitude-all",
        "reduce": f"masks(run={source})",
        "dtype": "float32",
    }
    return read(named | keys)


@pytest.mark.parametrize("place", ["", "model"])
def test_the_units_are_those_of_the_run_and_the_weights_those_of_the_model(
    place: str, first: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    prune(transfer(tiny_folder, first / place), tmp_path / "out")
    theirs, ours, dense = load(str(first / "model")), load(str(tmp_path / "out")), load(str(tiny_folder))
    assert ours.mask == theirs.mask
    assert theirs.mask is not None
    cut(dense.model, families.axes(dense.model), theirs.mask)
    assert all(torch.equal(ours.model.state_dict()[name], weight) for name, weight in dense.model.state_dict().items())
    assert any(not torch.equal(theirs.model.state_dict()[name], weight) for name, weight in dense.model.state_dict().items())


def test_a_run_that_was_stopped_after_the_cut_goes_on(first: Path, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    training = {"source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 32}
    recipe = transfer(tiny_folder, first, training=training, checkpoint_minutes=0)
    run(recipe, tmp_path / "whole")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", listen=as_dicts(stop))
    run(recipe, tmp_path / "stopped")
    assert_same_model(tmp_path / "whole", tmp_path / "stopped")
    assert read_json(tmp_path / "whole" / "model" / "mask.json") == read_json(first / "model" / "mask.json")


def test_what_is_no_mask_of_this_model_is_refused(first: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other, torn = tmp_path / "other", tmp_path / "torn"
    tiny_model(intermediate_size=48).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((tiny_folder / name).read_bytes())
    torn.mkdir()
    (torn / "mask.json").write_text('{"format": 2}')
    for recipe, trouble in (
        (
            transfer(other, first),
            r"the mask of .* is of another model: it has 40 units along layers\.\d\.neurons, and .* has 48 units; set",
        ),
        (transfer(tiny_folder, other), "has no mask.json, nor has its model/; name the folder of a run that has ended"),
        (transfer(tiny_folder, torn), r"mask.json is no mask \(.*\); name another run"),
        (transfer(tiny_folder, first, reduce="masks"), r"takes its units from another run; name its folder: reduce=masks\(run="),
        (transfer(tiny_folder, first, budget="60%"), r"units of .* stay"),
    ):
        with pytest.raises(UsageError, match=trouble):
            prune(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="can run only once, and stages is 2"):
        transfer(tiny_folder, first, stages=2)
    with pytest.raises(UsageError, match="repair would be ignored"):
        transfer(tiny_folder, first, repair="closed_form.least_squares")
