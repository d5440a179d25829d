"""A run's folder that is moved under the run, or whose result was damaged afterwards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import adapt_pruner as ap
from adapt_pruner.errors import RunError
from adapt_pruner.report.with_card import run
from conftest import as_dicts, assert_same_model, read_json
from test_cli import ask, one_sentence
from test_report import small_recipe

__all__ = ["ask"]  # a fixture


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(small_recipe(tiny_folder, text_file, stages=1), folder)
    return folder


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"\xff\x00", b"null", b"[]", b'{"figures": 3}', b'{"figures": {}}', {"seconds": "x"}, {"params_after": None},
     {"perplexities": [1.0, "x"]}, {"perplexities": 5}, {"nonzero_after": 5}],
)  # fmt: skip
def test_a_finished_run_whose_figures_are_damaged_says_so(content: Any, finished: Path, ask: Any, tmp_path: Path) -> None:
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    path = place / "model" / "pruning.json"
    if isinstance(content, dict):
        data = read_json(path)
        content = json.dumps(data | {"figures": data["figures"] | content}).encode()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    wanted = f"is finished, and its figures cannot be read: {path} is damaged ("
    for words in ((), ("--json",)):
        status, out, err = ask("run", place / "recipe.yaml", "-o", place, *words)
        assert (status, out) == (1, "")
        assert wanted in one_sentence(err.splitlines()[-1] + "\n")
    with pytest.raises(RunError, match="cannot be read") as refused:
        ap.run(str(place / "recipe.yaml"), place)
    assert f"remove {path.parent} and give the same command" in str(refused.value)


def test_a_result_that_was_removed_is_made_again(finished: Path, ask: Any, tmp_path: Path) -> None:
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(place / "model")
    assert ask("run", place / "recipe.yaml", "-o", place)[0] == 0
    assert_same_model(finished, place)


@pytest.mark.parametrize("kind", ["start", "cut", "step", "saved"])
@pytest.mark.parametrize("another", [False, True])
def test_a_folder_that_is_moved_under_its_run_is_written_to_no_more(
    kind: str, another: bool, finished: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe, place, moved = small_recipe(tiny_folder, text_file, stages=1), tmp_path / "run", tmp_path / "moved"
    at_once: dict[str, bytes] = {}

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def move(event: dict[str, Any]) -> None:
        if event["event"] == kind and not moved.exists():
            place.rename(moved)
            at_once.update(files(moved))
            if another:  # somebody begins something else under the old name
                shutil.copytree(finished, place)

    with pytest.raises(
        RunError, match=rf"{place} was moved or removed while its run worked in it, so nothing more was written; give"
    ):
        run(recipe, place, listen=as_dicts(move))
    assert files(moved) == at_once
    if another:
        assert files(place) == files(finished)
    else:
        assert not place.exists()
        run(recipe, moved)
        assert_same_model(finished, moved)
