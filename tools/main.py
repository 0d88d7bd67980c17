"""The `stvit` command: its subcommands are the programs of this folder."""

import importlib
import sys
from collections.abc import Sequence

# Module of each subcommand, and the line that `stvit --help` shows.
COMMANDS = {
    "train": ("train_cls", "train an image classifier on ImageNet or your own images"),
    "validate": ("validate_cls", "measure the accuracy of an image classifier"),
    "train-det": ("train_det", "train an object detector on COCO or your own images"),
    "validate-det": ("validate_det", "measure the accuracy of an object detector"),
    "predict-det": ("predict_det", "detect objects in images and draw them"),
    "train-seg": ("train_seg", "train a segmentation model on ADE20K or your own label maps"),
    "validate-seg": ("validate_seg", "measure the mIoU of a segmentation model"),
    "predict-seg": ("predict_seg", "predict the class of each pixel in images"),
    "export": ("export", "export a model to ONNX, torch.export or TorchScript"),
    "convert": ("convert_checkpoint", "convert a checkpoint to a folder that timm loads"),
    "push": ("push_to_hub", "upload a model, a detector or a demo to the Hugging Face Hub"),
    "visualize": ("visualize", "draw the super tokens that a model forms in images"),
    "demo": ("demo", "serve a page that shows super tokens and predictions"),
    "benchmark": ("benchmark", "measure throughput, latency and memory"),
    "yolo": ("yolo", "train and use YOLO26 detectors with an STViT backbone"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: The subcommand and its flags; None for those of the process.

    Returns:
        The exit status of the subcommand: 0, 2 for wrong flags.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        from stvit import __version__

        print(f"stvit {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    status: int = module.main(arguments[1:])
    return status


def _usage() -> str:
    lines = [f"  {name:<13}{summary}" for name, (_, summary) in COMMANDS.items()]
    end = "`stvit COMMAND --help` lists the flags of a command."
    return "\n".join(["usage: stvit COMMAND [FLAGS]", "", "commands:", *lines, "", end])


if __name__ == "__main__":
    sys.exit(main())
