"""The page of tools/demo.py in a browser, its server, and the page as a Space.

The browser is Chromium with its driver (Debian: chromium, chromium-driver). Tests in it are skipped if it is missing.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from ultralytics.utils import ASSETS

from stvit import hub as stvit_hub
from stvit import visualize
from stvit.adapters.yolo import YOLO
from stvit.tools import demo, push_to_hub
from stvit.tools.common.cli import CommandError
from stvit.tools.common.image_files import ImageError, open_image
from stvit.tools.common.viewing import LoadedModel
from stvit.tools.demonstration import models as demo_models
from stvit.tools.demonstration import tasks
from stvit.tools.demonstration.config import LimitsConfig, ModelsConfig
from stvit.tools.demonstration.models import ModelList, OpenedModels
from stvit.weights import Source
from tests.hub_server import Hub

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no browser; install chromium and chromedriver (Debian: chromium, chromium-driver)",
)
SIZE = 160  # image size of the models
LABELS = ["tram", "bus", "bus", "cat", "dog", "ship"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str | Path], cwd: Path, log: Path, env: dict[str, str] | None = None, end: int = signal.SIGINT
) -> Iterator[str]:
    """Context manager: serves a page in a process, yields its address, and ends it by a signal, such as Ctrl-C."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            # If the tests run in the background or under nohup, the process would inherit ignored signals.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
        )
    try:
        latest = time.monotonic() + 120
        while (line := re.search(r"the page is at (\S+)/ until", log.read_text())) is None:
            assert process.poll() is None and time.monotonic() < latest, log.read_text()
            time.sleep(0.2)
        yield line[1]
        assert process.poll() is None, log.read_text()
        process.send_signal(end)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the folder of a classifier, and the checkpoint of a detector that finds buses everywhere."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    classifier: Any = timm.create_model("test_stvit", num_classes=len(LABELS))
    torch.nn.init.normal_(classifier.head.fc.weight)  # clearly different probabilities
    stvit_hub.save(classifier, folder / "runs/vehicles/best", label_names=LABELS)
    detector: Any = YOLO("yolo26n-stokenattention.yaml")
    head = detector.model.model[-1]
    for layers in (*head.cv3, *head.one2one_cv3):
        layers[-1].bias.data[5] = 9.0
    detector.model.names = {**detector.model.names, 5: "bus"}
    (folder / "runs/detect/train/weights").mkdir(parents=True)
    detector.save(folder / "runs/detect/train/weights/best.pt")
    return folder


@pytest.fixture(scope="module")
def page_hub() -> Iterator[Hub]:
    """Serves the Hub that the page uses."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def page(models: Path, page_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves the page and yields its address.

    Afterwards the log must not contain a traceback.
    """
    log = tmp_path_factory.mktemp("log") / "log.txt"
    flags = ["--max-megabytes=1", "--max-megapixels=2", f"--img-size={SIZE}", f"--port={free_port()}"]
    flags += ["--max-total-megabytes=40"]
    env = page_hub.environment(tmp_path_factory.mktemp("home"))
    env |= {"HF_HUB_OFFLINE": "0", "GRADIO_SHARE": "true"}  # the page must not be shared nevertheless
    with serving([sys.executable, demo.__file__, "test_stvit", *flags], models, log, env) as address:
        yield address
    assert "Traceback" not in log.read_text(), log.read_text()


class Browser:
    """Chromium, and the actions of a user on the page."""

    def __init__(self, width: int, height: int, dark: bool = False) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "no-proxy-server"):
            options.add_argument(f"--{flag}")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def until(self, found: Callable[[], Any], what: str) -> Any:
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if result := found():
                    return result
            except (WebDriverException, IndexError):  # the page replaces an element
                pass
            time.sleep(0.1)
        raise AssertionError(f"{what} did not appear; text of the page:\n{self.text('body')}")

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.driver.find_element("css selector", selector).text)

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.until(lambda: self.all("#upload input[type=file]"), "the page")

    def upload(self, path: Path) -> None:
        """Chooses a file, and removes the present one first."""
        for button in self.all("#upload button[aria-label='Remove Image']"):
            button.click()
            self.until(lambda: not self.is_on("#classify"), "an empty field")
        field = self.until(lambda: self.all("#upload input[type=file]"), "the field for a file")[0]
        field.send_keys(str(path))

    def upload_image(self, path: Path) -> None:
        self.upload(path)
        self.until(lambda: self.all("#upload img") and self.is_on("#classify"), "the image")

    def is_on(self, selector: str) -> bool:
        return bool(self.all(selector)[0].is_enabled())

    def has_loaded(self, selector: str) -> bool:
        """Returns whether a picture has arrived. Until then, its element has no size."""
        script = "const e = document.querySelector(arguments[0]); return !!e && e.complete && e.naturalWidth > 0"
        return bool(self.driver.execute_script(script, selector))

    def tab(self, name: str) -> None:
        button = self.until(lambda: [b for b in self.all("button[role=tab]") if b.text == name], f"the tab {name}")[0]
        button.click()
        self.until(lambda: button.get_attribute("aria-selected") == "true", f"the tab {name}")

    def click(self, selector: str) -> None:
        self.until(lambda: self.all(selector), selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.all(selector)[0])
        self.all(selector)[0].click()

    def choose_model(self, name: str) -> None:
        """Types the name of a model into the visible field."""
        from selenium.webdriver.common.keys import Keys

        field = next(field for field in self.all("input[role=combobox]") if field.is_displayed())
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(name, Keys.ENTER)
        field.send_keys(Keys.TAB)

    def message(self) -> str:
        """Returns the message on the page, and closes it."""

        def shown() -> str:
            return " ".join(str(item.text) for item in self.all("[data-testid=toast-text]"))

        text = str(self.until(shown, "a message"))

        def closed() -> bool:
            for button in self.all("[data-testid=toast-close]"):
                self.driver.execute_script("arguments[0].click()", button)
            return not shown()

        self.until(closed, "the end of the message")
        return text

    def picture(self, selector: str) -> np.ndarray:
        """Returns the pixels of a picture on the page."""
        image = self.until(lambda: self.all(f"{selector} img"), f"a picture in {selector}")[0]
        with urllib.request.urlopen(image.get_attribute("src")) as answer:
            return np.array(Image.open(io.BytesIO(answer.read())).convert("RGB"))


@pytest.fixture(scope="module")
def laptop(page: str) -> Iterator[Browser]:
    browser = Browser(1366, 768)
    try:
        browser.open(page)
        yield browser
    finally:
        browser.driver.quit()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "bus.jpg"
    Image.open(ASSETS / "bus.jpg").resize((120, 160)).save(path)
    return path


def loaded(models: Path, name: str) -> LoadedModel:
    return OpenedModels().get(str(models / name))


def list_models(*flags: str) -> ModelList:
    return ModelList(demo.parse_args(flags).models)


# ---------------------------------------------------------------------------------------------------------------------
# In the browser


@needs_browser
def test_classify(laptop: Browser, models: Path, photo: Path) -> None:
    laptop.tab("Classify")
    laptop.upload_image(photo)
    assert "Random weights" not in laptop.text("body")
    laptop.choose_model("runs/vehicles")
    laptop.click("#classify")
    laptop.until(lambda: "%" in laptop.text("#classes"), "the classes")
    expected = tasks.classify(loaded(models, "runs/vehicles"), open_image(photo))
    assert len(expected) == 5 and {"bus (1)", "bus (2)"} & set(expected)
    lines = laptop.text("#classes").splitlines()
    for name, probability in expected.items():
        assert name in lines and f"{round(probability * 100)}%" in lines
    # The page marks a model with random weights.
    laptop.choose_model("test_stvit (random weights)")
    laptop.click("#classify")
    laptop.until(
        lambda: "class " in laptop.text("#classes") or "Random weights" in laptop.text("body"), "other classes"
    )
    assert "Random weights: the model is untrained, and its results are meaningless." in laptop.text("body")


@needs_browser
def test_the_tab_key_closes_the_list_of_models(laptop: Browser) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def options() -> list[Any]:
        return [option for option in laptop.all("[role=option]") if option.is_displayed()]

    laptop.tab("Classify")
    next(field for field in laptop.all("input[role=combobox]") if field.is_displayed()).click()
    laptop.until(options, "the list")
    ActionChains(laptop.driver).send_keys(Keys.TAB).perform()
    laptop.until(lambda: not options(), "the end of the list")


@needs_browser
def test_detect(laptop: Browser, models: Path, photo: Path) -> None:
    laptop.upload_image(photo)
    laptop.tab("Detect")
    laptop.click("#detect")
    laptop.until(lambda: laptop.text("#found"), "what was found")
    assert re.fullmatch(r"Found: [1-9]\d* (bus|buss|buses)\.", laptop.text("#found")), laptop.text("#found")
    picture, words = tasks.detect(loaded(models, "runs/detect/train"), open_image(photo), 0.25, SIZE)
    assert words == laptop.text("#found") and picture.size == (120, 160)
    shown = laptop.picture("#boxes")
    assert np.array_equal(shown, np.array(picture))
    assert np.abs(shown.astype(int) - np.array(open_image(photo))).mean() > 5  # the boxes


@needs_browser
def test_super_tokens_and_a_click(laptop: Browser, models: Path, photo: Path) -> None:
    """The super tokens, another stage by the slider, and the token at clicked pixels."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    laptop.upload_image(photo)
    laptop.tab("Super tokens")
    laptop.choose_model("runs/vehicles")
    for stage in (0, 1):
        if stage == 0:
            laptop.click("#look")
        else:
            laptop.all("#stage input[type=range]")[0].send_keys(Keys.ARROW_RIGHT)
        view = visualize.super_tokens(loaded(models, "runs/vehicles").model, open_image(photo), stage)
        laptop.until(
            lambda view=view: tasks.describe(view, view.center).replace("**", "") == laptop.text("#token"), "it"
        )
        assert np.array_equal(laptop.picture("#tokens"), np.array(view.draw_boundaries(view.center)))
    assert view.scale == 3 and view.layer.startswith("stages.1")
    image = laptop.all("#tokens img")[0]
    laptop.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    for x, y in [(20, 30), (100, 150), (61, 12)]:
        # Position of the pixel on the screen. The picture is reduced to its frame and centered in it.
        box = laptop.driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", image)
        shown = min(box["width"] / 120, box["height"] / 160)
        offset = [int(((x + 0.5) - 60) * shown), int(((y + 0.5) - 80) * shown)]
        ActionChains(laptop.driver).move_to_element_with_offset(image, *offset).click().perform()
        token = view.token_at(x, y)
        words = tasks.describe(view, token).replace("**", "")
        laptop.until(lambda words=words: laptop.text("#token") == words, words)
        laptop.until(
            lambda token=token: np.array_equal(laptop.picture("#association"), np.array(view.draw_association(token))),
            "its association",
        )
        assert np.array_equal(laptop.picture("#attention"), np.array(view.draw_attention(token)))
        assert np.array_equal(laptop.picture("#tokens"), np.array(view.draw_boundaries(token)))
    next(button for button in laptop.all("label") if button.text == "mean colors").click()
    laptop.until(
        lambda: np.array_equal(laptop.picture("#tokens"), np.array(view.draw_mean_colors(token))), "mean colors"
    )


@needs_browser
def test_a_new_image_removes_the_results_of_the_old_one(laptop: Browser, photo: Path) -> None:
    laptop.upload_image(photo)
    laptop.tab("Detect")
    laptop.click("#detect")
    laptop.until(lambda: laptop.all("#boxes img"), "boxes")
    laptop.upload_image(photo)
    laptop.until(lambda: not laptop.all("#boxes img") and not laptop.text("#found"), "no boxes")
    # A result of the former image must not appear either. Models run one after the other, so Detect ends first.
    laptop.click("#detect")
    laptop.upload_image(photo)
    laptop.tab("Classify")
    laptop.click("#classify")
    laptop.until(lambda: "%" in laptop.text("#classes"), "the classes")
    laptop.tab("Detect")
    assert not laptop.all("#boxes img") and not laptop.text("#found")


def hostile_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Returns the content of each file, and the message that it must cause."""
    whole = (ASSETS / "bus.jpg").read_bytes()
    large, noise = folder / "large.png", folder / "noise.png"
    Image.new("L", (1500, 1500)).save(large)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(noise)
    png = large.read_bytes()
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + png[24:29]  # announces 3.6 billion pixels
    bomb = png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    unknown = "not an image of a supported format (BMP, GIF, JPEG, PNG, TIFF or WebP)"
    return {
        "text.png": (b"<script>alert(1)</script>", unknown),
        "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", unknown),
        "empty.jpg": (b"", unknown),
        "cut.jpg": (whole[: len(whole) // 2], "damaged, truncated, or a kind of JPEG"),
        "broken.png": (b"\x89PNG\r\n\x1a\n" + bytes(500), "damaged, truncated, or a kind of PNG"),
        "program.webp": (b"RIFF\0\0\0\0WEBP" + bytes(100), "damaged, truncated, or a kind of WebP"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", unknown),
        "large.png": (png, "1500x1500 pixels, more than the limit of 2 million; reduce the image"),
        "bomb.png": (bomb, "60000x60000 pixels, more than"),
        "<img src=x onerror=alert(1)>.png": (b"no", unknown),
        "heavy.png": (noise.read_bytes(), "maximum allowed size of 1.0"),  # message of Gradio
    }


@needs_browser
def test_hostile_files_get_a_message(laptop: Browser, photo: Path, tmp_path: Path) -> None:
    """The page then has no image, and accepts the next one."""
    from selenium.common.exceptions import NoAlertPresentException

    for name, (content, words) in hostile_files(tmp_path).items():
        path = tmp_path / "upload" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        laptop.upload(path)
        message = laptop.message()
        assert words in message and "Traceback" not in message and "unexpected" not in message, f"{name}: {message}"
        with pytest.raises(NoAlertPresentException):
            _ = laptop.driver.switch_to.alert.text
        laptop.until(lambda: not laptop.all("#upload img"), f"the end of {name}")
    laptop.tab("Classify")
    assert not laptop.is_on("#classify")
    laptop.upload_image(photo)
    laptop.choose_model("runs/vehicles")
    laptop.click("#classify")
    laptop.until(lambda: "%" in laptop.text("#classes"), "the classes")


@needs_browser
def test_wrong_models_get_a_message(laptop: Browser, photo: Path) -> None:
    laptop.upload_image(photo)
    laptop.tab("Classify")
    for name, words in (
        ("/etc/passwd", "there is no model '/etc/passwd' here; choose a model from the list, or type hf-hub:ORG/NAME"),
        ("<b>bold</b>", "there is no model '<b>bold</b>' here"),
        ("hf-hub:org/missing", "org/missing"),
        ("local-dir:/etc", "there is no model"),
    ):
        laptop.choose_model(name)
        laptop.click("#classify")
        message = laptop.message()
        assert words in message and "unexpected" not in message, message
    laptop.tab("Super tokens")
    laptop.choose_model("hf-hub:org/missing")
    assert "org/missing" in laptop.message()  # the stages of the model
    laptop.click("#look")
    assert "org/missing" in laptop.message()


@needs_browser
@pytest.mark.parametrize(
    ("width", "height", "dark"),
    [
        (1366, 768, False),
        (390, 844, True),
        pytest.param(1366, 768, True, marks=pytest.mark.long),
        pytest.param(390, 844, False, marks=pytest.mark.long),
    ],
)
def test_legible_at_each_width_and_in_dark_mode(page: str, photo: Path, width: int, height: int, dark: bool) -> None:
    """The page does not scroll sideways.

    Text has at least 11 pixels and a contrast of at least 4.5.
    """
    browser = Browser(width, height, dark)
    try:
        browser.open(page)
        browser.upload_image(photo)
        for tab, button in (("Classify", "#classify"), ("Detect", "#detect"), ("Super tokens", "#look")):
            browser.tab(tab)
            browser.click(button)
            shown = {"#classify": "#classes", "#detect": "#boxes img", "#look": "#attention img"}[button]
            browser.until(lambda shown=shown: browser.all(shown), shown)
            found = browser.driver.execute_script(LEGIBLE)
            assert found["overflow"] <= 0, (tab, found)
            assert found["background"] < 60 if dark else found["background"] > 230, found
            assert not found["small"], (tab, found["small"])
            assert not found["faint"], (tab, found["faint"])
            selector = "#tokens img" if tab == "Super tokens" else "#upload img"
            browser.until(lambda selector=selector: browser.has_loaded(selector), f"the picture of {selector}")
            picture = browser.all(selector)[0].rect
            assert picture["width"] > 100 and picture["x"] >= 0 and picture["x"] + picture["width"] <= width
    finally:
        browser.driver.quit()


# Measures each visible text: size, and contrast with the color behind it (WCAG 2). Large text needs a contrast of 3.
LEGIBLE = """
const rgb = color => { const v = color.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v };
const linear = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = rgb(getComputedStyle(e).backgroundColor);
    if (color[3] > .5) return color;
  }
  return rgb(getComputedStyle(document.body).backgroundColor);
};
const small = [], faint = [];
for (const e of document.querySelectorAll('h1, h2, p, label, button, span, dt, dd, div')) {
  const own = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(' ').trim();
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  if (!own || box.width < 2 || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  const size = parseFloat(style.fontSize);
  if (size < 11) small.push([own, size]);
  const a = light(rgb(style.color)), b = light(behind(e));
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const isLarge = size >= 24 || (size >= 18.6 && +style.fontWeight >= 700);
  if (contrast < (isLarge ? 3 : 4.5)) faint.push([own, style.color, contrast]);
}
const background = behind(document.querySelector('.gradio-container'))[0];
return {overflow: document.documentElement.scrollWidth - window.innerWidth, small, faint, background};
"""


# ---------------------------------------------------------------------------------------------------------------------
# The server


def test_listens_only_on_this_machine_and_shares_nothing(page: str) -> None:
    with urllib.request.urlopen(f"{page}/config") as answer:
        config = json.load(answer)
    assert config["analytics_enabled"] is False and config["root"] == page
    assert all(item["api_visibility"] != "public" for item in config["dependencies"])
    host, port = page.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    with socket.socket() as probe:
        probe.settimeout(5)
        with pytest.raises(OSError, match="refused"):
            probe.connect(("127.0.0.2", int(port)))


def test_options_of_the_server(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio

    from stvit.tools.demonstration.server import PORTS

    asked: dict[str, Any] = {}

    def launch(_: Any, **kwargs: Any) -> None:
        asked.update(kwargs)
        raise OSError("not now")

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    assert demo.main(["--runs=", "stvit_pico", "--max-megabytes=3"]) == 1
    expected = {"share": False, "server_name": "127.0.0.1", "max_file_size": "3mb", "mcp_server": False}
    assert expected.items() <= asked.items() and asked["server_port"] in PORTS


def test_results_of_a_former_image_are_dropped(models: Path) -> None:
    """Functions of the buttons return nothing if the image changes while they run."""

    class Computer:
        work: Any = None

        def run(self, *_: Any) -> Any:
            return self.work(), False

    from stvit.tools.demonstration.page import Page

    offered = ModelList(ModelsConfig(names=[str(models / "runs/vehicles")], runs="", examples=False))
    computer: Any = Computer()
    page = Page(offered, computer, LimitsConfig()).blocks
    functions = {function.fn.__name__: function.fn for function in page.fns.values()}
    name = str(models / "runs/vehicles")
    former, new = Image.new("RGB", (40, 40)), Image.new("RGB", (50, 50))
    view = visualize.super_tokens(loaded(models, "runs/vehicles").model, former)

    for change in (False, True):
        sessions = [block.value for block in page.blocks.values() if type(block).__name__ == "State"]
        (session,) = sessions

        def work(result: Any, session: Any = session, change: bool = change) -> Any:
            session.image = new if change else session.image
            return result

        session.image = former
        computer.work = lambda work=work: work({"cat": 1.0})
        assert functions["on_classify"](session, name) == ((None, None) if change else ({"cat": 1.0}, ""))
        session.image = former
        computer.work = lambda work=work: work((former, "Found."))
        assert (functions["on_detect"](session, name, 0.5)[0] is None) == change
        session.image = former
        computer.work = lambda work=work: work(view)
        shown = functions["on_look"](session, name, 0, "boundaries")
        assert (shown[1] is None) == change and (session.view is None or not change)
        session.view = None


def test_no_file_of_the_machine_is_served(models: Path, tmp_path: Path) -> None:
    """Neither an address nor a message that claims an upload reads a file.

    Answers do not show whether it exists.
    """
    flags = ["--runs=", "--no-examples", str(models / "runs/vehicles"), f"--port={free_port()}"]
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary")}
    # SIGHUP: closing the terminal removes the files, too.
    with serving([sys.executable, demo.__file__, *flags], tmp_path, tmp_path / "log", env, signal.SIGHUP) as page:
        for name in ("/etc/passwd", "../../etc/passwd"):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"{page}/gradio_api/file={name}")
        with urllib.request.urlopen(f"{page}/config") as answer:
            config = json.load(answer)
        (receive,) = (item["id"] for item in config["dependencies"] if item["api_name"] == "receive")
        os.mkfifo(tmp_path / "pipe")
        # Paths around the user's own upload, and elsewhere on the machine.
        own = upload(page, (ASSETS / "bus.jpg").read_bytes())
        files = [own, own.parent, own.parent.parent, own.parent.parent.parent / "lock", own.parent / ".." / "missing"]
        files += [ASSETS / "bus.jpg", tmp_path / "missing", tmp_path / "pipe", Path("/proc/self/environ")]
        said = []
        for path in (*map(str, files), None, 7, "\0", "", "http://127.0.0.1/a.jpg", ["a"]):
            for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
                value = {"path": path, "url": path, "orig_name": "a.jpg", **meta}
                said.append(ask(page, join(receive, [value, None])))
        assert [status for status, _ in said] == [200, 200] + [400] * (len(said) - 2)
        assert {text for _, text in said[2:]} == {"that is no uploaded image; upload a file\n"}
    assert not list((tmp_path / "temporary").glob("stvit-demo-*"))


def ask(page: str, body: bytes | None = None, path: str = "/gradio_api/queue/join", **headers: str) -> tuple[int, str]:
    """Sends a request; returns the status and the text of the answer."""
    kind = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{page}{path}", body, kind | headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def join(function: int, data: Any, session: Any = "abc", **more: Any) -> bytes:
    """Returns the message of an event."""
    return json.dumps({"data": data, "fn_index": function, "session_hash": session, **more}).encode()


def answers(page: str, session: str) -> list[dict[str, Any]]:
    """Waits for all answers to the events of a session, and returns them."""
    found = []
    with urllib.request.urlopen(f"{page}/gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        for line in stream:
            message = json.loads(line.removeprefix(b"data: ") or b"{}") if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                found.append(message)
            elif message.get("msg") == "close_stream":
                break
    return found


def functions(page: str) -> dict[str, int]:
    """Returns the numbers of the page's functions by name."""
    return {item["api_name"]: item["id"] for item in json.loads(ask(page, path="/config")[1])["dependencies"]}


def upload(page: str, content: bytes, **headers: str) -> Path:
    """Uploads a file; returns its path on the server."""
    boundary = "----it"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, text = ask(page, body, "/gradio_api/upload", **kind, **headers)
    assert status == 200, text
    return Path(json.loads(text)[0])


def test_requests_of_other_pages_are_refused(page: str) -> None:
    """All paths refuse a foreign Host, as in DNS rebinding, and a foreign Origin."""
    port = page.rpartition(":")[2]
    message = join(functions(page)["on_load"], [None, None])
    for path, body in (
        ("/", None),
        ("/config", None),
        ("/gradio_api/queue/join", message),
        ("/gradio_api/upload", b""),
    ):
        for host in ("evil.com", f"evil.com:{port}", f"127.0.0.1.evil.com:{port}"):
            status, text = ask(page, body, path, Host=host)
            assert (status, text) == (
                403,
                f"Host '{host}' is not an address of this page; to allow it, start the page with --allow-host={host}\n",
            )
        for origin in ("http://evil.com", "null", "http://127.0.0.1:1"):
            status, text = ask(page, body, path, Origin=origin)
            assert (status, text) == (
                403,
                f"Origin '{origin}' is another page; only requests of this page are accepted\n",
            )
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(page, path="/config", Host=host, Origin=f"http://{host}")[0] == 200


def test_uploads_of_all_users_have_a_limit(page: str) -> None:
    """Refused and broken uploads leave no file. Old uploads are deleted for new ones."""
    first = upload(page, os.urandom(900_000))
    folder = first.parent.parent
    host, port = page.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=it\r\n\r\n")
        for i in range(60):  # 45 MB without an end
            part = b'--it\r\nContent-Disposition: form-data; name="files"; filename="%d"\r\n\r\n' % i
            part += bytes(750_000) + b"\r\n"
            try:
                connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
            except OSError:  # the server has closed the connection
                break
        answer = ""
        while "minutes" not in answer and (part := connection.recv(10_000)):
            answer += part.decode()
    assert answer.startswith("HTTP/1.1 413") and "the uploads of all users exceed the limit of 40 MB" in answer
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=it\r\n\r\n")
        connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
    end = time.monotonic() + 60
    while any(path.is_file() for path in folder.iterdir()):  # files of unfinished uploads
        assert time.monotonic() < end, list(folder.iterdir())
        time.sleep(0.05)
    assert first.is_file() and upload(page, b"small").is_file()
    for path in folder.rglob("*"):
        assert not path.is_file() or path.stat().st_size <= 900_000


HOSTILE: list[Any] = [
    *(
        None,
        True,
        -1,
        1e308,
        "x",
        "x" * 10_000,
        "\0\ud800",
        "<script>",
        "../../etc/passwd",
        "hf-hub:../..",
        [],
        {},
        [[]],
    ),
    *(
        {"path": "/etc/passwd"},
        {"path": ["a"]},
        {"index": "a"},
        {"__type__": "update"},
        {"a": {"path": "/", "meta": 1}},
    ),
]


def test_hostile_events_do_no_harm(page: str) -> None:
    """The page answers hostile inputs, sessions and events, and continues.

    The fixture checks that the log contains no traceback.
    """
    config = json.loads(ask(page, path="/config")[1])
    statuses = []
    for item in config["dependencies"]:
        for place in range(len(item["inputs"])):
            for value in HOSTILE:
                data: list[Any] = [None] * len(item["inputs"])
                data[place] = value
                for event in (None, {"index": [1e300, -5]}):
                    statuses.append(ask(page, join(item["id"], data, "fuzz", event_data=event))[0])
        wrong: Any
        for wrong in (None, {}, "a", [None] * 50):
            statuses.append(ask(page, join(item["id"], wrong, "fuzz"))[0])
    for value in HOSTILE:
        statuses.append(ask(page, json.dumps(value).encode())[0])
        statuses.append(ask(page, join(value, [], "fuzz"))[0])
        statuses.append(ask(page, join(0, [None], value if value != "x" else 5))[0])
        for key in ("trigger_id", "batched", "simple_format", "event_id", "oauth_token"):
            statuses.append(ask(page, join(2, [], "fuzz", **{key: value}))[0])
        for path in ("/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/upload"):
            status = ask(page, json.dumps(value).encode(), path)[0]
            assert 400 <= status < 500 or (status == 200 and path == "/gradio_api/reset"), (path, value, status)
    assert set(statuses) == {200, 400}
    for answer in answers(page, "fuzz"):
        assert "unexpected" not in json.dumps(answer), answer
    for path in ("/gradio_api/run/predict", "/gradio_api/api/on_classify", "/gradio_api/call/on_classify", "/login"):
        assert ask(page, b"{}", path)[0] == 404
    for path in ("/gradio_api/file=http://127.0.0.1/a", "/gradio_api/proxy=https://a.hf.space/", "/monitoring/summary"):
        assert ask(page, path=path)[0] == 404
    upload(page, b"and goes on")


def test_users_do_not_wait_for_each_other(page: str, page_hub: Hub, models: Path, photo: Path) -> None:
    """A Hub that hangs and an absurd model delay only the users who asked for them."""
    best = {file.name: file.read_bytes() for file in (models / "runs/vehicles/best").iterdir()}
    config = json.loads(best["config.json"])
    absurd = json.dumps(config | {"model_args": {**config.get("model_args", {}), "n_iter": 10**8}}).encode()
    for name, files in (("slow", best), ("fast", best), ("absurd", {**best, "config.json": absurd})):
        page_hub.create_repo(f"org/{name}")
        page_hub.commit(f"org/{name}", files)
    page_hub.fail("org/slow/.*safetensors", "hang")
    number, path = functions(page), str(upload(page, photo.read_bytes()))
    users = {
        "slow": "hf-hub:org/slow",
        "listed": "runs/vehicles",
        "fast": "hf-hub:org/fast",
        "absurd": "hf-hub:org/absurd",
    }
    try:
        for session, model in users.items():
            assert ask(page, join(number["receive"], [{"path": path}, None], session))[0] == 200
            (received,) = answers(page, session)
            assert received["success"], received
            assert ask(page, join(number["on_classify"], [None, model], session))[0] == 200
        for session in ("listed", "fast"):
            (answer,) = answers(page, session)
            assert answer["success"] and answer["output"]["data"][0]["confidences"], answer
        (answer,) = answers(page, "absurd")
        assert not answer["success"] and "n_iter=100000000, more than the limit of 8" in json.dumps(answer)
        assert any("org/slow" in request.path and "safetensors" in request.path for request in page_hub.requests)
    finally:
        page_hub.heal()
    (answer,) = answers(page, "slow")
    assert "org/slow" in json.dumps(answer) or answer["success"]


@pytest.mark.long
def test_no_file_is_left_when_the_page_ends(models: Path, photo: Path, tmp_path: Path) -> None:
    """After SIGTERM, uploads are deleted."""
    flags = ["--runs=", "--no-examples", str(models / "runs/vehicles"), f"--port={free_port()}"]
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary")}
    with serving([sys.executable, demo.__file__, *flags], tmp_path, tmp_path / "log", env, signal.SIGTERM) as page:
        path = upload(page, photo.read_bytes())
        assert path.read_bytes() == photo.read_bytes() and "/stvit-demo-" in str(path)  # a private folder
    assert not list((tmp_path / "temporary").glob("stvit-demo-*"))


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    """The files are refused without a page, before a pixel is decoded."""
    for name, (content, words) in hostile_files(tmp_path).items():
        if name != "heavy.png":  # refused by Gradio because of its size
            path = tmp_path / "upload" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            with pytest.raises(ImageError, match=re.escape(words)):
                open_image(path, max_pixels=2_000_000)
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait forever
    with pytest.raises(ImageError, match=r"pipe\.png: not a regular file"):
        open_image(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["no-such-model"],
            "'no-such-model': no such run, file or model; for a model on the Hub, pass hf-hub:ORG/NAME",
        ),
        ([""], "'': no such run, file or model"),
        (["."], "--checkpoint: no config.json in . or best"),
        (["--no-examples", "--no-hub"], "no model to offer; pass a MODEL, or remove --no-examples"),
        (["--host=203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--max-total-megabytes=5"], "--max-total-megabytes 5 is less than --max-megabytes 10; raise it"),
    ],
)
def test_bad_flags_are_named(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    assert demo.main(flags) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words in line and "unexpected" not in line, line


@pytest.mark.parametrize("name", ["http://demo.org", "demo.org/", "*", "", "demo.org:port"])
def test_wrong_names_of_hosts_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main([f"--allow-host={name}"])
    assert f"argument --allow-host: expected NAME or NAME:PORT, got {name!r}" in capsys.readouterr().err


def test_a_taken_port_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert demo.main([f"--port={port}"]) == 1
    assert f"error: cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main([]) == 1
    assert "pip install 'stvit[demo]'" in capsys.readouterr().err


def test_models_offered(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list contains arguments, runs, and examples.

    Models of the Hub are in the lists of both kinds.
    """
    monkeypatch.chdir(models)
    offered = list_models("hf-hub:ORG/a", "stvit_pico")
    assert offered.choices() == [
        ("hf-hub:ORG/a", "hf-hub:ORG/a"),
        ("stvit_pico (random weights)", "stvit_pico"),
        ("runs/detect/train", "runs/detect/train"),
        ("runs/vehicles", "runs/vehicles"),
        ("stvit_pico.cifar10 (trained on CIFAR-10)", "stvit_pico.cifar10"),
        ("yolo26n-stvit_pico (random weights)", "yolo26n-stvit_pico.yaml"),
    ]
    names = [name for _, name in offered.choices(of_detectors=True)]
    assert names == ["hf-hub:ORG/a", "runs/detect/train", "yolo26n-stvit_pico.yaml"]
    names = [name for _, name in offered.choices(of_detectors=False)]
    assert names == ["hf-hub:ORG/a", "stvit_pico", "runs/vehicles", "stvit_pico.cifar10"]
    opened = OpenedModels()
    assert opened.get("stvit_pico").is_random and not opened.get("runs/vehicles").is_random
    assert not opened.get("stvit_pico.cifar10").is_random
    assert opened.get("stvit_pico") is opened.get("stvit_pico")
    assert offered.check(" stvit_pico ") == "stvit_pico"
    assert offered.check(" hf_hub:ORG/b@v1") == "hf-hub:ORG/b@v1"  # timm's former spelling
    closed = list_models("runs/vehicles", "--no-hub", "--no-examples", "--runs=")
    assert [name for _, name in closed.choices()] == ["runs/vehicles"]
    for name in ("hf-hub:ORG/a", "stvit_pico", "runs/detect/train", "", None):
        with pytest.raises(CommandError, match=r"there is no model .* here; choose a model from the list$"):
            closed.check(name)


def test_threads_share_an_opened_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used model is removed before the next one is opened."""
    opened, kept, opening, go_on = OpenedModels(size=2), [], threading.Event(), threading.Event()

    def open_slowly(name: str, downloaded: Source | None, is_limited: bool) -> Any:
        kept.append((name, [other for other, _ in opened._models]))
        opening.set()
        assert go_on.wait(60)
        return object()

    monkeypatch.setattr(demo_models, "_open", open_slowly)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(opened.get("a"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert opening.wait(60)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len({id(model) for model in found}) == 1 and kept == [("a", [])]
    for name in "bac":
        opened.get(name)
    assert kept == [("a", []), ("b", ["a"]), ("c", ["a"])]


def test_models_of_the_hub(hub: Hub, models: Path) -> None:
    hub.create_repo("org/vehicles")
    hub.commit("org/vehicles", {f.name: f.read_bytes() for f in (models / "runs/vehicles/best").iterdir()})
    hub.create_repo("org/detector")
    hub.commit("org/detector", {"model.pt": (models / "runs/detect/train/weights/best.pt").read_bytes()})
    opened = OpenedModels()
    classifier, detector = opened.get("hf-hub:org/vehicles"), opened.get("hf-hub:org/detector")
    assert classifier.model.num_classes == len(LABELS) and detector.is_yolo
    image = Image.new("RGB", (64, 64))
    with pytest.raises(CommandError, match="choose a classifier"):
        tasks.classify(detector, image)
    with pytest.raises(CommandError, match="choose a detector"):
        tasks.detect(classifier, image, 0.5, 64)


def test_class_names() -> None:
    """Models with 1000 classes have the names of ImageNet.

    Gray models see gray images. The classes are sorted.
    """
    classifier = LoadedModel("it", timm.create_model("test_stvit").eval(), is_yolo=False, is_random=True)
    classes = tasks.classify(classifier, Image.new("RGB", (50, 50)))
    assert len(classes) == 5 and list(classes.values()) == sorted(classes.values(), reverse=True)
    known = timm.data.ImageNetInfo("imagenet-1k").label_descriptions()
    assert all(name in known for name in classes)
    classifier.model = timm.create_model("test_stvit", in_chans=1, num_classes=2).eval()
    assert set(tasks.classify(classifier, Image.new("RGB", (50, 50)))) == {"class 0", "class 1"}


# ---------------------------------------------------------------------------------------------------------------------
# A Space


@pytest.fixture(scope="module")
def space(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "it"
    flags = [str(models / "runs/vehicles"), "--space", "--repo-id=org/vehicles", "--license=mit"]
    assert push_to_hub.main([*flags, "--dry-run", f"--output={folder}"]) == 0
    return folder


def test_files_of_a_space(space: Path) -> None:
    import gradio

    names = {path.name for path in space.iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md", "LICENSE", "NOTICE", "stvit", "model"}
    assert {path.name for path in (space / "model").iterdir()} == {"model.safetensors", "config.json"}
    card = (space / "README.md").read_text()
    facts = yaml.safe_load(card.split("---")[1])
    expected = {"sdk": "gradio", "sdk_version": gradio.__version__, "app_file": "app.py", "license": "mit"}
    assert expected.items() <= facts.items() and facts["title"] == "vehicles"
    needed = (space / "requirements.txt").read_text().splitlines()
    assert {"torch>=2.6", "timm>=1.0.31", "ultralytics>=8.4.190"} <= set(needed) and "gradio>=6" not in needed
    assert not list(space.rglob("*.pyc"))
    assert (space / "stvit/adapters/yolo/modules.py").is_file() and (space / "stvit/tools/demo.py").is_file()


@needs_browser
@pytest.mark.long
def test_space_runs(space: Path, models: Path, photo: Path, tmp_path: Path) -> None:
    """The Space runs its own copy of stvit and offers only its model."""
    where = "import stvit, stvit.tools.demo as d; print(stvit.__file__, d.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=space, capture_output=True, text=True, check=True).stdout
    assert found.split() == [f"{space}/stvit/__init__.py", f"{space}/stvit/tools/demo.py"]
    env = {"GRADIO_SERVER_PORT": str(free_port()), "SPACE_HOST": "org-vehicles.hf.space,vehicles.org"}
    browser = Browser(1366, 768)
    try:
        with serving([sys.executable, "app.py"], space, tmp_path / "log.txt", env) as address:
            for host, status in (("org-vehicles.hf.space", 200), ("vehicles.org", 200), ("org-other.hf.space", 403)):
                assert ask(address, path="/config", Host=host)[0] == status
            browser.open(address)
            browser.upload_image(photo)
            browser.click("#classify")
            browser.until(lambda: "%" in browser.text("#classes"), "the classes")
            best = next(iter(tasks.classify(loaded(models, "runs/vehicles"), open_image(photo))))
            assert best in browser.text("#classes").splitlines()
            assert "hf-hub" not in browser.text("body")
            # Without a detector, the page has no tab for detection.
            assert [tab.text for tab in browser.all("button[role=tab]") if tab.text] == ["Classify", "Super tokens"]
    finally:
        browser.driver.quit()


def test_space_of_a_detector_and_of_the_hub(models: Path, tmp_path: Path) -> None:
    flags = ["--space", "--repo-id=org/demo", "--dry-run"]
    weights = models / "runs/detect/train/weights/best.pt"
    assert push_to_hub.main([str(weights), "--yolo", *flags, f"--output={tmp_path / 'a'}"]) == 0
    assert [path.name for path in (tmp_path / "a/model").iterdir()] == ["model.pt"]
    assert 'main(["model/model.pt", ' in (tmp_path / "a/app.py").read_text()
    # The next Space replaces it.
    flags[1] = "--repo-id=org/no"
    assert push_to_hub.main(["hf-hub:org/vehicles@v1", *flags, f"--output={tmp_path / 'a'}"]) == 0
    assert not (tmp_path / "a/model").exists()
    assert 'main(["hf-hub:org/vehicles@v1", ' in (tmp_path / "a/app.py").read_text()
    assert yaml.safe_load((tmp_path / "a/README.md").read_text().split("---")[1])["title"] == "no"
    (tmp_path / "a/own.txt").write_text("mine")
    assert push_to_hub.main(["hf-hub:org/vehicles", *flags, f"--output={tmp_path / 'a'}"]) == 1
    assert (tmp_path / "a/own.txt").exists()


def test_card_of_a_space_promises_no_super_tokens(tmp_path: Path) -> None:
    stvit_hub.save(timm.create_model("test_resnet", num_classes=3), tmp_path / "net")
    flags = [str(tmp_path / "net"), "--space", "--repo-id=org/net", "--dry-run", f"--output={tmp_path / 'space'}"]
    assert push_to_hub.main(flags) == 0
    card = (tmp_path / "space/README.md").read_text(encoding="utf-8")
    assert "super token" not in card.lower() and "see what test_resnet sees in it." in card


def test_space_is_pushed(hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second push uploads nothing.

    Files of a former version are deleted, but not those of the user.
    """
    flags = [str(models / "runs/vehicles"), "--space", "--repo-id=org/vehicles"]
    assert push_to_hub.main(flags) == 0
    assert "spaces/org/vehicles/commit/" in capsys.readouterr().out
    files = hub.files("spaces/org/vehicles")
    assert {"app.py", "README.md", "model/model.safetensors", "stvit/ops/__init__.py"} <= set(files)
    assert push_to_hub.main(flags) == 0
    assert "nothing to push" in capsys.readouterr().out
    hub.commit("spaces/org/vehicles", {"stvit/tools/common/old.py": b"1", "mine.txt": b"2"})
    assert push_to_hub.main(flags) == 0
    files = hub.files("spaces/org/vehicles")
    assert "stvit/tools/common/old.py" not in files and "mine.txt" in files
    # A Space without a readable model is not pushed.
    assert push_to_hub.main(["hf-hub:org/missing", "--space", "--repo-id=org/other"]) == 1
    assert "cannot read org/missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["runs/vehicles", "--example=a.jpg"], "--example is for the card of a detector"),
        (["hf-hub:a b"], "is not a repository id"),
        (['hf-hub:org/a@v"1'], "is not the name of a branch or tag"),
        (["runs/detect/train/weights/best.pt"], "pass --yolo"),
        (["hf-hub:org/a", "--img-size=32"], "remove --img-size"),
        (["missing"], "no such file or folder"),
    ],
)
def test_bad_flags_of_a_space_are_named(
    flags: list[str], words: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    assert push_to_hub.main([*flags, "--space", "--repo-id=org/demo", "--dry-run", "--output=out"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words in line, line
