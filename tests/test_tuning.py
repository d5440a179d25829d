"""No setting is chosen on a test text: benchmarks that tune refuse it, and recipes for tuning measure on others."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import sparse  # noqa: E402
import sparse_training  # noqa: E402
from texts import TESTED, TUNED_ON, to_tune_on  # noqa: E402

CORPUS = "../shared/data/corpus"


@pytest.mark.parametrize(
    "spec",
    [
        *TESTED.values(), "../shared/data/wikitext2", "../shared/data/wikitext2/*.txt", "../shared/data/wikitext2/test_public.txt#train",
        f"{CORPUS}/web_owt/*.jsonl.gz", f"{CORPUS}/w*/*.jsonl.gz#heldout", f"{CORPUS}/web_owt", f"{CORPUS}/web_owt/00.jsonl.gz#heldout",
        "benchmarks/../../shared/data/corpus/web_owt/*.jsonl.gz#heldout",
    ],
)  # fmt: skip
def test_a_text_that_results_are_measured_on_is_no_place_to_tune(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    with pytest.raises(
        SystemExit, match=r"error: settings chosen on .* docs/measurements.md measures on; tune on another text, such as"
    ):
        to_tune_on(spec)


@pytest.mark.parametrize(
    "spec", [TUNED_ON, f"{CORPUS}/web_owt/*.jsonl.gz#train", "../shared/data/wikitext2/valid.txt", f"{CORPUS}/wiki/*.jsonl.gz"]
)
def test_other_texts_may_be_tuned_on(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    assert to_tune_on(spec) == spec


def test_rates_are_chosen_on_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    source = yaml.safe_load((BENCHMARKS / "rates.yaml").read_text(encoding="utf-8"))["evaluation"]["source"]
    for spec in source:
        assert to_tune_on(spec) == spec


def called(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[list[str]]:
    """The calls of `adapt-pruner` that a benchmark makes; none is carried out, and each figure is 1."""
    calls: list[list[str]] = []

    def command(*asked: object) -> str:
        calls.append([str(word) for word in asked])
        if "-o" in calls[-1]:
            place = Path(calls[-1][calls[-1].index("-o") + 1])
            place.mkdir(parents=True, exist_ok=True)
            (place / "pruning.json").write_text('{"figures": {"seconds": 1, "peak_rss_bytes": 1}}', encoding="utf-8")
        return '{"seconds": 1, "peak_rss_bytes": 1, "trained_tokens": 1}'

    def evaluated(model: object, text: str, *more: object) -> dict[str, Any]:
        calls.append(["eval", str(model), text])
        return {"nll": 0.0, "perplexity": 1.0, "params": 1, "nonzero": 1}

    monkeypatch.setattr(module, "command", command)
    monkeypatch.setattr(module, "evaluated", evaluated)
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    module.main()
    return calls


def test_the_steps_of_fistapruner_are_chosen_on_held_out_c4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(sparse, monkeypatch, "--tune", "--draws", "0", "-o", str(tmp_path))
    pruned = [" ".join(words) for words in calls if words[0] == "prune"]
    assert len(pruned) >= 3
    assert all("--method fistapruner" in words and "rounds=" in words for words in pruned)
    assert {words[2] for words in calls if words[0] == "eval"} == {TUNED_ON}
    assert (tmp_path / "tuned.jsonl").exists()
    assert not (tmp_path / "figures.jsonl").exists(), "what is tuned is no result"
    with pytest.raises(SystemExit, match="tune on another text"):
        called(sparse, monkeypatch, "--tune", TESTED["WikiText-2"], "-o", str(tmp_path))


def test_ast_has_four_arms_that_differ_in_scores_and_in_whether_masks_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = called(sparse_training, monkeypatch, "--tokens", "8k", "--seed", "3", "-o", str(tmp_path))
    runs = {words[words.index("-o") + 1].rpartition("/")[2]: words for words in calls if words[0] == "run"}
    assert sorted(runs) == [
        f"{arm}-8k-3" for arm in ("magnitude-moving", "magnitude-moving-SLoRB", "magnitude-static-trained", "wanda-moving", "wanda-static-trained")
    ]  # fmt: skip
    for words in runs.values():
        assert {"training.tokens=8k", "seed=3"} <= {*words}
    assert "reduce=sparse_training(scores=wanda)" in runs["wanda-moving-8k-3"]
    assert not any("scores" in word for word in runs["magnitude-moving-8k-3"])
    for name, method in (("magnitude", "magnitude-sparse"), ("wanda", "wanda")):
        static = runs[f"{name}-static-trained-8k-3"]
        assert "reduce=units" in static
        made = next(words for words in calls if words[0] == "prune" and words[words.index("--method") + 1] == method)
        assert f"model={made[made.index('-o') + 1]}" in static
        assert ("--calibration-ids" in made) is (name == "wanda"), "magnitudes read no text"
