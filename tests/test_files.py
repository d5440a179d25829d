"""A file or folder is there whole or not at all, and what a killed process left is found by its name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapt_pruner.core.system import files
from adapt_pruner.core.system.locks import is_held, locked
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


def test_a_folder_beside_goes_unless_it_was_named(tmp_path: Path) -> None:
    with files.folder_beside(tmp_path / "deep" / "store") as partial:
        (partial / "x").touch()
    assert list((tmp_path / "deep").iterdir()) == []
    with files.folder_beside(tmp_path / "deep" / "store") as partial:
        (partial / "x").touch()
        files.named(partial, tmp_path / "deep" / "store")
    assert sorted(path.name for path in (tmp_path / "deep").rglob("*")) == ["store", "x"]


WRITES = """
import os, sys
from pathlib import Path
from adapt_pruner.core.system import files
with files.folder_beside(Path("store")) as folder, files.whole_file(Path("page")) as page:
    (folder / "weights").write_text("half")
    page.write_text("half")
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_tidied_away_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    """By the next that writes into the same folder, whichever process that is."""
    theirs = [".kept.partial-0123abcd", ".kept.partial-0123abcd0123abcd", ".kept.partial-x", "kept.partial-0123abcd"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
    (tmp_path / ".file.partial-89abcdef01234567").touch()
    command = [sys.executable, "-P", "-c", WRITES]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ours = {path.name for path in tmp_path.iterdir()} - {*theirs, ".file.partial-89abcdef01234567"}
        assert len(ours) == 2
        files.write_whole(tmp_path / "other", "whole")
        assert ours < {path.name for path in tmp_path.iterdir()}, "its process lives"
        process.kill()
    files.write_whole(tmp_path / "other", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, ".file.partial-89abcdef01234567", "other"])
    files.tidy(tmp_path / "nowhere")


def test_what_is_half_written_without_a_lock_goes_where_only_we_write(tmp_path: Path) -> None:
    places = [files._beside(tmp_path / name, files._WRITTEN) for name in ("stage-1", "thesis")]
    for place in places:
        place.mkdir()  # killed before it had its lock
    files.tidy(tmp_path, ours="stage-.*")
    assert list(tmp_path.iterdir()) == places[1:]


def test_what_was_half_removed_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed before anything went
        files.remove(tmp_path / "store")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".store.partial-")
    files.tidy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_there_is_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        files.write_whole(tmp_path / name, "whole")
        with files.folder_beside(tmp_path / f"{name[:-1]}y") as folder:
            files.named(folder, tmp_path / f"{name[:-1]}y")


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


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="it is a link"):
        locked(tmp_path / ".lock")
    assert (tmp_path / "theirs").read_text() == "precious"
    assert not is_held(tmp_path / ".lock")


def test_the_newest_checkpoint_is_the_last_that_a_run_would_write(tmp_path: Path) -> None:
    names = ["stage-10", "stage-2", "stage-2-step-100", "stage-2-step-9", "stage-2-pruned", "stage-1"]
    for name in [*reversed(names), "stage-3.damaged", ".stage-11.partial-0123abcd", "stage-x"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in newest_first(tmp_path)] == names
    assert newest_first(tmp_path / "nowhere") == []
