"""`feed: dynamic`: shares move by the formula, rows are not read twice too soon, and a killed run goes on with the same rows."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.system import world
from adapt_pruner.data.dynamic import Dynamic, fitted
from adapt_pruner.data.fixed import Rows, training_rows
from adapt_pruner.data.store import Store
from adapt_pruner.errors import UsageError
from adapt_pruner.recipe import Recipe, read
from adapt_pruner.report.with_card import run
from conftest import assert_refused, assert_same_model, break_off, byte_tokenizer, log_of


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """Two texts of rows of 16, told apart by their letters."""
    found = []
    for name, letters in (("a", "abcdefgh"), ("b", "stuvwxyz")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": letter * 15}) + "\n" for letter in letters), encoding="utf-8")
        found.append(str(path))
    return found[0], found[1]


def rows_of(texts: tuple[str, str], tmp_path: Path) -> Rows:
    return training_rows(
        byte_tokenizer(), dict.fromkeys(texts, 1.0), length=16, tokens=16 * 16, seed=0, warn=print, cache=tmp_path / "cache"
    )


def references(tmp_path: Path, losses: Any) -> str:
    path = tmp_path / "references.json"
    path.write_text(json.dumps(losses), encoding="utf-8")
    return str(path)


def feed_of(texts: tuple[str, str], tmp_path: Path, **how: Any) -> Dynamic:
    losses = how.pop("losses", dict(zip(texts, (2.0, 3.0), strict=True)))
    return Dynamic(rows_of(texts, tmp_path), references=references(tmp_path, losses), **how)


def letters_of(taken: Any) -> str:
    ids, _ = taken.batch(0, len(taken))
    return "".join(byte_tokenizer().decode(row[:1]) for row in ids)


def test_shares_move_by_the_excess_over_the_reference(texts: tuple[str, str], tmp_path: Path) -> None:
    a, b = texts
    feed = feed_of(texts, tmp_path, every=2, eta=0.5, floor=0.1)
    feed.tell({a: (30.0, 10.0), b: (10.0, 5.0)})
    assert feed.news() == [], "not before two steps"
    feed.tell({a: (50.0, 10.0), b: (0.0, 0.0)})
    excess = {a: 4.0 - 2.0, b: 2.0 - 3.0}
    raw = {name: 0.5 * math.exp(0.5 * value) for name, value in excess.items()}
    share = {name: 0.9 * value / sum(raw.values()) + 0.05 for name, value in raw.items()}
    (told,) = feed.news()
    assert told.shares == pytest.approx(share)
    assert told.losses == pytest.approx({a: 4.0, b: 2.0})
    assert feed.news() == []
    feed.tell({a: (9e9, 1.0), b: (0.0, 0.0)})
    feed.tell({})
    assert feed.news()[0].shares == pytest.approx({a: 0.95, b: 0.05}), "a loss out of all bounds does not overflow"


def test_a_text_that_gave_no_rows_keeps_its_last_excess(texts: tuple[str, str], tmp_path: Path) -> None:
    """A pruned model is above all references; a text without rows must not count as one that has reached its own."""
    a, b = texts
    feed = feed_of(texts, tmp_path, every=1, eta=1.0, floor=0.0)
    feed.tell({a: (40.0, 10.0), b: (0.0, 0.0)})
    assert feed.news()[0].shares == pytest.approx({a: 0.5, b: 0.5}), "nothing is known of b, which counts as the mean"
    feed.tell({a: (40.0, 10.0), b: (50.0, 10.0)})
    feed.tell({a: (40.0, 10.0), b: (0.0, 0.0)})
    assert feed.news()[-1].shares == pytest.approx({a: 0.5, b: 0.5}), "both are 2 nats above their reference"
    again = feed_of(texts, tmp_path, every=1, eta=1.0, floor=0.0)
    again.restore(json.loads(json.dumps(feed.state())))
    again.tell({a: (50.0, 10.0), b: (0.0, 0.0)})
    odds = math.exp(3.0 - 2.0)
    assert again.news()[-1].shares == pytest.approx({a: odds / (1 + odds), b: 1 / (1 + odds)})


def test_rows_are_drawn_by_the_shares_and_all_before_any_again(texts: tuple[str, str], tmp_path: Path) -> None:
    feed = feed_of(texts, tmp_path, every=1, floor=0.0, losses=dict(zip(texts, (1.0, 500.0), strict=True)))
    even = letters_of(feed.take(4))
    assert {letter < "m" for letter in even} == {True, False}
    feed.tell({texts[0]: (300.0, 100.0), texts[1]: (300.0, 100.0)})
    later = letters_of(feed.take(12))
    assert all(letter < "m" for letter in later), "all of the text that is above its reference"
    first = [letter for letter in even if letter < "m"]
    assert len({*first, *later[: 8 - len(first)]}) == 8, "each row once before any twice"
    assert len(set(later[8 - len(first) :])) == 12 - 8 + len(first)


def test_a_text_that_gains_gives_rows_beyond_its_share(texts: tuple[str, str], tmp_path: Path) -> None:
    rows = training_rows(
        byte_tokenizer(),
        dict.fromkeys(texts, 1.0),
        length=16,
        tokens=16 * 6,
        seed=0,
        warn=print,
        moving=True,
        cache=tmp_path / "c",
    )
    assert len(rows) == 6
    feed = Dynamic(rows, references=references(tmp_path, dict(zip(texts, (1.0, 500.0), strict=True))), every=1, floor=0.0)
    feed.tell({texts[0]: (300.0, 100.0), texts[1]: (300.0, 100.0)})
    assert len(set(letters_of(feed.take(6)))) == 6, "three of the text were in the order of the start"


def test_a_feed_goes_on_from_its_state(texts: tuple[str, str], tmp_path: Path) -> None:
    one, other = (feed_of(texts, tmp_path, every=2) for _ in range(2))
    for _ in range(3):
        one.take(2)
        one.tell({texts[0]: (3.0, 1.0), texts[1]: (9.0, 1.0)})
    other.restore(json.loads(json.dumps(one.state())))
    for _ in range(5):
        assert letters_of(one.take(2)) == letters_of(other.take(2))
        for feed in (one, other):
            feed.tell({texts[0]: (3.0, 1.0), texts[1]: (9.0, 1.0)})
    assert [event.shares for event in one.news()][-2:] == [event.shares for event in other.news()][-2:]


def test_every_process_takes_the_same_rows(texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = feed_of(texts, tmp_path)
    monkeypatch.setattr(world, "rank", lambda: 1)
    monkeypatch.setattr(world, "size", lambda: 2)
    assert letters_of(alone.take(9)) == letters_of(feed_of(texts, tmp_path).take(9))


@pytest.mark.parametrize(("losses", "said"), [
    ({"A": 2.0}, "has no reference loss for B; add it, in nats per token"),
    ({"A": 2.0, "B": 1.0, "c.txt": 1.0}, "has a reference loss for c.txt, which is not a text of training.source; leave it out"),
    ({"A": 2.0, "B": -1.0}, "gives -1.0 as reference loss of B; a loss is a positive number of nats"),
    ({"A": 2.0, "B": "many"}, "gives 'many' as reference loss of B; a loss is a positive number of nats"),
    ({"A": 2.0, "B": True}, "gives True as reference loss of B; a loss is a positive number of nats"),
    ({"A": 2.0, "B": "3"}, "gives '3' as reference loss of B; a loss is a positive number of nats"),
    ({"A": 2.0, "B": {"1M": 3.0, "4M": "2"}}, "gives '2' as reference loss of B; a loss is a positive number of nats"),
    ({"A": 2.0, "B": float("nan")}, "gives nan as reference loss of B; a loss is a positive number of nats"),
    ({"A": 2.0, "B": {"1M": 3.0, "4M": 2.0}}, "has losses of several sizes for B; choose one of the sizes: dynamic("),
    ([1, 2], "does not contain reference losses"),
])  # fmt: skip
def test_references_that_do_not_fit_are_refused(losses: Any, said: str, texts: tuple[str, str], tmp_path: Path) -> None:
    named = dict(zip("AB", texts, strict=True))
    asked = {named.get(name, name): loss for name, loss in losses.items()} if isinstance(losses, dict) else losses
    with pytest.raises(UsageError) as refused:
        feed_of(texts, tmp_path, losses=asked)
    for letter, path in named.items():
        said = said.replace(f" {letter};", f" {path};")
    assert said in str(refused.value)


def test_references_of_other_sizes_are_fitted_by_a_power_law(texts: tuple[str, str], tmp_path: Path) -> None:
    law = {size: 1.7 + 40 * size**-0.25 for size in (10**6, 10**7, 10**8)}
    assert fitted(law, 10**9) == pytest.approx(1.7 + 40 * 10**-2.25, rel=0.02)
    assert fitted({10**6: 4.0, 4 * 10**6: 2.0}, 16 * 10**6) == pytest.approx(1.0), "a line through the logarithms"
    assert fitted({10**6: 2.0, 10**7: 3.0}, 10**8) == pytest.approx(6**0.5), "what rises with size is no law; the mean stands"
    a, b = texts
    sizes = {"1M": 4.0, "4M": 2.0}
    feed = feed_of(texts, tmp_path, every=1, losses={a: sizes, b: 1.0}, size="16M", floor=0.0)
    feed.tell({a: (2.0, 1.0), b: (1.0, 1.0)})
    assert feed.news()[0].shares[a] == pytest.approx(math.e / (1 + math.e))
    with pytest.raises(UsageError, match="no losses of two or more sizes"):
        feed_of(texts, tmp_path, losses={a: {"1M": 4.0}, b: 1.0}, size="16M")


def test_the_loss_on_each_held_out_text_is_told(tiny_folder: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    source = dict.fromkeys(texts, 1.0)
    run(recipe_of(tiny_folder, texts, tmp_path, evaluation={"source": source, "window": 16, "max_windows": 8}), tmp_path / "run")
    told = log_of(tmp_path / "run", "evaluation")
    assert [set(one["by_text"]) for one in told] == [set(texts)] * 3  # at the start, after the cuts, at the end
    for one in told:
        assert sum(one["by_text"].values()) / 2 == pytest.approx(one["nll"]), "texts of equal length"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Loss on each held-out text" in page


def recipe_of(
    folder: Path, texts: tuple[str, str], tmp_path: Path, *, evaluation: Any = None, budget: str = "90%", **changes: Any
) -> Recipe:
    path = references(tmp_path, dict(zip(texts, (1.0, 8.0), strict=True)))
    training = {
        "source": dict.fromkeys(texts, 1.0), "tokens": 16 * 16, "batch_tokens": 32, "length": 16, "lr": 1e-3,
        "feed": f"dynamic(references={path}, every=2)",
    }  # fmt: skip
    return read({
        "model": str(folder), "budget": budget, "method": "magnitude", "chooser": "allocate.uniform", "dtype": "float32", "device": "cpu",
        "checkpoint_minutes": 0, "training": training | changes, "evaluation": evaluation or {},
    })  # fmt: skip


def test_distilling_shares_stay_where_the_cross_entropy_is_at_its_reference(tiny_folder: Path, tmp_path: Path) -> None:
    """The loss that is trained is the divergence from the teacher; references are cross-entropies, so the feed hears those."""
    texts = []
    for letter in "as":  # all rows of a text are alike, so any of them has the loss of the text
        path = tmp_path / f"{letter}.jsonl"
        path.write_text((json.dumps({"text": letter * 15}) + "\n") * 40, encoding="utf-8")
        texts.append(str(path))
    model, ids = load(tiny_folder).model, {}
    rows = rows_of((texts[0], texts[1]), tmp_path)
    for number, name in enumerate(rows.domains(0, len(rows))):
        ids[name] = rows.batch(number, number + 1)[0]
    losses = {name: model(batch, labels=batch).loss.item() for name, batch in ids.items()}
    assert abs(losses[texts[0]] - losses[texts[1]]) > 0.1, "else any shares would do"
    (tmp_path / "theirs").mkdir()
    feed = f"dynamic(references={references(tmp_path / 'theirs', losses)}, every=2)"
    changes = {"objective": "objectives.distil", "feed": feed, "lr": 1e-9}
    recipe = recipe_of(tiny_folder, (texts[0], texts[1]), tmp_path, budget="100%", **changes)
    run(recipe, tmp_path / "run")
    told = log_of(tmp_path / "run", "mixed")
    assert len(told) == 4
    for line in told:
        assert line["losses"] == pytest.approx({name: losses[name] for name in line["losses"]}, abs=1e-4)
        assert line["shares"] == pytest.approx(dict.fromkeys(texts, 0.5), abs=1e-3)


def test_a_killed_run_goes_on_with_the_same_rows(tiny_folder: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, texts, tmp_path)
    run(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "broken", kind="step", nth=6)
    run(recipe, tmp_path / "broken")
    logs = [[line | {"time": 0} for line in log_of(tmp_path / name, "mixed")] for name in ("whole", "broken")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
    assert logs[0][-1]["shares"][texts[0]] > 0.9, "the text above its reference takes over"
    assert_same_model(tmp_path / "whole", tmp_path / "broken")
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "What was read" in page
    assert "a.jsonl" in page


def test_a_run_goes_on_only_with_the_references_that_it_began_with(
    tiny_folder: Path, texts: tuple[str, str], tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_folder, texts, tmp_path)
    break_off(recipe, tmp_path / "run", kind="step", nth=6)
    references(tmp_path, dict(zip(texts, (8.0, 1.0), strict=True)))
    with pytest.raises(UsageError, match=r"the file of reference losses changed after \S+ was written; restore the old version"):
        run(recipe, tmp_path / "run")
    path = Path(references(tmp_path, dict(zip(texts, (1.0, 8.0), strict=True))))
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    run(recipe, tmp_path / "run")  # the same losses, written otherwise


def test_one_text_alone_and_no_references_are_refused(tiny_folder: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    for changes, said in (
        ({"source": texts[0]}, "feed dynamic moves shares between texts, and training.source has only one"),
        ({"feed": "dynamic"}, "feed dynamic needs reference losses; name a JSON file"),
        ({"feed": "dynamic(references=nowhere.json)"}, "the file of reference losses 'nowhere.json' does not exist"),
    ):
        assert_refused(partial(recipe_of, tiny_folder, texts, tmp_path, **changes), tmp_path / "run", said)


def unequal(tmp_path: Path, **how: Any) -> Dynamic:
    """Texts `long` of rows of 64 tokens and `short` of rows of 8, as conversations may have; one row in eight is long at first."""

    def store(length: int) -> Store:
        return Store(np.arange(40 * length) % 200, np.arange(41) * length, None, str(length), 0)

    rows = Rows([store(64), store(8)], np.arange(80) % 8 // 7 * -40 + np.arange(80) % 40 + 40, names=("long", "short"))
    assert sorted(set(rows.domains(0, 80))) == ["long", "short"]
    return Dynamic(rows, references=references(tmp_path, {"long": 1.0, "short": 9.0}), every=1, floor=0.0, **how)


def test_the_curve_of_the_rate_spans_the_tokens_that_will_be_read(tmp_path: Path) -> None:
    feed = unequal(tmp_path)
    assert feed.num_tokens == 10 * 64 + 70 * 8
    taken = feed.take(8)
    feed.tell({"long": (300.0, 100.0), "short": (300.0, 100.0)})
    assert feed.num_tokens == pytest.approx(taken.num_tokens + 72 * 64, rel=0.01), "long rows alone from now on"
    assert feed.news()[0].tokens == taken.num_tokens
    other = unequal(tmp_path)
    other.restore(json.loads(json.dumps(feed.state())))
    assert other.num_tokens == feed.num_tokens
    assert all(feed.take(8).num_tokens == 8 * 64 for _ in range(9))
    assert feed.num_tokens == taken.num_tokens + 72 * 64


def test_losses_on_rows_that_were_read_before_are_not_heard(texts: tuple[str, str], tmp_path: Path) -> None:
    feed = feed_of(texts, tmp_path, every=1, floor=0.0, losses=dict(zip(texts, (1.0, 500.0), strict=True)))
    feed.tell({texts[0]: (300.0, 100.0), texts[1]: (300.0, 100.0)})
    assert set(feed.take(8).domains(0, 8)) == {texts[0]}, "each of its rows once"
    again = feed.take(4)
    assert again.domains(0, 4) == [""] * 4
    before = feed.state()["excess"]
    feed.tell({"": (0.1, 100.0)})
    assert feed.state()["excess"] == before


def test_a_run_that_goes_on_with_another_rate_keeps_its_shares(tiny_folder: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    """As it is told to when the loss has exploded; only another text begins the mixture anew."""
    recipe = recipe_of(tiny_folder, texts, tmp_path)
    break_off(recipe, tmp_path / "broken", kind="step", nth=6)
    run(recipe_of(tiny_folder, texts, tmp_path, lr=5e-4), tmp_path / "broken", force_recipe=True)
    shares = [line["shares"][texts[0]] for line in log_of(tmp_path / "broken", "mixed")]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9, "the text above its reference goes on to take over"
