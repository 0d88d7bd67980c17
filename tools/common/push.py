"""Writes a model, a detector or a demo, pushes it and compares the upload."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stvit.adapters.folder import copy_folder, is_adapter_folder, load_pushed, read_config
from stvit.hub import HubError, Pushed, Repository, check_token, push
from stvit.hub.card import CARD
from stvit.hub.push import check_license, check_push_options, check_repo_id, compare_model_with_hub
from stvit.weights.source import Source, find_model_folder

from . import space
from .cli import CommandError, reason
from .config import PushConfig
from .release import MODEL_FILES, Output, describe_files, open_output, open_release, write_release
from .viewing import is_detector


def write_and_push(flags: PushConfig) -> None:
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
            adapter = _find_adapter_folder(flags)
            if adapter is not None:
                name = _write_adapter(flags, output, adapter)
            else:
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


def _find_adapter_folder(flags: PushConfig) -> Path | None:
    """Returns the folder of a detector or segmentation model; None for other sources."""
    path = Path(flags.origin.source).expanduser()
    if flags.yolo or not path.is_dir():
        return None
    try:
        folder = find_model_folder(path, flags.weights)
    except ValueError:  # the caller reports it
        return None
    return folder if is_adapter_folder(folder) else None


def _write_adapter(flags: PushConfig, output: Output, source: Path) -> str:
    """Writes the folder of a model of an adapter; returns the model's name."""
    for flag, value in (("--space", flags.space), ("--example", flags.example)):
        if value:
            raise CommandError(f"{flag} cannot be combined with {source}, which is no classifier; remove {flag}")
    flags.origin.check_unused(str(source))
    try:
        config = copy_folder(source, output.fresh, str(Source.hub(flags.repo_id)), flags.license)
    except OSError as error:
        raise CommandError(f"cannot write {output.path or output.fresh}: {reason(error)}") from error
    print(f"weights: {config.details.weights or 'unknown, as in the folder'}")
    return f"{config.recipe.builder} on {config.recipe.args.get('backbone')}"


def _write_classifier(flags: PushConfig, output: Output) -> str:
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


def _write_detector(flags: PushConfig, output: Output) -> str:
    """Writes the folder of a detector; returns the name of the model."""
    flags.origin.check_unused("a checkpoint of a detector")
    source = Path(flags.origin.source).expanduser()
    example = Path(flags.example).expanduser() if flags.example else None
    try:
        from stvit.adapters.yolo.hub import write_detector

        return write_detector(source, output.fresh, flags.repo_id, license=flags.license, example=example)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise CommandError(reason(error)) from error


def _write_space(flags: PushConfig, output: Output) -> str:
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


def _compare(pushed: Pushed, flags: PushConfig, folder: Path) -> None:
    """Compares the pushed files with the Hub, and prints how to load the model."""
    if flags.space:
        equal = Repository(pushed.repo_id, "space").compare_files(folder, pushed)
        print(f"compared with the Hub: the checksums of all {equal} files are equal")
        return
    revision = flags.tag or flags.revision or (pushed.commit if flags.create_pr else None)
    name = str(Source.hub(pushed.repo_id, revision))
    if is_adapter_folder(folder):
        Repository(pushed.repo_id).compare_files(folder, pushed)
        adapter = read_config(folder).recipe.adapter
        equal = load_pushed(folder, _builders(adapter), pushed.repo_id, pushed.commit)
        line = f"from stvit.adapters import {adapter}; model = {adapter}.load({name!r})"
    elif flags.yolo:
        from stvit.adapters.yolo.hub import compare_with_hub

        equal = compare_with_hub(folder, pushed)
        line = f"from stvit.adapters.yolo import YOLO; model = YOLO({name!r})"
    else:
        equal = compare_model_with_hub(folder, pushed.repo_id, pushed.commit)
        line = f"import stvit, timm; model = timm.create_model({name!r}, pretrained=True)"
    print(f"loaded commit {pushed.commit} from the Hub: all {equal} tensors and the checksums are equal")
    print(line)


def _builders(adapter: str) -> Mapping[str, Callable[..., Any]]:
    """Returns the functions of an adapter that build models."""
    try:
        module = importlib.import_module(f"stvit.adapters.{adapter}")
    except ImportError as error:
        raise CommandError(reason(error)) from error
    builders: Mapping[str, Callable[..., Any]] = module.BUILDERS
    return builders
