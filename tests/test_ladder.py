"""benchmarks/ladder: the table holds together, a job is done once, and verdicts follow from paired differences."""

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapt_pruner.core.system.files import write_whole
from adapt_pruner.errors import RunError, UsageError

FOLDER = Path(__file__).parents[1] / "benchmarks" / "ladder"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """jobs, reporting and ladder, which import each other as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield [importlib.import_module(name) for name in ("jobs", "reporting", "ladder")]
        for name in ("jobs", "reporting", "ladder"):
            sys.modules.pop(name, None)


@pytest.fixture
def ladder(modules: Any, tmp_path: Path) -> Any:
    words = ("The quick brown fox", "A lazy dog", "Sphinx of black quartz", "Two plus two", "Pack my box")
    rows = [json.dumps({"text": f"{words[i % 5]} number {i} sees {words[(i * 3) % 5]} {i * i} times. " * 8}) for i in range(400)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:300]) + "\n")
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows[300:]) + "\n")
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8")) | {"heldout_windows": 4}
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(table))
    text = {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "heldout")}
    return modules[0].Ladder(tmp_path / "kept", text=text, table=tmp_path / "ladder.yaml")


def test_every_job_of_every_plan_has_a_recipe(modules: Any, ladder: Any) -> None:
    jobs, _, _ = modules
    for rung in ladder.table["rungs"]:
        shape = ladder.folder / rung / "tokenizer"
        shape.mkdir(parents=True)
        (shape / "config.json").write_text("{}")
        if "like" in ladder.table["rungs"][rung]:
            assert ladder.home(rung) == ladder.folder / ladder.table["rungs"][rung]["like"]
        (ladder.folder / rung / "scratch").mkdir()
        (ladder.folder / rung / "scratch" / "config.json").write_text("{}")
    for plan in ladder.table["plans"]:
        for job in ladder.jobs(plan):
            recipe = ladder.recipe(job, Path("base"))
            assert recipe.training.tokens % 2048 == 0
            assert bool(recipe.training.tokens) == bool(job.at)
            arm = ladder.table["arms"][job.arm]
            assert recipe.stages == arm.get("stages", 1)
            assert (recipe.init == "random", recipe.budget == "100%") == (
                "scratch" in arm,
                bool({"scratch", "uncut"} & arm.keys()),
            )
    assert ladder.recipe(jobs.Job("S", 0, "c20", 4, 0), Path("base")).moments == "reset"
    assert ladder.recipe(jobs.Job("S", 0, "u5", 4, 0), Path("base")).chooser == "allocate.uniform"
    assert ladder.recipe(jobs.Job("S", 0, "b", 1, 0, 5e-4), Path("base")).training.lr == 5e-4
    assert ladder.recipe(jobs.Job("X75", 1, "h20", 4, 0), Path("base")).training.shards == "last=0.8"
    transfer = ladder.recipe(jobs.Job("X75", 1, "t20", 4, 0), Path("base"))
    assert (transfer.stages, transfer.reduce) == (1, f'masks(run="{ladder.folder}/masks/X75-1-d20-4-0")')
    arms = {arm for plan in ladder.table["plans"] for job in ladder.jobs(plan) for arm in [job.arm]}
    assert arms == set(ladder.table["arms"])
    assert {arm for claim in ladder.table["claims"] for arm in [*claim["better"], *claim["than"]]} <= arms


def test_arms_take_the_learning_rate_that_won(modules: Any, ladder: Any) -> None:
    jobs, _, _ = modules
    job = jobs.Job("X", 0, "u1", 1, 2)
    assert jobs.lr_of(ladder, job) == 1e-3, "where none was tried"
    ladder.results.mkdir(parents=True)
    for one, loss in zip(ladder.sweep("X", "b"), (4.2, 4.3, 4.1), strict=True):
        assert jobs.lr_of(ladder, job) == 1e-3, "as long as some are to be tried"
        write_whole(ladder.results / f"{one.name}.json", json.dumps({"lr": one.lr, "loss": loss}))
    assert jobs.lr_of(ladder, job) == 2e-3
    ladder._keep(job, {"loss": 4.0, "lr": 1e-3})
    assert ladder.result(job) is None, "another rate has won since"
    ladder._keep(job, {"loss": 4.0, "lr": 2e-3})
    assert ladder.result(job)["loss"] == 4.0
    write_whole(ladder.results / f"{one.name}.json", json.dumps({"lr": one.lr, "error": "no space left"}))
    assert jobs.lr_of(ladder, job) == 5e-4, "one that failed tells nothing"
    assert jobs.lr_of(ladder, jobs.Job("X", 0, "a", 1, 2)) == 4e-3


def test_jobs_are_done_once_and_reported(modules: Any, ladder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs, reporting, script = modules
    todo = [jobs.Job("T", 0, arm, at, 0) for arm, at in (("b", 0), ("u1", 0), ("b", 1), ("d5", 1))]
    script.work(ladder, todo)
    results = [ladder.result(job) for job in todo]
    assert [(result["arm"], result["tokens"]) for result in results] == [("b", 0), ("u1", 0), ("b", 8192), ("d5", 8192)]
    assert all(7_800 < result["params"] <= 8_000 for result in results)
    assert all(0 < result["loss"] < math.log(300) + 0.5 for result in results)
    assert results[2]["loss"] < results[0]["loss"], "it was trained"
    assert not list((ladder.folder / "runs").glob("*/"))
    monkeypatch.setattr(jobs.loop, "run", lambda *_: pytest.fail("it was done again"))
    script.work(ladder, todo)
    said = reporting.write_report(
        results, ladder.table, tmp_path / "report", plan="test", jobs=[*todo, jobs.Job("T", 0, "d5", 1, 1)]
    )
    assert "4 of 5 jobs of the plan `test` are done" in said
    assert "Interleaving in 5 stages beats one cut" in (tmp_path / "report" / "ladder.md").read_text()
    assert "<svg" in (tmp_path / "report" / "ladder.html").read_text()


def test_the_plan_of_interleaving_says_something_by_every_tenth(ladder: Any) -> None:
    """One cut beside five stages with most tokens last, on a base, by a tenth; on all five by a fourth; rungs S as rungs X."""
    x, s = (
        {
            dataclasses.replace(
                job, rung=job.rung.replace("S", "X"), at=job.at if job.lr is None else 0
            )  # each tries rates at its own
            for job in ladder.jobs(f"interleaving-{rung}")
        }
        for rung in ("x", "s")
    )
    assert s < x, "rung S asks nothing that X has not answered"
    for rung in ("x", "s"):
        plan = ladder.jobs(f"interleaving-{rung}")
        bases = [
            {job.base for job in plan[:count] if job.rung == f"{rung.upper()}75" and job.arm == "h5" and job.lr is None}
            for count in (len(plan) // 10, len(plan) // 4)
        ]
        assert (len(bases[0]) >= 1, bases[1]) == (True, {0, 1, 2, 3, 4})
        for place, job in enumerate(plan):
            source = ladder.source(job)
            assert source is None or source in plan[:place], "the units are there before they are taken"


def test_units_of_another_arm_are_taken_and_a_rate_is_not_tried_twice(
    modules: Any, ladder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, reporting, script = modules
    ladder.table["arms"] |= {
        "d20": {"says": "two stages", "lr": "d20", "tried_at": 0.5, "stages": 2},
        "t20": {"says": "their units", "lr": 1e-3, "units_of": "d20"},
    }
    ladder.table["rungs"]["T75"] = {**ladder.table["rungs"]["T"], "like": "T", "target": "7.2k"}
    ladder.table["learning_rates"] |= {"tried": [1e-3]}
    transfer = jobs.Job("T75", 0, "t20", 0.5, 0)
    assert not script._tried(ladder, transfer, [transfer]), "it waits for the units"
    todo = [*ladder.sweep("T75", "d20"), jobs.Job("T75", 0, "d20", 0.5, 0), transfer]
    runs, run = [], jobs.loop.run
    monkeypatch.setattr(jobs.loop, "run", lambda recipe, folder: runs.append(folder.name) or run(recipe, folder))
    script.work(ladder, todo)
    assert [name for name in runs if name != "base-0"] == [todo[0].name, transfer.name], "the sweep has this job"
    results = [ladder.result(job) for job in todo]
    swept, staged, at_once = results
    assert (staged["loss"], staged["lr"], staged["swept"]) == (swept["loss"], 1e-3, False)
    assert at_once["params"] == staged["params"] <= 7_200
    assert at_once["loss"] != staged["loss"]
    assert (ladder.folder / "T" / "base-0" / "model").exists()
    assert not (ladder.folder / "T75" / "base-0").exists(), "it has the bases of T"
    # Two stages have a larger model for a third of the tokens: more work.
    assert at_once["parameter_tokens"] == at_once["params"] * at_once["tokens"]
    assert 1.0 < staged["parameter_tokens"] / at_once["parameter_tokens"] < 1.1
    assert reporting.judged(results, ladder.table)["Twenty stages beat one cut to their units", "T75", 0.5].pairs == 1


def test_arms_are_compared_at_equal_work(modules: Any) -> None:
    """By hand: one cut has 5.0 at work 100 and 4.0 at 400; an arm with work 200 stands beside 4.5, halfway in log work."""
    _, reporting, _ = modules
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8"))
    results = [
        {**result, "parameter_tokens": work, "base": base}
        for arm, at, work, loss in (("b", 1, 100, 5.0), ("b", 4, 400, 4.0), ("h5", 1, 200, 4.7))
        for base in (0, 1) for result in results_of({arm: [loss]}, at=at)
    ]  # fmt: skip
    (row,) = reporting.tables(results, table)["work"][2:]
    assert row == f"| S | h5, {table['arms']['h5']['says']} | 1 | 2.00 | 2 | -0.3000 | +0.2000 | +0.2000 to +0.2000 |"


def test_what_was_made_otherwise_is_not_taken_for_ours(modules: Any, ladder: Any) -> None:
    jobs, _, _ = modules
    job, other = jobs.Job("X", 0, "b", 1, 0), jobs.Job("X", 0, "u1", 1, 0)
    for one in (job, other):
        ladder._keep(one, {"loss": 4.0})
    ladder.table["arms"]["u1"]["set"]["method"] = "random"
    assert ladder.result(job)["loss"] == 4.0
    assert ladder.result(other) is None, "its arm has changed"
    assert [one["arm"] for one in ladder.results_of({"X"})] == ["b"]
    assert ladder.results_of({"S"}) == []
    ladder.check("X")
    ladder.check("X")
    ladder.text = ladder.text | {"train": "mine.txt"}
    with pytest.raises(UsageError, match=r"was made with another text \(see .*made_of.json\); name another --folder"):
        ladder.check("X")


def test_a_job_that_failed_is_tried_once_more(modules: Any, ladder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, _, script = modules
    job = jobs.Job("T", 0, "b", 0, 0)
    (ladder.folder / "T" / "base-0" / "model").mkdir(parents=True)

    def fail(_: Any) -> None:
        raise RunError("no space left")

    monkeypatch.setattr(ladder, "do", fail)
    script.work(ladder, [job])
    assert ladder.result(job)["error"] == "no space left", "the first result of a folder, too"
    monkeypatch.setattr(ladder, "do", lambda _: pytest.fail("it would fail again"))
    script.work(ladder, [job])
    ladder.forget_failures([job])
    assert ladder.result(job) is None


def test_arms_of_one_plan_are_compared_with_those_of_another(modules: Any, ladder: Any, tmp_path: Path) -> None:
    jobs, reporting, _ = modules
    for arm, at, losses in (("b", 1, (4.0, 4.1, 4.2)), ("f", 1, (3.9, 4.0, 4.1))):
        for seed, loss in enumerate(losses):
            figures = {"loss": loss, "params": 800, "tokens": 100, "bits_per_byte": 1.0, "cpu_seconds": 1.0}
            ladder._keep(jobs.Job("X", 0, arm, at, seed), figures)
    named = ladder.jobs("long")
    said = reporting.write_report(ladder.results_of({"X"}), ladder.table, tmp_path / "report", plan="long", jobs=named)
    assert f"3 of {len(named)} jobs of the plan `long` are done" in said
    assert "| Removal between steps beats one cut | X | 1 | 1 | 3 | +0.1000 |" in (tmp_path / "report" / "ladder.md").read_text()


def results_of(arms: dict[str, list[float]], *, at: float = 1) -> list[dict[str, Any]]:
    return [
        {"rung": "S", "base": 0, "arm": arm, "at": at, "seed": seed, "loss": loss, "tokens": int(at * 800_000), "bits_per_byte": 1.0,
         "params": 800_000, "cpu_seconds": 1.0}
        for arm, losses in arms.items() for seed, loss in enumerate(losses)
    ]  # fmt: skip


@pytest.mark.parametrize(("t", "degrees", "p"), [
    (12.706, 1, 0.05), (4.303, 2, 0.05), (2.776, 4, 0.05), (2.262, 9, 0.05), (2.228, 10, 0.05), (63.657, 1, 0.01), (4.604, 4, 0.01), (0, 7, 1),
])  # fmt: skip
def test_p_values_are_those_of_the_tables(t: float, degrees: int, p: float, modules: Any) -> None:
    _, reporting, _ = modules
    assert reporting.p_of(t, degrees) == pytest.approx(p, rel=2e-3)
    assert reporting.p_of(-t, degrees) == reporting.p_of(t, degrees)


def test_holm_corrects_tests_that_are_made_together(modules: Any) -> None:
    """By hand: 0.01 · 4, 0.02 · 3, 0.03 · 2, 0.04 · 1, none below the one before it."""
    _, reporting, _ = modules
    assert reporting.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert reporting.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert reporting.holm([0.7, 0.8]) == [1.0, 1.0]
    assert reporting.holm([]) == []


def test_a_verdict_of_one_base_is_of_pairs_and_says_when_it_cannot_tell(modules: Any) -> None:
    _, reporting, _ = modules
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8"))
    # seeds differ by far more than arms do; pairs tell
    found = reporting.judged(results_of({"b": [4.0, 4.5, 5.0], "u1": [4.031, 4.529, 5.030], "d5": [4.01, 4.49, 5.002]}), table)
    adaptive = found["Adaptive shares beat uniform ones after one cut and training", "S", 1]
    assert (adaptive.verdict, len(adaptive.differences), adaptive.bases) == ("true", 3, 1)
    assert adaptive.mean == pytest.approx(0.030)
    assert adaptive.half == pytest.approx(4.303 * 0.001 / math.sqrt(3), rel=1e-3)
    assert adaptive.p == pytest.approx(2 * reporting.p_of(0.030 / (0.001 / math.sqrt(3)), 2)), (
        "of two tests the smaller counts twice"
    )
    assert found["Interleaving in 5 stages beats one cut", "S", 1].verdict == "undecided"
    lost = reporting.judged(results_of({"b": [4.0, 4.5], "d5": [4.1, 4.6001]}), table)
    assert lost["Interleaving in 5 stages beats one cut", "S", 1].verdict == "false"
    alone = reporting.judged(results_of({"b": [4.0], "d5": [3.0, 3.1]}), table)["Interleaving in 5 stages beats one cut", "S", 1]
    assert (alone.verdict, alone.differences) == ("undecided", (1.0,)), "one pair decides nothing"
    swept = [result | {"swept": True, "loss": 3.0} for result in results_of({"b": [4.0, 4.5]})]
    failed = [{"rung": "S", "base": 0, "arm": "b", "at": 1, "seed": 0, "error": "no space left"}]
    either = results_of({"b": [4.0, 4.5], "d5": [4.1, 4.6001]})
    assert reporting.judged([*swept, *either, *swept, *failed], table).keys() == lost.keys()
    assert reporting.judged([*either, *swept], table)["Interleaving in 5 stages beats one cut", "S", 1].verdict == "false"
    assert reporting.tables([*either, *failed], table)["failed"] == ["* S, base 0, b at 1, seed 0, failed: no space left"]
    untrained = reporting.judged(results_of({"b": [4.0, 4.1], "u1": [5.0, 5.1]}, at=0), table)
    assert list(untrained) == [("Adaptive shares beat uniform ones before training", "S", 0)]


def test_of_several_bases_each_counts_once(modules: Any) -> None:
    """Three seeds on one base agree to 0.001 nats, bases differ by 0.04: as nine pairs this would be sure, and it is not."""
    _, reporting, _ = modules
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8"))
    name = ("Interleaving in 5 stages beats one cut", "S", 1)

    def verdict(*gains: float) -> Any:
        results = [
            result | {"base": base}
            for base, gain in enumerate(gains)
            for result in results_of({"b": [4.0, 4.1, 4.2], "d5": [4.0 - gain, 4.1 - gain - 0.001, 4.2 - gain + 0.001]})
        ]
        return reporting.judged(results, table)[name]

    spread = verdict(0.05, 0.01, 0.02)
    assert spread.differences == pytest.approx([0.05, 0.01, 0.02])
    assert (spread.bases, spread.pairs, spread.verdict) == (3, 9, "undecided")
    assert spread.half == pytest.approx(4.303 * 0.020817 / math.sqrt(3), rel=1e-3)
    assert verdict(0.05, 0.051, 0.052, 0.05, 0.049).verdict == "true"
    assert verdict(-0.05, -0.051, -0.052).verdict == "false"
    assert verdict(0.001, -0.001, 0.0005, 0.0, -0.0004).verdict == "level", "within 0.005 nats of each other"
    assert verdict(0.004, 0.0041, 0.0042, 0.004, 0.004).verdict == "true", "a small difference that is sure"
    assert verdict(0.012, -0.003, 0.004).verdict == "undecided"


def test_what_only_seems_sure_among_many_tests_is_undecided(modules: Any) -> None:
    """p is about 0.02 alone; of five tests on the rung it is 0.1."""
    _, reporting, _ = modules
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8"))
    name = ("Interleaving in 5 stages beats one cut", "S", 1)
    arms = {"b": [4.0] * 3, "d5": [3.99, 3.988, 3.9855]}
    alone = reporting.judged(results_of(arms), table)[name]
    assert (alone.verdict, 0.005 < alone.p < 0.05) == ("true", True)
    others = {arm: [4.1, 3.9, 4.0] for arm in ("u1", "c5", "e1", "f")}
    among = reporting.judged(results_of(arms | others), table)
    assert among[name].verdict == "undecided"
    assert among[name].p == pytest.approx(5 * alone.p)
    elsewhere = [result | {"rung": "X"} for result in results_of({"b": [4.0] * 3, **others})]
    assert reporting.judged([*results_of(arms), *elsewhere], table)[name].verdict == "true", "each rung has its tests"


def test_tokens_saved_are_read_off_the_curve_from_scratch(modules: Any) -> None:
    _, reporting, _ = modules
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8"))
    scratch = results_of({"a": [6.0]}, at=1) + results_of({"a": [5.0]}, at=4)
    (row,) = reporting.tables(scratch + results_of({"b": [5.5]}), table)["saved"][2:]
    assert row == f"| S | 1 | 5.5000 | 2.0 | {2 * 0.8 / 24.8:.2g} |", "half of the way in log tokens from 1 to 4"
    (beyond,) = reporting.tables(scratch + results_of({"b": [4.5]}), table)["saved"][2:]
    assert "| > 4.0 |" in beyond


def test_the_page_says_what_the_figures_say(modules: Any) -> None:
    _, reporting, _ = modules
    table = yaml.safe_load((FOLDER / "ladder.yaml").read_text(encoding="utf-8"))
    files = [FOLDER / f"rung-{rung}.jsonl" for rung in "xs"]
    results = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    page = (FOLDER.parents[1] / "docs" / "ladder.md").read_text(encoding="utf-8")
    rows = {tuple(map(str.strip, line.split("|")[2:6])) for line in page.splitlines() if line.count("|") == 6}
    found = reporting.judged(results, table)
    assert sum(len(judged.differences) > 1 for judged in found.values()) >= 13
    for (claim, _, at), judged in found.items():
        low, high = judged.mean - judged.half, judged.mean + judged.half
        said = (f"{at:g}", f"{judged.mean:+.3f}", f"{low:+.3f} to {high:+.3f}", judged.verdict)
        assert said in rows or len(judged.differences) == 1, claim
