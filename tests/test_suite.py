"""Tests which tests may be skipped: with CI=true only those that need a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "CI"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_a_missing_browser_fails_in_ci(tmp_path: Path) -> None:
    arguments = ("tests/test_demo.py", "-k", "test_classify")
    done = run_pytest(*arguments, PATH=str(tmp_path))
    assert done.returncode == 0 and "1 skipped" in done.stdout, done.stdout
    done = run_pytest(*arguments, PATH=str(tmp_path), CI="true")
    assert done.returncode == 1 and "1 error" in done.stdout, done.stdout
    assert "no browser: it takes chromium and chromedriver" in done.stdout
    assert "Tests must not be skipped in CI" in done.stdout


@pytest.mark.long
def test_a_missing_module_fails_in_ci(tmp_path: Path) -> None:
    """A skip of one test fails, and so does a skip of a whole file."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_one.py").write_text("import pytest\ndef test(): pytest.importorskip('stvit_missing')\n")
    (tmp_path / "test_all.py").write_text("import pytest\npytest.importorskip('stvit_missing')\ndef test(): pass\n")
    arguments = (str(tmp_path), f"--rootdir={tmp_path}", "--continue-on-collection-errors")
    done = run_pytest(*arguments, PYTHONPATH=str(TESTS))
    assert done.returncode == 0 and "2 skipped" in done.stdout, done.stdout
    done = run_pytest(*arguments, PYTHONPATH=str(TESTS), CI="true")
    assert done.returncode == 1 and "1 failed, 1 error" in done.stdout, done.stdout


@pytest.mark.long
def test_a_missing_gpu_skips_in_ci() -> None:
    done = run_pytest("tests/test_triton.py", "-m", "gpu", CUDA_VISIBLE_DEVICES="", CI="true")
    assert done.returncode == 0 and "needs a GPU that torch.cuda can use" in done.stdout, done.stdout
    assert " skipped" in done.stdout.splitlines()[-1] and " passed" not in done.stdout.splitlines()[-1]
