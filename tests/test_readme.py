"""Tests the snippets, numbers, commands and links of the README."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
from torch.utils.flop_counter import FlopCounterMode

from stvit.hub import save
from tests.hub_server import Hub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
ROW = r"^\| `(stvit_\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|"


def test_length() -> None:
    assert len(README.splitlines()) < 150


def test_python_runs_as_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(timm.create_model("test_stvit", num_classes=4), tmp_path / "runs/flowers/best")
    hub.create_repo("ORG/flowers")
    hub.commit("ORG/flowers", {file.name: file.read_bytes() for file in (tmp_path / "runs/flowers/best").iterdir()})
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    blocks = [block for block in BLOCKS if "adapters.yolo" not in block]
    assert (len(blocks), len(BLOCKS)) == (5, 6)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert capsys.readouterr().out == "cat\n"
    assert scope["logits"].shape == (1, 10)
    assert [features.shape[-1] for features in scope["maps"]] == [56, 28, 14, 7]
    assert scope["detector"].roi_heads.has_mask() and scope["segmenter"].num_classes == 150
    assert scope["scores"].shape == (8, 10)
    assert scope["flowers"].num_classes == scope["own"].num_classes == 4
    assert scope["view"].assignment.shape == (300, 451) and Path("super_tokens.png").exists()


def test_detection_runs_as_written(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the snippet on fewer and smaller images, which have the name of the dataset in the README.

    MuSGD's steps take minutes on a CPU for a model of this size. tests/test_yolo_engine.py runs it on smaller models.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco8.yaml").write_text(photos.read_text())
    (block,) = [block for block in BLOCKS if "adapters.yolo" in block]
    for shown, run in (
        ("imgsz=640", "imgsz=64, plots=False"),
        ("epochs=10", f"epochs=1, project={str(tmp_path)!r}"),
        ("MuSGD", "AdamW"),
    ):
        assert block.count(shown) == 1
        block = block.replace(shown, run)
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["detector"].model.model[0].name == "stvit_small"
    assert next(tmp_path.rglob("best.pt"))


@pytest.mark.parametrize("name", sorted(set(timm.list_models(module="stvit")) - {"test_stvit"}))
def test_figures_of_the_table(name: str) -> None:
    model: Any = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(model.final_conv.weight.new_empty(1, 3, 224, 224))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    channels = ", ".join(str(info["num_chs"]) for info in model.feature_info)
    depths = ", ".join(str(len(stage.blocks)) for stage in model.stages)
    for text in (README, (ROOT / "docs/index.md").read_text(encoding="utf-8")):
        rows = {found: row for found, *row in re.findall(ROW, text, re.MULTILINE)}
        assert rows[name] == [f"{parameters:.2f}", f"{counter.get_total_flops() / 2e9:.2f}", channels, depths]


def test_make_commands_exist() -> None:
    commands = re.findall(r"^make (\w+)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
    assert {"train", "test"} <= set(commands)
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    ci = (ROOT / ".ci/run").read_text()
    assert "\nmake test\n" in ci and "\nmake docs\n" in ci


def test_commands_without_make_are_those_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv").replace("'", '"')
    for variable in ("BIN", "CONFIG", "ARGS"):
        value = re.search(rf"^{variable} \??:?= ?(.*)$", makefile, re.MULTILINE)[1]
        makefile = makefile.replace(f"$({variable})", value)
    shown = 0
    for document in ("docs/get-started.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for command in re.findall(r"^(?:OMP_NUM_THREADS=1 )?\.venv/bin/python .*$", text, re.MULTILINE):
            # make links the package for mypy where this installs it: Windows needs rights for links.
            made = command.split(" && ")[-1]
            for module, program in {"ruff": "ruff", "mypy": "mypy", "codespell_lib": "codespell"}.items():
                made = made.replace(f"python -m {module}", program)
            assert re.search(rf"^\t{re.escape(made)} *$", makefile, re.MULTILINE), command
            shown += 1
    assert shown == 10


def test_links_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!http)(.*?)\)", text) + re.findall(r'(?:src|srcset)="(.*?)"', text)
        for link in links:
            path, _, anchor = link.partition("#")
            assert (ROOT / path).exists(), f"{document}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{document}: {link}"
