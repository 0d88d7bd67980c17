#!/usr/bin/env python3
"""Pushes a run, a model folder or a checkpoint to the Hugging Face Hub.

    python tools/push_to_hub.py runs/flowers --repo-id ORG/flowers --license apache-2.0 --dry-run
    python tools/push_to_hub.py weights/stvit_small.in1k --repo-id ORG/stvit_small.in1k --private --tag v1
    python tools/push_to_hub.py stvit_small_official.pth --use-ema --repo-id ORG/stvit_small.in1k
    python tools/push_to_hub.py --yolo runs/detect/train/weights/best.pt --repo-id ORG/detector
    python tools/push_to_hub.py --space runs/flowers --repo-id ORG/flowers-demo

`python -m stvit.tools.push_to_hub` is the same program. It pushes

- of a classifier: model.safetensors, config.json and the card README.md;
- of a detector (--yolo): model.pt, an example picture and the card. No code of the checkpoint is run;
- with --space: the page of tools/demo.py and the model, as a Space. SOURCE may also be hf-hub:ORG/NAME.

A card that a person wrote or edited is kept, in the folder and on the Hub. After the push the command loads the model
by its commit and compares every tensor and checksum. Pushing the same files again uploads nothing. An interrupted push
changes no file and can be repeated. The token is that of `hf auth login` or HF_TOKEN.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the command without a traceback

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from stvit.hub import HubError, Pushed, Repository, check_token, push
from stvit.hub.card import CARD
from stvit.hub.push import check_license, check_push_options, check_repo_id, compare_model_with_hub
from stvit.tools.common import space
from stvit.tools.common.cli import CommandError, Parser, reason, run
from stvit.tools.common.flags import add_flags, flag, from_flags
from stvit.tools.common.release import (
    MODEL_FILES,
    Output,
    WeightsFlags,
    add_source_arguments,
    describe_files,
    open_output,
    open_release,
    write_release,
)
from stvit.tools.common.viewing import is_detector
from stvit.weights.source import Source


@dataclass
class Flags:
    """Flags of the command.

    Attributes:
        origin: Weights to push.
    """

    weights: str = flag("best", "weights of a run to push", choices=["best", "last", "last_ema"])
    yolo: bool = flag(False, "SOURCE is a checkpoint of Ultralytics", action="store_true")
    example: str | None = flag(
        None, "picture to show detections on, for the card (default: Ultralytics' bus)", metavar="IMAGE"
    )
    space: bool = flag(False, "push the page of tools/demo.py with the model, as a Space", action="store_true")
    repo_id: str = flag("", "repository, created if it is missing", required=True, metavar="ORG/NAME")
    revision: str | None = flag(None, "branch, created if it is missing (default: main)", metavar="BRANCH")
    tag: str | None = flag(None, "tag for the commit", metavar="NAME")
    private: bool = flag(False, "make a new repository private", action="store_true")
    create_pr: bool = flag(False, "open a pull request instead of committing to main", action="store_true")
    license: str | None = flag(None, "license of the weights on the Hub: mit, apache-2.0, …", metavar="NAME")
    message: str | None = flag(None, "commit message (default: Add MODEL)", metavar="TEXT")
    dry_run: bool = flag(False, "write and show the folder and the card, push nothing", action="store_true")
    output: str | None = flag(None, "folder to keep (default with --dry-run: hub/ORG/NAME)", metavar="DIR")
    origin: WeightsFlags = field(default_factory=WeightsFlags)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    It is 0, 1 after an error, or 130 after Ctrl-C.
    """
    logging.getLogger("timm").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    args = create_parser().parse_args(argv)
    flags = from_flags(Flags, args)
    flags.origin = WeightsFlags.from_args(args)
    return run(push_to_hub, flags)


def create_parser() -> Parser:
    """Returns the parser of the flags."""
    parser = Parser(prog="push_to_hub.py", description="Pushes weights to the Hugging Face Hub.")
    add_source_arguments(parser)
    group = parser.add_argument_group("push")
    add_flags(group, Flags)
    # Known to the parser, so that the token is refused without being printed.
    group.add_argument("--token", "--hf-token", nargs="?", action=_NoToken, help=argparse.SUPPRESS)
    return parser


class _NoToken(argparse.Action):
    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        parser.error(
            "a token on the command line is visible in `ps` and in the history of the shell; revoke this token, and "
            "log in with `hf auth login` or set HF_TOKEN"
        )


def push_to_hub(flags: Flags) -> None:
    """Writes the folder, pushes it and compares it with the Hub.

    A dry run only writes the folder.

    Raises:
        CommandError: If the weights cannot be read, or the push fails.
    """
    try:
        check_repo_id(flags.repo_id)
        check_push_options(flags.revision, flags.tag, flags.create_pr)
        check_license(flags.license)
        if not flags.dry_run:
            check_token()
        path = flags.output or (f"hub/{flags.repo_id}" if flags.dry_run else None)
        with open_output(path, space.FILES if flags.space else MODEL_FILES, replace=True) as output:
            write = _write_space if flags.space else _write_detector if flags.yolo else _write_classifier
            name = write(flags, output)
            folder = output.finish()
            if flags.dry_run:
                print(f"{name}: {folder} would be pushed to {flags.repo_id}; nothing was sent")
                print(describe_files(folder))
                print((folder / CARD).read_text(encoding="utf-8"))
                return
            pushed = push(
                folder,
                flags.repo_id,
                revision=flags.revision,
                tag=flags.tag,
                private=flags.private,
                create_pr=flags.create_pr,
                message=flags.message or f"Add {name}",
                allow_pickles=flags.yolo,
                delete=space.REPLACED if flags.space else (),
                repo_type="space" if flags.space else "model",
            )
            _print_pushed(pushed, flags.create_pr)
            _compare(pushed, flags, folder)
    except HubError as error:
        raise CommandError(str(error)) from error


def _write_classifier(flags: Flags, output: Output) -> str:
    """Writes a model folder; returns the name of the model."""
    if flags.example:
        raise CommandError("--example needs a detector; remove it, or pass --yolo")
    _refuse_detector(flags.origin.source)
    release = open_release(flags.origin, flags.weights)
    if not write_release(release, output, str(Source.hub(flags.repo_id)), flags.license):
        print(f"the card {CARD} in the folder was edited by a person, and is pushed unchanged")
    elif flags.license is None and not release.details.license:
        print("the card states no license; pass --license NAME to add one")
    print(f"weights: {release.details.weights or 'unknown, as in the folder'}")
    return release.name


def _write_detector(flags: Flags, output: Output) -> str:
    """Writes the folder of a detector; returns the name of the model."""
    flags.origin.check_unused("a checkpoint of a detector")
    source = Path(flags.origin.source).expanduser()
    example = Path(flags.example).expanduser() if flags.example else None
    try:
        from stvit.adapters.yolo.hub import write_detector

        return write_detector(source, output.fresh, flags.repo_id, license=flags.license, example=example)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise CommandError(reason(error)) from error


def _write_space(flags: Flags, output: Output) -> str:
    """Writes the page of tools/demo.py.

    A model that is not on the Hub is written to the folder `model`.
    """
    license, weights = flags.license, Output(output.fresh / "model", output.path, MODEL_FILES)
    source = Source.parse_hub(flags.origin.source)
    if source is not None:
        repository = Repository(source.name)
        check_push_options(source.revision)
        flags.origin.check_unused(str(source))
        if flags.example:
            raise CommandError(f"--example cannot be combined with {source}; remove it")
        if not flags.dry_run:
            repository.check_exists(source.revision)
        name = model = str(source)
    elif flags.yolo:
        name, model = _write_detector(flags, weights), "model/model.pt"
        _keep(weights.fresh, "model.pt")
    else:
        if flags.example:
            raise CommandError("--example is for the card of a detector, and a Space has no pictures; remove it")
        _refuse_detector(flags.origin.source)
        release = open_release(flags.origin, flags.weights)
        write_release(release, weights, str(Source.hub(flags.repo_id)), license)
        _keep(weights.fresh, "model.safetensors", "config.json")
        name, model, license = release.name, "model", license or release.details.license
    space.write_space(output.fresh, flags.repo_id, model, name, license)
    return f"demo of {name}"


def _refuse_detector(source: str) -> None:
    if is_detector(source):
        raise CommandError(f"{source} is a detector of Ultralytics; pass --yolo and its checkpoint (.pt)")


def _keep(folder: Path, *names: str) -> None:
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def _print_pushed(pushed: Pushed, create_pr: bool) -> None:
    if pushed.kept_card:
        print("the card on the Hub was edited by a person, and is kept")
    if pushed.changed:
        print(f"pushed {pushed.files} files: {pushed.url}")
    else:
        no_pr = "; no pull request was opened" if create_pr else ""
        print(f"nothing to push, {pushed.repo_id} already has all files{no_pr}: {pushed.url}")


def _compare(pushed: Pushed, flags: Flags, folder: Path) -> None:
    """Compares the pushed files with the Hub, and prints how to load the model."""
    if flags.space:
        equal = Repository(pushed.repo_id, "space").compare_files(folder, pushed)
        print(f"compared with the Hub: the checksums of all {equal} files are equal")
        return
    revision = flags.tag or flags.revision or (pushed.commit if flags.create_pr else None)
    name = str(Source.hub(pushed.repo_id, revision))
    if flags.yolo:
        from stvit.adapters.yolo.hub import compare_with_hub

        equal = compare_with_hub(folder, pushed)
        line = f"from stvit.adapters.yolo import YOLO; model = YOLO({name!r})"
    else:
        equal = compare_model_with_hub(folder, pushed.repo_id, pushed.commit)
        line = f"import stvit, timm; model = timm.create_model({name!r}, pretrained=True)"
    print(f"loaded commit {pushed.commit} from the Hub: all {equal} tensors and the checksums are equal")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
