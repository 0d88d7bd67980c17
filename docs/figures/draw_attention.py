#!/usr/bin/env python3
"""Draws the figure of "How it works", for light and dark pages.

It shows super token attention on a picture of 48x32 pixels.

    python docs/figures/draw_attention.py

The colors of the pixels, the nine weights, the super tokens and the result are computed by `stvit.ops`. Attention
among the tokens is left out of the computation, so that the last panel shows colors.
"""

import io
from base64 import b64encode
from pathlib import Path

import torch
from PIL import Image

from stvit import sample_super_tokens, upsample_super_tokens

HEIGHT, WIDTH, CELL = 32, 48, 8  # pixels
SCALE = 8  # units of the drawing for a pixel of the picture
PIXEL = (13, 26)  # row and column of the pixel whose weights are shown
TOKEN = (1, 1)  # row and column of the token whose attention is shown
GAP, TITLE = 40, 78
THEMES = {
    "light": {"text": "#1f2430", "muted": "#5b6270", "grid": "#ffffff", "accent": "#d6336c", "panel": "#f2f3f7"},
    "dark": {"text": "#e8eaf0", "muted": "#a7aebd", "grid": "#14161c", "accent": "#ff7aa8", "panel": "#242833"},
}


def main() -> None:
    """Writes attention-light.svg and attention-dark.svg beside this file."""
    x = make_picture()
    # Dot products compare the features. Centered and scaled up, colors are as distinct as the features of a network.
    features = torch.cat([8 * (x - x.mean(dim=(2, 3), keepdim=True)), x], dim=1)
    tokens, association = sample_super_tokens(features, CELL)
    smooth = upsample_super_tokens(tokens, association, CELL)
    for theme, colors in THEMES.items():
        svg = draw(x[0], association[0], tokens[0, 3:], smooth[0, 3:], colors)
        Path(__file__).with_name(f"attention-{theme}.svg").write_text(svg, encoding="utf-8")


def make_picture() -> torch.Tensor:
    """Returns a hill, a sun and a sky, (1, 3, H, W) from 0 to 1."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    sky = torch.tensor([0.55, 0.75, 0.95]).view(3, 1, 1) + 0.006 * rows
    sun = torch.tensor([0.99, 0.80, 0.30]).view(3, 1, 1)
    hill = torch.tensor([0.30, 0.58, 0.36]).view(3, 1, 1) - 0.004 * (rows - 20)
    picture = torch.where((rows - 9) ** 2 + (columns - 31) ** 2 < 49, sun, sky)
    picture = torch.where(rows > 24 - 9 * torch.exp(-(((columns - 14) / 9.0) ** 2)), hill, picture)
    return picture.clamp(0, 1).unsqueeze(0)


def draw(
    x: torch.Tensor, association: torch.Tensor, tokens: torch.Tensor, smooth: torch.Tensor, colors: dict[str, str]
) -> str:
    """Returns the drawing as SVG.

    Args:
        x: Picture (3, H, W).
        association: Weights (9, H, W) of each pixel.
        tokens: Mean colors (3, Hs, Ws) of the super tokens.
        smooth: Result (3, H, W).
        colors: A value of `THEMES`.
    """
    width, height = WIDTH * SCALE, HEIGHT * SCALE
    total = (2 * width + 3 * GAP, 2 * (height + TITLE) + 2 * GAP)
    panels = [
        ("1. Cells", "pixels (B, C, H, W) in cells of h x w", _image(x) + _grid(colors)),
        ("2. Associate", "each pixel with its 9 nearest tokens", _image(x, 0.35) + _weights(association, colors)),
        ("3. Attend", "among (B, C, H/h, W/w) super tokens", _panel(colors) + _attention(tokens, colors)),
        ("4. Upsample", "tokens back to pixels (B, C, H, W)", _image(smooth) + _grid(colors)),
    ]
    body = []
    for number, (title, subtitle, content) in enumerate(panels):
        left = GAP + (number % 2) * (width + GAP)
        top = GAP + (number // 2) * (height + TITLE + GAP // 2)
        body.append(
            f'<g transform="translate({left} {top})">'
            f'<text y="22" font-size="27" font-weight="bold" fill="{colors["text"]}">{title}</text>'
            f'<text y="54" font-size="20" fill="{colors["muted"]}">{subtitle}</text>'
            f'<g transform="translate(0 {TITLE - 8})">{content}</g></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" '
        f'font-family="system-ui, sans-serif" role="img">\n'
        "<title>Super token attention: cells, association, attention among super tokens, upsampling</title>\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _image(picture: torch.Tensor, opacity: float = 1.0) -> str:
    """Returns an image of sharp pixels."""
    values = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(values).resize((WIDTH * SCALE, HEIGHT * SCALE), Image.Resampling.NEAREST).save(file, "PNG")
    data = b64encode(file.getvalue()).decode()
    return (
        f'<image width="{WIDTH * SCALE}" height="{HEIGHT * SCALE}" opacity="{opacity}" '
        f'href="data:image/png;base64,{data}"/>'
    )


def _panel(colors: dict[str, str]) -> str:
    return f'<rect width="{WIDTH * SCALE}" height="{HEIGHT * SCALE}" rx="6" fill="{colors["panel"]}"/>'


def _grid(colors: dict[str, str]) -> str:
    """Returns the lines between the cells."""
    side = CELL * SCALE
    lines = [f"M0 {n * side}H{WIDTH * SCALE}" for n in range(1, HEIGHT // CELL)]
    lines += [f"M{n * side} 0V{HEIGHT * SCALE}" for n in range(1, WIDTH // CELL)]
    return f'<path d="{"".join(lines)}" stroke="{colors["grid"]}" stroke-width="2.5" fill="none"/>'


def _weights(association: torch.Tensor, colors: dict[str, str]) -> str:
    """Returns the nine cells around a pixel, with the pixel's weights."""
    side = CELL * SCALE
    row, column = PIXEL
    parts = [_grid(colors)]
    for number, weight in enumerate(association[:, row, column].tolist()):
        top, left = (row // CELL + number // 3 - 1) * side, (column // CELL + number % 3 - 1) * side
        parts.append(
            f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="{colors["accent"]}" '
            f'fill-opacity="{0.08 + 0.6 * weight:.2f}" stroke="{colors["accent"]}" stroke-width="2"/>'
            f'<text x="{left + side / 2}" y="{top + side / 2 + 7}" font-size="20" text-anchor="middle" '
            f'fill="{colors["text"]}">{weight:.2f}</text>'
        )
    parts.append(
        f'<rect x="{column * SCALE}" y="{row * SCALE}" width="{SCALE}" height="{SCALE}" fill="{colors["text"]}"/>'
    )
    return "".join(parts)


def _attention(tokens: torch.Tensor, colors: dict[str, str]) -> str:
    """Returns the super tokens as disks, and lines from one of them to all others."""
    side = CELL * SCALE
    centers = {
        (row, column): (side * (column + 0.5), side * (row + 0.5))
        for row in range(HEIGHT // CELL)
        for column in range(WIDTH // CELL)
    }
    x, y = centers[TOKEN]
    lines = "".join(f"M{x} {y}L{cx} {cy}" for place, (cx, cy) in centers.items() if place != TOKEN)
    parts = [f'<path d="{lines}" stroke="{colors["accent"]}" stroke-width="1.5" opacity="0.75" fill="none"/>']
    for (row, column), (cx, cy) in centers.items():
        red, green, blue = (tokens[:, row, column].clamp(0, 1) * 255).round().int().tolist()
        stroke = colors["accent"] if (row, column) == TOKEN else colors["grid"]
        parts.append(
            f'<circle cx="{cx}" cy="{cy}" r="17" fill="rgb({red},{green},{blue})" stroke="{stroke}" stroke-width="3"/>'
        )
    return "".join(parts)


if __name__ == "__main__":
    main()
