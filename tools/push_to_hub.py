#!/usr/bin/env python3
"""Pushes weights to the Hugging Face Hub: a run of tools/train_cls.py, a converted folder, or a checkpoint.

    python tools/push_to_hub.py runs/flowers --repo-id ORG/flowers --license apache-2.0 --dry-run
    python tools/push_to_hub.py weights/stvit_small.in1k --repo-id ORG/stvit_small.in1k --private --tag v1
    python tools/push_to_hub.py stvit_small_official.pth --use-ema --repo-id ORG/stvit_small.in1k
    python tools/push_to_hub.py --yolo runs/detect/train/weights/best.pt --repo-id ORG/detector
    python tools/push_to_hub.py --space runs/flowers --repo-id ORG/flowers-demo

`python -m stvit.tools.push_to_hub` is the same program. What is pushed is model.safetensors, config.json and a card,
README.md; a card that a person has written or changed, here or there, is left as it is. Of a detector (--yolo) it is
model.pt, opened safely, a card and an example picture. With --space it is the page of tools/demo.py with the model, as
a Space; SOURCE may then be hf-hub:ORG/NAME, too. The token is that of `hf auth login` or of HF_TOKEN.

After the push the model is loaded back by its commit, and every tensor and checksum compared. Pushing the same again
sends nothing; a push that was cut off changes nothing, and can be given again.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from stvit import hub
from stvit.tools.common import space
from stvit.tools.common.cli import CommandError, Parser, run
from stvit.tools.common.release import (
    WRITTEN,
    add_source_arguments,
    compare_detector_with_hub,
    describe_files,
    fresh_folder,
    open_release,
    refuse_flags,
    write_detector,
    write_release,
)
from stvit.tools.common.viewing import is_detector


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(push, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="push_to_hub.py", description="Pushes weights to the Hugging Face Hub.")
    add_source_arguments(parser)
    parser.add_argument("--weights", choices=["best", "last", "last_ema"], default="best", help="which of a run")
    group = parser.add_argument_group("detector")
    group.add_argument("--yolo", action="store_true", help="SOURCE is a checkpoint of Ultralytics, best.pt")
    group.add_argument("--example", metavar="IMAGE", help="picture to show detections on (default: Ultralytics' bus)")
    group = parser.add_argument_group("Space")
    group.add_argument("--space", action="store_true", help="push the page of demo.py with the model, as a Space")
    group = parser.add_argument_group("Hub")
    group.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository, made if it is missing")
    group.add_argument("--revision", metavar="BRANCH", help="branch, made if it is missing (default: main)")
    group.add_argument("--tag", metavar="NAME", help="tag to put on the commit")
    group.add_argument("--private", action="store_true", help="make a new repository private")
    group.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    group.add_argument("--license", metavar="NAME", help="of the weights, as the Hub names it: mit, apache-2.0, …")
    group.add_argument("--message", metavar="TEXT", help="of the commit (default: Add MODEL)")
    group.add_argument("--dry-run", action="store_true", help="write the folder, show it and the card, send nothing")
    group.add_argument("--output", metavar="DIR", help="keep the folder here (with --dry-run default: hub/ORG/NAME)")
    # Known, so that it is refused without being printed.
    parser.add_argument("--token", "--hf-token", nargs="?", action=_NoToken, help=argparse.SUPPRESS)
    return parser


class _NoToken(argparse.Action):
    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        parser.error(
            "a token is no option, where `ps` and the shell's history show it: log in with `hf auth login`, or set "
            "HF_TOKEN; take back the one that was just shown"
        )


def push(args: argparse.Namespace) -> None:
    """Makes the folder, and pushes it unless it is a dry run.

    Raises:
        CommandError: If the source cannot be read, or the push fails.
    """
    try:
        hub.check_repo_id(args.repo_id)
        hub.check_options(args.revision, args.tag, args.create_pr, args.license)
        if not args.dry_run:
            hub.check_token()
        output = args.output or (f"hub/{args.repo_id}" if args.dry_run else None)
        with fresh_folder(output, replace=True, ours=space.FILES if args.space else WRITTEN) as folder:
            write = _write_space if args.space else _write_detector if args.yolo else _write_classifier
            name = write(args, folder)
            if args.dry_run:
                print(f"{name}: {folder} would be pushed to {args.repo_id}; nothing was sent")
                print(describe_files(folder))
                print((folder / hub.CARD).read_text(encoding="utf-8"))
                return
            pushed = hub.push(
                folder,
                args.repo_id,
                revision=args.revision,
                tag=args.tag,
                private=args.private,
                create_pr=args.create_pr,
                message=args.message or f"Add {name}",
                pickles=args.yolo,
                delete=space.REPLACED if args.space else (),
                repo_type="space" if args.space else "model",
            )
            _say(pushed, args, folder)
    except hub.HubError as error:
        raise CommandError(str(error)) from error


def _write_classifier(args: argparse.Namespace, folder: Path) -> str:
    if args.example:
        raise CommandError("--example is for a detector: leave it out, or give --yolo")
    _refuse_detector(args)
    release = open_release(args, args.weights)
    if not write_release(release, folder, f"hf-hub:{args.repo_id}", args.license):
        print(f"the card {hub.CARD} of the folder was changed by hand, and goes as it is")
    elif args.license is None and not release.details.get("license"):
        print("the card states no license: --license NAME does")
    print(f"weights: {release.details.get('weights', 'those of the folder')}")
    return release.name


def _refuse_detector(args: argparse.Namespace) -> None:
    if is_detector(args.source):
        raise CommandError(f"{args.source} is of Ultralytics: give --yolo, and its checkpoint")


def _write_detector(args: argparse.Namespace, folder: Path) -> str:
    refuse_flags(args, "a detector's checkpoint", "results")
    image = Path(args.example).expanduser() if args.example else None
    source = Path(args.source).expanduser()
    return write_detector(source, folder, args.repo_id, license=args.license, example=image)


def _write_space(args: argparse.Namespace, folder: Path) -> str:
    """The page with the model in it; of the Hub the page loads it by itself."""
    license = args.license
    for name in ("model", "stvit"):  # of a former dry run
        shutil.rmtree(folder / name, ignore_errors=True)
    if args.source.startswith("hf-hub:"):
        repo_id, _, revision = args.source.removeprefix("hf-hub:").partition("@")
        hub.check_repo_id(repo_id)
        hub.check_options(revision or None, None, create_pr=False)
        if not args.dry_run:
            hub.check_there(repo_id, revision or None)
        refuse_flags(args, args.source, "results", "example")
        name = model = args.source
    elif args.yolo:
        with TemporaryDirectory() as temporary:
            name, model = _write_detector(args, Path(temporary)), "model/model.pt"
            _take(Path(temporary), folder / "model", "model.pt")
    else:
        if args.example:
            raise CommandError("--example is for a detector's card: leave it out")
        _refuse_detector(args)
        release = open_release(args, args.weights)
        with TemporaryDirectory() as temporary:
            write_release(release, Path(temporary) / "model", f"hf-hub:{args.repo_id}", license)
            _take(Path(temporary) / "model", folder / "model", "model.safetensors", "config.json")
        name, model, license = release.name, "model", license or release.details.get("license")
    space.write_space(folder, args.repo_id, model, name, license)
    return f"a page of {name}"


def _take(source: Path, target: Path, *names: str) -> None:
    target.mkdir(parents=True)
    for name in names:
        shutil.move(source / name, target / name)


def _say(pushed: hub.Pushed, args: argparse.Namespace, folder: Path) -> None:
    if pushed.kept_card:
        print("the card on the Hub was changed by hand, and stays as it is")
    if pushed.changed:
        print(f"pushed {pushed.files} files: {pushed.url}")
    else:
        no_pr = "; no pull request was made" if args.create_pr else ""
        print(f"nothing to push, {pushed.repo_id} has all of it already{no_pr}: {pushed.url}")
    if args.space:
        equal = hub.compare_files_with_hub(folder, pushed, "space")
        print(f"the checksums of all {equal} files are equal there")
        return
    if args.yolo:
        equal = compare_detector_with_hub(folder, pushed)
        line = f"from stvit.adapters.yolo import YOLO; model = YOLO({_source(pushed, args)!r})"
    else:
        equal = hub.compare_with_hub(folder, pushed.repo_id, pushed.commit)
        line = f"import stvit, timm; model = timm.create_model({_source(pushed, args)!r}, pretrained=True)"
    print(f"loaded back by commit {pushed.commit}: all {equal} tensors and the checksums are equal")
    print(line)


def _source(pushed: hub.Pushed, args: argparse.Namespace) -> str:
    at = args.tag or args.revision or (pushed.commit if args.create_pr else None)
    return f"hf-hub:{pushed.repo_id}{f'@{at}' if at else ''}"


if __name__ == "__main__":
    sys.exit(main())
