"""Image sizes that an exported file accepts."""

import sys
from dataclasses import dataclass
from typing import Any

# Height and width of images.
Size = tuple[int, int]
# Minimum and maximum length of an axis; None for no maximum.
Bounds = tuple[int, int | None]


@dataclass(frozen=True)
class ServedSizes:
    """Image sizes that a file accepts, with any batch size.

    Attributes:
        height: Minimum and maximum height in pixels.
        width: Minimum and maximum width in pixels.
    """

    height: Bounds = (1, None)
    width: Bounds = (1, None)

    def __str__(self) -> str:
        return f"any batch, {_describe('height', *self.height)}, {_describe('width', *self.width)}"

    @property
    def is_bounded(self) -> bool:
        """True if the height or the width has a maximum."""
        return self.height[1] is not None or self.width[1] is not None


def program_sizes(program: Any) -> ServedSizes:
    """Returns the sizes that a program of torch.export accepts."""
    (images,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == "images")
    height, width = (_bounds(length, program) for length in images.meta["val"].shape[2:])
    return ServedSizes(height, width)


def _bounds(length: Any, program: Any) -> Bounds:
    if isinstance(length, int):
        return length, length
    expression = length.node.expr
    if expression.is_number:
        return int(expression), int(expression)
    bounds = program.range_constraints.get(expression)
    if bounds is None:  # an expression, such as a multiple of a number
        return 1, None
    return int(bounds.lower), int(bounds.upper) if bounds.upper < sys.maxsize else None


def _describe(axis: str, low: int, high: int | None) -> str:
    if low == high:
        return f"only {axis} {low}"
    if low <= 2 and high is None:
        return f"any {axis}"
    return f"{axis} {low} {f'to {high}' if high else 'or more'}"
