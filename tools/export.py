#!/usr/bin/env python3
"""Exports a model to ONNX, torch.export or TorchScript, and checks the files.

    python tools/export.py --checkpoint runs/digits --output digits.onnx
    python tools/export.py --checkpoint runs/digits --format onnx torch-export torchscript --output exported
    python tools/export.py --checkpoint hf-hub:ORG/NAME --features --dtype float16 --output features.onnx
    python tools/export.py --checkpoint runs/flowers --dtype int8 --data-dir /data/flowers --output flowers.onnx

`python -m stvit.tools.export` is the same program. It exports STViT and all other timm models. A checkpoint is a run of
tools/train_cls.py, a folder with model.safetensors and config.json, a file of weights (of this package, timm or the
authors), or a model on the Hub. The flags for data are those of tools/validate_cls.py.

A file takes normalized float32 `images` (batch, channels, height, width). It returns float32 `logits` (batch, classes).
With --features it returns the feature maps `features_0`, `features_1`, … of the stages. Inputs and outputs stay float32
if the file computes in float16 or int8. onnxruntime calibrates int8 on real images.

ONNX and TorchScript files accept any batch size, height and width. A torch.export program accepts a range of sizes,
which the command prints. Each file stores the preprocessing and the class names: ONNX in metadata_props, the other
formats in the extra file metadata.json.

The command opens each file with its own runtime and compares it with the PyTorch model at three sizes. A file that
differs is not written. With data, the command also compares the accuracy on the validation images.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_sections, from_flags
from stvit.tools.exporting.config import ExportConfig
from stvit.tools.exporting.preflight import check_flags, check_output, check_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, 1 after an error, 130 after Ctrl-C.
    """
    silence_libraries()
    return run(export, from_flags(ExportConfig, create_parser().parse_args(argv)))


def create_parser() -> Parser:
    """Returns the parser. Flags have the names of tools/validate_cls.py."""
    parser = Parser(prog="export.py", description="Exports a model to ONNX, torch.export or TorchScript.")
    add_sections(parser, ExportConfig)
    return parser


def export(config: ExportConfig) -> None:
    """Writes the files, checks them and compares their accuracy with the model's.

    Raises:
        CommandError: If a flag, the model or the data are wrong, or a file differs from the model.
    """
    result, data_flags = config.result, config.data
    check_flags(result, data_flags)
    check_output(result)
    check_packages(result, data_flags)

    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.common.bad_images import BadImages
    from stvit.tools.common.data import resolve_data_config
    from stvit.tools.common.model import check_img_size, check_num_classes, open_model
    from stvit.tools.exporting.compare import compare_files
    from stvit.tools.exporting.data import open_data
    from stvit.tools.exporting.files import write_files
    from stvit.tools.exporting.metadata import file_metadata
    from stvit.tools.exporting.source import SourceModel

    wanted = replace(config.source, img_size=config.image.img_size)
    opened = open_model(wanted, **({"features_only": True} if result.features else {}))
    check_num_classes(wanted, opened.model)
    model = opened.model.eval().requires_grad_(False)
    name = str(model.pretrained_cfg.get("architecture") or opened.name)
    preprocessing = opened.fill({**vars(config.image), "in_chans": wanted.in_chans})
    data_config = resolve_data_config(preprocessing, model, use_test_size=True)
    check_img_size(model, data_config)

    with TemporaryDirectory() as temporary:
        bad_images = BadImages(data_flags.max_bad_images, Path(temporary) / "bad_images.jsonl")
        data = open_data(
            data_flags,
            model,
            data_config,
            features=result.features,
            calibrate=result.dtype == "int8",
            bad_images=bad_images,
        )
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        shape = "x".join(map(str, data_config["input_size"]))
        print(f"{wanted.title}: {name}, {parameters:.1f} M parameters, images of {shape}", flush=True)
        source = SourceModel(model, result.features, result.dtype, data_config["input_size"])
        metadata = file_metadata(
            model, name, data_config, dtype=result.dtype, features=result.features, class_map=data_flags.class_map
        )
        files = write_files(source, result, metadata, data)
        if data is not None:
            print("\n".join(compare_files(source, files, data, result.features)), flush=True)
        for image in sorted(bad_images.names()):
            print(f"warning: {image} cannot be read and was skipped", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
