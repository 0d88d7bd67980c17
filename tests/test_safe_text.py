"""Tests that messages, logs and cards contain no secrets.

They also contain no control characters and no untrusted markup.
"""

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from PIL import Image

import stvit
from stvit import hub as hub_module
from stvit.hub.card import model_card
from stvit.safe_text import code_span, escape_markdown, one_line, printable, redact, redact_values
from stvit.tools import convert_checkpoint, push_to_hub, train_cls, validate_cls
from stvit.tools.common import classification
from stvit.tools.common.cli import CommandError, OneProcessError
from stvit.tools.common.flags import to_recipe
from tests.hub_server import OWNER, Hub

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "aB3" * 11
COMMANDS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")


# The functions


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN}.", "token hf_***."),
        ("hf_finetune1 and hf_hub_download", "hf_finetune1 and hf_hub_download"),
        ("hf_oauth_eyJhbGci.eyJzdWIi.x-y_z failed", "hf_*** failed"),
        (f"{{'Authorization': 'Bearer {TOKEN}'}}", "{'Authorization': '***'}"),
        ("authorization: Basic dXNlcjpwYXNz, then", "authorization: ***, then"),
        ("Bearer abcdefgh1234", "Bearer ***"),
        ("https://user:pass@host:8/a?b=c", "https://***@host:8/a?b=c"),
        ("http://user:p@ss@host/", "http://***@host/"),
        ("proxy socks5h://me@host", "proxy socks5h://***@host"),
        ("https://host/a?X-Amz-Signature=0123&b=1", "https://host/a?X-Amz-Signature=***&b=1"),
        ("https://host/a?b=1&token=0123", "https://host/a?b=1&token=***"),
        # Not secrets
        (
            "hf-hub:org/name@main hf_hub:org/name hf_hub_download",
            "hf-hub:org/name@main hf_hub:org/name hf_hub_download",
        ),
        ("https://host/a@b and me@host", "https://host/a@b and me@host"),
        ("the basic authorization of bearers", "the basic authorization of bearers"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


def test_secrets_in_use_are_hidden_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "own-token-of-mine")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pa%2Fss-word@proxy:8080")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    for secret in ("own-token-of-mine", "pa%2Fss-word", "me:pa/ss-word", "pa/ss-word", "0123456789abcdef"):
        assert redact(f"({secret})") == "(***)"
    assert redact(base64.b64encode(b"me:pa/ss-word").decode()) == "***"
    values: dict[str, Any] = {"a": ["x own-token-of-mine"], "b": (1, None), "c": {"d": "0123456789abcdef"}}
    assert redact_values(values) == {"a": ["x ***"], "b": (1, None), "c": {"d": "***"}}


def test_control_characters_are_escaped() -> None:
    assert printable("a\n\r\t\x1b[31m\x7f\x9b\u2028\u202e\udc80b") == r"a\n\r\t\x1b[31m\x7f\x9b\u2028\u202e\udc80b"
    for text in ("Größe 猫 ॐ क्‍ष 👨‍👩‍👧", "a\u00a0b\u3000c"):
        assert printable(text) == text
    assert printable("a\nb", kept="\n") == "a\nb"
    assert one_line(" a\nerror: b ") == r"a\nerror: b"


def test_markdown_shows_text_as_it_is() -> None:
    assert code_span("<b>|`x``") == r"``` <b>\|`x`` ```" and code_span("digit_0") == "`digit_0`"
    # Two backticks would begin a code span that ends in the next text.
    assert code_span("") == code_span("\n") == "` `"
    assert escape_markdown("_a_ b_c __d__") == r"\_a\_ b_c \_\_d\_\_"
    assert escape_markdown("<img src=x> [a](b) *c* `d` | e\n# f") == (
        r"&lt;img src=x&gt; \[a\](b) \*c\* \`d\` \| e\\n# f"
    )


# Commands


def test_error_is_one_line() -> None:
    error = CommandError("no such file 'a\nerror: b\r\x1b[2K'")
    assert str(error) == r"no such file 'a\nerror: b\r\x1b[2K'"
    wrapped = OneProcessError(
        "Caught OneProcessError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\nstvit.tools.common.cli.OneProcessError: cannot read image Error: a: b\n'
    )
    assert str(wrapped) == "cannot read image Error: a: b"


@pytest.mark.parametrize("name", ["x\nerror: forged", "x\rerror: forged", "x\x1b[2K\x1b[1Gerror: forged"])
def test_arguments_cannot_forge_an_error(
    hub: Hub, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / name)
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (train_cls.main, ["--model=test_stvit", f"--data-dir={path}"]),
        (validate_cls.main, [f"--checkpoint={path}", f"--data-dir={tmp_path}"]),
        (convert_checkpoint.main, [path, f"--output={tmp_path / 'out'}"]),
        (push_to_hub.main, [path, "--repo-id=org/x"]),
        (train_cls.main, [f"--config={path}"]),
        (train_cls.main, [f"--epochs={name}"]),
    ]
    for main, flags in commands:
        try:
            status = main(flags)
        except SystemExit as error:
            status = int(str(error.code))
        said = capsys.readouterr().err
        assert status != 0 and said.startswith("error: ") and said.endswith("\n"), said
        assert said[:-1].isprintable() and "error: forged" in said, said


def test_image_with_a_hostile_name(own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes from a worker process, and PyTorch puts its traceback before the message."""
    bad = own_digits_folder / "val/digit_0/a\nerror: b\x1b[2K.png"
    bad.write_bytes(b"")
    flags = f"--model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=1 --output={tmp_path}"
    assert train_cls.main([*flags.split(), f"--data-dir={own_digits_folder}"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: cannot read image {own_digits_folder}") and r"a\nerror: b\x1b[2K.png: " in line


def test_names_of_classes_and_files_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["<script>alert(1)</script>", "\x1b]0;owned\x07|`x`", "[a](javascript:b)"]
    for split in ("train", "val"):
        for number, name in enumerate(names[1:]):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for place in range(4):
                Image.new("L", (16, 16), 60 * number).save(tmp_path / "data" / split / name / f"{place}.png")
    flags = "--model=test_stvit --img-size=32 --epochs=1 --batch-size=4 --workers=0 --experiment=it"
    assert train_cls.main([*flags.split(), f"--data-dir={tmp_path / 'data'}", f"--output={tmp_path}"]) == 0
    best = tmp_path / "it/best"
    evaluation = [f"--checkpoint={best}", f"--data-dir={tmp_path / 'data'}", "--workers=0", "--img-size=32"]
    assert validate_cls.main([*evaluation, f"--output={tmp_path / 'results'}"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out and "\x07" not in said.out
    hub_module.save(timm.create_model("test_stvit", num_classes=3), tmp_path / "net", label_names=names)
    card = model_card(tmp_path / "net", "hf-hub:org/x")
    assert "classes: 3 (`<script>alert(1)</script>`, " in card and r"``\x1b]0;owned\x07\|`x```" not in card
    assert "\x1b" not in card and "`[a](javascript:b)`" in card


def test_card_of_a_folder_from_elsewhere(tmp_path: Path) -> None:
    model = timm.create_model("test_stvit", num_classes=3)
    details = hub_module.Details(weights=f"<b>x</b>\n# y {TOKEN}", source="https://u:p@host/x | y")
    hub_module.save(model, tmp_path / "net", details=details)
    card = model_card(tmp_path / "net", "hf-hub:org/x")
    assert r"- weights: &lt;b&gt;x&lt;/b&gt;\\n# y hf\_\*\*\*" in card
    assert r"- converted from: https://\*\*\*@host/x \| y" in card and TOKEN not in card


# The Hub


def test_server_that_repeats_the_token(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.create_repo("org/echo")
    hub.fail("org/echo", "echo")
    with pytest.raises(stvit.PretrainedError, match=r"status 400 \(.*Authorization: \*\*\*\)") as raised:
        timm.create_model("test_stvit", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "org/echo"})
    assert OWNER not in str(raised.value)
    hub_module.save(timm.create_model("test_stvit"), tmp_path / "net")
    assert push_to_hub.main([str(tmp_path / "net"), "--repo-id=org/echo"]) == 1
    said = capsys.readouterr()
    assert "Authorization: ***" in said.err and OWNER not in said.err + said.out + caplog.text


def test_password_of_the_endpoint(
    hub: Hub, digits_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The output and the files of a real process do not contain the password.

    Its log is uploaded.
    """
    hub.fail("", "echo")
    env = hub.environment(tmp_path / "home", OWNER) | {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": "key-of-wandb"}
    env["HF_ENDPOINT"] = env["HF_ENDPOINT"].replace("http://", "http://me:pass-word@")
    command = (
        "-m stvit.tools.train_cls --model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=0 "
        f"--experiment=it --repo-id=org/run --output={tmp_path} --data-dir={digits_folder}"
    )
    done = subprocess.run([sys.executable, *command.split()], env=env, capture_output=True, text=True, check=False)
    hub.heal()
    said = done.stdout + done.stderr
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".yaml", ".md")]
    for text in (said, *(path.read_text(encoding="utf-8") for path in found)):
        assert not any(secret in text for secret in ("pass-word", OWNER, "key-of-wandb")), text
        assert base64.b64encode(b"me:pass-word").decode() not in text
    assert "warning: the snapshot after epoch 1 was not uploaded: " in said and "Authorization: ***)" in said


def test_recipe_of_a_run_contains_no_password(digits_folder: Path, tmp_path: Path) -> None:
    config = train_cls.parse_args(["--dataset=wds/x", "--data-dir=https://me:pass-word@host/x"])
    assert to_recipe(config)["data_dir"] == "https://***@host/x"
    flags = "--model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=0 --experiment=it"
    more = ["--model-kwargs", "stoken_size=(4, 2, 1, 1)"]
    assert train_cls.main([*flags.split(), *more, f"--data-dir={digits_folder}", f"--output={tmp_path}"]) == 0
    recipe = yaml.load((tmp_path / "it/config.yaml").read_text(encoding="utf-8"), yaml.FullLoader)
    assert recipe["data_dir"] == str(digits_folder) and list(recipe["model_kwargs"]["stoken_size"]) == [4, 2, 1, 1]


def test_traceback_contains_no_secret(
    digits_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise LookupError(f"server said {TOKEN}")

    monkeypatch.setattr(classification, "prepare", fail)
    assert train_cls.main(["--model=test_stvit", f"--data-dir={digits_folder}"]) == 1
    said = capsys.readouterr().err
    assert "unexpected LookupError: server said hf_***; please report it" in said
    monkeypatch.setenv("STVIT_TRACEBACK", "1")
    assert train_cls.main(["--model=test_stvit", f"--data-dir={digits_folder}"]) == 1
    said = capsys.readouterr().err
    assert "in fail" in said and "server said hf_***" in said and TOKEN not in said


# Ctrl-C


# Flags that a command needs.
FLAGS = {
    "benchmark": "op",
    "convert_checkpoint": "weights.pth --output=folder",
    "main": "train",
    "push_to_hub": "run --repo-id=org/run",
    "visualize": "image.jpg",
    "yolo": "predict",
}


@pytest.mark.parametrize(
    ("command", "start"),
    [
        pytest.param(command, start, marks=[pytest.mark.long] * (command != "train_cls"))
        for command in COMMANDS
        for start in ("file", "module")
        if (command, start) != ("main", "file")  # `stvit` is a module
    ],
)
def test_ctrl_c_during_the_imports(command: str, start: str, tmp_path: Path) -> None:
    """The process is interrupted while it imports torch.

    A fake torch waits for the test.
    """
    (tmp_path / "torch.py").write_text("import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    arguments = [str(ROOT / "tools" / f"{command}.py")] if start == "file" else ["-m", f"stvit.tools.{command}"]
    arguments += FLAGS.get(command, "").split()  # without them the command would end before it imports torch
    process = subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said == ("", "") and process.returncode == -signal.SIGINT
