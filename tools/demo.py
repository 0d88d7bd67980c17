#!/usr/bin/env python3
"""A page in the browser that shows what a model sees: classes, boxes, super tokens of a photograph.

    python tools/demo.py                                  # the runs in runs/, and models with random weights
    python tools/demo.py runs/flowers hf-hub:ORG/detector yolo26s-stvit_small.yaml
    python tools/demo.py --port 8000 --max-megabytes 5

`python -m stvit.tools.demo` is the same program; it needs `pip install 'stvit[demo]'`. The page is at
http://127.0.0.1:7860, for this machine alone: there is no share link, and --host 0.0.0.0 opens it to the network.

A model is a run, a file, `hf-hub:ORG/NAME` (which may also be typed into the page) or a name, whose weights are
then random. `push_to_hub.py --space` makes a Space of the Hugging Face Hub of this page and a model.
"""

import argparse
import errno
import html
import re
import socket
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from stvit import visualize
from stvit.tools.common.cli import CommandError, Parser, positive, reason, run
from stvit.tools.common.data import resolve_images
from stvit.tools.common.viewing import READERS, Viewed, explained, fitted, is_detector, open_image, open_viewed

PORTS = range(7860, 7960)
RANDOM_MODELS = ("stvit_small", "yolo26n-stvit_pico.yaml")
HUB_ID = re.compile(r"hf-hub:[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
# What is kept of an image: more than a screen shows, or a network is given here.
MOST_SHOWN = 1280
OVERLAYS = ("boundaries", "mean colors")
RANDOM_NOTE = "⚠️ **Random weights:** nothing has trained this model, what it says means nothing."
# No picture is higher than the screen, and lines are not too long.
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
.result img {max-height: 75vh; object-fit: contain}
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
        "--hub", action=argparse.BooleanOptionalAction, default=True, help="let hf-hub:ORG/NAME be typed into the page"
    )
    parser.add_argument(
        "--random", action=argparse.BooleanOptionalAction, default=True, help="offer models with random weights, too"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on")
    parser.add_argument("--port", type=positive, metavar="N", help="port (default: the first free one from 7860 on)")
    parser.add_argument("--max-megabytes", type=positive, default=10, metavar="N", help="largest file that is taken")
    parser.add_argument("--max-megapixels", type=positive, default=25, metavar="N", help="largest image that is taken")
    parser.add_argument("--img-size", type=positive, default=640, metavar="N", help="longest side shown to a model")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted.

    Raises:
        CommandError: If Gradio is missing, a model is unknown, or the port is taken.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise CommandError(f"the page needs Gradio, pip install 'stvit[demo]': {reason(error)}") from error
    page = create_page(Models(args), args)
    port = _free_port(args.host, args.port)
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
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise CommandError(f"cannot listen on {args.host}, port {port}: {reason(error)}") from error
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
            if asked or not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
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
            if not _is_source(name) and not is_detector(name) and not timm.is_model(name):
                raise CommandError(f"{name}: there is no such run, file or model; of the Hub it is hf-hub:ORG/NAME")
        # The last few stay in memory.
        self._open = lru_cache(maxsize=3)(_open)

    def choices(self, of_detectors: bool | None = None) -> list[tuple[str, str]]:
        """What to call each model, and its name.

        Args:
            of_detectors: Whether to list detectors, or classifiers, alone; what is on the Hub may be either.
        """
        wanted = [
            name
            for name in self.names
            if of_detectors is None or HUB_ID.fullmatch(name) or is_detector(name) == of_detectors
        ]
        return [(name if _is_source(name) else f"{name.split('.')[0]} (random weights)", name) for name in wanted]

    def open(self, name: str | None) -> Viewed:
        """The model of a name.

        Raises:
            CommandError: If it is not offered, or cannot be had.
        """
        name = (name or "").strip()
        if name not in self.names and not (self.takes_hub_ids and HUB_ID.fullmatch(name)):
            hub = ", or type hf-hub:ORG/NAME" if self.takes_hub_ids else ""
            raise CommandError(f"there is no model {name[:80]!r} here: choose one of the list{hub}")
        return self._open(name)


def _is_source(name: str) -> bool:
    """Whether a name is that of weights, and not of a model alone."""
    return name.startswith("hf-hub:") or Path(name).expanduser().exists()


def _open(name: str) -> Viewed:
    of_name = {"checkpoint": name, "model": None} if _is_source(name) else {"checkpoint": None, "model": name}
    flags: dict[str, Any] = {
        "use_ema": None,
        "num_classes": None,
        "in_chans": None,
        "model_kwargs": {},
        "pretrained": False,
    }
    return open_viewed(argparse.Namespace(**of_name, **flags))


# ---------------------------------------------------------------------------------------------------------------------
# What the buttons do


@torch.inference_mode()
def classify(viewed: Viewed, image: Image.Image) -> dict[str, float]:
    """The five likeliest classes and their probabilities.

    Raises:
        CommandError: If the model is no classifier.
    """
    model = viewed.model
    if viewed.is_yolo:
        raise CommandError(f"{viewed.title} is a model of Ultralytics: choose a classifier, or go to Detect")
    if model.num_classes < 1:
        raise CommandError(f"{viewed.title} has no classes: choose another")
    config = resolve_images({"in_chans": getattr(model, "in_chans", None)}, model, use_test_size=True)
    image = image.convert("L") if config["input_size"][0] == 1 else image
    with explained():
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


def detect(viewed: Viewed, image: Image.Image, confidence: float, img_size: int) -> tuple[Image.Image, str]:
    """The image with what was found drawn on it, and in words.

    Raises:
        CommandError: If the model is no detector.
    """
    if not viewed.is_yolo:
        raise CommandError(f"{viewed.title} says what is in an image, and not where: choose a detector")
    with explained():
        size = -(-img_size // 32) * 32
        (result,) = viewed.model.predict(image, conf=confidence, imgsz=size, verbose=False, save=False)
    found = result.verbose().strip(" ,")
    words = f"Found: {found}." if len(result) else f"Nothing was found with a confidence of {confidence:g} or more."
    return Image.fromarray(np.ascontiguousarray(result.plot()[..., ::-1])), words


def look(viewed: Viewed, image: Image.Image, stage: int, img_size: int) -> tuple[visualize.SuperTokens, list[int], int]:
    """The super tokens of a stage, the stages that have any, and the stage: the first of these if it has none.

    Raises:
        CommandError: If no stage has any.
    """
    with explained():
        stages = visualize.stages(viewed.model)
        if not stages:
            raise CommandError(f"{viewed.title} has no super tokens: choose an STViT, or a detector with one")
        stage = stage if stage in stages else stages[0]
        return visualize.super_tokens(viewed.model, fitted(image, img_size), stage), stages, stage


def describe(view: visualize.SuperTokens, token: int) -> str:
    """A token in words."""
    row, column = divmod(token, view.grid[1])
    share = np.count_nonzero(view.labels == token) / view.labels.size
    return (
        f"**Token {token}**, row {row + 1}, column {column + 1} of {view.grid[0]}x{view.grid[1]}: {share:.1%} of the "
        f"image belongs to it most. A pixel belongs to it up to {view.association(token).max():.0%}, and it attends to "
        f"a token up to {view.attention(token).max():.1%}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def create_page(models: Models, args: argparse.Namespace) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        models: What it offers.
        args: The flags.
    """
    import gradio as gr

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

    def receive(upload: Any) -> Image.Image | None:
        if upload is None:
            return None
        path = upload.get("path")
        if not isinstance(path, str):
            raise CommandError("that is no image: upload a file")
        return fitted(open_image(Path(path), args.max_megapixels * 10**6), MOST_SHOWN)

    def need(image: Image.Image | None) -> Image.Image:
        if image is None:
            raise CommandError("choose an image first")
        return image

    def note(viewed: Viewed) -> str:
        return RANDOM_NOTE if viewed.is_random else ""

    def on_classify(image: Image.Image | None, name: str) -> Any:
        image, viewed = need(image), models.open(name)
        return classify(viewed, image), note(viewed)

    def on_detect(image: Image.Image | None, name: str, confidence: float) -> Any:
        image, viewed = need(image), models.open(name)
        picture, words = detect(viewed, image, confidence, args.img_size)
        return picture, f"{words}\n\n{note(viewed)}"

    def on_look(image: Image.Image | None, name: str, stage: float, overlay: str) -> Any:
        image, viewed = need(image), models.open(name)
        view, stages, stage = look(viewed, image, int(stage), args.img_size)
        slider = gr.Slider(maximum=max(1, stages[-1]), value=stage)
        return view, slider, note(viewed), on_overlay(view, overlay), *show(view, view.center)

    def on_overlay(view: visualize.SuperTokens | None, overlay: str) -> Any:
        if view is None:
            return None
        return view.draw_mean_colors() if overlay == OVERLAYS[1] else view.draw_boundaries()

    def on_click(view: visualize.SuperTokens | None, event: gr.SelectData) -> Any:
        if view is None:
            raise CommandError("show the super tokens first")
        x, y = (int(position) // view.scale for position in event.index)
        return show(view, view.token_at(min(x, view.image.width - 1), min(y, view.image.height - 1)))

    def show(view: visualize.SuperTokens, token: int) -> tuple[Image.Image, Image.Image, str]:
        return view.draw_association(token), view.draw_attention(token), describe(view, token)

    def model_choice(of_detectors: bool | None) -> gr.Dropdown:
        choices = models.choices(of_detectors)
        return gr.Dropdown(
            choices,
            value=choices[0][1] if choices else None,
            allow_custom_value=models.takes_hub_ids,
            label="Model",
            info="One of the list, or hf-hub:ORG/NAME" if models.takes_hub_ids else None,
        )

    def picture(label: str, **kwargs: Any) -> gr.Image:
        return gr.Image(
            label=label,
            interactive=False,
            buttons=["download", "fullscreen"],
            format="png",
            elem_classes="result",
            **kwargs,
        )

    # Networks take turns.
    heavy: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
    light: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    kinds = list(READERS)
    with gr.Blocks(title="What the model sees", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        image: Any = gr.State(time_to_live=3600)
        view: Any = gr.State(time_to_live=3600)
        gr.Markdown("# What the model sees\nClasses, boxes and super tokens of your image.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.Image(label="Image", type="filepath", height=340, buttons=[], elem_id="upload")
                gr.Markdown(
                    f"{', '.join(kinds[:-1])} or {kinds[-1]}, at most {args.max_megabytes} MB and "
                    f"{args.max_megapixels} million pixels. Deleted from this machine within the hour."
                )
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Classify"):
                    classifier = model_choice(of_detectors=False)
                    classify_button = gr.Button("Classify", variant="primary", elem_id="classify")
                    classifier_note = gr.Markdown()
                    classes = gr.Label(label="Five likeliest classes", num_top_classes=5, elem_id="classes")
                with gr.Tab("Detect"):
                    detector = model_choice(of_detectors=True)
                    confidence = gr.Slider(0.05, 0.95, value=0.25, step=0.05, label="Least confidence")
                    detect_button = gr.Button("Detect", variant="primary", elem_id="detect")
                    found = gr.Markdown(elem_id="found")
                    boxes = picture("What it found, and where", elem_id="boxes")
                with gr.Tab("Super tokens"):
                    of_tokens = model_choice(of_detectors=None)
                    with gr.Row():
                        stage = gr.Slider(0, 1, value=0, step=1, label="Stage", min_width=160, elem_id="stage")
                        overlay = gr.Radio(OVERLAYS, value=OVERLAYS[0], label="Picture", min_width=160)
                    look_button = gr.Button("Show super tokens", variant="primary", elem_id="look")
                    tokens_note = gr.Markdown()
                    tokens = picture("Super tokens. Click on one.", elem_id="tokens")
                    token = gr.Markdown(elem_id="token")
                    with gr.Row():
                        association = picture("Its association with the pixels", min_width=240, elem_id="association")
                        attention = picture("Its attention to the tokens", min_width=240, elem_id="attention")

        # Gradio would open what is uploaded by itself: unprocessed it is a path, and is opened with care.
        receiving = upload.input(guarded(receive), upload, image, preprocess=False, **light)
        receiving.failure(lambda: (None, None), None, [upload, image], **light)
        results = [classes, classifier_note, boxes, found, view, tokens_note, tokens, association, attention, token]
        upload.input(lambda: [None] * len(results), None, results, **light)
        classify_button.click(guarded(on_classify), [image, classifier], [classes, classifier_note], **heavy)
        detect_button.click(guarded(on_detect), [image, detector, confidence], [boxes, found], **heavy)
        gr.on(
            [look_button.click, stage.input],
            guarded(on_look),
            [image, of_tokens, stage, overlay],
            [view, stage, tokens_note, tokens, association, attention, token],
            trigger_mode="always_last",
            **heavy,
        )
        overlay.input(guarded(on_overlay), [view, overlay], tokens, **light)
        tokens.select(guarded(on_click), view, [association, attention, token], **light)
    return page


if __name__ == "__main__":
    sys.exit(main())
