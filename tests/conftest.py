import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import hub_server

# Ultralytics reads these variables when it is imported, and processes that tests start inherit them. Ultralytics then
# uses a settings folder for tests, installs no packages and sends no requests.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="stvit-tests-"))
os.environ.update(YOLO_AUTOINSTALL="false", YOLO_OFFLINE="true")
# Tests send nothing to the public Hub. Tests that need a Hub start a local one (hub_server).
os.environ["HF_HUB_OFFLINE"] = "1"


# Triton chooses between its interpreter and its compiler when it is imported, once per process. Without a GPU, the
# tests of the kernels need the interpreter (fixture `interpreter`). The variable is set for this import only.
if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with suppress(ImportError):
            import triton  # noqa: F401


# Each of these files has one long test. Started last, it would run while the other test processes are idle.
LONG_FILES = ("test_timm.py", "test_ultralytics.py")


# The longest tests on a GPU. Each should begin at once, in a process of its own.
LONG_ON_GPU = (
    "test_compiled_training", "test_killed_run_resumes_exactly", "test_on_a_gpu", "test_one_process_of_torchrun",
    "test_training_in_mixed_precision", "test_on_a_gpu_with_little_time", "test_validation", "test_detector",
)  # fmt: skip


@pytest.hookimpl(trylast=True)  # after the tests were selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    if torch.cuda.is_available() and all(item.get_closest_marker("gpu") for item in items):
        items[:] = spread(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch.cuda can use"))


def spread(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Returns tests in an order whose equal parts, one for each process, begin with the longest tests."""
    ordered = sorted(items, key=lambda item: item.originalname not in LONG_ON_GPU)
    return [item for first in range(processes) for item in ordered[first::processes]]


# CI installs everything that the tests need except a GPU. A skipped test there hides a mistake.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
        fail_if_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped_in_ci(report)
    return report


def fail_if_skipped_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason}\nTests must not be skipped in CI. Install what is missing, or run without CI=true."


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def write_digits() -> Callable[[Path, int, int], Path]:
    """Returns a function that writes scikit-learn's digits 0 to 3 as PNG files.

    The files are train/<class>/* and val/<class>/*. The arguments are the folder and the numbers of images per split.
    """

    def write_digits(folder: Path, train: int, val: int) -> Path:
        from sklearn.datasets import load_digits  # may be missing on a machine for GPU tests

        digits = load_digits(n_class=4)
        for i, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True)):
            if i == train + val:
                break
            path = folder / ("train" if i < train else "val") / f"digit_{target}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).resize((16, 16)).save(path)
        return folder

    return write_digits


@pytest.fixture(scope="session")
def digits_folder(write_digits: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 and 20 digits. Tests must not change it: see `own_digits_folder`."""
    return write_digits(tmp_path_factory.mktemp("digits"), 60, 20)


@pytest.fixture
def own_digits_folder(write_digits: Callable[[Path, int, int], Path], tmp_path: Path) -> Path:
    """Folder of 60 and 20 digits that a test may change."""
    return write_digits(tmp_path / "data", 60, 20)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """Hub on 127.0.0.1 that this process uses, logged in as the user `owner`.

    The client does not wait before it retries a request.
    """
    from huggingface_hub.utils import _http

    with hub_server.Hub() as hub:
        hub.add_user("owner", hub_server.OWNER, orgs=("stvit", "org", "team"))
        hub.add_user("reader", hub_server.READER, role="read", orgs=("org",))
        hub.add_user("stranger", hub_server.STRANGER)
        hub.enter(monkeypatch, tmp_path / "home", hub_server.OWNER)
        for request in (_http.http_backoff, _http.http_stream_backoff.__wrapped__):
            monkeypatch.setitem(request.__kwdefaults__, "base_wait_time", 0)
        yield hub


BOXES = {  # class (0 person, 1 bus), center and size, relative to the image
    "bus": [
        (1, 0.5, 0.453, 0.977, 0.479),
        (0, 0.176, 0.602, 0.235, 0.467),
        (0, 0.352, 0.587, 0.151, 0.421),
        (0, 0.913, 0.587, 0.174, 0.456),
    ],
    "zidane": [(0, 0.74, 0.52, 0.319, 0.928), (0, 0.432, 0.636, 0.676, 0.708)],
}


@pytest.fixture(scope="session")
def write_photos() -> Callable[..., Path]:
    """Returns a function that writes a dataset and returns its Ultralytics data file.

    The images are the two photographs of Ultralytics and their mirror images, 160 pixels wide.
    """

    def write_photos(folder: Path, channels: int = 3, nc: int = 2) -> Path:
        from ultralytics.utils import ASSETS

        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, boxes in BOXES.items():
            photo = Image.open(ASSETS / f"{name}.jpg").convert("RGB")
            photo = photo.resize((160, 160 * photo.height // photo.width))
            for mirrored in (False, True):
                picture = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else photo
                picture.save(folder / "images" / f"{name}_{int(mirrored)}.jpg")
                rows = [f"{c} {1 - x if mirrored else x:.4f} {y} {w} {h}" for c, x, y, w, h in boxes]
                (folder / "labels" / f"{name}_{int(mirrored)}.txt").write_text("\n".join(rows))
        names = "".join(f"  {i}: {name}\n" for i, name in enumerate(["person", "bus", "tie", "cat"][:nc]))
        data = folder / "photos.yaml"
        data.write_text(f"path: {folder}\ntrain: images\nval: images\nchannels: {channels}\nnames:\n{names}")
        return data

    return write_photos


@pytest.fixture(scope="session")
def photos(write_photos: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data file of four photographs. Tests must not change it."""
    return write_photos(tmp_path_factory.mktemp("photos"))


COCO_NAMES = {3: "person", 7: "bus"}  # category ids with gaps


@pytest.fixture(scope="session")
def write_coco() -> Callable[..., Path]:
    """Returns a function that writes photographs with annotations in COCO's format: images/ and instances.json.

    The images are the two photographs of Ultralytics and their mirror images. The objects have polygons, the first
    person of each image has an RLE, and one image has a crowd.
    """

    def write_coco(folder: Path, width: int = 96) -> Path:
        from ultralytics.utils import ASSETS

        (folder / "images").mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for name, boxes in BOXES.items():
            photo = Image.open(ASSETS / f"{name}.jpg").convert("RGB")
            photo = photo.resize((width, width * photo.height // photo.width))
            for mirrored in (False, True):
                picture = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else photo
                file_name = f"{name}_{int(mirrored)}.jpg"
                picture.save(folder / "images" / file_name)
                image_id = 100 + len(images)
                images.append({"id": image_id, "file_name": file_name, "width": width, "height": photo.height})
                for number, (label, x, y, w, h) in enumerate(boxes):
                    box = to_pixels(1 - x if mirrored else x, y, w, h, photo.size)
                    annotation = {
                        "id": 1 + len(annotations),
                        "image_id": image_id,
                        "category_id": list(COCO_NAMES)[label],
                        "bbox": box,
                        "iscrowd": int(name == "zidane" and mirrored and number == 1),
                        "segmentation": octagon(box),
                        "area": box[2] * box[3] * 7 / 9,
                    }
                    if number == 1:
                        annotation["segmentation"] = rectangle_rle(box, photo.size)
                        annotation["area"] = sum(annotation["segmentation"]["counts"][1::2])
                    annotations.append(annotation)
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in COCO_NAMES.items()],
        }
        (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write_coco


def to_pixels(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> list[float]:
    """Returns left, top, width and height of a box, in pixels inside the image."""
    left, top = max(0.0, (x - w / 2) * size[0]), max(0.0, (y - h / 2) * size[1])
    right, bottom = min(size[0], (x + w / 2) * size[0]), min(size[1], (y + h / 2) * size[1])
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]


def octagon(box: list[float]) -> list[list[float]]:
    """Returns a polygon in a box, whose corners are cut off at a third of each side."""
    left, top, width, height = box
    x, y = [left + width * k / 3 for k in range(4)], [top + height * k / 3 for k in range(4)]
    points = [(x[1], y[0]), (x[2], y[0]), (x[3], y[1]), (x[3], y[2]), (x[2], y[3]), (x[1], y[3]), (x[0], y[2]),
              (x[0], y[1])]  # fmt: skip
    return [[round(value, 2) for point in points for value in point]]


def rectangle_rle(box: list[float], size: tuple[int, int]) -> dict[str, Any]:
    """Returns the mask of a box as uncompressed run lengths, column by column."""
    (width, height), (left, top) = size, (round(box[0]), round(box[1]))
    right, bottom = min(width, round(box[0] + box[2])), min(height, round(box[1] + box[3]))
    inside = bottom - top
    runs = [left * height + top, *[inside, height - inside] * (right - left)]
    runs[-1] = width * height - sum(runs[:-1])
    return {"size": [height, width], "counts": runs}


@pytest.fixture(scope="session")
def coco_photos(write_coco: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of four photographs in COCO's format. Tests must not change it."""
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def ultralytics_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Captures the log of Ultralytics, whose logger does not propagate by default."""
    from ultralytics.utils import LOGGER

    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


# ---------------------------------------------------------------------------------------------------------------------
# Triton's kernels: tests/test_triton.py, tests/test_launch.py and tests/test_fused_layers.py


def run_without_interpreter(program: str, *arguments: str, **environment: str) -> list[str]:
    """Returns the output of a program in a new process, on a CPU without the interpreter."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "STVIT_OPS_BACKEND")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Selects the backend automatically.

    Without a GPU, Triton interprets the kernels.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STVIT_OPS_BACKEND", raising=False)
        # On a GPU PyTorch's float32 convolutions use TF32 by default, which is less exact than the tests expect.
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        if not torch.cuda.is_available():
            # Triton reads this variable when the kernels are imported.
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills newly allocated tensors with NaN, so that unwritten results are noticed."""
    # Only warnings, because cuBLAS is not deterministic. No test depends on cuBLAS.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
