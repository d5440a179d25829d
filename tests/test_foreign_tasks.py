"""A folder of tasks is foreign code, and so are the tasks that lm-eval marks as unsafe; templates never reach Python."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, UndefinedError

import adapt_pruner as ap
from adapt_pruner import recipe
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate import task_sources
from adapt_pruner.evaluate.task_sources import check_tasks, find_tasks
from adapt_pruner.evaluate.tasks import evaluate_tasks
from adapt_pruner.run.forecast import dry_run
from conftest import VOCAB, byte_tokenizer, tiny_model
from test_tasks import CHOICES, ask, needs_lm_eval

pytestmark = needs_lm_eval
__all__ = ["ask"]  # a fixture

PLAIN = CHOICES.replace("tiny_choices", "tiny_evil")
OPENS = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
CODED = PLAIN + "process_docs: !function evil.process\n"
ATTACKS = {
    "nothing but data": PLAIN,
    "a function": CODED,
    "a guard switched off over an unsafe task": "group: tiny_evil\ntask:\n  - {task: cruxeval_input, unsafe_code: false, dataset_path: json, dataset_kwargs: {data_files: {test: FOLDER/unsafe.jsonl}}, num_fewshot: 0}\n",
    "another name for lm-eval's own unsafe file": "include: LM_EVAL/tasks/cruxeval/cruxeval_input.yaml\ntask: tiny_evil\nunsafe_code: false\n",
}
UNSAFE = """
task: tiny_evil
unsafe_code: true
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/data/items.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: a
generation_kwargs: {max_gen_toks: 2, until: [x]}
"""
TEMPLATES = {
    "globals": OPENS,
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by subscript": "{{ ''['__class__']['__mro__'] }}",
    "by filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "by a format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "by a mapped attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "by a name of the item": "{{ ''[kind] }}",
    "an undefined": "{{ nothing.__init__.__globals__ }}",
    "a generator": "{{ (range(2)|select).gi_frame.f_globals }}",
    "a function of the environment": "{{ self.__init__.__globals__ }}{{ lipsum.__globals__.os }}",
}


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder with items and with Python that leaves a mark when it is run."""
    where = tmp_path / "tk"
    for name in ("data", "sub"):
        (where / name).mkdir(parents=True)
    items = [{"question": f"{i} " * i, "choices": ["a", "b", "c"], "answer": i % 3, "kind": "__class__"} for i in range(1, 5)]
    (where / "data" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    code = f"open({str(tmp_path / 'marker')!r}, 'w').close()\nprocess = lambda docs: docs\n"
    (where / "evil.py").write_text(code, encoding="utf-8")
    return where


def written(where: Path, text: str) -> Path:
    import lm_eval

    names = {"FOLDER": str(where), "MARKER": str(where.parent / "marker"), "LM_EVAL": str(Path(lm_eval.__file__).parent)}
    for name, path in names.items():
        text = text.replace(name, path)
    (where / "x.yaml").write_text(text, encoding="utf-8")
    return where


@pytest.mark.parametrize("name", ATTACKS)
def test_a_folder_of_tasks_needs_the_flag_whatever_is_in_it(name: str, evil: Path) -> None:
    written(evil, ATTACKS[name])
    for look in (find_tasks, check_tasks):
        with pytest.raises(
            UsageError, match=r"task folder '.*/tk' is foreign code, .*; read them, and pass --trust-remote-code if"
        ):
            look("tiny_evil", task_dir=evil)
    assert not (evil.parent / "marker").exists()


@pytest.mark.parametrize("name", ["humaneval", "cruxeval_input", "humaneval_infilling"])
def test_what_lm_eval_marks_as_unsafe_needs_the_flag(name: str) -> None:
    """Two tasks and a group; they are refused before their data is looked for."""
    for look in (find_tasks, check_tasks):
        with pytest.raises(UsageError, match=r"task '\w+' runs code .*lm-eval marks it as unsafe; pass --trust-remote-code"):
            look(name)
    check_tasks(name, trust_remote_code=True)


def test_an_unsafe_task_is_scored_with_the_flag_only(evil: Path, tmp_path: Path) -> None:
    wanted = find_tasks("tiny_evil", task_dir=written(evil, UNSAFE), trust_remote_code=True)
    model, tokenizer = tiny_model(vocab_size=VOCAB), byte_tokenizer()
    with pytest.raises(UsageError, match="marked as unsafe"):  # lm-eval's own guard
        evaluate_tasks(model, tokenizer, wanted, cache=tmp_path / "c", limit=2)
    (score,) = evaluate_tasks(model, tokenizer, wanted, cache=tmp_path / "c", limit=2, trust_remote_code=True)
    assert score.items == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_cannot_reach_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import utils

    monkeypatch.chdir(tmp_path)  # what a template would make lies there

    doc = {"question": "1", "kind": "__class__"}
    with task_sources.as_lm_eval_does():
        with suppress(SecurityError, UndefinedError):
            assert "class" not in utils.apply_template(TEMPLATES[name], doc)
        assert utils.apply_template("{{question|regex_replace('1', '2')}}\n", doc) == "2\n", "what lm-eval adds is there"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix"])
def test_every_template_of_a_task_is_rendered_in_the_sandbox(field: str, evil: Path, tmp_path: Path) -> None:
    """Whether the file has it itself, includes it, or puts it over another task."""
    text = "".join(line + "\n" for line in PLAIN.splitlines() if not line.startswith(f"{field}:"))
    (evil / "sub" / "base.txt").write_text(f"{text}{field}: {json.dumps(OPENS)}\n".replace("MARKER", str(tmp_path / "marker")))
    over = f"group: tiny_evil\ntask:\n  - task: tiny_under\n    {field}: {json.dumps(OPENS)}\n"
    (evil / "under.yaml").write_text(
        CHOICES.replace("tiny_choices", "tiny_under").replace("data/", f"{evil}/data/"), encoding="utf-8"
    )
    for whole in ("include: sub/base.txt\ntask: tiny_evil\n", over):
        written(evil, whole)
        with pytest.raises(UsageError, match="task 'tiny_.*attribute '__init__' of 'type' object is unsafe"):
            evaluate_tasks(
                tiny_model(vocab_size=VOCAB),
                byte_tokenizer(),
                find_tasks("tiny_evil", task_dir=evil, trust_remote_code=True),
                cache=tmp_path / "c",
                limit=2,
            )
        assert not (tmp_path / "marker").exists()


def test_with_the_flag_the_code_runs(evil: Path) -> None:
    """So that the marks above would be seen."""
    find_tasks("tiny_evil", task_dir=written(evil, CODED), trust_remote_code=True)
    assert (evil.parent / "marker").exists()


def test_a_recipe_cannot_allow_it_and_a_dry_run_loads_no_task(
    ask: Any, evil: Path, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(evil, CODED)
    asked = {
        "model": str(tiny_folder), "budget": "80%", "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        "evaluation": {"tasks": "tiny_evil", "task_dir": str(evil)},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked), encoding="utf-8")
    for words in (["--dry-run"], ["-o", tmp_path / "run"]):
        status, _, err = ask("run", tmp_path / "recipe.yaml", *words)
        assert (status, "--trust-remote-code" in err) == (2, True)
    words = ["eval", tiny_folder, "--tasks", "tiny_evil", "--task-dir", evil, "--limit", 2, "--cache-dir", tmp_path / "c"]
    status, _, err = ask(*words)
    assert (status, "--trust-remote-code" in err) == (2, True)
    with pytest.raises(UsageError, match="read them, and pass trust_remote_code=True if you trust them"):
        ap.evaluate(str(tiny_folder), tasks="tiny_evil", task_dir=evil)
    assert not (evil.parent / "marker").exists()
    for trust in ("trust_remote_code", "evaluation.trust_remote_code", "training.trust_remote_code"):
        with pytest.raises(UsageError, match="trust_remote_code' is not known"):
            recipe.read(asked, overrides=[f"{trust}=true"])
    monkeypatch.setattr(task_sources._Index, "find", None)
    assert dry_run(recipe.read(asked), trust_remote_code=True)["time_without"][-1] == "scoring tasks"
    assert not (evil.parent / "marker").exists()
    with pytest.raises(UsageError, match="'tiny_evl' is not known; did you mean 'tiny_evil'"):
        dry_run(recipe.read(asked, overrides=["evaluation.tasks=tiny_evl"]), trust_remote_code=True)


def test_a_pipe_among_the_files_is_refused(evil: Path) -> None:
    written(evil, PLAIN)
    os.mkfifo(evil / "never.yaml")
    with pytest.raises(UsageError, match=r"never\.yaml is a device, a pipe or a socket"):
        find_tasks("tiny_evil", task_dir=evil, trust_remote_code=True)
