"""Tests of atomic writes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stvit.tools.common.files import atomic_write


def test_two_processes_do_not_mix_their_files(tmp_path: Path) -> None:
    """The second writer gets an error, and the file of the first writer does not change."""
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def write(fresh: Path) -> None:
        fresh.write_text("first")
        with pytest.raises(OSError, match=r"another process is writing this file: '.*model.onnx.tmp'"):
            atomic_write(path, lambda other: other.write_text("second"))
        assert path.read_text() == "old"

    atomic_write(path, write)
    assert path.read_text() == "first"
    atomic_write(path, lambda fresh: fresh.write_text("third"))
    assert path.read_text() == "third" and list(tmp_path.iterdir()) == [path]


def test_a_killed_process_does_not_block_others(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    code = """
        import sys, time
        from pathlib import Path
        from stvit.tools.common.files import atomic_write

        def write(fresh):
            fresh.write_text("partial")
            print("started", flush=True)
            time.sleep(600)

        atomic_write(Path(sys.argv[1]), write)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        with pytest.raises(OSError, match="another process is writing this file"):
            atomic_write(path, lambda fresh: fresh.write_text("second"))
        os.kill(process.pid, signal.SIGKILL)
    assert (tmp_path / "model.onnx.tmp").read_text() == "partial" and not path.exists()
    atomic_write(path, lambda fresh: fresh.write_text("second"))
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]
