"""The model to export, its optimized copy, and its torch.export programs."""

import copy
from typing import Any

import torch
from torch import nn

import stvit

from .errors import explain_failure, silence
from .sizes import ServedSizes, Size, program_sizes

# Outputs of a model or a file: one tensor of logits (B, K), or one feature map (B, C, H, W) for each stage.
Outputs = list[torch.Tensor]


class Classifier(nn.Module):
    """Converts images from float32 to the model's dtype, and logits back.

    The inputs and outputs of every exported file are therefore float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float()


class FeatureExtractor(Classifier):
    """A `Classifier` whose model returns a list of feature maps.

    It is a separate class, because in TorchScript the return type of `forward` is fixed.
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
        portable: Copy to export, with folded layers if torch.fx can trace the model. It computes in float16 for
            float16 files, otherwise in float32. Inputs and outputs are float32.
    """

    def __init__(self, model: Any, features: bool, dtype: str, input_size: tuple[int, int, int]) -> None:
        """Folds a copy of the model and converts it to the precision.

        Args:
            model: The model in float32, on the CPU, in eval mode.
            features: Whether the model returns a list of feature maps.
            dtype: Precision of the files: float32, float16 or int8. For int8 the copy stays in float32; the ONNX
                file is quantized later.
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
            auto = torch.export.Dim.AUTO  # dynamic if possible; a fixed size is no error
            dims = {0: torch.export.Dim("batch", min=1), 2: auto, 3: auto}
            example = torch.randn(2, self.channels, *size)
            with silence(), explain_failure("torch.export"):
                program = torch.export.export(self.portable, (example,), dynamic_shapes=(dims,), strict=False)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains paths of this machine
            self._programs[size] = program
        return self._programs[size], program_sizes(self._programs[size])

    def widest_program(self) -> tuple[Any, ServedSizes]:
        """Returns a program without a maximum image size if possible, and its sizes.

        torch.export specializes the graph if an axis of the traced image has only one super token. Such a program
        accepts only small images. The model is therefore traced at 1, 2 and 4 times its image size, until a program
        without a maximum is found. Otherwise, the program for the model's own image size is returned.

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
