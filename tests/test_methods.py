"""Every row in methods/, found by being there, prunes to one budget and says where it comes from."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from adapt_pruner import families
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.budget import count_parameters
from adapt_pruner.errors import UsageError
from adapt_pruner.pipeline import prune
from adapt_pruner.recipe import methods, read
from conftest import VOCAB, byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers: enough for a row that leaves six of them whole."""
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    tiny_model(vocab_size=VOCAB, num_hidden_layers=12).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", methods())
def test_every_row_names_its_paper_and_meets_the_budget(name: str, deep_folder: Path, text_file: Path, tmp_path: Path) -> None:
    row = yaml.safe_load(methods()[name].read_text(encoding="utf-8"))
    assert row["method"] == name
    assert "arXiv:" in row["paper"] or name == "random"
    asked = read({
        "model": str(deep_folder), "budget": "85%", "method": name, "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    })  # fmt: skip
    figures = prune(asked, tmp_path / "out").figures
    costs = {axis.kind: axis.cost for axis in families.axes(load(str(deep_folder)).model)}
    unit = costs["neurons" if "neurons" in asked.axes else "layers"]
    left = load(str(tmp_path / "out")).model
    assert count_parameters(left) == figures["params_after"] <= figures["budget"]
    if asked.rotate is None:  # which goes by widths that are multiples of 8
        assert figures["budget"] - unit < figures["params_after"]


def test_llm_pruner_leaves_the_ends_whole_and_says_so_where_nothing_else_is_left(
    deep_folder: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "budget": "85%", "method": "llm-pruner", "dtype": "float32",
        "calibration": {"source": str(text_file), "samples": 4, "length": 32},
    }  # fmt: skip
    prune(read(asked | {"model": str(deep_folder)}), tmp_path / "out")
    sizes = {axis.name: axis.size for axis in families.axes(load(str(tmp_path / "out")).model)}
    for i in range(12):
        assert (sizes[f"layers.{i}.neurons"] < 40) == (4 <= i < 10)
    with pytest.raises(UsageError, match="has taken all that it may .*; the nearest that can be had is 50,784"):
        prune(read(asked | {"model": str(tiny_folder)}), tmp_path / "none")
