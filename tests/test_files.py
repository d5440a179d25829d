"""A file or folder is there whole or not at all, and what a killed process left is found by its name."""

import os
from pathlib import Path

import pytest

from adapt_pruner.core import files
from adapt_pruner.core.locks import is_held, locked
from adapt_pruner.errors import UsageError
from adapt_pruner.run.checkpoints import newest_first


def test_a_file_takes_its_place_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    place.write_text("old")
    with pytest.raises(KeyError), files.whole_file(place) as partial:
        partial.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert place.read_text() == "old"
    with files.whole_file(place) as partial:
        partial.write_text("new")
        assert place.read_text() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_beside_goes_unless_it_was_renamed(tmp_path: Path) -> None:
    with files.folder_beside(tmp_path / "deep" / "store") as partial:
        (partial / "x").touch()
    assert list((tmp_path / "deep").iterdir()) == []
    with files.folder_beside(tmp_path / "deep" / "store") as partial:
        (partial / "x").touch()
        partial.rename(tmp_path / "deep" / "store")
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["store", "x"]


def test_what_a_killed_process_left_is_tidied_away(tmp_path: Path) -> None:
    for name in ("kept", ".kept.partial-0123abcd", ".kept.partial-x", "kept.partial-0123abcd"):
        (tmp_path / name).mkdir()
    (tmp_path / ".file.partial-89abcdef").touch()
    (tmp_path / ".kept.partial-0123abcd" / "inside").touch()
    files.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.partial-x", "kept", "kept.partial-0123abcd"]
    files.tidy(tmp_path / "nowhere")


def test_what_another_process_puts_in_a_removed_place_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store"

    def rename(path: Path, to: Path) -> Path:
        place.mkdir()  # another process was quicker: it removed the old one, and has just made its own
        raise FileNotFoundError

    monkeypatch.setattr(Path, "rename", rename)
    files.remove(place)
    assert place.is_dir()


def test_a_lock_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    place = tmp_path / ".lock"
    assert not is_held(place)
    assert not place.exists()
    holder = locked(place)
    before = place.stat().st_mtime_ns
    assert is_held(place)
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        locked(place)
    assert (place.read_text(), place.stat().st_mtime_ns) == (str(os.getpid()), before)
    holder.close()
    assert not is_held(place)


def test_the_newest_checkpoint_is_the_last_that_a_run_would_write(tmp_path: Path) -> None:
    names = ["stage-10", "stage-2", "stage-2-step-100", "stage-2-step-9", "stage-2-pruned", "stage-1"]
    for name in [*reversed(names), "stage-3.damaged", ".stage-11.partial-0123abcd", "stage-x"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in newest_first(tmp_path)] == names
    assert newest_first(tmp_path / "nowhere") == []
