#!/usr/bin/env python3
"""A page in the browser that shows what a model sees: classes, boxes, super tokens of a photograph.

    python tools/demo.py                                  # the runs in runs/, and models with random weights
    python tools/demo.py runs/flowers hf-hub:ORG/detector yolo26s-stvit_small.yaml
    python tools/demo.py --port 8000 --max-megabytes 5

`python -m stvit.tools.demo` is the same program; it needs `pip install 'stvit[demo]'`. The page is at
http://127.0.0.1:7860, for this machine alone: there is no share link, and --host 0.0.0.0 opens it to the network.
The page answers to its own addresses only, and to the names that --allow-host adds.

A model is a run, a file, `hf-hub:ORG/NAME` (which may also be typed into the page) or a name, whose weights are
then random. `push_to_hub.py --space` makes a Space of the Hugging Face Hub of this page and a model.

Models run in processes of their own: one for the models of the list, and one for models that are typed in. A request
that takes longer than --max-seconds ends its process, and the next request starts another. Each process takes some
hundred MB beside its models.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import errno
import html
import math
import os
import re
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from stvit import visualize
from stvit.images import READERS
from stvit.tools.common.cli import CommandError, Parser, positive, reason, run
from stvit.tools.common.config import ModelSource
from stvit.tools.common.data import resolve_data_config
from stvit.tools.common.hub_models import Downloads, check_config, check_modules
from stvit.tools.common.image_files import fit, open_image
from stvit.tools.common.model import find_source
from stvit.tools.common.scratch import Storage, private_folder
from stvit.tools.common.viewing import (
    LoadedModel,
    explain_errors,
    is_detector,
    load_downloaded,
    load_model,
    stages_of,
)
from stvit.tools.common.worker import Worker
from stvit.weights import Source

PORTS = range(7860, 7960)
RANDOM_MODELS = ("stvit_small", "yolo26n-stvit_pico.yaml")
# Repository ids that users may type in, with a revision.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
# What is kept of an image: more than a screen shows, or a network is given here.
MOST_SHOWN = 1280
# Uploads and pictures are deleted after that many seconds: the page promises an hour.
MAX_AGE_S = 3000.0
# Bytes of the arrays that a session keeps of its super tokens; those of this package's models have a few MB.
MAX_VIEW = 64 * 2**20
# Of models that users type in: the largest, and all of them.
MAX_DOWNLOAD = 2**30
MAX_DOWNLOADS = 10 * 2**30
DOWNLOAD_S = 120.0
TITLE = "What the model sees"
OVERLAYS = ("boundaries", "mean colors")
RANDOM_NOTE = "⚠️ **Random weights:** nothing has trained this model, what it says means nothing."
# No picture is higher than the screen, and lines are not too long.
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
.result img {max-height: 75vh; object-fit: contain}
.result {min-height: 5rem}
.dark {--color-accent: var(--primary-400)}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error."""
    return run(serve, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="demo.py", description="A page in the browser that shows what a model sees.")
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="runs, files, hf-hub:ORG/NAME, or names (random weights)"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder whose runs are offered, too")
    parser.add_argument(
        "--hub",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"let hf-hub:ORG/NAME be typed into the page: models of up to {MAX_DOWNLOAD // 2**30} GB, "
        f"{MAX_DOWNLOADS // 2**30} GB in all",
    )
    parser.add_argument(
        "--random", action=argparse.BooleanOptionalAction, default=True, help="offer models with random weights, too"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on")
    parser.add_argument("--port", type=positive, metavar="N", help="port (default: the first free one from 7860 on)")
    parser.add_argument(
        "--allow-host",
        type=_host_name,
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="address that the page answers to, beside the one it listens on (with --host 0.0.0.0: beside localhost "
        "and all IP addresses); may be given again",
    )
    parser.add_argument("--max-megabytes", type=positive, default=10, metavar="N", help="largest file that is taken")
    parser.add_argument("--max-megapixels", type=positive, default=25, metavar="N", help="largest image that is taken")
    parser.add_argument(
        "--max-total-megabytes",
        type=positive,
        default=1000,
        metavar="N",
        help="room for the uploads and pictures of all users; the oldest ones are deleted from half of it on",
    )
    parser.add_argument(
        "--max-seconds", type=positive, default=60, metavar="N", help="longest computation of a request"
    )
    parser.add_argument(
        "--max-gigabytes",
        type=positive,
        default=8,
        metavar="N",
        help="memory for models that are typed in (Linux only)",
    )
    parser.add_argument("--img-size", type=positive, default=640, metavar="N", help="longest side shown to a model")
    return parser


def _host_name(text: str) -> str:
    """A flag's name of a host, with a port or without."""
    if not re.fullmatch(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", text):
        raise argparse.ArgumentTypeError(f"must be NAME or NAME:PORT, got {text!r}")
    return text


def serve(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted.

    Raises:
        CommandError: If Gradio is missing, a model is unknown, or the port is taken.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise CommandError(f"the page needs Gradio, pip install 'stvit[demo]': {reason(error)}") from error
    if args.max_total_megabytes < args.max_megabytes:
        raise CommandError(
            f"--max-total-megabytes {args.max_total_megabytes} is less than --max-megabytes {args.max_megabytes}; "
            "raise it"
        )
    with _ended_by_signals(), private_folder("stvit-demo-") as folder:
        uploads, temporary = folder / "uploads", folder / "temporary"
        uploads.mkdir()
        temporary.mkdir()
        storage = Storage(uploads, args.max_total_megabytes * 2**20, MAX_AGE_S)
        # The processes that compute may be killed before they remove their temporary files.
        with _environment(GRADIO_TEMP_DIR=str(uploads), TMPDIR=str(temporary)), storage.kept_small():
            models = Models(args)
            port = _free_port(args.host, args.port)
            computer = Computer(models, args)
            try:
                _serve(create_page(models, args, computer), args, port, storage, computer)
            finally:
                computer.close()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Context in which variables of the environment have other values."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP end the program as Ctrl-C does, so that it removes its files."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Programs under nohup are to ignore SIGHUP.
    handlers = {
        number: handler
        for number in (getattr(signal, name) for name in names)
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def end(*_: Any) -> None:
        for number in handlers:  # a second signal is not to interrupt the removal
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in handlers:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _serve(page: Any, args: argparse.Namespace, port: int, storage: Storage, computer: "Computer") -> None:
    from starlette.middleware import Middleware

    from stvit.tools.common.page_guard import Guard, Hosts

    hosts = Hosts(args.host, port, args.allow_host)
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=port,
            share=False,
            max_file_size=f"{args.max_megabytes}mb",
            state_session_capacity=100,
            theme=_theme(),
            css=CSS,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(Guard, page=page, hosts=hosts, storage=storage)]},
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise CommandError(f"cannot listen on {args.host}, port {port}: {reason(error)}") from error
    computer.start()
    print(f"the page is at {url} until Ctrl-C", flush=True)
    page.block_thread()


def _theme() -> Any:
    """Gradio's own with more contrast, and fonts of the reader's machine: nothing is fetched from elsewhere."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def _free_port(host: str, asked: int | None) -> int:
    """A port to listen on: that asked for, or the first free one from 7860 on. Gradio would try for minutes."""
    for port in [asked] if asked else PORTS:
        try:
            with socket.create_server((host, port)):
                return port
        except (OSError, OverflowError) as error:
            # Windows denies access to ports that it keeps for itself.
            if asked or not isinstance(error, OSError) or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise CommandError(f"cannot listen on {host}, port {port}: {reason(error)}") from error
    raise CommandError(f"all ports from {PORTS[0]} to {PORTS[-1]} of {host} are taken: give a --port")


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Models:
    """The models that the page offers, by name, opened when they are asked for.

    Attributes:
        names: Those of the list.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """
        Args:
            args: The flags.

        Raises:
            CommandError: If one is unknown, or there is none.
        """
        self.takes_hub_ids = args.hub
        runs = Path(args.runs).expanduser() if args.runs else None
        found = [] if runs is None else [*runs.glob("*/best/config.json"), *runs.glob("**/weights/best.pt")]
        self.names = list(
            dict.fromkeys(
                [*args.models, *sorted(str(file.parents[1]) for file in found), *(RANDOM_MODELS if args.random else ())]
            )
        )
        if not self.names and not args.hub:
            raise CommandError("no model: give one, or leave --no-random out")
        for name in self.names:
            if not name or not (_is_source(name) or is_detector(name) or timm.is_model(name)):
                raise CommandError(
                    f"{name!r}: no such run, file or model; for a model on the Hub, pass hf-hub:ORG/NAME"
                )
            if _is_source(name) and not is_detector(name):
                find_source(name)  # reports what is missing
        self._opened = OpenedModels()

    def choices(self, of_detectors: bool | None = None) -> list[tuple[str, str]]:
        """What to call each model, and its name.

        Args:
            of_detectors: Whether to list detectors, or classifiers, alone; what is on the Hub may be either.
        """
        wanted = [
            name for name in self.names if of_detectors is None or _parse_hub(name) or is_detector(name) == of_detectors
        ]
        return [
            (name if _is_source(name) else f"{name.removesuffix('.yaml')} (random weights)", name) for name in wanted
        ]

    def check(self, name: Any) -> str:
        """Returns the name of a model in the list or on the Hub.

        Raises:
            CommandError: If the model is not offered.
        """
        name = name.strip() if isinstance(name, str) else ""
        if name in self.names:
            return name
        source = _parse_hub(name) if self.takes_hub_ids else None
        if source is None:
            hub = ", or type hf-hub:ORG/NAME" if self.takes_hub_ids else ""
            raise CommandError(f"there is no model {name[:80]!r} here; choose a model from the list{hub}")
        return str(source)

    def open(self, name: Any) -> LoadedModel:
        """Opens a model in this process.

        Raises:
            CommandError: If the model is not offered, or cannot be opened.
        """
        return self._opened.get(self.check(name))


class OpenedModels:
    """The models that were opened last. Threads that ask for the same model get the same one."""

    def __init__(self, size: int = 3) -> None:
        """
        Args:
            size: How many models stay in memory.
        """
        self.size = size
        self._models: OrderedDict[tuple[str, Source | None], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, downloaded: Source | None = None, is_limited: bool = False) -> LoadedModel:
        """Opens a model, or returns the open model of this name.

        Args:
            name: Name of the model on the page.
            downloaded: Folder or file of a model that was downloaded; None for a model of this machine.
            is_limited: Whether to refuse a model that is slow to build or run.

        Raises:
            CommandError: If the model cannot be opened or is refused.
        """
        with self._lock:
            loaded = self._models.pop((name, downloaded), None)
            if loaded is None:
                while len(self._models) >= self.size:  # frees memory for the next model
                    self._models.popitem(last=False)
                loaded = _open(name, downloaded, is_limited)
            self._models[name, downloaded] = loaded
            return loaded


def _is_source(name: str) -> bool:
    """Returns whether a name stands for weights, not only for a model."""
    is_path = not name.endswith((".yaml", ".yml")) and Path(name).expanduser().exists()
    return is_path or Source.parse_hub(name) is not None


def _parse_hub(name: str) -> Source | None:
    """Returns the source of a model on the Hub; None if the name is another or contains odd characters."""
    source = Source.parse_hub(name)
    return source if source is not None and HUB_ID.fullmatch(source.full_name) else None


def _open(name: str, downloaded: Source | None, is_limited: bool) -> LoadedModel:
    if downloaded is not None:
        if is_limited:
            check_config(name, downloaded)
        loaded = load_downloaded(name, downloaded)
    elif _is_source(name):
        loaded = load_model(ModelSource(checkpoint=name))
    else:
        loaded = load_model(ModelSource(model=name, pretrained=False))
    if is_limited:
        check_modules(name, loaded.model)
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# Processes that compute

_opened = OpenedModels()  # of such a process


class Computer:
    """Runs models in other processes: those of the list in one, those that users type in in another."""

    def __init__(self, models: Models, args: argparse.Namespace) -> None:
        """
        Args:
            models: Models of the page.
            args: The flags.
        """
        self._models = models
        self._downloads = Downloads(DOWNLOAD_S, MAX_DOWNLOAD, MAX_DOWNLOADS)
        self._offered = Worker(args.max_seconds, setup=_prepare)
        self._typed = Worker(args.max_seconds, setup=_prepare, max_bytes=args.max_gigabytes * 2**30)

    def start(self) -> None:
        """Starts the process for the models of the list, and does not wait for it."""
        if self._models.names:
            self._offered.start()

    def close(self) -> None:
        """Ends the processes and all waiting."""
        self._downloads.close()
        self._offered.close()
        self._typed.close()

    def run(self, task: Callable[..., Any], name: Any, *inputs: Any) -> tuple[Any, bool]:
        """Runs a function on a model.

        Args:
            task: Of this module's top level. It takes the model and the inputs.
            name: Of the model.
            inputs: Further arguments.

        Returns:
            The result, and whether the model has random weights.

        Raises:
            CommandError: If the model is not offered or cannot be opened, as `task` raises it, or if it takes too long.
        """
        name = self._models.check(name)
        is_limited = name not in self._models.names
        source = _parse_hub(name)
        downloaded = None if source is None else self._downloads.get(source, is_limited)
        worker = self._typed if is_limited else self._offered
        result: tuple[Any, bool] = worker.call(_work, task, name, downloaded, is_limited, *inputs)
        return result


def _prepare() -> None:
    """Does nothing: to find this function, a new process imports this module and all that it needs."""


def _work(
    task: Callable[..., Any], name: str, downloaded: Source | None, is_limited: bool, *inputs: Any
) -> tuple[Any, bool]:
    try:
        loaded = _opened.get(name, downloaded, is_limited)
        return task(loaded, *inputs), loaded.is_random
    except CommandError as error:
        if downloaded is None:
            raise
        # Users of the page must not see paths of this machine.
        message = str(error).replace(str(downloaded), name).replace(downloaded.name, name)
        raise CommandError(message) from error


# ---------------------------------------------------------------------------------------------------------------------
# What the buttons do


@torch.inference_mode()
def classify(viewed: LoadedModel, image: Image.Image) -> dict[str, float]:
    """The five likeliest classes and their probabilities.

    Raises:
        CommandError: If the model is no classifier.
    """
    model = viewed.model
    if viewed.is_yolo:
        raise CommandError(f"{viewed.title} is a model of Ultralytics: choose a classifier, or go to Detect")
    if model.num_classes < 1:
        raise CommandError(f"{viewed.title} has no classes: choose another")
    config = resolve_data_config({"in_chans": getattr(model, "in_chans", None)}, model, use_test_size=True)
    image = image.convert("L") if config["input_size"][0] == 1 else image
    with explain_errors():
        x = create_transform(**config)(image)[None]
        probabilities = model(x).float().softmax(dim=1)[0]
    top, classes = probabilities.topk(min(5, len(probabilities)))
    names = [_class_name(model, int(i)) for i in classes]
    # Names of a classifier need not differ.
    names = [
        f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, classes.tolist(), strict=True)
    ]
    return dict(zip(names, top.tolist(), strict=True))


def _class_name(model: Any, index: int) -> str:
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) == model.num_classes:
        return str(names[index])
    if model.num_classes == 1000:
        return str(ImageNetInfo("imagenet-1k").index_to_description(index))
    return f"class {index}"


def detect(viewed: LoadedModel, image: Image.Image, confidence: float, img_size: int) -> tuple[Image.Image, str]:
    """The image with what was found drawn on it, and in words.

    Raises:
        CommandError: If the model is no detector.
    """
    if not viewed.is_yolo:
        raise CommandError(f"{viewed.title} says what is in an image, and not where: choose a detector")
    with explain_errors():
        size = -(-img_size // 32) * 32
        (result,) = viewed.model.predict(image, conf=confidence, imgsz=size, verbose=False, save=False)
    found = result.verbose().strip(" ,")
    if result.boxes is not None and len(result.boxes) == 0:
        words = f"Nothing was found with a confidence of {confidence:g} or more."
    else:  # masks of the whole image, depths and so on have no boxes, and may have no words
        words = f"Found: {found}." if found else "The picture shows what was found."
    return Image.fromarray(np.ascontiguousarray(result.plot()[..., ::-1])), words


def look(viewed: LoadedModel, image: Image.Image, stage: int, img_size: int) -> visualize.SuperTokens:
    """Returns the super tokens of a stage.

    Raises:
        CommandError: If the model has no such stage, or its super tokens take too much memory.
    """
    stages_of(viewed)
    with explain_errors():
        view = visualize.super_tokens(viewed.model, fit(image, img_size), stage)
    size = sum(array.nbytes for array in (view.association, view.tokens, view.features, view.queries, view.keys))
    if size > MAX_VIEW:
        raise CommandError(
            f"the super tokens of stage {stage} take {size // 2**20} MB, more than the {MAX_VIEW // 2**20} MB that "
            "this page keeps; choose another stage"
        )
    return view


def describe(view: visualize.SuperTokens, token: int) -> str:
    """A token in words."""
    row, column = divmod(token, view.grid[1])
    share = np.count_nonzero(view.assignment == token) / view.assignment.size
    return (
        f"**Token {token}**, row {row + 1}, column {column + 1} of {view.grid[0]}x{view.grid[1]}: {share:.1%} of the "
        f"image belongs to it most. A pixel belongs to it up to {view.association_map(token).max():.0%}, and it "
        f"attends to a token up to {view.attention_map(token).max():.1%}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def create_page(models: Models, args: argparse.Namespace, computer: Computer) -> Any:
    """Returns the page, a `gradio.Blocks`.

    Args:
        models: Models that it offers.
        args: The flags.
        computer: Runs the models.
    """
    import gradio as gr
    from gradio.utils import get_upload_folder

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        """Words an error as a message on the page, which is one of HTML."""

        @wraps(function)
        def call(*inputs: Any) -> Any:
            try:
                return function(*inputs)
            except CommandError as error:
                raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
            except Exception as error:
                message = f"unforeseen {type(error).__name__}, of which the server's log says more"
                raise gr.Error(message, duration=None) from error

        return call

    # Of the session, since a result may come after the next image.
    @dataclass
    class Session:
        image: Image.Image | None = None
        view: visualize.SuperTokens | None = None
        token: int = 0

    def forget(session: Session, results: int) -> Any:
        session.image = session.view = None
        return [gr.Button(interactive=False)] * 3 + [None] * results

    def receive(upload: Any, session: Session) -> Any:
        path = Path(str(upload.get("path"))).resolve() if isinstance(upload, dict) else None
        if path is not None:
            # Gradio believes the path of a message that it takes for no file.
            if not path.is_relative_to(Path(get_upload_folder()).resolve()):
                raise CommandError("that is no image: upload a file")
            session.image = fit(open_image(path, args.max_megapixels * 10**6), MOST_SHOWN)
        return [gr.Button(interactive=session.image is not None)] * 3

    def need(session: Session) -> Image.Image:
        if session.image is None:
            raise CommandError("choose an image first")
        return session.image

    def note(is_random: bool) -> str:
        return RANDOM_NOTE if is_random else ""

    def on_classify(session: Session, name: Any) -> Any:
        image = need(session)
        result, is_random = computer.run(classify, name, image)
        return (result, note(is_random)) if session.image is image else (None, None)

    def on_detect(session: Session, name: Any, confidence: Any) -> Any:
        image = need(session)
        confidence = min(max(_number(confidence), 0.0), 1.0)
        (picture, words), is_random = computer.run(detect, name, image, confidence, args.img_size)
        return (picture, f"{words}\n\n{note(is_random)}") if session.image is image else (None, None)

    def on_model(session: Session, name: Any) -> Any:
        session.view = None
        stages, _ = computer.run(stages_of, name)
        return gr.Slider(minimum=stages[0], maximum=max(stages[-1], stages[0] + 1), value=stages[0])

    def on_load(session: Session, name: Any) -> Any:
        try:
            return on_model(session, name)
        except CommandError:  # which nobody has asked about yet
            return gr.Slider()

    def on_look(session: Session, name: Any, stage: Any, overlay: Any) -> Any:
        image = need(session)
        view, is_random = computer.run(look, name, image, int(_number(stage)), args.img_size)
        if session.image is not image:
            return [None] * 5
        session.view = view
        return note(is_random), *show(session, view, view.center, overlay)

    def on_overlay(session: Session, overlay: Any) -> Any:
        view, token = session.view, session.token
        return None if view is None else draw_overlay(view, token, overlay)

    def on_click(session: Session, overlay: Any, event: gr.SelectData) -> Any:
        view, place = session.view, event.index
        if view is None:
            raise CommandError("show the super tokens first")
        if not isinstance(place, list | tuple) or len(place) != 2:
            raise CommandError("that is no place in the picture: click on it")
        sides = zip(place, view.image.size, strict=True)
        x, y = (min(max(int(position) // view.scale, 0), side - 1) for position, side in sides)
        return show(session, view, view.token_at(x, y), overlay)

    def draw_overlay(view: visualize.SuperTokens, token: int, overlay: Any) -> Image.Image:
        return view.draw_mean_colors(token) if overlay == OVERLAYS[1] else view.draw_boundaries(token)

    def show(session: Session, view: visualize.SuperTokens, token: int, overlay: Any) -> tuple[Any, ...]:
        session.token = token
        pictures = draw_overlay(view, token, overlay), view.draw_association(token), view.draw_attention(token)
        return describe(view, token), *pictures

    def model_choice(choices: list[tuple[str, str]]) -> gr.Dropdown:
        return gr.Dropdown(
            choices,
            value=choices[0][1] if choices else None,
            allow_custom_value=models.takes_hub_ids,
            label="Model",
            info="One of the list, or hf-hub:ORG/NAME" if models.takes_hub_ids else None,
        )

    def picture(caption: str, elem_id: str) -> gr.Image:
        """A picture below its caption, which Gradio would put on top of it."""
        gr.Markdown(caption)
        buttons = ["download", "fullscreen"]
        look: dict[str, Any] = {"show_label": False, "buttons": buttons, "elem_classes": "result", "format": "png"}
        return gr.Image(label=caption, interactive=False, elem_id=elem_id, **look)

    # Models take turns in their processes. Those who wait, for a download too, leave room for light work. Inputs are
    # checked by the guard and the functions, which word what is wrong.
    common: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
    heavy: dict[str, Any] = {**common, "concurrency_id": "network", "concurrency_limit": 32}
    light: dict[str, Any] = {**common, "concurrency_limit": 8, "show_progress": "hidden"}
    *kinds, last_kind = READERS
    of_classifiers, of_detectors = models.choices(of_detectors=False), models.choices(of_detectors=True)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        session: Any = gr.State(Session(), time_to_live=3600)
        gr.Markdown(f"# {TITLE}\nClasses, boxes and super tokens of your image.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.Image(label="Image", type="filepath", height=340, buttons=[], elem_id="upload")
                gr.Markdown(
                    f"{', '.join(kinds)} or {last_kind}, at most {args.max_megabytes} MB and {args.max_megapixels} "
                    "million pixels. Deleted from this machine within the hour."
                )
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Classify", visible=bool(of_classifiers) or models.takes_hub_ids):
                    classifier = model_choice(of_classifiers)
                    classify_button = gr.Button("Classify", variant="primary", interactive=False, elem_id="classify")
                    classifier_note = gr.Markdown()
                    classes = gr.Label(label="Five likeliest classes", num_top_classes=5, elem_id="classes")
                with gr.Tab("Detect", visible=bool(of_detectors) or models.takes_hub_ids):
                    detector = model_choice(of_detectors)
                    confidence = gr.Slider(0.05, 0.95, value=0.25, step=0.05, label="Least confidence")
                    detect_button = gr.Button("Detect", variant="primary", interactive=False, elem_id="detect")
                    found = gr.Markdown(elem_id="found")
                    boxes = picture("What it found, and where:", "boxes")
                with gr.Tab("Super tokens"):
                    of_tokens = model_choice(models.choices())
                    with gr.Row():
                        stage = gr.Slider(0, 1, value=0, step=1, label="Stage", min_width=140, elem_id="stage")
                        overlay = gr.Radio(OVERLAYS, value=OVERLAYS[0], label="Picture", min_width=140)
                    look_button = gr.Button("Show super tokens", variant="primary", interactive=False, elem_id="look")
                    tokens_note = gr.Markdown()
                    token = gr.Markdown(elem_id="token")
                    tokens = picture("Super tokens. **Click on one:**", "tokens")
                    with gr.Row():
                        with gr.Column(min_width=240):
                            association = picture("Its association with the pixels:", "association")
                        with gr.Column(min_width=240):
                            attention = picture("Its attention to the others:", "attention")

        buttons: list[Any] = [classify_button, detect_button, look_button]
        of_view: list[Any] = [token, tokens, association, attention]
        results: list[Any] = [classes, classifier_note, boxes, found, tokens_note, *of_view]
        # Gradio would open what is uploaded by itself: unprocessed it is a path, and is opened with care. Until it is
        # there the buttons are off.
        emptied = upload.input(lambda session: forget(session, len(results)), session, buttons + results, **light)
        receiving = emptied.then(guarded(receive), [upload, session], buttons, **light)
        receiving.failure(lambda: None, None, upload, **light)
        classify_button.click(guarded(on_classify), [session, classifier], [classes, classifier_note], **heavy)
        detect_button.click(guarded(on_detect), [session, detector, confidence], [boxes, found], **heavy)
        quiet: dict[str, Any] = {**heavy, "show_progress": "hidden"}
        page.load(on_load, [session, of_tokens], stage, **quiet)
        of_tokens.input(guarded(on_model), [session, of_tokens], stage, **quiet)
        of_tokens.input(lambda: [None] * (1 + len(of_view)), None, [tokens_note, *of_view], **light)
        gr.on(
            [look_button.click, stage.input],
            guarded(on_look),
            [session, of_tokens, stage, overlay],
            [tokens_note, *of_view],
            trigger_mode="always_last",
            **heavy,
        )
        overlay.input(guarded(on_overlay), [session, overlay], tokens, **light)
        tokens.select(guarded(on_click), [session, overlay], of_view, **light)
    page.queue(api_open=False, max_size=200)
    return page


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CommandError(f"expected a number, got {value!r:.40}")
    return float(value)


if __name__ == "__main__":
    sys.exit(main())
