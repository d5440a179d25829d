"""The rules of `shrink`, on machines that are numbers and models without weights."""

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner import families
from adapt_pruner.core.events.words import compact
from adapt_pruner.core.model.budget import Budget
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate.anatomy import decoder_parameters, weight_size
from adapt_pruner.recipe import read
from adapt_pruner.run import shrink
from adapt_pruner.run.estimate import Setup, Speed, operations, shapes
from adapt_pruner.run.plan import setup_of
from adapt_pruner.run.shrink import Asked, Choice, planned
from adapt_pruner.work import Work
from conftest import tiny_model

RECIPE = read({
    "model": "smollm2-135m-instruct", "dtype": "bfloat16", "calibration": {"source": "corpus#train"},
    "training": {"source": "corpus#train", "tokens": "1M", "length": 256}, "evaluation": {"source": "corpus#heldout"},
})  # fmt: skip
ROW = Setup("cpu", True, 256)
KINDS = {"read": "read", "scored": "score", "trained": "train"}


def sized(**changes: Any) -> Work:
    """SmolLM2-135M, or another model of its kind, without weights."""
    sizes = {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }  # fmt: skip
    with torch.device("meta"):
        return Work.of(LlamaForCausalLM(LlamaConfig(**sizes | changes)), RECIPE)


SMOLLM2, TEXT = sized(), Asked(40_000_000, 100_000, True)
SHAPES = shapes(SMOLLM2.model)
SPEEDS = {"read": 1_500, "scored": 360, "trained": 570}
"""Tokens a second of SmolLM2-135M on two idle cores of a Xeon with AMX."""


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu() -> Iterator[None]:
    """The models lie nowhere, and are planned for a CPU. What is computed of the same model twice is computed once."""
    draft = shrink._draft

    def key(speed: Speed, work: Work, way: Any, *, distilled: bool, again: bool) -> Any:
        return speed.flops, *speed.others.values(), work.num_params, work.budget.keep, way, distilled, again

    drafts: dict[Any, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "axes", functools.cache(families.axes))
        patch.setattr(shrink, "weight_size", lambda model: 0.2)
        patch.setattr(shrink, "setup_of", functools.partial(setup_of, device=torch.device("cpu")))
        patch.setattr(
            shrink,
            "_draft",
            lambda *given, **how: drafts.get(key(*given, **how)) or drafts.setdefault(key(*given, **how), draft(*given, **how)),
        )
        yield


def plan_of(
    minutes: float | None = None, *, of: Work = SMOLLM2, target: int = 113_300_000, chats: bool = False, sparse: bool = False,
    load: float = 10, memory: int | None = 16 * 2**30, **changes: Any,
) -> Choice:  # fmt: skip
    asked = {key: value for key, value in changes.items() if hasattr(TEXT, key)}
    read, scored, trained = (
        changes.get(name, SPEEDS[name]) * operations(shapes(of.model), ROW, kind=kind)
        for name, kind in KINDS.items()  # type: ignore[arg-type]
    )
    speed = Speed(
        read, "2 threads, bfloat16", memory=memory, load=load, others={"score": scored, "repair": scored, "train": trained}
    )
    work = replace(of, budget=Budget(keep=target, total=of.num_params), weight_mask=True if sparse else None)  # type: ignore[arg-type]
    work.loaded = replace(work.loaded, tokenizer=SimpleNamespace(chat_template="{{ messages }}" if chats else None))
    return planned(speed, work, replace(TEXT, minutes=minutes, **asked))


def bytes_of(target: int, *, distilled: bool = False, again: bool = False) -> int:
    """Bytes that training takes."""
    work = replace(SMOLLM2, budget=Budget(keep=target, total=SMOLLM2.num_params))
    speed = Speed(1e12, "", others={"score": 1e12, "repair": 1e12, "train": 1e12})
    memory: int = shrink._draft(speed, work, shrink._WAYS[0], distilled=distilled, again=again).memory
    return memory


@pytest.mark.parametrize("minutes", [4, 15, 60, 150, 600])
@pytest.mark.parametrize("target", [113_300_000, 92_000_000, 70_800_000])
def test_a_plan_is_a_recipe_that_fits_its_time(minutes: float, target: int) -> None:
    plan = plan_of(minutes, target=target)
    recipe = read({}, values=plan.settings)
    assert (recipe.minutes, recipe.budget, recipe.stages) == (minutes, str(target), 1)
    assert 0.85 * 60 * minutes < sum(plan.seconds.values()) < 60 * minutes
    assert plan.seconds["prune"] <= 20 * minutes, "a third at most"
    assert recipe.training.tokens % recipe.training.batch_tokens == 0
    assert recipe.calibration.self_generated == 0
    assert len(plan.lines) == 5
    assert all("\n" not in line for line in plan.lines)


def test_more_time_buys_thoroughness_and_then_tokens() -> None:
    plans = [plan_of(minutes) for minutes in (2, 4, 8, 15, 60)]
    looked_at = [plan.settings["calibration.samples"] for plan in plans]
    tokens = [plan.settings["training.expected"] for plan in plans]
    assert [plan.settings["method"] for plan in plans] == ["adaptive-ls-v1"] * 5
    assert [plan.settings["step"] for plan in plans] == [1.0, 0.1, 0.1, 0.1, 0.1]
    assert [plan.settings["amplitude"] for plan in plans] == [1.0, 0.1, 0.1, 0.1, 0.1], (
        "the shares of layers do not depend on the step"
    )
    assert looked_at == [32, 32, 64, 64, 64]
    assert tokens == sorted(tokens)
    assert 3 < tokens[4] / tokens[3] < 6


def test_a_slower_machine_gets_a_smaller_plan() -> None:
    fast, slow = plan_of(15), plan_of(15, read=300, scored=72, trained=114)
    assert (slow.settings["step"], fast.settings["step"]) == (1.0, 0.1)
    assert slow.settings["training.expected"] < fast.settings["training.expected"] / 4
    assert slow.settings["evaluation.max_windows"] < fast.settings["evaluation.max_windows"]


def test_five_minutes_do_on_a_machine_a_sixth_or_a_tenth_as_fast() -> None:
    """`make demo` took 7 minutes at least on a busy machine and was refused; smaller steps and fewer windows fit."""
    settings = plan_of(4, own=False, target=105_000_000, read=250, scored=60, trained=95, load=20).settings
    assert (settings["training.batch_tokens"], settings["evaluation.max_windows"]) == (1024, 2)
    assert plan_of(4).settings["training.batch_tokens"] == 2048
    assert plan_of(4).settings["evaluation.max_windows"] >= 8
    stalled = plan_of(5, own=False, target=105_000_000, read=75, scored=20, trained=29, load=25, gone=0.7).settings
    assert (stalled["training.batch_tokens"], stalled["evaluation.max_windows"]) == (512, 2)


def test_prompts_are_answered_where_there_is_time() -> None:
    assert "evaluation.prompts" not in plan_of(15, chats=True).settings
    assert plan_of(15, chats=True).seconds["measure"] > plan_of(15).seconds["measure"]
    slow = {"read": 75, "scored": 20, "trained": 29, "load": 25, "target": 105_000_000, "own": False}
    assert plan_of(4.4, chats=True, **slow).settings["evaluation.prompts"] == []
    assert plan_of(4.4, chats=True, **slow).seconds == plan_of(4.4, **slow).seconds


def test_who_loses_much_or_has_no_text_learns_from_the_dense_model() -> None:
    assert plan_of(60).settings["training.objective"] == "objectives.lm"
    for plan in (plan_of(60, target=92_000_000), plan_of(60, own=False)):
        assert plan.settings["training.objective"] == "objectives.distil(temperature=1)"
        assert "learning from the dense model's predictions" in plan.lines[2]
    assert "name your own with --text" in plan_of(60, own=False).lines[3]


def test_a_text_that_is_read_again_teaches_by_the_dense_model() -> None:
    """A model learns such a text by heart; the dense model's predictions are no text."""
    enough = plan_of(60).settings["training.expected"]
    once, again = plan_of(60, text_tokens=enough), plan_of(60, text_tokens=enough // 2)
    assert once.settings["training.objective"] == "objectives.lm"
    assert again.settings["training.objective"] == "objectives.distil(temperature=1)"
    assert again.settings["training.expected"] < enough
    assert plan_of(tokens=30_000, text_tokens=20_000).settings["training.objective"] == "objectives.distil(temperature=1)"
    assert plan_of(60, text_tokens=enough // 2, sparse=True).settings["training.objective"] == "objectives.lm"
    alone, taught = bytes_of(113_300_000, again=True), bytes_of(113_300_000, distilled=True, again=True)
    lacking = plan_of(60, text_tokens=enough // 2, memory=(alone + taught) // 2)
    assert lacking.settings["training.objective"] == "objectives.lm"
    assert "which would teach it, does not fit" in lacking.lines[2]


def test_a_text_a_little_short_is_read_once_and_one_shorter_teaches_by_the_dense_model() -> None:
    """The plan says why, and how much text would be enough; a slower or faster probe does not change its mind at 1.05 readings."""
    enough = plan_of(60).settings["training.expected"]
    for readings in (1.1, 1.19):
        plan = plan_of(60, text_tokens=round(enough / readings))
        assert plan.settings["training.objective"] == "objectives.lm"
        assert (
            enough / readings - 2048 < plan.settings["training.expected"] == plan.settings["training.tokens"] <= enough / readings
        )
        assert (
            f"on one reading of the text, which is a little short; a text of {compact(enough)} tokens would be enough"
            in plan.lines[2]
        )
    plan = plan_of(60, text_tokens=round(enough / 1.25))
    assert plan.settings["training.objective"] == "objectives.distil(temperature=1)"
    assert "since the text would be read 1.2 times without them" in plan.lines[2]
    assert f"a text of {compact(enough)} tokens would be read once, which is better" in plan.lines[2]
    asked = plan_of(tokens=204_800, text_tokens=180_000)
    assert (asked.settings["training.tokens"], asked.settings["training.objective"]) == (178_176, "objectives.lm")
    assert "since 40% of the decoder goes" in plan_of(60, target=92_000_000).lines[2]
    assert "since the text is not yours" in plan_of(60, own=False).lines[2]


def test_tokens_in_the_place_of_minutes() -> None:
    plan = plan_of(tokens=2_000_000)
    assert plan.settings["training.tokens"] == 2_000_896, "whole batches"
    assert "minutes" not in plan.settings
    assert plan.settings["calibration.samples"] == 64
    assert plan.lines[4].startswith("it takes about ")


@pytest.mark.parametrize(("minutes", "more"), [(15, 8), (60, 2), (600, 2)])
def test_the_text_lasts_until_the_deadline_where_the_probe_was_too_slow(minutes: float, more: float) -> None:
    """A disturbed probe found 110 tokens a second where training reached 300; 15 minutes ended after 10."""
    training = read({}, values=plan_of(minutes).settings).training
    assert training.expected is not None
    assert more <= training.tokens / training.expected <= 8
    disturbed = read({}, values=plan_of(15, read=550, scored=130, trained=210).settings).training
    assert disturbed.tokens > read({}, values=plan_of(15).settings).training.expected


def test_no_more_is_prepared_than_a_small_text_has_if_it_is_read_as_often_as_allowed() -> None:
    """Training refuses a text that it would read more than 10,000 times; a fast machine got there with twice the tokens."""
    fast = {"read": 90_000, "scored": 30_000, "trained": 40_000}
    expected = plan_of(60, text_tokens=20_000, **fast).settings["training.expected"]
    for repeats, prepared in ((2_000, 2 * expected), (4_000, 1.25 * expected), (9_000, expected)):
        settings = plan_of(60, text_tokens=round(expected / repeats), **fast).settings
        assert settings["training.expected"] == expected
        assert settings["training.tokens"] == pytest.approx(prepared, rel=1e-3)
    for asked, less in (({"minutes": 60}, "less time with --minutes"), ({"tokens": expected}, "fewer --tokens")):
        with pytest.raises(
            UsageError, match=rf"would read it 1\d,\d{{3}} times; at most 10,000 are allowed, so .* --text, or {less}"
        ):
            plan_of(**asked, text_tokens=round(expected / 11_000), **fast)


@pytest.mark.parametrize("target", [113_300_000, 70_800_000])
def test_too_few_minutes_are_refused_with_the_least_that_would_do(target: int) -> None:
    with pytest.raises(UsageError, match=r"0\.5 minutes are too few: .* takes about [\d.]+ minutes here") as refused:
        plan_of(0.5, target=target)
    least = re.search(r"about ([\d.]+) minutes", str(refused.value))
    assert least is not None
    plan_of(float(least[1]), target=target)
    with pytest.raises(UsageError, match="are too few"):
        plan_of(0.8 * float(least[1]), target=target)
    with pytest.raises(UsageError, match=r"^2\.5 minutes are too few") as late:
        plan_of(2.5, target=target, gone=2.0)
    assert f"about {float(least[1]) + 2:.1f} minutes" in str(late.value), "what the probe took is a part of it"
    with pytest.raises(UsageError, match=r"^1\.25 minutes are too few") as spent:
        plan_of(1.25, target=target, gone=2.0)
    assert f"about {float(least[1]) + 2:.1f} minutes" in str(spent.value), "the probe took longer than the user gave"


def test_no_more_windows_are_measured_than_the_held_out_part_has() -> None:
    plan = plan_of(60, held_out_tokens=5 * 512 + 100)
    assert plan.settings["evaluation.max_windows"] == 5
    assert "held out and measured: 5 windows" in plan.lines[3]
    assert plan_of(60, held_out_tokens=10).settings["evaluation.max_windows"] == 1
    assert plan.seconds["measure"] < plan_of(60).seconds["measure"] / 4


def test_a_text_too_small_for_the_time_is_said_with_what_would_do() -> None:
    line = plan_of(60, text_tokens=50_000).lines[2]
    often = re.search(r"each about ([\d.]+) times; a text of ([\d.]+).M tokens would be read once, which is better", line)
    assert often is not None, line
    tokens = plan_of(60, text_tokens=50_000).settings["training.expected"]
    assert float(often[1]) == pytest.approx(tokens / 50_000, rel=0.01)
    assert 1e6 * float(often[2]) == pytest.approx(plan_of(60).settings["training.expected"], rel=0.05)
    assert "times" not in plan_of(60).lines[2]


def test_a_model_that_hardly_fits_works_twice() -> None:
    assert not plan_of(60).settings["training.gradient_checkpointing"]
    hardly = plan_of(60, memory=bytes_of(113_300_000) - 1)
    assert hardly.settings["training.gradient_checkpointing"]
    assert hardly.settings["training.expected"] < plan_of(60).settings["training.expected"]
    plan_of(60, memory=None)


def test_where_the_dense_model_does_not_fit_beside_it_the_text_alone_teaches() -> None:
    taught, alone = (bytes_of(70_800_000, distilled=distilled, again=True) for distilled in (True, False))
    fits, lacking = (plan_of(60, target=70_800_000, memory=memory) for memory in (taught, (alone + taught) // 2))
    assert fits.settings["training.objective"] == "objectives.distil(temperature=1)"
    assert lacking.settings["training.objective"] == "objectives.lm"
    assert "; the dense model, which would teach it, does not fit into memory beside it" in lacking.lines[2]


def test_seconds_are_operations_at_the_speed_that_was_measured() -> None:
    """docs/shrink.md: 0.8 of the speed of training; a teacher reads at the speed of reading. Measured: 370 and 235 tokens a second."""
    speeds = []
    for text_tokens in (TEXT.text_tokens, 100_000):  # the second is read more than once
        plan = plan_of(60, target=105_000_000, read=685, trained=373, text_tokens=text_tokens)
        speeds.append(plan.settings["training.expected"] / plan.seconds["train"])
    dense, pruned = (operations(of, ROW, kind="train") for of in (SHAPES, SHAPES.cut_to(105_000_000)))
    student = 373 * dense / pruned
    assert speeds == pytest.approx([0.8 * student, 0.8 / (1 / student + 1 / 685)], rel=0.01)
    assert speeds == pytest.approx([370, 235], rel=0.1)


def test_the_shares_of_the_rules_are_where_the_page_says() -> None:
    """docs/shrink.md: 35 % of the decoder, a sixth of the time, 5 % for windows, rows of 256, and how the rate rises and falls."""
    dense, decoder = SMOLLM2.num_params, decoder_parameters(SMOLLM2.model)
    for share, objective in ((0.345, "objectives.lm"), (0.355, "objectives.distil(temperature=1)")):
        assert plan_of(60, target=round(dense - share * decoder)).settings["training.objective"] == objective
    assert [plan_of(minutes).settings["checkpoint_minutes"] for minutes in (6, 30, 600)] == [1, 5, 10]
    for minutes in (8, 15, 60):
        assert plan_of(minutes).seconds["measure"] <= 0.05 * 60 * minutes
    training = read({}, values=plan_of(60).settings).training
    assert (training.length, training.batch_tokens, training.warmup, training.decay, training.lr) == (256, 2048, 0.05, 0.1, 1e-4)


def test_the_rate_rises_with_what_is_gone_and_with_the_size_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/shrink.md: the size of a weight times 0.0005 below 35 % of the decoder, 0.001 below 50 %, 0.002 from there on."""
    dense, decoder = SMOLLM2.num_params, decoder_parameters(SMOLLM2.model)
    shares = {0.2: 1e-4, 0.345: 1e-4, 0.355: 2e-4, 0.495: 2e-4, 0.505: 4e-4, 0.6: 4e-4}
    assert {share: plan_of(60, target=round(dense - share * decoder)).settings["training.lr"] for share in shares} == shares
    monkeypatch.setattr(shrink, "weight_size", lambda model: 0.0395)
    assert plan_of(60).settings["training.lr"] == 2e-5


def test_the_size_of_a_weight_is_that_of_the_middle_layer_s_matrices() -> None:
    model = tiny_model()
    before = weight_size(model)
    with torch.no_grad():
        for weight in model.model.layers[len(model.model.layers) // 2].parameters():
            weight *= 3
    assert 0.01 < before < 1
    assert weight_size(model) == pytest.approx(3 * before)
    with torch.no_grad():
        for weight in model.model.layers[len(model.model.layers) // 2].parameters():
            weight[..., ::2] = 0
    assert weight_size(model) == pytest.approx(3 * before, rel=0.1), "zeros, as of a 2:4 model, count"
