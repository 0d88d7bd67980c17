"""Tests the wheel: contents, metadata and use outside the repository."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import stvit
from stvit.weights.packaged import PACKAGED

ROOT = Path(__file__).parents[1]

# The new process imports the dependencies of this environment, and stvit only from the folder of the wheel.
OUTSIDE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "stvit" not in getattr(finder, "__module__", "")]
sys.path[:] = [entry for entry in sys.path if entry != {root!r}]
sys.path.insert(0, {target!r})
"""


def run(command: Sequence[str | Path], cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel built from a copy of the sources, which excludes files of earlier builds."""
    folder = tmp_path_factory.mktemp("wheel")
    files = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", folder / "source"], folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_wheel_contains_one_package_with_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"stvit", f"stvit-{stvit.__version__}.dist-info"}
    assert "stvit/py.typed" in names
    for folder in ("adapters", "configs", "tools"):
        sources = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")}
        assert sources and {f"stvit/{path.as_posix()}" for path in sources} <= set(names)
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "stvit").rglob("*.py")} <= set(names)
    assert any(name.startswith("stvit/configs/") and name.endswith(".yaml") for name in names)
    assert {f"stvit/weights/packaged/{name}.safetensors" for name in PACKAGED} <= set(names)
    assert wheel.stat().st_size < 5e6
    licenses = f"stvit-{stvit.__version__}.dist-info/licenses/"
    assert {licenses + "LICENSE", licenses + "NOTICE"} <= set(names)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"stvit-{stvit.__version__}.dist-info/METADATA").decode().split("\n\n")[0]
    assert "Name: stvit\n" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    needed = re.findall(r"Requires-Dist: (\S+)$", metadata, re.MULTILINE)
    assert {"torch>=2.6", "timm>=1.0.31"} <= set(needed)
    names = {name for name, bound in (need.split(">=") for need in needed) if bound}
    assert {"torch", "timm", "safetensors", "huggingface-hub"} <= names
    assert 'Requires-Dist: ultralytics>=8.4.190; extra == "yolo"' in metadata
    assert set(re.findall(r"Provides-Extra: (\S+)", metadata)) == {
        "train",
        "yolo",
        "detection",
        "segmentation",
        "visualize",
        "export",
        "demo",
        "docs",
        "dev",
    }


def test_checkout_finds_the_adapters_without_an_editable_install(tmp_path: Path) -> None:
    # Without site, no editable install is active: only the folders of this list are searched.
    folders = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    program = f"import sys; sys.path[:0] = {folders}\nimport stvit.adapters.yolo, stvit.tools, stvit.configs\n"
    program += "print(stvit.adapters.__file__)"
    output = run([sys.executable, "-S", "-c", program], tmp_path)
    assert output.splitlines()[-1] == str(ROOT / "adapters" / "__init__.py")


def test_wheel_works_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel], tmp_path)
    program = (
        OUTSIDE.format(root=str(ROOT), target=str(target))
        + """
import importlib.resources, timm, torch, yaml
import stvit, stvit.adapters, stvit.configs, stvit.tools.train_cls
for module in (stvit, stvit.adapters, stvit.configs, stvit.tools.train_cls):
    assert module.__file__.startswith(sys.path[0]), module.__file__
model = timm.create_model("stvit_pico.cifar10", pretrained=True).eval()
print(tuple(model(torch.zeros(1, 3, 64, 64)).shape))
recipe = importlib.resources.files("stvit.configs") / "cls" / "stvit_pico_digits.yaml"
print(yaml.safe_load(recipe.read_text())["model"])
"""
    )
    assert run([sys.executable, "-c", program], tmp_path).splitlines() == ["(1, 10)", "stvit_pico"]


def test_import_needs_no_extra() -> None:
    """The models work if the packages of the extras are missing."""
    extras = ["ultralytics", "onnx", "onnxruntime", "onnxscript", "sklearn", "datasets", "webdataset", "pytest"]
    extras += ["matplotlib", "tensorboard", "wandb", "skimage", "gradio", "selenium"]
    program = f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
    program += "import stvit, timm; print(timm.create_model('test_stvit').num_classes)"
    assert run([sys.executable, "-c", program], ROOT).strip() == "1000"


def test_public_names() -> None:
    assert set(stvit.__all__) == {
        "PretrainedDownloadError",
        "PretrainedError",
        "STViT",
        "SuperTokenAttention",
        "create_model",
        "optimize_for_inference",
        "sample_super_tokens",
        "upsample_super_tokens",
        "visualize",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", stvit.__version__)
