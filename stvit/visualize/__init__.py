"""Shows the super tokens of a model over an image, as arrays and pictures.

    view = stvit.visualize.super_tokens(model, "photo.jpg", stage=0)
    view.draw()  # a notebook shows `view` as the same picture

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, section 3.2.

Shapes:
    H, W     image, in pixels
    h, w     feature map of the layer: H and W divided by the stride, rounded up (for a detector, H and W include the
             padding that Ultralytics adds)
    Hs, Ws   grid of super tokens; a token's number is row * Ws + column, counted from 0
    N        number of super tokens, Hs * Ws
    C        channels of the layer
"""

from stvit.visualize.draw import LINE_COLOR, MARK_COLOR, contact_sheet, draw_boundaries
from stvit.visualize.probe import Padding, find_layers, register_library, stages, super_tokens
from stvit.visualize.view import SuperTokens

__all__ = [
    "LINE_COLOR",
    "MARK_COLOR",
    "Padding",
    "SuperTokens",
    "contact_sheet",
    "draw_boundaries",
    "find_layers",
    "register_library",
    "stages",
    "super_tokens",
]
