"""The README: what it shows runs as written, and its figures are those of the models."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fill import draw
from hub_server import Hub
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.utils import ASSETS

from stvit.hub import save
from stvit.tools import benchmark, convert_checkpoint, demo, export, push_to_hub, train_cls, validate_cls, visualize

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODELS = {
    name: row for name, *row in re.findall(r"^\| `(stvit_\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", README, re.M)
}


def test_python_runs_as_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for repo, model in (
        ("stvit/stvit_small.in1k", timm.create_model("stvit_small")),
        ("ORG/flowers", timm.create_model("test_stvit", num_classes=4)),
    ):
        save(model, tmp_path / repo)
        hub.create_repo(repo)
        hub.commit(repo, {file.name: file.read_bytes() for file in (tmp_path / repo).iterdir()})
    keys = json.loads((ROOT / "tests/golden/official_keys.json").read_text())["stvit_small"]
    weights = {key: torch.from_numpy(draw(key, tuple(shape))) for key, shape in keys.items()}
    torch.save(
        {"model": weights}, "stvit_small_official.pth"
    )  # stands for the authors' file, which is not ours to ship

    Image.open(ASSETS / "bus.jpg").convert("RGB").resize((405, 540)).save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    yolo = [block for block in blocks if "adapters.yolo" in block]
    blocks = [block for block in blocks if block not in yolo]
    assert (len(blocks), len(yolo)) == (6, 1)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["logits"].shape == (1, 10)
    assert [m.shape[-1] for m in scope["maps"]] == [56, 28, 14, 7]
    assert scope["tokens"].shape == (1, 64, 7, 7) and scope["association"].shape == (1, 9, 56, 56)
    assert scope["smooth"].shape == scope["y"].shape == (1, 64, 56, 56)
    assert (scope["published"].num_classes, scope["flowers"].num_classes) == (1000, 4)
    assert scope["scores"].shape == (8, 10)
    assert scope["view"].assignment.shape == (540, 405) and Image.open("association.png").size == (405, 540)
    assert torch.equal(scope["model"].head.fc.weight, weights["head.weight"])


def test_detection_runs_as_written(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller and shorter, with photographs under the name of a set that is not ours to ship.

    MuSGD's steps take minutes on a CPU for a model of this size; tests/test_yolo_engine.py has it on smaller ones.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco8.yaml").write_text(photos.read_text())
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "adapters.yolo" in block)
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
        model(torch.empty(1, 3, 224, 224, device="meta"))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    channels = ", ".join(str(info["num_chs"]) for info in model.feature_info)
    depths = ", ".join(str(len(stage.blocks)) for stage in model.stages)
    assert MODELS[name] == [f"{parameters:.2f}", f"{counter.get_total_flops() / 2e9:.2f}", channels, depths]


def test_commands_exist() -> None:
    commands = re.findall(r"^make (\w+)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.M)
    assert {"train", "test"} <= set(commands)
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.M)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


def test_commands_without_make_are_those_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv").replace("'", '"')
    for variable in ("BIN", "CONFIG", "ARGS"):
        value = re.search(rf"^{variable} \??:?= ?(.*)$", makefile, re.M)[1]
        makefile = makefile.replace(f"$({variable})", value)
    shown = 0
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for command in re.findall(r"^(?:OMP_NUM_THREADS=1 )?\.venv/bin/python .*$", text, re.M):
            made = command.replace("python -m ruff", "ruff").replace("python -m mypy", "mypy")
            assert re.search(rf"^\t{re.escape(made)} *$", makefile, re.M), command
            shown += 1
    assert shown == 8


def test_flags_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command that is shown, as the shell would hand them on."""
    monkeypatch.chdir(ROOT)
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    variables = dict(re.findall(r'^(\w+)="(.*)"$', shell, re.M))
    for name, value in variables.items():
        shell = shell.replace(f"${name}", value)
    commands = re.findall(r"tools/(\w+)\.py (.*?)[`#\n]", shell + "\n" + "\n".join(re.findall(r"`python .*?`", README)))
    parsers = {
        "train_cls": train_cls.parse_args,
        "validate_cls": validate_cls.parse_args,
        "benchmark": benchmark.create_parser().parse_args,
        "demo": demo.create_parser().parse_args,
        "visualize": visualize.create_parser().parse_args,
        "convert_checkpoint": convert_checkpoint.create_parser().parse_args,
        "export": export.create_parser().parse_args,
        "push_to_hub": push_to_hub.create_parser().parse_args,
    }
    assert {name for name, _ in commands} == set(parsers)
    for name, flags in commands:
        parsers[name](shlex.split(flags))


def test_links_lead_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\((?!http)(.*?)\)", (ROOT / document).read_text()):
            path, _, anchor = link.partition("#")
            assert (ROOT / path).exists(), f"{document}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{document}: {link}"
