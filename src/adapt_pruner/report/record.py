"""The content of a run's folder, even of a damaged one: recipe, log, newest figures, and whether a process works there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from adapt_pruner.core.events import Event, parse_line
from adapt_pruner.core.events.progress import RunProgress
from adapt_pruner.core.system import filenames
from adapt_pruner.core.system.files import read_plain, weight_bytes
from adapt_pruner.core.system.locks import is_held
from adapt_pruner.core.system.strict_json import is_count, is_number, read_json, to_json
from adapt_pruner.core.system.strict_yaml import value_of
from adapt_pruner.errors import UsageError, first_line
from adapt_pruner.run.checkpoints import newest_first

Status = Literal["finished", "running", "stopped"]
_Kind = TypeVar("_Kind", bound=Event)

# Keys of a recipe that the page reads as numbers or as sections, and the numbers in sections.
_NUMBERS = ("step", "amplitude")
_SECTIONS = ("calibration", "training", "evaluation")
_COUNTS = ("samples", "length", "tokens")


@dataclass(frozen=True)
class Record:
    """A run, as its folder shows it.

    Attributes:
        path: the folder.
        status: finished; running, if a process holds the folder's lock; otherwise stopped.
        recipe: the content of recipe.yaml; empty if it cannot be read.
        recipe_text: recipe.yaml as text.
        made_by: versions of the software that ran it; empty if not known.
        events: events of the log, in their order.
        pruning: pruning.json of the result, or of the newest checkpoint that has one; empty if there is none.
        state: state.json of that checkpoint; empty if there is none, as in a result.
        mask: axis name -> (entries in the model at the start, indices that stayed), from the same folder as pruning.json.
        checkpoint: the folder of these files; None if there is none.
        weight_bytes: bytes of the result's weights on disk, or None.
        kept: whether `path` is the folder of a run. If not, it is the result itself, of a run that kept nothing else.
        trouble: sentences about what could not be read.
    """

    path: Path
    status: Status
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    made_by: str = ""
    events: list[Event] = field(default_factory=list)
    pruning: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    checkpoint: Path | None = None
    weight_bytes: int | None = None
    kept: bool = True
    trouble: list[str] = field(default_factory=list)

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """The events of one kind."""
        of_kind: list[_Kind] = self._by_kind.get(kind, [])
        return of_kind

    @cached_property
    def _by_kind(self) -> dict[type[Event], list[Any]]:
        kinds: dict[type[Event], list[Any]] = {}
        for event in self.events:
            kinds.setdefault(type(event), []).append(event)
        return kinds

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that the run itself recorded so far."""
        return dict(self.pruning.get("figures") or {})


def read_record(run_dir: str | Path) -> Record:
    """Read a run's folder. Nothing in it is changed, and no weights are read.

    Raises:
        UsageError: it is not the folder of a run.
    """
    path = Path(run_dir)
    check_is_run(path)
    trouble: list[str] = []
    prepares = _prepares(path)
    text, recipe = _recipe(path / filenames.RECIPE, trouble)
    first = text.partition("\n")[0]
    finished = (path / filenames.RESULT).is_dir()
    checkpoints = (folder for folder in newest_first(path / filenames.CHECKPOINTS) if (folder / filenames.PRUNING).is_file())
    place = path / filenames.RESULT if finished else next(checkpoints, None)
    pruning = {} if place is None else _json(place / filenames.PRUNING, trouble)
    events = _events(path / filenames.LOG, trouble)
    if prepares and not recipe and not events:
        trouble = [
            "the run is preparing: it loads the model and reads its text, and has written neither recipe.yaml nor log.jsonl yet"
        ]
    status: Status = "finished"
    if not finished:
        status = "running" if is_worked_in(path) else "stopped"
    return Record(
        path=path,
        status=status,
        recipe=recipe,
        recipe_text=text,
        made_by=str(pruning.get("made_by") or (first[2:] if first.startswith("# ") else "")),
        events=events,
        pruning=pruning,
        state={} if place is None or finished else _json(place / filenames.STATE, trouble),
        mask={} if place is None else _mask(_json(place / filenames.MASK, trouble)),
        checkpoint=place,
        weight_bytes=weight_bytes(place) if finished and place else None,
        trouble=trouble,
    )


def record_of_result(path: Path, events: Iterable[Event]) -> Record:
    """The record of a run that kept only its result.

    Args:
        path: the result.
        events: what its listener was told, each with its `time` in Unix seconds.
    """
    trouble: list[str] = []
    pruning = _json(path / filenames.PRUNING, trouble)
    recipe = pruning.get("recipe") or {}
    return Record(
        path=path, status="finished", recipe=recipe, recipe_text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        made_by=str(pruning.get("made_by") or ""), events=[read for event in events if event.logged and (read := parse_line(to_json(event.to_dict())))],
        pruning=pruning, mask=_mask(_json(path / filenames.MASK, trouble)), checkpoint=path, weight_bytes=weight_bytes(path), kept=False,
        trouble=trouble,
    )  # fmt: skip


def check_is_run(path: Path) -> None:
    """Refuse a path that is not the folder of a run, and say what was probably meant. A run in preparation has only its lock.

    Raises:
        UsageError: the path is refused.
    """
    if (path / filenames.RECIPE).is_file() or (path / filenames.LOG).is_file() or _prepares(path):
        return
    if not path.exists():
        raise UsageError(f"{path} does not exist; name the folder that `adapt-pruner shrink` or `run` wrote, such as runs/demo")
    if not path.is_dir():
        raise UsageError(f"{path} is a file; name the folder of a run, which contains recipe.yaml and log.jsonl")
    if (path / filenames.PRUNING).is_file() and (path.parent / filenames.LOG).is_file():
        raise UsageError(f"{path} is the result of a run; name the run's folder, {path.parent}")
    inside = sorted(child.parent for child in path.glob("*/log.jsonl"))
    hint = f"; did you mean {inside[0]}?" if inside else "; name the folder that `adapt-pruner shrink` or `run` wrote"
    raise UsageError(f"{path} is not the folder of a run: it contains neither recipe.yaml nor log.jsonl{hint}")


def read_progress(path: Path) -> tuple[RunProgress, float] | None:
    """Where the run in this folder last said that it stands, and when (Unix seconds); None if there is nothing to read."""
    try:
        data = read_json(path / filenames.PROGRESS)
        return RunProgress(**data), float(data["time"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _prepares(path: Path) -> bool:
    """Whether a run works here that has written nothing yet. A comparison also locks its folder, but has `cells`."""
    written = (path / name for name in (filenames.RECIPE, filenames.LOG, filenames.CELLS))
    return not any(place.exists() for place in written) and is_worked_in(path)


def _recipe(path: Path, trouble: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = read_plain(path, most=2**20).decode("utf-8")
        data = value_of(text, filenames.RECIPE)
    except FileNotFoundError:
        trouble.append("recipe.yaml is missing, so the page cannot say what the run was asked to do")
        return "", {}
    except (OSError, ValueError) as error:
        trouble.append(f"recipe.yaml cannot be read ({first_line(error)})")
        return "", {}
    if not isinstance(data, dict):
        trouble.append("recipe.yaml contains no keys")
        return text, {}
    wrong = [key for key in data if not _makes_sense(key, data[key])]
    if wrong:
        trouble.append(f"recipe.yaml has no usable {', '.join(wrong)}, which was left out")
    return text, {key: value for key, value in data.items() if key not in wrong}


def _makes_sense(key: str, value: Any) -> bool:
    """Whether the value of a recipe's key has a form that the page can use."""
    if value is None:
        return True
    if key in _NUMBERS:
        return is_number(value)
    if key == "axes":
        return isinstance(value, list)
    if key in _SECTIONS:
        if not isinstance(value, dict) or not all(is_count(value.get(name) or 0) for name in _COUNTS):
            return False
        source = value.get("source")  # a text, several with their weights, or none
        return all(map(is_number, source.values())) if isinstance(source, dict) else source is None or isinstance(source, str)
    return True


def _events(path: Path, trouble: list[str]) -> list[Event]:
    try:
        lines = read_plain(path).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        trouble.append("log.jsonl does not exist yet, so the page cannot show the course of the run")
        return []
    except OSError as error:
        trouble.append(f"log.jsonl cannot be read ({error.strerror})")
        return []
    read = {number: parse_line(line) for number, line in enumerate(lines, start=1) if line.strip()}
    bad = [number for number, event in read.items() if event is None]
    if bad and bad[-1] == len(lines):
        bad.pop()
        trouble.append("the last line of log.jsonl is broken off: the run was killed while writing it, or is writing it now")
    if bad:
        trouble.append(
            f"lines of log.jsonl that are not events were left out ({len(bad)}): {', '.join(map(str, bad[:5]))}{' …' if bad[5:] else ''}"
        )
    return [event for event in read.values() if event is not None]


def _json(path: Path, trouble: list[str]) -> dict[str, Any]:
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        trouble.append(f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__})")
        return {}
    return data if isinstance(data, dict) else {}


def _mask(data: Mapping[str, Any]) -> dict[str, tuple[int, list[int]]]:
    axes = data.get("axes")
    if not isinstance(axes, Mapping):
        return {}
    return {
        name: (axis["size"], axis["kept"]) for name, axis in axes.items()
        if isinstance(axis, Mapping) and isinstance(axis.get("size"), int) and isinstance(axis.get("kept"), list)
    }  # fmt: skip


def is_worked_in(run_dir: Path) -> bool:
    """Whether a process works in a run's folder."""
    return is_held(run_dir / ".lock")
