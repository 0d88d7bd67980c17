"""The model to export, and what all formats make of it."""

import copy
from typing import Any

import torch
from torch import nn

import stvit

from .errors import explain_failure, silence
from .sizes import ServedSizes, Size, program_sizes

# Outputs of a model or a file: logits (B, K), or a feature map (B, C, H, W) of each stage.
Outputs = list[torch.Tensor]


class Classifier(nn.Module):
    """Runs a model in any precision on float32 images, and returns float32.

    So all files have the same inputs and outputs.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float()


class FeatureExtractor(Classifier):
    """A `Classifier` whose model returns a list of feature maps.

    TorchScript needs a class of its own for the type of the output.
    """

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        maps: list[torch.Tensor] = self.model(images.to(self.dtype))
        return [each.float() for each in maps]


class SourceModel:
    """The model to export, in float32 and in the precision of the files.

    Attributes:
        model: The model in float32, to which every file is compared.
        channels: Image channels.
        size: Height and width of the images that the model is made for.
        names: Names of the outputs.
        portable: Folded copy in the precision of the files. It takes and returns float32.
    """

    def __init__(self, model: Any, features: bool, dtype: str, input_size: tuple[int, int, int]) -> None:
        """Folds a copy of the model and converts it to the precision.

        Args:
            model: The model in float32, on the CPU, in eval mode.
            features: Whether the model returns a list of feature maps.
            dtype: Precision of the files: float32, float16 or int8. int8 starts from float32.
            input_size: Channels, height and width of the images.
        """
        self.model = model
        self.channels = input_size[0]
        self.size: Size = input_size[1:]
        self.names = [f"features_{i}" for i in range(len(model.feature_info.channels()))] if features else ["logits"]
        wrapper = FeatureExtractor if features else Classifier
        folded = _fold(model)
        if dtype == "float16":
            self.portable = wrapper(folded.half(), torch.float16).eval()
        else:
            self.portable = wrapper(folded, torch.float32).eval()
        self._programs: dict[Size, Any] = {}

    def __call__(self, images: torch.Tensor) -> Outputs:
        """Returns the outputs of the float32 model for images (B, C, H, W)."""
        with torch.inference_mode():
            return as_list(self.model(images))

    def accepts(self, height: int, width: int) -> bool:
        """Returns whether the model accepts images of this size.

        Some timm models accept only one size.
        """
        try:
            self(torch.zeros(1, self.channels, height, width))
        except (AssertionError, RuntimeError, ValueError):
            return False
        return True

    def program(self, size: Size) -> tuple[Any, ServedSizes]:
        """Returns a torch.export program and the sizes that it accepts.

        Args:
            size: Size of the images to trace the model with.

        Raises:
            CommandError: If torch.export fails.
        """
        if size not in self._programs:
            auto = torch.export.Dim.AUTO  # accepts models that fix their size
            dims = {0: torch.export.Dim("batch", min=1), 2: auto, 3: auto}
            example = torch.randn(2, self.channels, *size)
            with silence(), explain_failure("torch.export"):
                program = torch.export.export(self.portable, (example,), dynamic_shapes=(dims,), strict=False)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains paths of this machine
            self._programs[size] = program
        return self._programs[size], program_sizes(self._programs[size])

    def widest_program(self) -> tuple[Any, ServedSizes]:
        """Returns the program that accepts the largest images, and its sizes.

        The graph of an image with a single super token differs from that of several. So a program traced with small
        images accepts only small images.

        Raises:
            CommandError: If torch.export fails.
        """
        for factor in (1, 2, 4):
            size = self.size[0] * factor, self.size[1] * factor
            if factor > 1 and not self.accepts(*size):
                break
            program, sizes = self.program(size)
            if not sizes.is_bounded:
                return program, sizes
        return self.program(self.size)


def as_list(outputs: Any) -> Outputs:
    """Returns the outputs of a model as a list."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _fold(model: nn.Module) -> nn.Module:
    """Returns an optimized copy, or a plain one if torch.fx cannot trace the model."""
    try:
        return stvit.optimize_for_inference(model)
    except ValueError:
        return copy.deepcopy(model)
