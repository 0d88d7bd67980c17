"""Opens weights from a run, a folder or a file, with their metadata."""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from stvit.hub import Details, HubError, Metric, Release
from stvit.hub.card import CARD, is_edited
from stvit.hub.files import file_sha256, list_files
from stvit.hub.folder import CONFIG, WEIGHTS
from stvit.weights import PretrainedError, find_variant, read_checkpoint
from stvit.weights.read import find_weight_keys, pick_weights
from stvit.weights.source import find_model_folder

from .checkpoint import load_checkpoint
from .cli import CommandError, reason
from .config import INTERPOLATIONS, WeightsFlags
from .data import resolve_data_config
from .files import atomic_replace_dir
from .locks import InUseError, PathLock
from .model import RECIPE_KEYS, create_model, strip_weights

# Top-1 accuracy on ImageNet-1k in percent that the paper reports for the published weights (tables 2 and 3).
PAPER_TOP1 = {
    "stvit_small.in1k": 83.6,
    "stvit_small.in1k_384": 85.0,
    "stvit_base.in1k": 84.8,
    "stvit_base.in1k_384": 86.0,
    "stvit_large.in1k": 85.3,
    "stvit_large.in1k_384": 86.4,
}
# Files that the commands write for a classifier or a detector.
MODEL_FILES = {WEIGHTS, CONFIG, CARD, "model.pt", "example.jpg"}
_FIRST_CONV = ("stem.0.weight", "patch_embed.proj.0.weight")
_NO_ARCHITECTURE = (
    "the shapes fit no model of stvit; for another timm model, pass --model NAME and its arguments as --model-kwargs"
)


def open_release(flags: WeightsFlags, part: str = "best") -> Release:
    """Opens weights and checks them with a forward pass.

    Args:
        flags: Weights and facts about them.
        part: Folder of a run directory: 'best', 'last' or 'last_ema'.

    Raises:
        CommandError: If the weights cannot be read, their model is unknown, or a flag is missing.
    """
    path = Path(flags.source).expanduser()
    try:
        if path.is_dir():
            release = _open_folder(path, flags, part)
        elif path.is_file():
            release = _open_file(path, flags)
        else:
            raise CommandError(f"{path}: no such file or folder")
        if flags.results:
            release.details.metrics = read_results(Path(flags.results))
        release.check()
    except (HubError, PretrainedError) as error:
        raise CommandError(str(error)) from error
    return release


def write_release(release: Release, output: "Output", name: str, license: str | None = None) -> bool:
    """Writes a model folder to an output.

    `Release.save` documents the other arguments and the returned value.

    Raises:
        CommandError: If the folder cannot be written.
    """
    try:
        return release.save(output.fresh, name, license)
    except (HubError, PretrainedError) as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CommandError(f"cannot write {output.path or output.fresh}: {reason(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def _open_folder(path: Path, flags: WeightsFlags, part: str) -> Release:
    try:
        folder = find_model_folder(path, part)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not (folder / WEIGHTS).is_file():
        raise CommandError(f"no {WEIGHTS} in {folder}; pass the file of weights instead of the folder")
    flags.check_unused(str(folder), allowed={"results"})
    return Release.from_folder(folder)


def _open_file(path: Path, flags: WeightsFlags) -> Release:
    content = read_checkpoint(path)
    is_run = {"progress", "recipe", "model"} <= content.keys()
    if is_run:
        content = load_checkpoint(path)  # checks the checksums of the file, too
    plain, ema = find_weight_keys(content)
    if plain is not None and ema is not None and flags.use_ema is None:
        raise CommandError(
            f"{path} contains weights ({plain}) and their moving average ({ema}); pass --no-use-ema or --use-ema"
        )
    weights, is_ema = pick_weights(content, path, flags.use_ema)
    recipe = _read_recipe(content, is_run)
    name = flags.model or _find_model(path, weights, content, recipe)
    weights = strip_weights(name, weights)
    is_published = name in PAPER_TOP1
    size = flags.img_size or (None if is_published else recipe.get("img_size"))
    first = next((weights[key] for key in _FIRST_CONV if key in weights), None)
    in_chans = flags.in_chans or recipe.get("in_chans") or (None if first is None else first.shape[1])
    model: Any = create_model(
        name,
        pretrained=True,
        weights=weights,
        in_chans=in_chans,
        img_size=size,
        model_kwargs={**(recipe.get("model_kwargs") or {}), **flags.model_kwargs},
    ).eval()
    images = {key: getattr(flags, key) or recipe.get(key) for key in RECIPE_KEYS if key != "num_classes"}
    data_config = resolve_data_config({**images, "in_chans": in_chans, "img_size": size}, model)
    details = Details(
        weights="moving average (EMA)" if is_ema else "as trained" + (", not the moving average" if ema else ""),
        source=f"{path.name}, sha256 {file_sha256(path)}",
    )
    if is_run:
        details.weights = f"{details.weights}, after epoch {content['progress']['epoch']}"
    if is_published:
        _check_published(path, name, model, data_config)
        _add_published_details(details, name)
    return Release(model, data_config, _find_label_names(path) if is_run else None, details)


def _check_published(path: Path, name: str, model: Any, data_config: Mapping[str, Any]) -> None:
    """Checks the number of classes and the resolution of published weights.

    Raises:
        CommandError: If they are different.
    """
    size = 384 if name.endswith("384") else 224
    found = (model.num_classes, tuple(data_config["input_size"]))
    if found != (1000, (3, size, size)):
        raise CommandError(
            f"{path} cannot be the published {name}: expected 1000 classes and images of 3x{size}x{size}, got "
            f"{found[0]} classes and {'x'.join(map(str, found[1]))}; for weights of your own, pass --model "
            f"{name.partition('.')[0]}"
        )


def _add_published_details(details: Details, name: str) -> None:
    details.tag = name.partition(".")[2]
    details.license = "mit"
    details.datasets = ["imagenet-1k"]
    how = "reported in the paper; not measured again for this file"
    details.metrics = [Metric("top-1", PAPER_TOP1[name], "ImageNet-1k", "validation", how)]


def _read_recipe(content: Mapping[str, Any], is_run: bool) -> dict[str, Any]:
    """Returns what a checkpoint stores about the model and the images.

    Checkpoints of our runs have a recipe. Those of the authors and of timm have the flags of the training.
    """
    if is_run:
        return {key: content["recipe"].get(key) for key in (*RECIPE_KEYS, "model", "model_kwargs")}
    flags = content.get("args")
    if not isinstance(flags, argparse.Namespace):
        return {}

    def numbers(name: str) -> list[float] | None:
        value = getattr(flags, name, None)
        value = [value] if isinstance(value, int | float) else value
        if not isinstance(value, list | tuple) or not all(isinstance(number, int | float) for number in value):
            return None
        return [float(number) for number in value] or None

    size, channels = (numbers(name) for name in ("img_size", "in_chans"))
    size, crop = size or numbers("input_size"), numbers("crop_pct")
    interpolation = getattr(flags, "interpolation", None)
    return {
        "img_size": int(size[-1]) if size else None,
        "in_chans": int(channels[0]) if channels else None,
        "crop_pct": crop[0] if crop else None,
        "interpolation": interpolation if interpolation in INTERPOLATIONS else None,
        "mean": numbers("mean"),
        "std": numbers("std"),
    }


def _find_model(path: Path, weights: Mapping[str, Any], content: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    try:
        found = recipe.get("model") or find_variant(weights) or content.get("arch")
    except ValueError as error:  # several models under different prefixes
        raise CommandError(f"{path}: {error}") from error
    if not isinstance(found, str):
        raise CommandError(f"{path}: {_NO_ARCHITECTURE}")
    return found


def _find_label_names(checkpoint: Path) -> list[str] | None:
    """Returns the class names of a run, from the model folders in its run directory."""
    for part in ("last", "best"):
        config = checkpoint.parent.parent / part / CONFIG
        if config.is_file():
            names = json.loads(config.read_text(encoding="utf-8")).get("label_names")
            return list(names) if names else None
    return None


def read_results(path: Path) -> list[Metric]:
    """Reads the accuracies in a results.json of tools/validate_cls.py.

    Raises:
        CommandError: If the file cannot be read.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        dataset = results["dataset"]
        if dataset == "folder" and results.get("data_dir"):
            dataset = f"images in {Path(results['data_dir']).name}"
        size, versions = results["input_size"][-1], results["versions"]
        how = (
            f"{results['images']} images of {results['split']} at {size} pixels, crop {results['crop_pct']:g}, "
            f"{results['interpolation']}, {results['dtype']} on {results['device']}; tools/validate_cls.py of stvit "
            f"{versions['stvit']}, torch {versions['torch']}, timm {versions['timm']}, {results['date'][:10]}"
        )
        metrics = []
        for prefix, title in (("", ""), ("real_", " (reassessed labels)")):
            for name in ("top1", "top5"):
                if f"{prefix}{name}" in results:
                    low, high = results[f"{prefix}{name}_interval"]
                    interval = f"95 % confidence interval {low:.2f} to {high:.2f}"
                    value = float(results[f"{prefix}{name}"])
                    label = f"{name[:3]}-{name[3:]}{title}"
                    metrics.append(Metric(label, value, dataset, results["split"], f"{how}; {interval}"))
        return metrics
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CommandError(
            f"cannot read --results {path} ({reason(error)}); pass a results.json of tools/validate_cls.py"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Output


@dataclass(frozen=True)
class Output:
    """Folder that a command writes. Its contents are complete or unchanged.

    Attributes:
        fresh: Folder to write to.
        path: Final place of the folder; None to leave it in `fresh`, which is temporary.
        names: Names of the files and folders that the command writes.
    """

    fresh: Path
    path: Path | None
    names: Set[str]

    def finish(self) -> Path:
        """Moves the contents to the final place and returns its path.

        Files of an earlier command are removed there.

        Raises:
            CommandError: If a file cannot be moved.
        """
        if self.path is None:
            return self.fresh
        try:
            self.path.mkdir(exist_ok=True)
            for name in self.names - {entry.name for entry in self.fresh.iterdir()}:
                _remove(self.path / name)
            for entry in list(self.fresh.iterdir()):
                if entry.is_dir():
                    _remove(self.path / entry.name)
                    os.replace(entry, self.path / entry.name)
            atomic_replace_dir(self.fresh, self.path)
        except OSError as error:
            raise CommandError(f"cannot write {self.path}: {reason(error)}") from error
        return self.path


@contextmanager
def open_output(path: str | None, names: Set[str] = MODEL_FILES, replace: bool = False) -> Iterator[Output]:
    """Context manager: yields an empty folder to write to.

    `Output.finish` moves its contents to their final place.

    Args:
        path: Final place; None for a temporary folder, which exists until the end of the context.
        names: Names of the files and folders that the command writes.
        replace: Whether the final place may already contain these files from an earlier command.

    Raises:
        CommandError: If the final place contains anything else, cannot be written, or is the output of another command
            that is still running.
    """
    folder = None if path is None else Path(path).expanduser()
    with PathLock() as lock:
        try:
            if folder is not None:
                folder.parent.mkdir(parents=True, exist_ok=True)
                place = folder.resolve()
                lock.acquire(place.parent / f".{place.name}.lock")
                _check_output(folder, names, replace)
            # Beside the final place, because files cannot be moved to another disk in one step.
            prefix = "stvit-" if folder is None else f".{folder.name}-"
            temporary = TemporaryDirectory(dir=None if folder is None else folder.parent, prefix=prefix)
        except InUseError as error:
            raise InUseError(f"--output {path}: another command is writing it; choose another folder") from error
        except OSError as error:
            raise CommandError(f"cannot write {path}: {reason(error)}") from error
        with temporary as temporary_folder:
            fresh = Path(temporary_folder, "fresh")
            fresh.mkdir()
            yield Output(fresh, folder, names)


def _check_output(folder: Path, names: Set[str], replace: bool) -> None:
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    links = sorted(name for name in found if (folder / name).is_symlink())
    if links:  # writing would follow the link
        raise CommandError(f"--output {folder} contains a link, {links[0]}; remove it, or choose another folder")
    card = folder / CARD
    is_replaceable = replace and found <= names and card.is_file() and not is_edited(card)
    if folder.is_file() or (found and not is_replaceable):
        raise CommandError(f"--output {folder} already exists; choose another folder, or move it away")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe_files(folder: Path) -> str:
    """Returns a line for each file of a folder, with its size and sha256."""
    return "\n".join(
        f"  {size:>12,} bytes  sha256 {file_sha256(folder / path)}  {path}" for path, size in list_files(folder).items()
    )
