#!/usr/bin/env python3
"""Pushes weights to the Hugging Face Hub: a run of tools/train_cls.py, a model folder, or a checkpoint.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from stvit.hub import HubError, Pushed, Repository, check_token, push
from stvit.hub.card import CARD
from stvit.hub.push import check_license, check_push_options, check_repo_id, compare_model_with_hub
from stvit.tools.common import space
from stvit.tools.common.cli import CommandError, Parser, reason, run
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


@dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
        weights: Weights to push.
        part: Folder of a run directory: 'best', 'last' or 'last_ema'.
        is_yolo: Whether the weights are a checkpoint of Ultralytics.
        example: Picture to show detections on; None for that of Ultralytics.
        is_space: Whether to push the page of tools/demo.py as a Space.
        repo_id: Id of the repository.
        revision: Branch; None for main.
        tag: Tag for the commit.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request.
        license: License of the weights; None for the license that is known.
        message: Commit message; None for the name of the model.
        dry_run: Whether to write the folder without pushing it.
        output: Folder to keep; None to keep none.
    """

    weights: WeightsFlags
    part: str
    is_yolo: bool
    example: str | None
    is_space: bool
    repo_id: str
    revision: str | None
    tag: str | None
    private: bool
    create_pr: bool
    license: str | None
    message: str | None
    dry_run: bool
    output: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(push_to_hub, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """Returns the parser of the flags."""
    parser = Parser(prog="push_to_hub.py", description="Pushes weights to the Hugging Face Hub.")
    add_source_arguments(parser)
    parser.add_argument(
        "--weights", dest="part", choices=["best", "last", "last_ema"], default="best", help="weights of a run to push"
    )
    group = parser.add_argument_group("detector")
    group.add_argument("--yolo", dest="is_yolo", action="store_true", help="SOURCE is a checkpoint of Ultralytics")
    group.add_argument("--example", metavar="IMAGE", help="picture to show detections on (default: Ultralytics' bus)")
    group = parser.add_argument_group("Space")
    group.add_argument("--space", dest="is_space", action="store_true", help="push a Space: the page of demo.py")
    group = parser.add_argument_group("Hub")
    group.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository, created if it is missing")
    group.add_argument("--revision", metavar="BRANCH", help="branch, created if it is missing (default: main)")
    group.add_argument("--tag", metavar="NAME", help="tag for the commit")
    group.add_argument("--private", action="store_true", help="make a new repository private")
    group.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    group.add_argument("--license", metavar="NAME", help="license of the weights on the Hub: mit, apache-2.0, …")
    group.add_argument("--message", metavar="TEXT", help="commit message (default: Add MODEL)")
    group.add_argument("--dry-run", action="store_true", help="write and show the folder and the card, push nothing")
    group.add_argument("--output", metavar="DIR", help="folder to keep (default with --dry-run: hub/ORG/NAME)")
    # Known to the parser, so that the token is refused without being printed.
    parser.add_argument("--token", "--hf-token", nargs="?", action=_NoToken, help=argparse.SUPPRESS)
    return parser


class _NoToken(argparse.Action):
    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        parser.error(
            "a token on the command line is visible in `ps` and in the history of the shell; revoke this token, and "
            "log in with `hf auth login` or set HF_TOKEN"
        )


def push_to_hub(args: argparse.Namespace) -> None:
    """Writes the folder, pushes it unless this is a dry run, and compares it with the Hub.

    Raises:
        CommandError: If the weights cannot be read, or the push fails.
    """
    values = {key: value for key, value in vars(args).items() if key in Flags.__dataclass_fields__}
    flags = Flags(weights=WeightsFlags.from_args(args), **values)
    try:
        check_repo_id(flags.repo_id)
        check_push_options(flags.revision, flags.tag, flags.create_pr)
        check_license(flags.license)
        if not flags.dry_run:
            check_token()
        path = flags.output or (f"hub/{flags.repo_id}" if flags.dry_run else None)
        with open_output(path, space.FILES if flags.is_space else MODEL_FILES, replace=True) as output:
            write = _write_space if flags.is_space else _write_detector if flags.is_yolo else _write_classifier
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
                allow_pickles=flags.is_yolo,
                delete=space.REPLACED if flags.is_space else (),
                repo_type="space" if flags.is_space else "model",
            )
            _print_pushed(pushed, flags.create_pr)
            _compare(pushed, flags, folder)
    except HubError as error:
        raise CommandError(str(error)) from error


def _write_classifier(flags: Flags, output: Output) -> str:
    """Writes a model folder; returns the name of the model."""
    if flags.example:
        raise CommandError("--example needs a detector; remove it, or pass --yolo")
    _refuse_detector(flags.weights.source)
    release = open_release(flags.weights, flags.part)
    if not write_release(release, output, str(Source.hub(flags.repo_id)), flags.license):
        print(f"the card {CARD} in the folder was edited by a person, and is pushed unchanged")
    elif flags.license is None and not release.details.license:
        print("the card states no license; pass --license NAME to add one")
    print(f"weights: {release.details.weights or 'unknown, as in the folder'}")
    return release.name


def _write_detector(flags: Flags, output: Output) -> str:
    """Writes the folder of a detector; returns the name of the model."""
    flags.weights.check_unused("a checkpoint of a detector")
    source = Path(flags.weights.source).expanduser()
    example = Path(flags.example).expanduser() if flags.example else None
    try:
        from stvit.adapters.yolo.hub import write_detector

        return write_detector(source, output.fresh, flags.repo_id, license=flags.license, example=example)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise CommandError(reason(error)) from error


def _write_space(flags: Flags, output: Output) -> str:
    """Writes the page of tools/demo.py, and the model in the folder `model` unless it is on the Hub."""
    license, weights = flags.license, Output(output.fresh / "model", output.path, MODEL_FILES)
    source = Source.parse_hub(flags.weights.source)
    if source is not None:
        repository = Repository(source.name)
        check_push_options(source.revision)
        flags.weights.check_unused(str(source))
        if flags.example:
            raise CommandError(f"--example cannot be combined with {source}; remove it")
        if not flags.dry_run:
            repository.check_exists(source.revision)
        name = model = str(source)
    elif flags.is_yolo:
        name, model = _write_detector(flags, weights), "model/model.pt"
        _keep(weights.fresh, "model.pt")
    else:
        if flags.example:
            raise CommandError("--example is for the card of a detector, and a Space has no pictures; remove it")
        _refuse_detector(flags.weights.source)
        release = open_release(flags.weights, flags.part)
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
    if flags.is_space:
        equal = Repository(pushed.repo_id, "space").compare_files(folder, pushed)
        print(f"compared with the Hub: the checksums of all {equal} files are equal")
        return
    revision = flags.tag or flags.revision or (pushed.commit if flags.create_pr else None)
    name = str(Source.hub(pushed.repo_id, revision))
    if flags.is_yolo:
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
