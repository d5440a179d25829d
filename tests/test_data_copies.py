"""Passages that two texts share are found wherever they stand, and nothing else is."""

import hashlib

import numpy as np
import pytest

from adapt_pruner.data import copies, pieces
from adapt_pruner.data.copies import Passages


def words(seed: int, count: int) -> str:
    """Words that no other seed has."""
    return " ".join(hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:7] for number in range(count))


def test_a_copy_is_covered_wherever_it_stands_and_nothing_beside_it() -> None:
    copied, before, after = (words(seed, 120) for seed in range(3))
    (covered,) = Passages([f"another introduction {copied}"]).cover([f"{before}\n\n  {copied}\t{after}"])
    part = len(copied)
    assert covered[121 * 8 - 8 + 100 : 121 * 8 + part - 100].mean() > 0.9
    assert not covered[: len(before)].any()
    assert not covered[len(before) + part + 2 :].any()


@pytest.mark.parametrize("text", ["", "short", words(3, 20), words(4, 4000)])
def test_equal_texts_cover_each_other(text: str) -> None:
    (covered,) = Passages([words(5, 50), text]).cover([f"  {text}\n"])
    assert covered.mean() > 0.9 if text else not len(covered)
    assert not np.concatenate(list(Passages([words(6, 50)]).cover([text]))).any()
    assert not np.concatenate(list(Passages([]).cover([text]))).any()


def test_blocks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [words(seed, size) for seed, size in enumerate((5, 300, 40, 900, 1, 77))]
    known = Passages(texts[::2])
    whole = list(known.cover(texts))
    monkeypatch.setattr(copies, "_BLOCK", 1000)
    monkeypatch.setattr(pieces, "CHARACTERS", 500)
    in_blocks = list(Passages(texts[::2]).cover(texts))
    alone = [covered for text in texts for covered in known.cover([text])]
    for first, second, third in zip(whole, in_blocks, alone, strict=True):
        assert (first == second).all()
        assert (first == third).all()
    assert [covered.mean() > 0.9 for covered in whole] == [True, False] * 3


def test_a_formula_that_comes_often_is_no_copy() -> None:
    prompt = words(7, 40)
    asked = [f"{prompt} {words(seed, 40)}" for seed in range(10, 14)]
    (covered,) = Passages(asked, most=2).cover([f"{prompt} {words(20, 40)}"])
    assert not covered.any()
    assert [each.mean() > 0.3 for each in Passages(asked, most=2).cover(asked)] == [True] * 4
