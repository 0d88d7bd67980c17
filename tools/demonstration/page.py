"""The page: its layout, and the functions of its buttons, pictures and fields.

It has three tabs: Classify, Detect and Super tokens. They share the image that the user uploaded.
"""

import html
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from stvit import visualize
from stvit.images import READERS

from ..common.cli import CommandError
from ..common.image_files import fit, open_image
from ..common.viewing import stages_of
from .computing import Computer
from .config import LimitsConfig
from .models import ModelList
from .tasks import classify, compute_view, describe, detect

__all__ = ["Page"]

TITLE = "What the model sees"
OVERLAYS = ("boundaries", "mean colors")
RANDOM_NOTE = "⚠️ **Random weights:** the model is untrained, and its results are meaningless."
# An uploaded image is reduced to this width and height: larger than a screen shows or a model of the page sees.
MAX_SHOWN = 1280

# The guard and the functions of this module check all inputs, so that a wrong one gets a message.
COMMON: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
# Events that run a model wait for its process or for a download. The limit leaves threads for light events.
HEAVY: dict[str, Any] = {**COMMON, "concurrency_id": "network", "concurrency_limit": 32}
HEAVY_QUIET: dict[str, Any] = {**HEAVY, "show_progress": "hidden"}
LIGHT: dict[str, Any] = {**COMMON, "concurrency_limit": 8, "show_progress": "hidden"}


@dataclass
class Session:
    """State of a user's page.

    Attributes:
        image: The uploaded image.
        view: The super tokens that the page shows.
        token: Number of the selected token.
    """

    image: Image.Image | None = None
    view: visualize.SuperTokens | None = None
    token: int = 0


@dataclass
class ClassifyTab:
    """Components of the tab Classify."""

    model: Any
    button: Any
    note: Any
    classes: Any


@dataclass
class DetectTab:
    """Components of the tab Detect."""

    model: Any
    confidence: Any
    button: Any
    words: Any
    picture: Any


@dataclass
class TokensTab:
    """Components of the tab Super tokens."""

    model: Any
    stage: Any
    overlay: Any
    button: Any
    note: Any
    words: Any
    tokens: Any
    association: Any
    attention: Any

    @property
    def view(self) -> list[Any]:
        """Components of the selected token: its description and three pictures."""
        return [self.words, self.tokens, self.association, self.attention]


class Page:
    """The page of a list of models.

    Attributes:
        blocks: The page, a `gradio.Blocks`.
    """

    def __init__(self, models: ModelList, computer: Computer, limits: LimitsConfig) -> None:
        """Creates the components and connects them with the methods of this class.

        Args:
            models: Models that the page offers.
            computer: Runs the models.
            limits: Limits on images.
        """
        self.models = models
        self.computer = computer
        self.limits = limits
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            self.session: Any = gr.State(Session(), time_to_live=3600)
            gr.Markdown(f"# {TITLE}\nClasses, boxes and super tokens of your image.")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self.upload = self._add_upload()
                with gr.Column(scale=3, min_width=300), gr.Tabs():
                    self.classify_tab = self._add_classify_tab()
                    self.detect_tab = self._add_detect_tab()
                    self.tokens_tab = self._add_tokens_tab()
            self._connect_upload()
            self._connect_classify()
            self._connect_detect()
            self._connect_tokens()
        self.blocks.queue(api_open=False, max_size=200)

    # -----------------------------------------------------------------------------------------------------------------
    # Layout

    def _add_upload(self) -> Any:
        upload = gr.Image(label="Image", type="filepath", height=340, buttons=[], elem_id="upload")
        *kinds, last_kind = READERS
        gr.Markdown(
            f"{', '.join(kinds)} or {last_kind}, up to {self.limits.max_megabytes} MB and "
            f"{self.limits.max_megapixels} million pixels. Deleted from this machine within an hour."
        )
        return upload

    def _add_classify_tab(self) -> ClassifyTab:
        choices = self.models.choices(of_detectors=False)
        with self._tab("Classify", choices):
            return ClassifyTab(
                model=self._add_model_choice(choices),
                button=_add_button("Classify", "classify"),
                note=gr.Markdown(),
                classes=gr.Label(label="Five most likely classes", num_top_classes=5, elem_id="classes"),
            )

    def _add_detect_tab(self) -> DetectTab:
        choices = self.models.choices(of_detectors=True)
        with self._tab("Detect", choices):
            return DetectTab(
                model=self._add_model_choice(choices),
                confidence=gr.Slider(0.05, 0.95, value=0.25, step=0.05, label="Minimum confidence"),
                button=_add_button("Detect", "detect"),
                words=gr.Markdown(elem_id="found"),
                picture=_add_picture("Detections:", "boxes"),
            )

    def _add_tokens_tab(self) -> TokensTab:
        with gr.Tab("Super tokens"):
            model = self._add_model_choice(self.models.choices())
            with gr.Row():
                stage = gr.Slider(0, 1, value=0, step=1, label="Stage", min_width=140, elem_id="stage")
                overlay = gr.Radio(OVERLAYS, value=OVERLAYS[0], label="Picture", min_width=140)
            button = _add_button("Show super tokens", "look")
            note = gr.Markdown()
            words = gr.Markdown(elem_id="token")
            tokens = _add_picture("Super tokens. **Click on one:**", "tokens")
            with gr.Row():
                with gr.Column(min_width=240):
                    association = _add_picture("Association of the pixels with this token:", "association")
                with gr.Column(min_width=240):
                    attention = _add_picture("Attention of this token to all tokens:", "attention")
        return TokensTab(model, stage, overlay, button, note, words, tokens, association, attention)

    @contextmanager
    def _tab(self, title: str, choices: list[tuple[str, str]]) -> Iterator[None]:
        """Context manager: adds a tab, which is hidden if no model fits it."""
        with gr.Tab(title, visible=bool(choices) or self.models.takes_hub_ids):
            yield

    def _add_model_choice(self, choices: list[tuple[str, str]]) -> Any:
        return gr.Dropdown(
            choices,
            value=choices[0][1] if choices else None,
            allow_custom_value=self.models.takes_hub_ids,
            label="Model",
            info="From the list, or hf-hub:ORG/NAME" if self.models.takes_hub_ids else None,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Events

    def _connect_upload(self) -> None:
        """Connects the field for the image.

        The upload reaches `receive` as a path. Gradio would open the file without the limits of this page. The buttons
        are disabled until the image is open.
        """
        tokens = self.tokens_tab
        buttons = [self.classify_tab.button, self.detect_tab.button, tokens.button]
        results = [
            *(self.classify_tab.classes, self.classify_tab.note),
            *(self.detect_tab.picture, self.detect_tab.words),
            *(tokens.note, *tokens.view),
        ]

        def forget(session: Session) -> Any:
            session.image = session.view = None
            return [gr.Button(interactive=False)] * len(buttons) + [None] * len(results)

        emptied = self.upload.input(forget, self.session, buttons + results, **LIGHT)
        receiving = emptied.then(_show_errors(self.receive), [self.upload, self.session], buttons, **LIGHT)
        receiving.failure(lambda: None, None, self.upload, **LIGHT)

    def _connect_classify(self) -> None:
        tab = self.classify_tab
        inputs = [self.session, tab.model]
        tab.button.click(_show_errors(self.on_classify), inputs, [tab.classes, tab.note], **HEAVY)

    def _connect_detect(self) -> None:
        tab = self.detect_tab
        inputs = [self.session, tab.model, tab.confidence]
        tab.button.click(_show_errors(self.on_detect), inputs, [tab.picture, tab.words], **HEAVY)

    def _connect_tokens(self) -> None:
        tab = self.tokens_tab
        results = [tab.note, *tab.view]
        self.blocks.load(self.on_load, [self.session, tab.model], tab.stage, **HEAVY_QUIET)
        tab.model.input(_show_errors(self.on_model), [self.session, tab.model], tab.stage, **HEAVY_QUIET)
        tab.model.input(lambda: [None] * len(results), None, results, **LIGHT)
        gr.on(
            [tab.button.click, tab.stage.input],
            _show_errors(self.on_look),
            [self.session, tab.model, tab.stage, tab.overlay],
            results,
            trigger_mode="always_last",
            **HEAVY,
        )
        tab.overlay.input(_show_errors(self.on_overlay), [self.session, tab.overlay], tab.tokens, **LIGHT)
        tab.tokens.select(_show_errors(self.on_click), [self.session, tab.overlay], tab.view, **LIGHT)

    def receive(self, upload: Any, session: Session) -> Any:
        """Opens the uploaded image, and enables the buttons.

        Raises:
            CommandError: If the file is not an upload or not an image within the limits.
        """
        path = Path(str(upload.get("path"))).resolve() if isinstance(upload, dict) else None
        if path is not None:
            # Gradio does not check a path in a message that is not marked as a file.
            if not path.is_relative_to(Path(get_upload_folder()).resolve()):
                raise CommandError("that is no uploaded image; upload a file")
            session.image = fit(open_image(path, self.limits.max_megapixels * 10**6), MAX_SHOWN)
        return [gr.Button(interactive=session.image is not None)] * 3

    def on_classify(self, session: Session, name: Any) -> Any:
        """Returns the classes and a note.

        It returns nothing if the user has changed the image meanwhile.
        """
        image = _require_image(session)
        result, is_random = self.computer.run(classify, name, image)
        return (result, _note(is_random)) if session.image is image else (None, None)

    def on_detect(self, session: Session, name: Any, confidence: Any) -> Any:
        """Returns a picture and a sentence.

        It returns nothing if the user has changed the image meanwhile.
        """
        image = _require_image(session)
        confidence = min(max(_parse_number(confidence), 0.0), 1.0)
        (picture, words), is_random = self.computer.run(detect, name, image, confidence, self.limits.img_size)
        return (picture, f"{words}\n\n{_note(is_random)}") if session.image is image else (None, None)

    def on_model(self, session: Session, name: Any) -> Any:
        """Returns the slider for the stages of the chosen model."""
        session.view = None
        stages, _ = self.computer.run(stages_of, name)
        return gr.Slider(minimum=stages[0], maximum=max(stages[-1], stages[0] + 1), value=stages[0])

    def on_load(self, session: Session, name: Any) -> Any:
        """Returns the slider for the stages of the first model.

        An error is not shown, because the user has not chosen this model.
        """
        try:
            return self.on_model(session, name)
        except CommandError:
            return gr.Slider()

    def on_look(self, session: Session, name: Any, stage: Any, overlay: Any) -> Any:
        """Returns a note and the view of the token at the center.

        It returns nothing if the user has changed the image meanwhile.
        """
        image = _require_image(session)
        number = int(_parse_number(stage))
        view, is_random = self.computer.run(compute_view, name, image, number, self.limits.img_size)
        if session.image is not image:
            return [None] * 5
        session.view = view
        return _note(is_random), *_show_token(session, view, view.center, overlay)

    def on_overlay(self, session: Session, overlay: Any) -> Any:
        """Returns the other picture of the super tokens."""
        # A new image or model may set `session.view` to None at any time.
        view, token = session.view, session.token
        return None if view is None else _draw_overlay(view, token, overlay)

    def on_click(self, session: Session, overlay: Any, event: gr.SelectData) -> Any:
        """Returns the view of the token at the clicked pixel."""
        view, place = session.view, event.index
        if view is None:
            raise CommandError("there are no super tokens yet; press Show super tokens")
        if not isinstance(place, list | tuple) or len(place) != 2:
            raise CommandError("that is no pixel of the picture; click on the picture")
        sides = zip(place, view.image.size, strict=True)
        x, y = (min(max(int(position) // view.scale, 0), side - 1) for position, side in sides)
        return _show_token(session, view, view.token_at(x, y), overlay)


def _add_button(label: str, elem_id: str) -> Any:
    return gr.Button(label, variant="primary", interactive=False, elem_id=elem_id)


def _add_picture(caption: str, elem_id: str) -> Any:
    """Adds a picture below its caption.

    Gradio would draw the caption over the picture.
    """
    gr.Markdown(caption)
    look: dict[str, Any] = {"show_label": False, "buttons": ["download", "fullscreen"], "elem_classes": "result"}
    return gr.Image(label=caption, interactive=False, elem_id=elem_id, format="png", **look)


def _show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that shows errors as messages on the page."""

    @wraps(function)
    def call(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except CommandError as error:  # the page shows messages as HTML
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
        except Exception as error:
            message = f"unexpected {type(error).__name__}; the log of the server has details"
            raise gr.Error(message, duration=None) from error

    return call


def _require_image(session: Session) -> Image.Image:
    """Returns the uploaded image.

    Raises:
        CommandError: If the user has not uploaded an image.
    """
    if session.image is None:
        raise CommandError("there is no image yet; upload one")
    return session.image


def _note(is_random: bool) -> str:
    return RANDOM_NOTE if is_random else ""


def _show_token(session: Session, view: visualize.SuperTokens, token: int, overlay: Any) -> tuple[Any, ...]:
    """Selects a token, and returns its description and the three pictures."""
    session.token = token
    pictures = _draw_overlay(view, token, overlay), view.draw_association(token), view.draw_attention(token)
    return describe(view, token), *pictures


def _draw_overlay(view: visualize.SuperTokens, token: int, overlay: Any) -> Image.Image:
    return view.draw_mean_colors(token) if overlay == OVERLAYS[1] else view.draw_boundaries(token)


def _parse_number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CommandError(f"expected a number, got {value!r:.40}")
    return float(value)
