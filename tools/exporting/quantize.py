"""int8 models, calibrated on real images."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..common.cli import progress_bar
from .data import ExportData
from .errors import explain_failure, silence


def quantize(proto: Any, data: ExportData) -> Any:
    """Returns an ONNX model with convolutions and linear layers in int8.

    Args:
        proto: ONNX model in float32.
        data: Training images to calibrate the activations on.

    Raises:
        CommandError: If the images cannot be read, or onnxruntime fails.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    loader = data.calibration_loader()

    class Reader(CalibrationDataReader):
        def __init__(self, bar: Any) -> None:
            self.batches = iter(loader)
            self.bar = bar

        def get_next(self) -> dict[str, Any] | None:
            for image, target in self.batches:
                self.bar.update()
                if bool((target >= 0).any()):  # skips batches of only unreadable images
                    return {"images": image[target >= 0].numpy()}
            return None

    with TemporaryDirectory() as temporary, progress_bar(len(loader), "batch", True) as bar:
        reader = Reader(bar)
        path = Path(temporary) / "int8.onnx"
        with silence(), explain_failure("onnxruntime's quantization"):
            quantize_static(
                proto,
                str(path),
                reader,
                quant_format=QuantFormat.QDQ,
                # These have all weights. Softmax, normalizations, means over super tokens and products of two
                # activations (association, attention) stay in float32, because they have no weights to shrink.
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                extra_options={"MatMulConstBOnly": True},
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # Weights of 7 bits. CPUs without VNNI add pairs of 8-bit products in 16 bits, which saturates. With 8
                # bits the file would compute other results there than on newer CPUs.
                reduce_range=True,
            )
        return onnx.load(str(path))
