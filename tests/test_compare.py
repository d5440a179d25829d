"""Methods side by side: equal terms, nothing run twice, a failure that stops nothing, and a page with a picture that says it."""

import itertools
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner.checkpoint.load import load
from adapt_pruner.compare import comparison
from adapt_pruner.data.tokens import in_other_tokens, text_bytes
from adapt_pruner.data.windows import held_out_windows
from adapt_pruner.evaluate.perplexity import perplexity
from adapt_pruner.recipe import Recipe
from adapt_pruner.report import with_card
from conftest import VOCAB, byte_tokenizer, read_json, tiny_model
from test_cli import call, one_sentence
from test_vocabulary import byte_level

DRAW, PRUNE_APART = comparison.draw, comparison.prune_apart
COMMAND = [sys.executable, "-m", "adapt_pruner"]
Ask = Any


def words(
    model: Path, text: Path, out: Path, *more: Any, methods: str = "magnitude-all,random", params: str = "80%"
) -> list[Any]:
    usual = {"--window": 64, "--max-windows": 4, "--dtype": "float32"}
    rest = [word for option, value in usual.items() if option not in more for word in (option, value)]
    return ["compare", model, "--methods", methods, "--params", params, "--text", text, "-o", out, *rest, *more]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return lambda *words: call(monkeypatch, capsys, *words)


@pytest.fixture
def pruned_here(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Cells are pruned in this process and nothing is drawn, which takes seconds less; the recipes of the cells."""
    recipes: list[Recipe] = []

    def here(recipe: Recipe, path: Path, **_: Any) -> None:
        recipes.append(recipe)
        with_card.prune(recipe, path)

    monkeypatch.setattr(comparison, "prune_apart", here)
    monkeypatch.setattr(comparison, "draw", lambda *_, **__: False)
    return recipes


@pytest.fixture
def only_in_a_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Recipe], bool]], list[bool]]:
    """Let only these cells have a process of their own, and the others this one; whether each had."""

    def only(these: Callable[[Recipe], bool]) -> list[bool]:
        had: list[bool] = []

        def prune(recipe: Recipe, path: Path, **options: Any) -> None:
            had.append(these(recipe))
            PRUNE_APART(recipe, path, **options) if had[-1] else with_card.prune(recipe, path)

        monkeypatch.setattr(comparison, "prune_apart", prune)
        return had

    return only


def test_all_are_measured_on_equal_terms(
    ask: Ask, only_in_a_process: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Figures are those that `eval` and `prune` give of the same models, of which the first is pruned in a process of its own."""
    out = tmp_path / "out"
    apart = only_in_a_process(lambda recipe: (recipe.method, recipe.seed) == ("magnitude-all", 0))
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 2, "--keep", "--json", params="80%"))
    assert status == 0, err
    assert apart == [True, False, False, False]
    result = json.loads(said)
    dense, *rows = result["rows"]
    measure = ["--text", text_file, "--window", 64, "--max-windows", 4, "--dtype", "float32", "--json"]
    own = json.loads(ask("eval", tiny_folder, *measure)[1])
    assert (dense["method"], dense["params"], dense["removed"]) == ("dense", own["params"], 0)
    assert dense["texts"][str(text_file)]["perplexity"] == pytest.approx(own["perplexity"], rel=1e-6)
    assert {row["method"] for row in rows} == {"magnitude-all", "random"}
    for row in rows:
        models = sorted((out / "models").glob(f"{row['method']}-*"))
        assert [read_json(model / "pruning.json")["figures"]["seed"] for model in models] == [0, 1]
        found = [json.loads(ask("eval", model, *measure)[1]) for model in models]
        figures = [read_json(model / "pruning.json")["figures"] for model in models]
        its = row["texts"][str(text_file)]
        perplexities = [each["perplexity"] for each in found]
        assert its["perplexity"] == pytest.approx(statistics.median(perplexities), rel=1e-5)
        assert (its["low"], its["high"]) == pytest.approx((min(perplexities), max(perplexities)), rel=1e-5)
        assert its["ratio"] == pytest.approx(its["perplexity"] / own["perplexity"], rel=1e-5)
        assert row["params"] == max(each["params"] for each in found) <= row["size"] == int(0.8 * own["params"])
        assert row["removed"] == pytest.approx(1 - found[0]["decoder_params"] / own["decoder_params"])
        assert row["seconds"] == pytest.approx(statistics.median(each["seconds"] for each in figures))
        assert row["peak_bytes"] == max(each["peak_bytes"] for each in figures)
        assert row["speed_up"] > 0, "how much is the machine's to say"
        cells = [cell for cell in result["cells"] if cell["method"] == row["method"]]
        assert [cell["draw"] for cell in cells] == [0, 1]
    random = next(row for row in rows if row["method"] == "random")["texts"][str(text_file)]
    assert random["low"] < random["high"], "draws differ"
    assert re.search(r"^cell 4 of 4: random to [\d,]+, draw 2 of 2, about [^:]+ left$", err, re.MULTILINE)
    assert {path.name for path in out.iterdir()} >= {"compare.json", "compare.md", "compare.svg", "compare.png", "cells"}
    written = read_json(out / "compare.json")
    assert written == {key: value for key, value in result.items() if key != "path"}
    assert "torch" in written["made_by"]
    assert written["arguments"]["draws"] == 2


def test_what_is_finished_is_not_run_again(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"input_ids": [[5, 6, 7, 8]] * 4}))

    def run(*more: Any, methods: str = "magnitude-all", **kinds: Any) -> tuple[int, str]:
        pruned_here.clear()
        status, _, err = ask(*words(tiny_folder, text_file, out, *more, methods=methods, **kinds))
        assert status == 0, err
        return len(pruned_here), err

    assert run("--draws", 1)[0] == 1
    before = read_json(out / "compare.json")
    assert not (out / "models").exists(), "checkpoints are large, figures are what is kept"
    again, err = run("--draws", 1)
    assert again == 0
    assert "1 of 1 cells are finished and used again" in err
    assert read_json(out / "compare.json") == before
    assert run("--draws", 2)[0] == 1, "the second draw"
    assert run("--draws", 1, methods="magnitude-all,random")[0] == 1, "a method more"
    assert run("--draws", 1, params="80%,70%")[0] == 1, "a size more"
    assert run("--draws", 1, "--set", "metric=weights.magnitude(norm=l2)")[0] == 1, "another recipe"
    assert run("--draws", 1, "--max-windows", 3)[0] == 1, "other windows"
    assert run("--draws", 1, "--dtype", "bfloat16")[0] == 1, "another precision"
    given = ["--calibration-ids", ids, "--set", "step=1"]
    assert run(*given, methods="uniform")[0] == 1
    assert run(*given, methods="uniform")[0] == 0
    ids.write_text(json.dumps({"input_ids": [[5, 6, 7, 9]] * 4}))
    assert run(*given, methods="uniform")[0] == 1, "other tokens under the same name"
    for path in (out / "cells").glob("magnitude-*"):
        path.write_text('{"half')
    both = "magnitude-all,random"
    count, err = run("--draws", 1, methods=both)
    assert count == 1, "figures that cannot be read are no figures"
    assert "1 of 2 cells are finished and used again" in err
    for path in (out / "cells").glob("random-*"):
        path.write_text(json.dumps(read_json(path) | {"made_by": "adapt-pruner 0.0.1"}))
    count, err = run("--draws", 1, methods=both)
    assert count == 0
    assert "other versions (adapt-pruner 0.0.1)" in err


def test_checkpoints_that_are_kept_are_measured_on_another_text(
    ask: Ask, pruned_here: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for text in (text_file, "python-docs:heldout"):
        assert ask(*words(tiny_folder, text, out, "--draws", 1, "--keep", methods="magnitude-all"))[0] == 0
    assert len(pruned_here) == 1
    assert len(list((out / "models").iterdir())) == 1


def test_another_model_under_the_same_name_is_another(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    for seed in (0, 1):
        tiny_model(vocab_size=VOCAB, seed=seed).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        assert ask(*words(model, text_file, tmp_path / "out", "--draws", 1, methods="magnitude-all"))[0] == 0
    assert len(pruned_here) == 2


def test_each_file_of_ids_is_a_draw(
    ask: Ask,
    pruned_here: list[Any],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.json")
        ids = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(number)).tolist()
        files[-1].write_text(json.dumps({"input_ids": ids}))
    given = [word for file in files for word in ("--calibration-ids", file)]
    status, said, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *given, "--set", "step=0.2", methods="uniform"))
    assert status == 0, err
    assert [recipe.calibration.ids for recipe in pruned_here] == list(map(str, files))
    assert [recipe.step for recipe in pruned_here] == [0.2] * 3
    result = read_json(tmp_path / "out" / "compare.json")
    found = [math.exp(cell["nll"][str(text_file)]) for cell in result["cells"]]
    row = result["rows"][1]["texts"][str(text_file)]
    assert row["perplexity"] == pytest.approx(sorted(found)[1])
    assert len(set(found)) > 1
    assert "spread" in said
    moved = [word for file in files for word in ("--calibration-ids", file.rename(file.with_suffix(".moved.json")))]
    status, said, err = ask(*words(tiny_folder, text_file, tmp_path / "out", *moved, "--set", "step=0.2", methods="uniform"))
    assert status == 0, err
    assert len(pruned_here) == 3, "the same ids in another place are the same draw"


def test_samples_and_length_are_options_here_too(
    ask: Ask, pruned_here: list[Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = ["--calibration", text_file, "--calibration-samples", 4, "--calibration-length", 16, "--draws", 1]
    assert ask(*words(tiny_folder, text_file, tmp_path / "out", *given, methods="uniform"))[0] == 0
    (recipe,) = pruned_here
    assert (recipe.calibration.samples, recipe.calibration.length) == (4, 16)
    assert recipe.evaluation.prompts == [], "nothing is answered that nobody sees"
    status, _, err = ask(
        *words(
            tiny_folder, text_file, tmp_path / "ids", "--calibration-ids", "x.json", "--calibration-samples", 4, methods="uniform"
        )
    )
    assert status == 2
    assert "calibration.samples would be ignored, since calibration.ids fixes every token" in err


def test_a_failure_is_a_row_and_the_others_go_on(
    ask: Ask,
    only_in_a_process: Any,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """A size that nothing can reach, in a real process: its own sentence is the reason."""
    apart = only_in_a_process(lambda recipe: recipe.budget == "20000")
    status, said, err = ask(
        *words(tiny_folder, text_file, tmp_path / "out", "--draws", 1, methods="magnitude-all", params="20k,80%")
    )
    assert status == 1
    assert sorted(apart) == [False, True]
    assert "1 of 2 cells failed" in one_sentence(err)
    failed = next(line for line in said.splitlines() if "is too small: " in line)
    assert failed.startswith("magnitude")
    assert "–" in failed
    assert [row["error"] is None for row in read_json(tmp_path / "out" / "compare.json")["rows"]] == [True, True, False]
    assert "the smallest possible budget is" in (tmp_path / "out" / "compare.md").read_text(), "in full"
    assert not list((tmp_path / "out").rglob("*.partial-*"))


def test_what_a_method_adds_is_not_free(
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """A checkpoint above the size is no result, whatever its pruning said of it."""

    def whole(recipe: Recipe, path: Path, *, listen: Any, trust_remote_code: bool) -> None:
        assert trust_remote_code
        with_card.prune(recipe.model_copy(update={"budget": "100%"}), path)

    monkeypatch.setattr(comparison, "prune_apart", whole)
    status, _, err = ask(
        *words(
            tiny_folder, text_file, tmp_path / "out", "--draws", 1, "--trust-remote-code", methods="magnitude-all", params="90%"
        )
    )
    assert status == 1
    assert "more than asked for" in err


def test_fewer_tokens_are_measured_on_the_same_text(ask: Ask, pruned_here: list[Any], text_file: Path, tmp_path: Path) -> None:
    """Perplexity is per token of the dense model, so that it compares; the text whose tokens are counted decides what is used again."""
    folder, out = tmp_path / "words", tmp_path / "out"
    tokenizer = byte_level()
    tiny_model(vocab_size=len(tokenizer), bos_token_id=700, pad_token_id=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    counted = tmp_path / "counted.txt"
    counted.write_text("Some words to count tokens by. " * 20)
    (tmp_path / "read.txt").write_text("Other words, by which units are scored. " * 400)
    asked = words(
        folder, text_file, out, "--calibration", tmp_path / "read.txt", "--set", f"vocabulary.source={counted}", "--set", "vocabulary.keep=300", "--draws", 1, "--keep",
        params="70%", methods="uniform",
    )  # fmt: skip
    status, said, err = ask(*asked)
    assert status == 0, err
    assert "Pruned models have a vocabulary of 300 tokens, the dense one 702" in said
    assert "Pruned models have a vocabulary of 300 tokens" in (out / "compare.md").read_text()
    assert "Pruned models have a vocabulary of 300 tokens" in (out / "compare.html").read_text()
    result = read_json(out / "compare.json")
    (its,) = (row["texts"][str(text_file)] for row in result["rows"][1:])
    (text,) = result["texts"]
    small = load(str(next((out / "models").iterdir())))
    windows = held_out_windows(tokenizer, source=str(text_file), window=64, max_windows=4)
    retold = in_other_tokens(windows, read_by=tokenizer, tokenizer=small.tokenizer)
    found = perplexity(small.model, retold, num_bytes=text_bytes(small.tokenizer, retold))
    assert found.tokens > text["tokens"], "fewer tokens in the vocabulary, more in the text"
    assert its["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-6)
    assert math.log(its["perplexity"]) == pytest.approx(
        found.bits_per_byte * math.log(2) * text["bytes"] / text["tokens"], rel=1e-6
    )
    before = {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("magnitude-all*")}
    status, _, err = ask(*(word if word != "magnitude-all" else "magnitude-all,wanda-sp" for word in asked))
    assert status == 0, err
    assert {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("magnitude-all*")} == before, "it reads no text"
    pruned_here.clear()
    assert ask(*asked)[0] == 0
    assert pruned_here == []
    counted.write_text("Other words. " * 20)
    assert ask(*asked)[0] == 0
    assert len(pruned_here) == 1, "another text is counted"


def test_a_loss_beyond_numbers_stops_nothing(
    ask: Ask,
    pruned_here: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """exp of a loss above 709 is no float; the dense model's may be as large."""
    out = tmp_path / "out"
    measured = comparison.measure_beside
    monkeypatch.setattr(comparison, "draw", DRAW)
    monkeypatch.setattr(
        comparison,
        "measure_beside",
        lambda *args, **kinds: (its := measured(*args, **kinds)) | {"nll": dict.fromkeys(its["nll"], 800.0)},
    )
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 1))
    assert status == 0, err
    assert err.count(": perplexity ∞") == 2
    assert said.count("∞") >= 2
    assert ask("report", out)[0] == 0
    monkeypatch.setattr(
        comparison,
        "measure",
        lambda dense, windows, **_: {"params": 1000, "decoder_params": 800, "nll": dict.fromkeys(windows, 800.0)},
    )
    shutil.rmtree(out)
    status, said, err = ask(*words(tiny_folder, text_file, out, "--draws", 1))
    assert status == 0, err
    assert "nan" not in said
    assert "| ∞ | – |" in (out / "compare.md").read_text(), "there is nothing to be a multiple of"
    assert ask("report", out)[0] == 0


def test_methods_that_make_zeros_have_a_table_of_their_own(
    ask: Ask, pruned_here: list[Recipe], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = words(
        tiny_folder, text_file, out, "--sparsity", "2:4,50%", "--draws", 1, "--calibration", text_file, "--set", "calibration.samples=4",
        "--set", "calibration.length=32", methods="random,magnitude-sparse,wanda",
    )  # fmt: skip
    status, said, err = ask(*command)
    assert status == 0, err
    assert [(bool(recipe.budget), bool(recipe.sparsity)) for recipe in pruned_here] == [(True, False), *[(False, True)] * 4]
    result = read_json(out / "compare.json")
    assert [(row["method"], row["sparsity"]) for row in result["rows"]] == [("dense", None), ("random", None)]
    sparse = result["sparse_rows"]
    assert {(row["method"], row["sparsity"]) for row in sparse[1:]} == set(
        itertools.product(("magnitude-sparse", "wanda"), ("2:4", "50%"))
    )
    assert all(row["params"] == result["dense"]["params"] for row in sparse)
    assert f"; written to {out}, its page is {out / 'compare.html'}" in said
    assert {row["nonzero"] for row in sparse[1:]} == {
        result["dense"]["nonzero"] - (result["dense"]["decoder_params"] - 6 * 48) // 2
    }
    for text in (said, (out / "compare.md").read_text(encoding="utf-8"), (out / "compare.html").read_text(encoding="utf-8")):
        assert "not zero" in text
        assert "2:4 zeros" in text
    for changed, wrong in (
        ({"params": "80%", "methods": "wanda"}, "wanda needs --sparsity"),
        ({"methods": "random"}, "no method takes --sparsity 2:4"),
        ({"methods": "random,ast"}, "ast learns its zeros in training"),
    ):
        status, _, err = ask(
            *words(tiny_folder, text_file, tmp_path / "no", *([] if "params" in changed else ["--sparsity", "2:4"]), **changed)
        )
        assert (status, wrong in one_sentence(err)) == (2, True), err
