"""What a model sees: the super tokens of one of its layers over an image, as arrays and as pictures.

    view = stvit.visualize.super_tokens(model, "photo.jpg", stage=0)
    view.draw()  # a notebook shows `view` itself the same way

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, section 3.2.

Shapes:
    H, W     pixels of the image
    h, w     pixels of the layer's map, H and W over its stride, rounded up; for a detector, of the image with the gray
             that Ultralytics adds around it
    Hs, Ws   super tokens; number row * Ws + column, from 0
    N        super tokens, Hs * Ws
    C        channels of the layer
"""

import copy
import io
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from torch import nn

from stvit.images import convert_image, open_image
from stvit.ops import SuperTokenAttention, sample_super_tokens
from stvit.stvit import STViT

__all__ = ["SuperTokens", "contact_sheet", "draw_boundaries", "find_layers", "stages", "super_tokens"]

LINE = (255, 225, 25)
MARK = (0, 229, 255)
# The gray around a detector's images, Ultralytics'.
PADDING = 114
_WRAPPERS = (torch._dynamo.OptimizedModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
# Smaller images are shown enlarged.
MIN_SHOWN = 384
# Dark to bright, in steps that look equally large; no red beside green.
_HEAT = np.array(
    [(0, 0, 0), (40, 10, 90), (115, 20, 110), (190, 50, 85), (240, 105, 40), (252, 185, 55), (253, 255, 170)],
    dtype=np.float32,
)


@dataclass(frozen=True, eq=False)
class SuperTokens:
    """The super tokens of one layer over one image.

    Attributes:
        image: The image that the model saw, RGB, without the gray around it.
        layer: Name of the layer, a `SuperTokenAttention`, in the model.
        stoken_size: Pixels of the map in a cell, high and wide.
        stride: Pixels of the image for a pixel of the map, along an axis.
        offset: Rows of gray above the image, and columns left of it; (0, 0) but for detectors.
        soft: (9, h, w), how much each pixel of the map belongs to each of the nine super tokens around its cell, row
            by row (equation 3). The nine add up to 1; what points outside the grid belongs to no token.
        tokens: (C, Hs, Ws), the super tokens as they are sampled (equation 4).
        features: (C, Hs, Ws), the same after the attention among them (equation 6).
        queries: (heads, N, C / heads), of that attention.
        keys: (heads, N, C / heads)
    """

    image: Image.Image
    layer: str
    stoken_size: tuple[int, int]
    stride: int
    offset: tuple[int, int]
    soft: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    features: np.ndarray = field(repr=False)
    queries: np.ndarray = field(repr=False)
    keys: np.ndarray = field(repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Super tokens, high and wide."""
        return self.tokens.shape[1], self.tokens.shape[2]

    @cached_property
    def candidates(self) -> np.ndarray:
        """(9, h, w), the numbers of the nine super tokens that `soft` speaks of; -1 outside the grid."""
        _, h, w = self.soft.shape
        rows, columns = np.arange(h)[:, None] // self.stoken_size[0], np.arange(w)[None] // self.stoken_size[1]
        found = []
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                row, column = np.broadcast_arrays(rows + i, columns + j)
                inside = (0 <= row) & (row < self.grid[0]) & (0 <= column) & (column < self.grid[1])
                found.append(np.where(inside, row * self.grid[1] + column, -1))
        return np.stack(found)

    @cached_property
    def hard(self) -> np.ndarray:
        """(h, w), the number of the super token that each pixel of the map belongs to most."""
        inside = np.where(self.candidates >= 0, self.soft, -1.0)
        return np.take_along_axis(self.candidates, inside.argmax(axis=0)[None], axis=0)[0]

    @cached_property
    def labels(self) -> np.ndarray:
        """(H, W), the same for each pixel of the image."""
        return self.to_image(self.hard)

    def association(self, token: int) -> np.ndarray:
        """(H, W), how much each pixel of the image belongs to a super token, from 0 to 1.

        Raises:
            ValueError: If there is no such token.
        """
        self._check(token)
        return self.to_image(np.where(self.candidates == token, self.soft, 0.0).sum(axis=0))

    def attention(self, token: int, head: int | None = None) -> np.ndarray:
        """(Hs, Ws), how much a super token attends to each of them, which adds up to 1.

        Args:
            token: Its number.
            head: One head; None for the mean of all.

        Raises:
            ValueError: If there is no such token or head.
        """
        self._check(token)
        heads, _, dim = self.queries.shape
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
        scores = np.einsum("hnc,hc->hn", self.keys, self.queries[:, token]) * dim**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return (weights.mean(axis=0) if head is None else weights[head]).reshape(self.grid)

    def token_at(self, x: float, y: float) -> int:
        """The number of the super token that a pixel of the image belongs to most.

        Args:
            x: Pixels from the left.
            y: Pixels from the top.

        Raises:
            ValueError: If it lies outside the image.
        """
        if not (0 <= x < self.image.width and 0 <= y < self.image.height):
            raise ValueError(f"pixel ({x}, {y}) lies outside the image of {self.image.width}x{self.image.height}")
        return int(self.labels[int(y), int(x)])

    @property
    def center(self) -> int:
        """The number of the super token in the middle of the image."""
        return self.token_at(self.image.width // 2, self.image.height // 2)

    @property
    def scale(self) -> int:
        """Pixels of a picture for a pixel of the image, along an axis: small images are shown enlarged."""
        return _scale(self.image)

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures, of the image's size times `scale`

    def draw_boundaries(self, token: int | None = None) -> Image.Image:
        """The image, with lines between the super tokens (each pixel's hard one).

        Args:
            token: One to mark, with a line of another color; None for none.

        Raises:
            ValueError: If there is no such token.
        """
        return self._marked(draw_boundaries(self.image, self.labels), token)

    def draw_mean_colors(self, token: int | None = None) -> Image.Image:
        """The mean color of each super token's pixels in their place.

        Args:
            token: One to mark, as above.

        Raises:
            ValueError: If there is no such token.
        """
        labels, n = self.labels.ravel(), math.prod(self.grid)
        pixels = np.asarray(self.image).reshape(-1, 3)
        sums = np.stack([np.bincount(labels, weights=pixels[:, c], minlength=n) for c in range(3)], axis=1)
        means = sums / np.maximum(np.bincount(labels, minlength=n), 1)[:, None]
        return self._marked(Image.fromarray(_enlarged(means[self.labels].round().astype(np.uint8), self.scale)), token)

    def draw_association(self, token: int | None = None) -> Image.Image:
        """How much each pixel belongs to one super token: bright from 0 to the most, with a line around it.

        Args:
            token: Its number; None for the one in the middle of the image.

        Raises:
            ValueError: If there is no such token.
        """
        token = self.center if token is None else token
        return self._draw_heat(_stretched(self.association(token), 0.0), token)

    def draw_attention(self, token: int | None = None, head: int | None = None) -> Image.Image:
        """How much one super token, with a line around it, attends to each: bright from the least to the most.

        Args:
            token: Its number; None for the one in the middle of the image.
            head: One head; None for the mean of all.

        Raises:
            ValueError: If there is no such token or head.
        """
        token = self.center if token is None else token
        weights = self.attention(token, head)
        return self._draw_heat(_stretched(weights, weights.min()).ravel()[self.labels], token)

    def draw(self, token: int | None = None, title: str | None = None) -> Image.Image:
        """The four pictures on a sheet, with what they are below each.

        Args:
            token: Of which association and attention are shown; None for the one in the middle of the image.
            title: What stands above them.

        Raises:
            ValueError: If there is no such token.
        """
        return contact_sheet(self.panels(token), columns=2, title=title)

    def panels(self, token: int | None = None) -> list[tuple[str, Image.Image]]:
        """What they are, and the pictures: boundaries, mean colors, a token's association, its attention.

        Args:
            token: As for `draw`.

        Raises:
            ValueError: If there is no such token.
        """
        token = self.center if token is None else token
        most, weights = self.association(token).max(), self.attention(token)
        rows, columns = self.grid
        return [
            (f"{rows}x{columns} super tokens", self.draw_boundaries()),
            ("mean colors", self.draw_mean_colors()),
            (f"association with token {token}, up to {most:.2f}", self.draw_association(token)),
            (f"its attention, {weights.min():.2g} to {weights.max():.2g}", self.draw_attention(token)),
        ]

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.draw().save(file, format="PNG")
        return file.getvalue()

    def _draw_heat(self, heat: np.ndarray, token: int) -> Image.Image:
        """Values from 0 to 1, (H, W), over the gray image, with a line around the pixels of a token."""
        at = np.clip(heat, 0, 1)[..., None]
        steps = np.arange(len(_HEAT)) / (len(_HEAT) - 1)
        color = np.stack([np.interp(at[..., 0], steps, _HEAT[:, c]) for c in range(3)], axis=-1)
        gray = np.asarray(self.image.convert("L"), dtype=np.float32)[..., None] * 0.55
        picture = _enlarged((gray * (1 - at) + color * at).round().astype(np.uint8), self.scale)
        return self._marked(Image.fromarray(picture), token)

    def _marked(self, picture: Image.Image, token: int | None) -> Image.Image:
        """A picture with a line around the pixels of a token."""
        if token is None:
            return picture
        self._check(token)
        pixels = np.array(picture)
        pixels[_lines(_enlarged(self.labels == token, self.scale), more=1)] = MARK
        return Image.fromarray(pixels)

    def to_image(self, values: np.ndarray) -> np.ndarray:
        """Values of the map's pixels, (h, w), for those of the image, (H, W): each takes the nearest.

        Pixel (i, j) of the map looks at the image around pixel (stride * i, stride * j), where 3x3 convolutions of
        stride 2 and padding 1 put it.

        Raises:
            ValueError: If there are not as many.
        """
        if values.shape != self.soft.shape[1:]:
            raise ValueError(f"values must be those of the map's pixels, {self.soft.shape[1:]}, got {values.shape}")
        rows, columns = (
            np.minimum((np.arange(size) + before + self.stride // 2) // self.stride, limit - 1)
            for size, before, limit in zip(self.image.size[::-1], self.offset, values.shape, strict=True)
        )
        return values[rows[:, None], columns[None]]

    def _check(self, token: int) -> None:
        if not isinstance(token, (int, np.integer)) or not 0 <= token < math.prod(self.grid):
            raise ValueError(f"token must be from 0 to {math.prod(self.grid) - 1}, got {token!r}")


def super_tokens(
    model: nn.Module,
    image: Any,
    stage: int = 0,
    block: int = -1,
    *,
    data_config: Mapping[str, Any] | None = None,
) -> SuperTokens:
    """The super tokens of a model over an image.

    The model runs in evaluation mode up to the layer that is looked at. The model itself does not change, so that other
    threads may use it meanwhile.

    Args:
        model: A classifier, its features (`features_only=True`), a detector on an STViT backbone or with super token
            attention as a block, Ultralytics' YOLO of one, or any module that contains super token attention.
        image: A path, PIL's image, an array (H, W, 3) or (H, W) of dtype uint8; or a tensor (C, H, W) or (1, C, H, W)
            as the model takes it. Of any size; it is not resized. Paths and PIL's images become RGB by the rules of
            `stvit.images`.
        stage: Which of `find_layers(model)`: of an STViT its stages, as in `model.stages`; elsewhere the layers of
            super token attention, in order. Negative ones count from the last.
        block: Which block of the stage.
        data_config: 'mean' and 'std' of what the model takes, of each channel; None for those of the model of timm that
            this is or contains. Images are from 0 to 1 where there are none, or a layer brings its own mean and std, as
            in Ultralytics.

    Raises:
        ValueError: If the model has no such stage or block, its tokens are single pixels there, or the image is not as
            described. It is an `UnreadableImageError` for a file that is not an image or is damaged.
        TypeError: If the model cannot be looked into, as scripted ones.
        OSError: If the image's file cannot be opened.
    """
    net = _unwrap(model)
    layer = _choose(net, stage, block)
    attention: Any = net.get_submodule(layer)
    config = _data_config(net, data_config)
    x, shown = _prepare(image, config)
    x, offset = _padded(x, net, config)
    parameter = next(net.parameters())
    seen = _run_to(net, attention, x.to(parameter.device, parameter.dtype))
    stride = _stride(x.shape[2:], seen["soft"].shape[1:])
    return SuperTokens(shown, layer, attention.stoken_size, stride, offset, **seen)


def stages(model: nn.Module) -> list[int]:
    """The stages whose tokens are more than single pixels: what `super_tokens` takes.

    Raises:
        TypeError: If the model cannot be looked into, as scripted ones.
    """
    net = _unwrap(model)
    return [i for i, names in enumerate(find_layers(net)) if _has_tokens(net, names[-1])]


def find_layers(model: nn.Module) -> list[list[str]]:
    """The names of a model's super token attention layers: those of each stage of an STViT, elsewhere each by itself.

    Raises:
        TypeError: If the model cannot be looked into, as scripted ones.
    """
    layers: dict[str, list[str]] = {}
    for name, module in _unwrap(model).named_modules():
        if isinstance(module, SuperTokenAttention):
            stage = re.match(r"(.*\b)?stages[._]\d+(?=\.)", name)  # of features with '_'
            layers.setdefault(stage.group() if stage else name, []).append(name)
    return list(layers.values())


def draw_boundaries(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """An image with lines between regions.

    Args:
        image: Of H x W pixels; small ones are enlarged.
        labels: (H, W)

    Raises:
        ValueError: If the two are of different size.
    """
    if labels.shape != (image.height, image.width):
        raise ValueError(f"labels must be ({image.height}, {image.width}) as the image, got {labels.shape}")
    picture = _enlarged(np.asarray(image.convert("RGB")), _scale(image))
    picture[_lines(_enlarged(labels, _scale(image)))] = LINE
    return Image.fromarray(picture)


def contact_sheet(
    panels: Sequence[tuple[str, Image.Image]], columns: int, title: str | None = None, panel_width: int = 480
) -> Image.Image:
    """Pictures in rows, each with its caption below it.

    Args:
        panels: Captions and pictures.
        columns: Pictures in a row.
        title: What stands above them.
        panel_width: Pixels to whose width each picture is scaled, or to twice whose height, if it is narrow.

    Raises:
        ValueError: If there is none, `columns` is less than 1, or `panel_width` less than 100.
    """
    if not panels or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns, got {len(panels)} and {columns}")
    if panel_width < 100:
        raise ValueError(f"panel_width must be at least 100 pixels, got {panel_width}")
    gap, columns = panel_width // 30, min(columns, len(panels))
    width = columns * panel_width + (columns + 1) * gap
    size = width // 36  # to be read where the sheet is as wide as a phone
    pictures = []
    for _, picture in panels:
        factor = min(panel_width / picture.width, 2 * panel_width / picture.height)
        fitted = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
        pictures.append(picture.convert("RGB").resize(fitted, way))
    font, captions = _fit([caption for caption, _ in panels], size, panel_width)
    line = size * 3 // 2
    heights = [max(p.height for p in pictures[i : i + columns]) + line for i in range(0, len(pictures), columns)]
    top = gap if title is None else gap + line
    sheet = Image.new("RGB", (width, top + sum(heights) + len(heights) * gap), "white")
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        font_of_title, (text,) = _fit([title], size, width - 2 * gap)
        draw.text((width // 2, (gap + line) // 2), text, fill="black", font=font_of_title, anchor="mm")
    for row, height in enumerate(heights):
        for column, picture in enumerate(pictures[row * columns : (row + 1) * columns]):
            left = gap + column * (panel_width + gap)
            sheet.paste(picture, (left + (panel_width - picture.width) // 2, top))
            middle = (left + panel_width // 2, top + picture.height + line // 2)
            draw.text(middle, captions[row * columns + column], fill="black", font=font, anchor="mm")
        top += height + gap
    return sheet


def _fit(captions: Sequence[str], size: int, width: int) -> tuple[Any, list[str]]:
    """The largest font, of half the size at least, in which no caption is wider; and the captions, cut if need be."""
    length = max(ImageFont.load_default(size).getlength(caption) for caption in captions)
    font: Any = ImageFont.load_default(max(size / 2, size * min(1.0, width / length)))
    fitting = []
    for caption in captions:
        cut = caption
        while font.getlength(cut) > width and len(cut) > 1:
            cut = cut[: -2 if cut.endswith("…") else -1] + "…"
        fitting.append(cut)
    return font, fitting


def _scale(image: Image.Image) -> int:
    return math.ceil(MIN_SHOWN / max(image.size))


def _enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def _stretched(values: np.ndarray, least: float) -> np.ndarray:
    """Values as parts of the way from the least to the greatest of them."""
    return (values - least) / max(values.max() - least, 1e-12)


def _lines(labels: np.ndarray, more: int = 0) -> np.ndarray:
    """Where lines between labels go, thick enough to be seen when the picture is scaled down, and thicker by `more`."""
    lines = np.zeros(labels.shape, dtype=bool)
    lines[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    lines[:-1] |= labels[:-1] != labels[1:]
    for _ in range(1, max(1, max(labels.shape) // 400) + more):
        grown = lines.copy()
        grown[1:] |= lines[:-1]
        grown[:, 1:] |= lines[:, :-1]
        lines = grown
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _unwrap(model: Any) -> nn.Module:
    """The module whose layers run: out of compilation, parallel copies, and Ultralytics' YOLO."""
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise TypeError(
            f"cannot look into a {type(model).__name__}: give the model that it was made from, a torch.nn.Module"
        )
    inner: Any = None
    if isinstance(model, torch._dynamo.OptimizedModule):
        inner = model._orig_mod
    elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    elif _is_of(model, "ultralytics.engine."):  # YOLO: calling it predicts, and its train() trains
        inner = model.model
    if inner is None:
        return model
    return _unwrap(inner)


def _is_of(model: Any, package: str) -> bool:
    return any(f"{kind.__module__}.".startswith(package) for kind in type(model).__mro__)


def _choose(net: nn.Module, stage: int, block: int) -> str:
    layers = find_layers(net)
    if not layers:
        raise ValueError("the model has no super token attention")
    if not isinstance(stage, int) or not -len(layers) <= stage < len(layers):
        raise ValueError(f"stage must be from {-len(layers)} to {len(layers) - 1}, got {stage!r}")
    blocks = layers[stage]
    if not isinstance(block, int) or not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block of stage {stage} must be from {-len(blocks)} to {len(blocks) - 1}, got {block!r}")
    if not _has_tokens(net, blocks[block]):
        which = [str(i) for i in stages(net)]
        raise ValueError(
            f"stage {stage} has no super tokens, for each pixel of its map attends by itself; "
            + (f"those that have: {', '.join(which)}" if which else "no other has any")
        )
    return blocks[block]


def _has_tokens(net: nn.Module, layer: str) -> bool:
    attention: Any = net.get_submodule(layer)
    return attention.stoken_size != (1, 1)


def _data_config(net: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """'mean', 'std' and 'in_chans' of what a model takes."""
    conv = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    in_chans = 3 if conv is None else conv.in_channels
    mean, std = _statistics(net) if given is None else _checked(given, in_chans)
    values = [torch.tensor(_for_channels(stat, in_chans)).reshape(1, in_chans, 1, 1) for stat in (mean, std)]
    return {"mean": values[0], "std": values[1], "in_chans": in_chans}


def _statistics(net: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of a model's images."""
    modules = list(net.modules())
    if any(hasattr(module, "mean") and hasattr(module, "std") for module in modules):  # which normalize by themselves
        return (0.0,), (1.0,)
    cfg = next((module.pretrained_cfg for module in modules if getattr(module, "pretrained_cfg", None)), None)
    if cfg is not None:
        config = resolve_data_config(pretrained_cfg=cfg)
        return config["mean"], config["std"]
    if any(isinstance(module, STViT) for module in modules):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (0.0,), (1.0,)


def _checked(given: Mapping[str, Any], in_chans: int) -> tuple[Sequence[float], Sequence[float]]:
    try:
        mean, std = ([float(value) for value in given[name]] for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data_config must have 'mean' and 'std', a number for each channel, got {given}") from error
    if not (len(mean) == len(std) == in_chans and all(value > 0 for value in std)):
        raise ValueError(
            f"data_config must have 'mean' and 'std', above 0, of each of the {in_chans} channels, got {mean} and {std}"
        )
    return mean, std


def _for_channels(values: Sequence[float], in_chans: int) -> list[float]:
    """Mean or deviation for other channels than it is given for, as timm adapts a first convolution to them."""
    if in_chans == 1:
        return [sum(values) / len(values)]
    return [float(values[channel % len(values)]) for channel in range(in_chans)]


def _prepare(image: Any, config: Mapping[str, Any]) -> tuple[torch.Tensor, Image.Image]:
    """An image as the model takes it, (1, C, H, W), and as it is shown."""
    channels = config["in_chans"]
    if isinstance(image, torch.Tensor):
        x = image[None] if image.dim() == 3 else image
        if x.dim() != 4 or x.shape[0] != 1 or x.shape[1] != channels or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"a tensor must be one normalized image, ({channels}, H, W) or (1, {channels}, H, W) of a floating "
                f"dtype, got {list(image.shape)} of {image.dtype}"
            )
        x = x.detach().float().cpu()
        pixels = (x * config["std"] + config["mean"])[0, :3]
        pixels = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
        pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return x, Image.fromarray(pixels.numpy())
    shown = _open(image)
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes images of {channels} channels: those can be given as a normalized tensor alone, "
            f"({channels}, H, W)"
        )
    pixels = torch.from_numpy(np.array(shown.convert("L" if channels == 1 else "RGB")))
    pixels = pixels.reshape(1, *pixels.shape[:2], channels).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - config["mean"]) / config["std"], shown


def _open(image: Any) -> Image.Image:
    if isinstance(image, (str, Path)):
        return open_image(Path(image).expanduser())
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2 or 0 in image.shape:
            raise ValueError(
                f"an array must be (H, W, 3) or (H, W) of dtype uint8, got {list(image.shape)} of {image.dtype}"
            )
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    if isinstance(image, Image.Image):
        return convert_image(image)
    raise ValueError(f"image must be a path, PIL's image, an array or a tensor, got {type(image).__name__}")


def _padded(x: torch.Tensor, net: nn.Module, config: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The image as Ultralytics letterboxes it, in the middle of gray, to a multiple of a detector's stride.

    Returns:
        The image, and the rows above and the columns left of it.
    """
    strides = getattr(net, "stride", None)
    if not _is_of(net, "ultralytics.") or not isinstance(strides, torch.Tensor):
        return x, (0, 0)
    multiple = int(strides.max())
    height, width = (-(-size // multiple) * multiple for size in x.shape[2:])
    # Of an odd number the larger half comes after.
    top, left = (height - x.shape[2]) // 2, (width - x.shape[3]) // 2
    gray = (PADDING / 255 - config["mean"]) / config["std"]
    whole = gray.expand(1, x.shape[1], height, width).clone()
    whole[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    return whole, (top, left)


class _Reached(Exception):
    """The layer has been looked at: the rest of the model need not run."""


def _run_to(net: nn.Module, attention: SuperTokenAttention, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Runs a model in evaluation mode up to a layer; returns the arrays of `SuperTokens`.

    The modules that run are copies. Other threads may use the model meanwhile: they meet neither the hook nor the mode.
    """
    seen: dict[str, np.ndarray] = {}

    def look(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        tokens, association = sample_super_tokens(args[0], module.stoken_size, module.n_iter, module.backend)
        queries, keys, _ = module.project(tokens)
        arrays = {"soft": association, "tokens": tokens, "features": module.attend(tokens)}
        for name, batch in {**arrays, "queries": queries, "keys": keys}.items():
            seen[name] = batch[0].detach().float().cpu().numpy()
        raise _Reached

    copies = _copy_modules(net)
    copies[id(attention)].register_forward_pre_hook(look)
    with torch.no_grad():
        try:
            copies[id(net)](x)
        except _Reached:
            pass
    if not seen:
        raise ValueError("the layer does not take part when the model runs")
    return seen


def _copy_modules(net: nn.Module) -> dict[int, nn.Module]:
    """Copies the modules of a model, but not their tensors; the copies are in evaluation mode.

    Copies have the hooks of their originals, and refer to each other where the originals do. Compiled modules and
    parallel copies become the plain module inside.

    Returns:
        The copies, by the ids of the originals.
    """
    originals = list(net.modules())
    copies: dict[int, nn.Module] = {}
    for module in originals:
        if isinstance(module, torch.jit.ScriptModule):
            copies[id(module)] = copy.copy(module).eval()
        else:
            copies[id(module)] = object.__new__(type(module))
    for module in originals:
        inner: Any = module
        while isinstance(inner, _WRAPPERS):
            inner = inner._orig_mod if isinstance(inner, torch._dynamo.OptimizedModule) else inner.module
        copies[id(module)] = copies[id(inner)]
    for module in originals:
        if isinstance(module, (torch.jit.ScriptModule, *_WRAPPERS)):
            continue
        attributes = {name: _with_copies(value, copies) for name, value in vars(module).items()}
        attributes.pop("_compiled_call_impl", None)  # of Module.compile, which would call the original
        vars(copies[id(module)]).update({**attributes, "training": False})
    return copies


def _with_copies(value: Any, copies: Mapping[int, nn.Module], depth: int = 3) -> Any:
    """Returns an attribute of a module with the copies of modules in place of the originals.

    Args:
        value: Dictionaries and lists become new ones, methods of a module become those of its copy.
        copies: By the ids of the originals.
        depth: Levels of containers that are looked into.
    """
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _with_copies(value.__self__, copies, 0))
    if depth == 0:
        return value
    if type(value) is partial:
        func, args, keywords = (
            _with_copies(part, copies, depth - 1) for part in (value.func, value.args, value.keywords)
        )
        return partial(func, *args, **keywords)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _with_copies(item, copies, depth - 1)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_with_copies(item, copies, depth - 1) for item in value)
    return value


def _stride(image: Sequence[int], pixels: Sequence[int]) -> int:
    """Pixels of the image for one of the map, along an axis."""
    for stride in (2**i for i in range(12)):
        if all(-(-size // stride) == count for size, count in zip(image, pixels, strict=True)):
            return stride
    return max(1, round(max(image) / max(pixels)))
