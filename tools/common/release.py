"""Weights from wherever they are, as a folder that timm loads and the Hub takes."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from torch import nn

from stvit import hub
from stvit.safe_text import code_span, escape_markdown
from stvit.tools.common.checkpoint import load_checkpoint
from stvit.tools.common.cli import CommandError, KeyValues, positive, reason
from stvit.tools.common.config import INTERPOLATIONS, ImageConfig
from stvit.tools.common.data import resolve_data_config
from stvit.tools.common.files import atomic_replace_dir
from stvit.tools.common.flags import add_flags
from stvit.tools.common.model import RECIPE_KEYS, create_model, open_file, pick_weights, strip_weights, weights_in
from stvit.weights import find_variant, verify

# Top-1 on ImageNet-1k in percent that the paper gives for the authors' weights (tables 2 and 3).
PAPER_TOP1 = {
    "stvit_small.in1k": 83.6,
    "stvit_small.in1k_384": 85.0,
    "stvit_base.in1k": 84.8,
    "stvit_base.in1k_384": 86.0,
    "stvit_large.in1k": 85.3,
    "stvit_large.in1k_384": 86.4,
}
WRITTEN = {"model.safetensors", "config.json", "model.pt", "example.jpg", hub.CARD}
_FIRST_CONV = ("stem.0.weight", "patch_embed.proj.0.weight")


def add_source_arguments(parser: Any) -> None:
    """The flags that say what the weights are of, alike in every command that makes a folder of them."""
    parser.add_argument("source", metavar="SOURCE", help="run, folder or file of weights: the authors', timm's, ours")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--use-ema",
        action=argparse.BooleanOptionalAction,
        help="take the moving average of a file that holds both, or with --no-use-ema the weights themselves",
    )
    group.add_argument(
        "--model", metavar="NAME", help="model or tag, any of timm's (default: recognized by the shapes)"
    )
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="more of its")
    group.add_argument("--in-chans", type=positive, metavar="N", help="image channels (default: those of the weights)")
    add_flags(group, ImageConfig)
    group.add_argument("--results", metavar="FILE", help="results.json of tools/validate_cls.py, for the card")


def refuse_flags(args: argparse.Namespace, source: str, *more: str) -> None:
    """Refuses the flags of `add_source_arguments` that a source answers itself.

    Raises:
        CommandError: If one is given.
    """
    names = ("use_ema", "model", "in_chans", "img_size", "mean", "std", "interpolation", "crop_pct", *more)
    refused = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    refused += ["--model-kwargs"] if args.model_kwargs else []
    if refused:
        raise CommandError(f"{source} says itself what it holds: leave {', '.join(refused)} out")


@dataclass
class Release:
    """What becomes a folder.

    Attributes:
        model: With the weights.
        data_config: How it wants its images.
        label_names: Of the classes, in order; None if nobody knows.
        details: What is known of the weights, for the card.
        files: Folder whose files are taken as they are instead, None for none.
    """

    model: nn.Module
    data_config: dict[str, Any]
    label_names: list[str] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    files: Path | None = None

    @property
    def name(self) -> str:
        """timm's name of the model, with the tag if the weights are those published under it."""
        cfg: Any = self.model.pretrained_cfg
        tag = self.details.get("tag")
        return f"{cfg['architecture']}.{tag}" if tag else str(cfg["architecture"])


def open_release(args: argparse.Namespace, part: str = "best") -> Release:
    """The weights of the flags of `add_source_arguments`, checked by a forward pass.

    Args:
        args: The flags.
        part: Folder of a run to take: 'best', 'last' or 'last_ema'.

    Raises:
        CommandError: If they cannot be read, are of no model that is known, or the choice is not clear.
    """
    path = Path(args.source).expanduser()
    if path.is_dir():
        release = _open_folder(path, args, part)
    elif path.is_file():
        release = _open_file(path, args)
    else:
        raise CommandError(f"{path}: there is no such file or folder")
    if args.results:
        release.details["metrics"] = _read_results(Path(args.results))
    _check_forward(release)
    return release


def write_release(release: Release, folder: Path, name: str, license: str | None = None) -> bool:
    """Writes model.safetensors, config.json and the card, and checks that they load to the same results.

    Args:
        release: What to write.
        folder: Where to.
        name: By which timm will load it, for the card.
        license: Of the weights; None for what is known of them.

    Returns:
        Whether the card was written: False if a person has changed the one that was there.

    Raises:
        CommandError: If they cannot be written, or load to other results.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            fresh = Path(temporary) / "fresh"
            if release.files is None:
                hub.save(
                    release.model,
                    fresh,
                    label_names=release.label_names,
                    data_config=release.data_config,
                    details=release.details,
                )
            else:
                fresh.mkdir()
                for file in ("model.safetensors", "config.json", hub.CARD):
                    if os.path.lexists(release.files / file):
                        hub.copy_file(release.files, file, fresh / file)
                hub.remove_repeated_arguments(fresh)
                config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
                if release.details != config.get("stvit", {}):
                    text = json.dumps({**config, "stvit": release.details}, indent=2)
                    (fresh / "config.json").write_text(text, encoding="utf-8")
            again: Any = create_model(f"local-dir:{fresh}", pretrained=True)
            image = _image(release)
            with torch.inference_mode():
                same = torch.equal(again.eval()(image), release.model(image))
            if not same:
                raise CommandError(f"{release.name} gives other results when it is loaded from its folder")
            is_card_ours = hub.write_card(fresh, name, license=license)
            _put_in_place(fresh, folder)
            return is_card_ours
    except hub.HubError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CommandError(f"cannot write {folder}: {reason(error)}") from error


@contextmanager
def fresh_folder(path: str | None, replace: bool = False, ours: Set[str] = WRITTEN) -> Iterator[Path]:
    """A folder to write to: of that name, which holds nothing yet, or one that is gone afterwards.

    Args:
        path: Its name; None for one that is gone afterwards.
        replace: Whether it may hold what these commands have written, and nothing else.
        ours: Names of what they have.

    Raises:
        CommandError: If something is in it.
    """
    if path is None:
        with TemporaryDirectory(prefix="stvit-") as temporary:
            yield Path(temporary) / "model"
        return
    folder = Path(path).expanduser()
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    links = sorted(name for name in names if (folder / name).is_symlink())
    if links:  # writing would follow them
        raise CommandError(f"--output {folder} holds a link, {links[0]}: remove it, or choose another folder")
    card = folder / hub.CARD
    is_ours = names <= ours and card.is_file() and hub.CARD_MARK in card.read_text(encoding="utf-8")
    if folder.is_file() or (names and not (replace and is_ours)):
        raise CommandError(f"--output {folder} is there already: choose another, or move it away")
    yield folder


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Moves the files of a folder into another, which then holds no older ones of ours beside them."""
    stale = WRITTEN - {file.name for file in fresh.iterdir()}
    atomic_replace_dir(fresh, folder)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def describe_files(folder: Path) -> str:
    """A line for each file: its size and its sha256."""
    return "\n".join(
        f"  {size:>12,} bytes  sha256 {hub.file_sha256(folder / path)}  {path}"
        for path, size in hub.list_files(folder).items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Detectors

_PIPELINES = {
    "detect": "object-detection",
    "obb": "object-detection",
    "segment": "image-segmentation",
    "semantic": "image-segmentation",
    "pose": "keypoint-detection",
    "depth": "depth-estimation",
    "classify": "image-classification",
}


def write_detector(
    source: Path, folder: Path, repo_id: str, *, license: str | None = None, example: Path | None = None
) -> str:
    """Writes a detector's checkpoint, an example picture and the card.

    Args:
        source: Checkpoint of Ultralytics.
        folder: Where to.
        repo_id: 'org/name'.
        license: Of the weights; None for what the checkpoint says.
        example: Picture to show its results on; None for Ultralytics' own.

    Returns:
        Name of the model.

    Raises:
        CommandError: If Ultralytics is missing, the checkpoint cannot be opened safely, or nothing can be written.
    """
    try:
        from stvit.adapters.yolo.hub import prepare_checkpoint

        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            fresh = Path(temporary) / "fresh"
            facts = prepare_checkpoint(source, fresh, example)
            (fresh / hub.CARD).write_text(_detector_card(fresh, repo_id, facts, license), encoding="utf-8")
            _put_in_place(fresh, folder)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    return Path(str(facts["model"])).stem


def _detector_card(folder: Path, repo_id: str, facts: Mapping[str, Any], license: str | None) -> str:
    title, license = repo_id.rsplit("/", 1)[-1], license or facts["license"]
    pipeline = _PIPELINES.get(facts["task"], "object-detection")
    data = ModelCardData(
        license=license,
        library_name="ultralytics",
        pipeline_tag=pipeline,
        tags=[pipeline, "ultralytics", *(["stvit", "super-token-attention"] if facts["has_super_tokens"] else [])],
    )
    names = [str(name) for name in facts["names"].values()]
    rows = [f"| {escape_markdown(name)} | {value:.4f} |" for name, value in facts["metrics"].items()]
    how = (
        f"By Ultralytics {facts['version']} in its validation while it trained, on the validation images of "
        f"{code_span(facts['data'])} at {escape_markdown(facts['imgsz'])} pixels, which chose the epoch too; fractions "
        "of 1."
    )
    measured = "\n".join([how, "", "| | |", "|---|---:|", *rows]) if rows else "Not measured."
    text = f"""
{hub.CARD_MARK}

# {title}

A model of Ultralytics in half precision, made from {code_span(facts["model"])}, for the task
{code_span(facts["task"])}.

```python
from stvit.adapters.yolo import YOLO

model = YOLO("hf-hub:{repo_id}")  # no code of the checkpoint is run
results = model.predict("photos")
```

![What it sees in {escape_markdown(facts["image"])}](example.jpg)

- {facts["parameters"] / 1e6:.2f} M parameters
- {len(names)} classes: {", ".join(map(code_span, names[:20]))}{", …" if len(names) > 20 else ""}
- sha256 of model.pt: `{hub.file_sha256(folder / "model.pt")}`

## Results

{measured}
{hub.CITATION_SECTION if facts["has_super_tokens"] else ""}"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def compare_detector_with_hub(folder: Path, pushed: hub.Pushed) -> int:
    """Loads a pushed detector back by its commit, into a cache of its own, and compares every tensor and checksum.

    Returns:
        How many tensors are equal: all of them.

    Raises:
        stvit.hub.HubError: If one differs, or it cannot be loaded.
    """
    from stvit.adapters.yolo.hub import fetch_checkpoint, open_safely

    name = f"hf-hub:{pushed.repo_id}@{pushed.commit}"
    with TemporaryDirectory() as cache:
        try:
            there = open_safely(fetch_checkpoint(name, cache))["model"].state_dict()
            wrong = verify(pushed.repo_id, pushed.commit, cache)
        except (OSError, RuntimeError, ValueError) as error:
            raise hub.HubError(f"pushed, but it does not load back: {error}") from error
    here = open_safely(folder / "model.pt")["model"].state_dict()
    wrong += hub.mismatched_tensors(here, there)
    if wrong:
        raise hub.HubError(f"pushed, but {name} reads back otherwise: {', '.join(wrong[:5])}")
    return len(here)


# ---------------------------------------------------------------------------------------------------------------------
# Where weights are


def _open_folder(path: Path, args: argparse.Namespace, part: str) -> Release:
    folder = next((place for place in (path, path / part) if (place / "config.json").is_file()), None)
    if folder is None:
        raise CommandError(f"{path}: neither it nor its folder {part}/ holds a config.json")
    if not (folder / "model.safetensors").is_file():
        raise CommandError(f"{folder} holds no model.safetensors: convert the file of weights instead")
    refuse_flags(args, str(folder))
    model: Any = create_model(f"local-dir:{folder}", pretrained=True)
    try:
        config = hub.read_config(folder)
    except hub.HubError as error:
        raise CommandError(str(error)) from error
    return Release(
        model.eval(),
        resolve_input_data_config(model),
        label_names=config.get("label_names"),
        details=dict(config.get("stvit", {})),
        files=folder,
    )


def _open_file(path: Path, args: argparse.Namespace) -> Release:
    content = open_file(path)
    is_run = {"progress", "recipe", "model"} <= content.keys()
    if is_run:
        content = load_checkpoint(path)  # which looks at its checksums
    plain, ema = weights_in(content)
    if plain is not None and ema is not None and args.use_ema is None:
        raise CommandError(
            f"{path} holds the weights ({plain}) and their moving average ({ema}): choose, --no-use-ema or --use-ema"
        )
    weights, is_ema = pick_weights(content, path, args.use_ema)
    recipe = _recipe(content, is_run)
    name = args.model or _find_model(path, weights, content, recipe)
    weights = strip_weights(name, weights)
    size = args.img_size or recipe.get("img_size")
    first = next((weights[key] for key in _FIRST_CONV if key in weights), None)
    in_chans = args.in_chans or recipe.get("in_chans") or (None if first is None else first.shape[1])
    model: Any = create_model(
        name,
        pretrained=True,
        weights=weights,
        in_chans=in_chans,
        img_size=size if name not in PAPER_TOP1 else args.img_size,
        model_kwargs={**(recipe.get("model_kwargs") or {}), **args.model_kwargs},
    ).eval()
    images = {key: getattr(args, key, None) or recipe.get(key) for key in RECIPE_KEYS if key != "num_classes"}
    images |= {"in_chans": in_chans, "img_size": size if name not in PAPER_TOP1 else args.img_size}
    data_config = resolve_data_config(images, model)
    details: dict[str, Any] = {
        "weights": "moving average (EMA)" if is_ema else "as trained" + (", not their average" if ema else ""),
        "source": f"{path.name}, sha256 {hub.file_sha256(path)}",
    }
    if is_run:
        details["weights"] += f", after epoch {content['progress']['epoch']}"
    if name in PAPER_TOP1:
        _check_published(path, name, model, data_config)
        details |= {
            "tag": name.partition(".")[2],
            "license": "mit",
            "datasets": ["imagenet-1k"],
            "metrics": [
                {
                    "name": "top-1",
                    "value": PAPER_TOP1[name],
                    "dataset": "ImageNet-1k",
                    "split": "validation",
                    "how": "by the authors, as the paper gives it; not measured again for this file",
                }
            ],
        }
    return Release(model, data_config, _label_names(path) if is_run else None, details)


def _check_published(path: Path, name: str, model: Any, data_config: Mapping[str, Any]) -> None:
    """Refuses to call weights published that cannot be."""
    size = 384 if name.endswith("384") else 224
    found = (model.num_classes, tuple(data_config["input_size"]))
    if found != (1000, (3, size, size)):
        raise CommandError(
            f"{path} cannot be the published {name}, of 1000 classes and images of 3x{size}x{size}: it has {found[0]} "
            f"classes and {'x'.join(map(str, found[1]))}; give --model {name.partition('.')[0]} for weights of your own"
        )


def _recipe(content: Mapping[str, Any], is_run: bool) -> dict[str, Any]:
    """What a checkpoint tells of its model and its images: our recipe, or the flags of the authors' or timm's runs."""
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
    except ValueError as error:  # several prefixes
        raise CommandError(f"{path}: {error}") from error
    if not isinstance(found, str):
        raise CommandError(
            f"{path}: the shapes are those of no model of stvit; of another model of timm's give --model NAME, and "
            "what it was made with as --model-kwargs"
        )
    return found


def _label_names(checkpoint: Path) -> list[str] | None:
    """The class names of a run, which stand beside its weights."""
    for part in ("last", "best"):
        config = checkpoint.parent.parent / part / "config.json"
        if config.is_file():
            names = json.loads(config.read_text(encoding="utf-8")).get("label_names")
            return list(names) if names else None
    return None


def _read_results(path: Path) -> list[dict[str, Any]]:
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
                    metrics.append(
                        {
                            "name": f"{name[:3]}-{name[3:]}{title}",
                            "value": float(results[f"{prefix}{name}"]),
                            "dataset": dataset,
                            "split": results["split"],
                            "how": f"{how}; 95 % confidence {low:.2f} to {high:.2f}",
                        }
                    )
        return metrics
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CommandError(
            f"cannot read --results {path} ({reason(error)}): it must be the results.json of tools/validate_cls.py"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# What they give


def _image(release: Release) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *release.data_config["input_size"], generator=generator)


def _check_forward(release: Release) -> None:
    try:
        with torch.inference_mode():
            output = release.model(_image(release))
    except Exception as error:  # a foreign model may refuse the size
        channels, height, width = release.data_config["input_size"]
        raise CommandError(
            f"{release.name} does not take images of {channels}x{height}x{width} ({reason(error)}); pass another "
            "--img-size"
        ) from error
    broken = [key for key, value in release.model.state_dict().items() if not torch.isfinite(value.float()).all()]
    if broken or not torch.isfinite(output).all():
        what = f"{', '.join(broken[:5])} hold NaN or infinity" if broken else "the output holds NaN or infinity"
        raise CommandError(f"{release.name}: {what}: the weights are broken, take an earlier checkpoint")
