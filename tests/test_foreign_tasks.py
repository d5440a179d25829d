"""Task files of somebody else run no code: neither Python that they name, nor through templates, nor through what they include."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, UndefinedError

from adapt_pruner import recipe
from adapt_pruner.errors import UsageError
from adapt_pruner.evaluate import task_sources
from adapt_pruner.evaluate.task_sources import check_tasks, find_tasks
from adapt_pruner.evaluate.tasks import evaluate_tasks
from adapt_pruner.run.forecast import dry_run
from conftest import VOCAB, byte_tokenizer, tiny_model
from test_tasks import CHOICES, ask, definition, needs_lm_eval

pytestmark = needs_lm_eval
__all__ = ["ask"]  # a fixture

PLAIN = CHOICES.replace("tiny_choices", "tiny_evil")
WRITES = "open({marker!r}, 'w').close()\n"
OPENS = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
ATTACKS = {
    "process_docs": PLAIN + "process_docs: !function evil.process\n",
    "a function deep within": PLAIN + "metadata:\n  a: [1, {b: !function evil.process}]\n",
    "a class": "task: tiny_evil\nclass: !function evil.Process\n",
    "behind an anchor": PLAIN + "metadata: {x: &a !function evil.process}\nprocess_docs: *a\n",
    "merged in": "x: &a {process_docs: !function evil.process}\n<<: *a\n" + PLAIN,
    "with YAML's own tag": PLAIN + "process_docs: !!python/name:evil.process ''\n",
    "included": "include: sub/base.txt\ntask: tiny_evil\n",
    "included by a list, twice": "include: [sub/twice]\ntask: tiny_evil\n",
    "included through a merge": "x: &a {include: sub/base.txt}\n<<: *a\ntask: tiny_evil\n",
    "put over a stock task": "group: tiny_evil\ntask:\n  - task: piqa\n    process_docs: !function evil.process\n",
    "a metric's file": PLAIN.replace("metric: acc_norm", "metric: FOLDER/evil.py\n    aggregation: mean"),
    "a metric of the evaluate library": PLAIN.replace("- metric: acc_norm", "- metric: acc_norm\n    hf_evaluate: true"),
    "a script that reads data": PLAIN.replace("dataset_path: json", "dataset_path: FOLDER/evil.py"),
    "pickles": PLAIN.replace("dataset_path: json", "dataset_path: pandas"),
    "trust of its own": PLAIN.replace("dataset_kwargs:", "dataset_kwargs:\n  trust_remote_code: true"),
    "code that generates": PLAIN + "generation_kwargs: {custom_generate: FOLDER, trust_remote_code: true}\n",
    "prompts of another library": PLAIN + "use_prompt: promptsource:all\n",
}
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
    for name in ("data", "sub", "custom_generate"):
        (where / name).mkdir(parents=True)
    items = [{"question": f"{i} " * i, "choices": ["a", "b", "c"], "answer": i % 3, "kind": "__class__"} for i in range(1, 5)]
    (where / "data" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    code = WRITES.format(marker=str(tmp_path / "marker")) + "process = generate = lambda docs, *a, **k: docs\n"
    for name in ("evil.py", "sub/evil.py", "custom_generate/generate.py"):
        (where / name).write_text(code, encoding="utf-8")
    (where / "sub" / "base.txt").write_text(PLAIN + "process_docs: !function evil.process\n", encoding="utf-8")
    (where / "sub" / "twice").write_text(f"include: {where}/sub/base.txt\n", encoding="utf-8")
    return where


def written(where: Path, text: str) -> Path:
    (where / "x.yaml").write_text(text.replace("FOLDER", str(where)).replace("MARKER", str(where.parent / "marker")))
    return where


@pytest.mark.parametrize("name", ATTACKS)
def test_code_that_a_task_file_names_needs_the_flag(name: str, evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    written(evil, ATTACKS[name])
    for look in (find_tasks, check_tasks):
        with pytest.raises(UsageError, match=r"line \d+, .*; read it, and pass --trust-remote-code if you trust it"):
            look("tiny_evil", task_dir=evil)
    assert not (evil.parent / "marker").exists()


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
                find_tasks("tiny_evil", task_dir=evil),
                cache=tmp_path / "c",
                limit=2,
            )
        assert not (tmp_path / "marker").exists()


def test_with_the_flag_the_code_runs(evil: Path) -> None:
    """So that the marks above would be seen."""
    find_tasks("tiny_evil", task_dir=written(evil, ATTACKS["process_docs"]), trust_remote_code=True)
    assert (evil.parent / "marker").exists()


def test_a_recipe_cannot_allow_it_and_a_dry_run_loads_no_task(
    ask: Any, evil: Path, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(evil, ATTACKS["process_docs"])
    asked = {
        "model": str(tiny_folder), "budget": "80%", "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        "evaluation": {"tasks": "tiny_evil", "task_dir": str(evil)},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked), encoding="utf-8")
    for words in (["--dry-run"], ["-o", tmp_path / "run"]):
        status, _, err = ask("run", tmp_path / "recipe.yaml", *words)
        assert (status, "--trust-remote-code" in err) == (2, True)
    status, _, err = ask("eval", tiny_folder, "--tasks", "tiny_evil", "--task-dir", evil)
    assert (status, "--trust-remote-code" in err) == (2, True)
    assert not (evil.parent / "marker").exists()
    for trust in ("trust_remote_code", "evaluation.trust_remote_code", "training.trust_remote_code"):
        with pytest.raises(UsageError, match="trust_remote_code' is not known"):
            recipe.read(asked, overrides=[f"{trust}=true"])
    monkeypatch.setattr(task_sources, "_loaded", None)
    monkeypatch.setattr(task_sources, "_with_overlay", None)
    assert dry_run(recipe.read(asked), trust_remote_code=True)["time_without"][-1] == "scoring tasks"
    assert not (evil.parent / "marker").exists()
    with pytest.raises(UsageError, match="'tiny_evl' is not known; did you mean 'tiny_evil'"):
        dry_run(recipe.read(asked, overrides=["evaluation.tasks=tiny_evl"]), trust_remote_code=True)


def test_plain_files_need_no_flag(evil: Path) -> None:
    """Those without code, whatever else lies beside them; lm-eval's own files may be included, code and all."""
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    assert "!function" in theirs.read_text()
    more = "metadata: {class_size: 3}\nuse_prompt: null\nunsafe_code: false\n"
    (evil / "broken.yaml").write_text("[", encoding="utf-8")
    (evil / "theirs.yaml").write_text(f"include: {theirs}\ntask: theirs\n", encoding="utf-8")
    written(evil, PLAIN + more)
    assert [line.name for line in find_tasks("tiny_evil", task_dir=evil)] == ["tiny_evil"]
    check_tasks("theirs,tiny_evil,piqa", task_dir=evil)


def test_a_pipe_among_the_files_is_refused(evil: Path) -> None:
    written(evil, PLAIN)
    os.mkfifo(evil / "never.yaml")
    with pytest.raises(UsageError, match=r"never\.yaml is a device, a pipe or a socket"):
        find_tasks("tiny_evil", task_dir=evil)


def test_what_a_task_asks_a_model_to_generate_is_not_code(evil: Path, tmp_path: Path) -> None:
    """What transformers' `generate` would take for code is refused where the task generates, too."""
    text = definition("tiny_evil", "doc_to_text: '{{question}}'\ndoc_to_target: a", kind="generate_until")
    for key in ("custom_generate: FOLDER", "trust_remote_code: yes"):
        written(evil, text + f"generation_kwargs:\n  until: ['x']\n  {key}\n")
        with pytest.raises(UsageError, match="--trust-remote-code"):
            find_tasks("tiny_evil", task_dir=evil)
