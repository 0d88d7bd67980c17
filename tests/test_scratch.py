"""Tests the private folder of a process.

The tests cover permissions, removal, leftovers of killed processes, and old files.
"""

import multiprocessing
import os
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stvit.tools.demonstration.scratch import Storage, private_folder, remove_leftovers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork processes, which Windows cannot")
PREFIX = "stvit-test-"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def hold(ready: Any) -> None:
    """Keeps a private folder with a file until a signal comes."""
    with private_folder(PREFIX) as folder:
        (folder / "upload").mkdir()
        (folder / "upload/a.jpg").write_bytes(b"private")
        ready.send(str(folder))
        signal.pause()


@pytest.fixture
def holders() -> Iterator[Any]:
    """Yields a function that starts a process with a private folder, and returns both."""
    processes = []

    def start() -> tuple[Any, Path]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=hold, args=(theirs,))
        process.start()
        processes.append(process)
        assert ours.poll(60)
        return process, Path(ours.recv())

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_only_this_user_can_read_the_folder(temporary: Path) -> None:
    with private_folder(PREFIX) as one, private_folder(PREFIX) as two:
        for folder in (one, two):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.parent == temporary
            assert len(folder.name) >= len(PREFIX) + 8
        assert one != two
    assert not list(temporary.iterdir())


def test_the_next_process_removes_the_folder_of_a_killed_one(holders: Any, temporary: Path) -> None:
    """The folder of a running process is not changed."""
    killed, left = holders()
    _, used = holders()
    killed.kill()
    killed.join()
    assert (left / "upload/a.jpg").exists()
    with private_folder(PREFIX):
        assert not left.exists()
        assert (used / "upload/a.jpg").read_bytes() == b"private"


def test_other_folders_stay(temporary: Path, tmp_path: Path) -> None:
    """Folders without a lock, links, files, other prefixes."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/lock").touch()
    (temporary / f"{PREFIX}link").symlink_to(tmp_path / "mine")
    (temporary / f"{PREFIX}file").touch()
    (temporary / f"{PREFIX}foreign").mkdir()
    (temporary / f"{PREFIX}foreign/work.txt").touch()
    (temporary / "other-1").mkdir()
    (temporary / "other-1/lock").touch()
    before = sorted(temporary.rglob("*"))
    remove_leftovers(PREFIX)
    assert sorted(temporary.rglob("*")) == before and (tmp_path / "mine/lock").exists()


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_old_files_are_deleted_beside_others_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, broken links, pipes and files that cannot be deleted do not stop the sweep."""
    monkeypatch.setattr("stvit.tools.demonstration.scratch._changed", lambda status: status.st_mtime)
    for name in ("a/old.png", "b/old.png", "b/new.png", "stuck/old.png", "z/old.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(5000))
        if "old" in name:
            age(tmp_path / name, 5000)
    (tmp_path / "a/link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "a/pipe")
    age(tmp_path / "a/pipe", 5000)
    remove = os.remove

    def fail(path: Any) -> None:
        if "stuck" in str(path):
            raise PermissionError("not now")
        remove(path)

    monkeypatch.setattr(os, "remove", fail)
    storage = Storage(tmp_path, 10**6, max_age=3000)
    storage.sweep()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left == {"a/link", "b/new.png", "stuck/old.png"}
    assert 2 * 5000 <= storage.stored <= 2 * 5000 + 5 * 4096
    for name in "ab":
        age(tmp_path / name, 5000)
    remove(tmp_path / "a/link")
    age(tmp_path / "a", 5000)
    storage.sweep()
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_the_oldest_files_are_deleted_above_half_of_the_limit(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the last minute are kept."""
    monkeypatch.setattr("stvit.tools.demonstration.scratch._changed", lambda status: status.st_mtime)
    for i in range(10):
        (temporary / f"{i}.png").write_bytes(bytes(100_000))
        age(temporary / f"{i}.png", 1000 - i if i < 9 else 0)
    storage = Storage(temporary, 1_000_000, max_age=3000)
    storage.sweep()
    assert sorted(path.name for path in temporary.iterdir()) == ["6.png", "7.png", "8.png", "9.png"]
    assert storage.stored <= storage.limit / 2
    storage.limit = 1
    storage.sweep()
    assert [path.name for path in temporary.iterdir()] == ["9.png"]


def test_the_sweeping_thread_outlives_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path, 1000, max_age=3000)
    runs, again = [], threading.Event()

    def fail_once() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("of any kind")
        again.set()

    storage.sweep = fail_once
    with storage.kept_small(seconds=0.01):
        assert again.wait(60)
    assert "of any kind" in capsys.readouterr().out
