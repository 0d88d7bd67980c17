"""Tests the documentation: Python snippets, commands and the checks of the site.

Snippets of a page run in order, in one namespace, as they are written. A page that takes more than a few seconds is
marked `long`. Shell commands of a page in `SHELL_PAGES` run too, with flags that make them small.
"""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from ultralytics.utils import ASSETS, DEFAULT_CFG_DICT

from stvit.adapters import segmentation
from stvit.adapters.folder import save_model
from stvit.adapters.yolo import YOLO
from stvit.hub import save
from stvit.tools import (
    benchmark,
    convert_checkpoint,
    demo,
    export,
    predict_det,
    predict_seg,
    push_to_hub,
    train_cls,
    train_det,
    train_seg,
    validate_cls,
    validate_det,
    validate_seg,
    visualize,
)
from tests.golden.fill import draw
from tests.hub_server import OWNER, Hub

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
# These pages show programs that made measurements. They need the data and the time of the measurements.
RECORDS = {"results.md", "speed.md", "benchmarks/gpu.md"}
FAST_PAGES = {"faq.md", "guides/data.md", "guides/segmentation.md", "how-it-works.md", "index.md"}
SHELL_PAGES = {"get-started.md", "guides/export.md", "guides/hub.md", "guides/super-tokens.md"}
LABELS = ["daisy", "rose", "tulip", "violet"]

PROGRAMS: dict[str, Any] = {
    "train": train_cls,
    "validate": validate_cls,
    "train-det": train_det,
    "validate-det": validate_det,
    "predict-det": predict_det,
    "train-seg": train_seg,
    "validate-seg": validate_seg,
    "predict-seg": predict_seg,
    "export": export,
    "convert": convert_checkpoint,
    "push": push_to_hub,
    "visualize": visualize,
    "demo": demo,
    "benchmark": benchmark,
}
# Flags that make a command small enough for a test.
SMALL = {
    "train": "--model test_stvit --img-size 32 --epochs 1 --batch-size 20 --warmup-epochs 0 --workers 0",
    "validate": "--workers 0",
    "export": "--workers 0",
    "visualize": "--img-size 64",
}


def read(page: str) -> str:
    return (ROOT / page if page == "README.md" else DOCS / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns the language and the text of each snippet, in order."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Returns the command and the arguments of each line of a page that starts one of ours."""
    shell = "\n".join(text for language, text in blocks(page) if language == "sh").replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*?)"$', shell, re.MULTILINE | re.DOTALL):
        shell = shell.replace(f"${name}", " ".join(value.split()))
    found = []
    files = {module.__name__.split(".")[-1]: name for name, module in PROGRAMS.items()} | {"yolo": "yolo"}
    for line in re.split(r"\n|; ", shell):
        match = re.search(r"\bstvit ([\w-]+)(.*)|(?:tools/|stvit\.tools\.)(\w+)(?:\.py)?(.*)", line)
        if match and "…" not in line and "--help" not in line:
            name = match[1] or files[match[3]]
            found.append((name, shlex.split(match[2] if match[1] else match[4], comments=True)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Snippets


@pytest.fixture
def workplace(
    hub: Hub,
    photos: Path,
    write_digits: Callable[[Path, int, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Folder with the images, runs and repositories that the pages name."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    write_digits(folder / "flowers", 60, 20)
    for name in ("photo.jpg", "photos/bus.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(ASSETS / "bus.jpg").convert("RGB").resize((405, 540)).save(name)
    (folder / "coco8.yaml").write_text(photos.read_text())

    model = timm.create_model("test_stvit", num_classes=len(LABELS))
    for place in ("runs/flowers/best", "runs/cifar10/best", "repository"):
        save(model, folder / place, label_names=LABELS)
    hub.add_user("owner", OWNER, orgs=("ORG",))
    hub.create_repo("ORG/flowers")
    hub.commit("ORG/flowers", {file.name: file.read_bytes() for file in (folder / "repository").iterdir()})
    segmenter = segmentation.upernet("test_stvit", num_classes=3, decoder_channels=16)
    save_model(segmenter, folder / "runs/streets/best", label_names=["road", "sidewalk", "car"])
    digits: Any = timm.create_model("stvit_pico", in_chans=1, num_classes=10)
    digits.pretrained_cfg.update(input_size=(1, 32, 32), mean=[0.3], std=[0.35])
    save(digits, folder / "runs/digits/best", label_names=[str(n) for n in range(10)])
    return folder


def write_official_file(path: Path) -> None:
    """Writes random weights in the authors' format.

    The authors' file is not in this repository.
    """
    keys = json.loads((ROOT / "tests/golden/official_keys.json").read_text())["stvit_small"]
    torch.save({"model": {key: torch.from_numpy(draw(key, tuple(shape))) for key, shape in keys.items()}}, path)


def run_command(name: str, arguments: list[str], folder: Path) -> None:
    replaced = [{"/data/flowers": str(folder / "flowers")}.get(argument, argument) for argument in arguments]
    if "hf-hub:ORG/flowers@last" in arguments:
        shutil.rmtree(folder / "runs/flowers")  # another machine does not have the run
    small = [] if "parity" in arguments or "digits" in arguments else shlex.split(SMALL.get(name, ""))
    assert PROGRAMS[name].main([*replaced, *small]) == 0, (name, replaced)


def run_page(page: str, folder: Path) -> dict[str, Any]:
    """Runs the snippets of a page and returns the names that they define."""
    scope: dict[str, Any] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), scope)
        elif page in SHELL_PAGES:
            for line in text.replace("\\\n", " ").splitlines():
                match = re.match(r"stvit ([\w-]+)(.*)", line)
                if match and match[1] not in ("demo", "yolo"):
                    run_command(match[1], shlex.split(match[2], comments=True), folder)
    return scope


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page in FAST_PAGES else (pytest.mark.long, pytest.mark.timeout(1800)))
        for page in PAGES
        if page not in RECORDS and page != "guides/yolo.md" and any(lang == "python" for lang, _ in blocks(page))
    ],
)
def test_page_runs_as_written(
    page: str, workplace: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page == "get-started.md":
        shutil.rmtree(workplace / "runs/digits")
    if page == "guides/hub.md":
        write_official_file(workplace / "stvit_small_official.pth")
        (workplace / "report").mkdir()
        detector: Any = YOLO("yolo26n-stokenattention.yaml")
        (workplace / "runs/detect/train/weights").mkdir(parents=True)
        detector.save(workplace / "runs/detect/train/weights/best.pt")
    if page == "guides/super-tokens.md":
        prepare_super_tokens(workplace)
    scope = run_page(page, workplace)
    if page == "index.md":
        assert scope["logits"].shape == (1, 10)
        assert [features.shape[-1] for features in scope["maps"]] == [56, 28, 14, 7]
    if page == "faq.md":
        assert "True" in capsys.readouterr().out
    if page == "get-started.md":
        out = capsys.readouterr().out
        assert "(1, 192, 7, 10)" in out and re.search(r"^7 0\.\d+$", out, re.MULTILINE)
        assert json.loads((workplace / "report/results.json").read_text())["top1"] > 90
    if page == "guides/frameworks.md":
        assert scope["masks"].shape == (1, 4, 128, 160) and set(scope["found"]) == {"boxes", "labels", "scores"}
        assert scope["smooth"].shape == scope["y"].shape == (1, 64, 56, 56)
    if page == "guides/segmentation.md":
        assert scope["logits"].shape == (1, 3, 540, 405) and set(scope["names"]) <= {"road", "sidewalk", "car"}
    if page == "guides/super-tokens.md":
        assert Image.open("association.png").size == Image.open("docs/cat.jpg").size


def prepare_super_tokens(folder: Path) -> None:
    """Writes a run with kept epochs, a detector and masks."""
    flags = f"--data-dir {folder / 'flowers'} {SMALL['train']} --epochs 2 --checkpoint-epochs 1 --experiment cifar10"
    shutil.rmtree(folder / "runs/cifar10")
    assert train_cls.main(shlex.split(flags)) == 0
    detector: Any = YOLO("yolo26n-stokenattention.yaml")
    (folder / "runs/detect/train/weights").mkdir(parents=True)
    detector.save(folder / "runs/detect/train/weights/best.pt")
    (folder / "masks").mkdir()
    mask = Image.new("L", (405, 540))
    mask.paste(1, (100, 200, 300, 400))
    mask.save(folder / "masks/bus.png")


@pytest.mark.long
def test_commands_of_the_detection_guide_run(
    write_coco: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the commands for your own images, with a smaller model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = write_coco(tmp_path / "data")
    (folder / "images").rename(tmp_path / "photos")
    for name in ("train.json", "val.json"):
        shutil.copy(folder / "instances.json", name)
    sizes = "--min-size 64 --max-size 96 --test-size 64 --epochs 1 --decay-milestones 1 --batch-size 2"
    small = {"train-det": f"--backbone test_stvit {sizes} --workers 0", "validate-det": "--workers 0"}
    done = []
    for name, arguments in commands("guides/detection.md"):
        if "/data/coco" not in arguments:
            done.append(name)
            assert PROGRAMS[name].main([*arguments, *shlex.split(small.get(name, ""))]) == 0
    assert done == ["train-det", "validate-det", "predict-det"]
    assert {path.name for path in Path("report").iterdir()} == {"results.json", "per_class.csv", "detections.json"}
    assert len(list(Path("predictions").glob("*.jpg"))) == 4


@pytest.mark.long
def test_detection_runs_as_written(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the page of YOLO26 on fewer and smaller images.

    MuSGD's steps take minutes on a CPU.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco8.yaml").write_text(photos.read_text())
    text = "".join(text for language, text in blocks("guides/yolo.md") if language == "python")
    changes = {"imgsz=640": "imgsz=64, plots=False", "epochs=10": f"epochs=1, project={str(tmp_path)!r}"}
    for shown, run in {**changes, "MuSGD": "AdamW", "yolo26s-stvit_small.yaml": "yolo26n-stvit_pico.yaml"}.items():
        assert text.count(shown) == 1
        text = text.replace(shown, run)
    scope: dict[str, Any] = {}
    exec(compile(text, "guides/yolo.md", "exec"), scope)
    assert next(tmp_path.rglob("best.pt")) and Path(scope["path"]).exists()


@pytest.mark.long
def test_notebook_runs(tmp_path: Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    accuracies = [float(number) for number in re.findall(r"held-out accuracy ([\d.]+) %", printed)]
    assert accuracies and accuracies[-1] > 85
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_commands_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, arguments in commands(page):
        if name == "yolo":
            keys = {argument.partition("=")[0] for argument in arguments if "=" in argument}
            ours = {"pretrained_backbone", "stock_weights", "backbone_lr_scale", "layer_decay", "trust"}
            assert keys <= DEFAULT_CFG_DICT.keys() | ours, arguments
        elif hasattr(PROGRAMS[name], "parse_args"):
            PROGRAMS[name].parse_args(arguments)
        else:
            PROGRAMS[name].create_parser().parse_args(arguments)


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_flags_in_the_text_exist(page: str) -> None:
    for name, arguments in re.findall(r"(?<!`)`stvit ([\w-]+) (.+?)`", read(page)):
        if name in PROGRAMS:
            text = PROGRAMS[name].create_parser().format_help()
            for parser in find_subparsers(PROGRAMS[name].create_parser()):
                text += parser.format_help()
            for flag in re.findall(r"--[\w-]+", arguments):
                assert re.search(rf"{flag}\b", text), (name, flag)


def find_subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [subparser for action in actions for subparser in action.choices.values()]


def test_each_command_is_shown() -> None:
    assert {name for page in PAGES for name, _ in commands(page)} == {*PROGRAMS, "yolo"}


# ---------------------------------------------------------------------------------------------------------------------
# The site


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """Returns the program docs/build_site.py as a module."""
    spec = importlib.util.spec_from_file_location("build_site", DOCS / "build_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_is_in_the_navigation() -> None:
    shown = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert set(PAGES) <= shown
    made = {"tutorial.md", "reference/commands.md"} | {page for page in shown if page.startswith("reference/")}
    assert shown <= set(PAGES) | made


def test_reference_has_each_command(site: ModuleType, tmp_path: Path) -> None:
    site.write_commands(tmp_path / "commands.md")
    text = (tmp_path / "commands.md").read_text()
    assert set(PROGRAMS) | {"yolo"} == set(site.COMMANDS)
    for name in site.COMMANDS:
        assert f"\n## stvit {name}\n" in text
    assert re.search(r"^\| `--batch-size`.* \| 128 \| .+ \|$", text, re.MULTILINE)
    assert "### stvit benchmark model" in text


def test_reference_has_each_public_module(site: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "BUILD", tmp_path)
    site.copy_pages()
    site.write_reference(tmp_path / "docs/reference")
    pages = "".join(path.read_text() for path in (tmp_path / "docs/reference").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert sorted(listed) == [name for name in site.find_modules(tmp_path / "package/stvit") if name != "stvit"]
    assert {"stvit.ops", "stvit.stvit", "stvit.inference", "stvit.images", "stvit.adapters.yolo"} <= set(listed)


def test_missing_and_foreign_files_are_found(site: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "there.png").touch()
    (tmp_path / "page/index.html").write_text(
        '<img src="../there.png"><img src="gone.png"><script src="https://cdn.example/a.js"></script>'
        '<a href="https://example.com">a link may leave the site</a>'
    )
    (tmp_path / "a.css").write_text('@import "https://fonts.example/b.css";')
    assert site.find_missing_files(tmp_path) == ["page/index.html: gone.png does not exist"]
    foreign = site.find_foreign_assets(tmp_path)
    assert len(foreign) == 2 and "cdn.example" in foreign[0] and "fonts.example" in foreign[1]


@pytest.mark.parametrize("link", ["missing.md", "#missing", "other.md#missing", "other.md#there"])
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n[link]({link})\n")
    (tmp_path / "docs/other.md").write_text("# Other\n\n## There\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "test"\n')
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (link == "other.md#there"), done.stdout + done.stderr
