"""Tests that `stvit` finds its commands and answers without importing PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest

from stvit.tools.main import COMMANDS

STVIT = Path(sys.executable).with_name("stvit")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_help_lists_each_command_in_one_line() -> None:
    shown = run(STVIT, "--help")
    assert shown.returncode == 0 and not shown.stderr
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name:<13}{summary}\n" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert run(STVIT).returncode == 2


def test_every_program_has_a_command() -> None:
    folder = Path(__file__).parents[1] / "tools"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "main"} == {name for name, _ in COMMANDS.values()}


def test_an_unknown_command_is_one_line() -> None:
    shown = run(STVIT, "trian")
    assert shown.returncode == 2 and not shown.stdout
    assert shown.stderr == f"error: unknown command 'trian', expected one of {', '.join(COMMANDS)}\n"


def test_errors_show_the_name_of_the_command() -> None:
    shown = run(STVIT, "convert", "--nope")
    assert shown.returncode == 2
    assert "(see stvit convert --help)" in shown.stderr
    shown = run(STVIT, "benchmark", "data", "--workers", "x")
    assert shown.returncode == 2
    assert "(see stvit benchmark data --help)" in shown.stderr


@pytest.mark.parametrize(
    "command", [[STVIT, "--version"], [sys.executable, "-X", "importtime", "-m", "stvit.tools.main", "--help"]]
)
def test_answers_without_pytorch(command: list[str | Path]) -> None:
    shown = run(*command)
    assert shown.returncode == 0 and "stvit" in shown.stdout
    assert " torch\n" not in shown.stderr and " timm\n" not in shown.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_imports_no_pytorch(name: str) -> None:
    shown = run(sys.executable, "-X", "importtime", "-m", "stvit.tools.main", name, "--help")
    assert shown.returncode == 0 and f"{COMMANDS[name][0]}.py" in shown.stdout
    assert " argparse\n" in shown.stderr  # the imports are listed
    assert not any(f" {module}\n" in shown.stderr for module in ("torch", "timm", "gradio"))


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import stvit, timm; print(timm.is_model('stvit_small'))", marks=pytest.mark.long),
        "import timm, stvit; print(timm.is_model('stvit_small'))",
        # A command imports public names at their first use.
        "import sys; sys.argv[0] = 'stvit'; import stvit; assert 'torch' not in sys.modules; "
        "model = stvit.create_model('test_stvit'); print(isinstance(model, stvit.STViT) and not hasattr(stvit, 'x'))",
    ],
)
def test_import_registers_the_models(program: str) -> None:
    shown = run(sys.executable, "-c", program)
    assert shown.stdout == "True\n", shown.stderr
