"""Pictures of super tokens: what is drawn, and where the files are."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from stvit import visualize

from ..common.checkpoint import Checkpoints
from ..common.cli import CommandError, reason
from ..common.files import atomic_write
from ..common.image_files import ImageError, fit, result_names
from ..common.viewing import LoadedModel, explain_errors, stages_of
from .config import DrawConfig

__all__ = [
    "PICTURES",
    "choose_stages",
    "compute_view",
    "draw_checkpoints",
    "draw_view",
    "find_checkpoints",
    "output_folders",
    "save",
]

# Endings of the file names, in the order of `SuperTokens.panels`.
PICTURES = ("boundaries", "mean_colors", "association", "attention")


def compute_view(loaded: LoadedModel, image: Image.Image, stage: int, config: DrawConfig) -> visualize.SuperTokens:
    """Returns the super tokens of a stage over an image.

    Raises:
        CommandError: If the model cannot process the image, or the block does not exist.
    """
    with explain_errors():
        return visualize.super_tokens(loaded.model, fit(image, config.img_size), stage, config.block)


def _choose_token(view: visualize.SuperTokens, image: Image.Image, config: DrawConfig) -> int:
    """Returns the number of the token whose association and attention are drawn.

    Args:
        view: Super tokens of the reduced image.
        image: Original image, to which `config.pixel` refers.
        config: Settings.

    Raises:
        ImageError: If the token does not exist in this image.
    """
    if config.token is not None:
        last = view.grid[0] * view.grid[1] - 1
        if config.token > last:
            raise ImageError(f"--token must be from 0 to {last} for this image, got {config.token}")
        return config.token
    if config.pixel is None:
        return view.center
    x, y = config.pixel
    if x >= image.width or y >= image.height:
        raise ImageError(f"--pixel {x} {y} is outside the image of {image.width}x{image.height} pixels")
    return view.token_at(x * view.image.width // image.width, y * view.image.height // image.height)


def draw_view(view: visualize.SuperTokens, title: str, image: Image.Image, path: Path, config: DrawConfig) -> None:
    """Writes the sheet and the four pictures.

    Args:
        view: Super tokens.
        title: Title of the sheet.
        image: Original image.
        path: Path of the sheet, without its suffix.
        config: Settings.
    """
    panels = view.panels(_choose_token(view, image, config))
    save(visualize.contact_sheet(panels, columns=2, title=title), path.with_name(f"{path.name}.png"))
    for name, (_, picture) in zip(PICTURES, panels, strict=True):
        save(picture, path.with_name(f"{path.name}_{name}.png"))


def draw_checkpoints(
    checkpoints: Sequence[tuple[str, Path]],
    load_checkpoint: Callable[[Path], LoadedModel],
    stages: Sequence[int],
    image: Image.Image,
    folder: Path,
    config: DrawConfig,
    bar: tqdm,
) -> None:
    """Writes a sheet for each stage, with one row per checkpoint."""
    panels: dict[int, list[tuple[str, Image.Image]]] = {stage: [] for stage in stages}
    for label, path in checkpoints:
        loaded = load_checkpoint(path)  # one at a time: the models of a long run may not fit into memory
        for stage in choose_stages(stages, loaded):
            view = compute_view(loaded, image, stage, config)
            token = _choose_token(view, image, config)
            highest = view.association_map(token).max()
            panels[stage] += [
                (f"{label}: boundaries", view.draw_boundaries()),
                ("mean colors", view.draw_mean_colors()),
                (f"association, up to {highest:.2f}", view.draw_association(token)),
            ]
        bar.update()
    for stage, row in panels.items():
        save(visualize.contact_sheet(row, columns=3, panel_width=360), folder / f"stage{stage}_checkpoints.png")


def save(picture: Image.Image, path: Path) -> None:
    """Writes a picture as PNG, and the folders that it needs.

    Raises:
        CommandError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Directories, stages and checkpoints


def output_folders(root: Path, images: Sequence[Path], output: Path) -> list[Path]:
    """Returns the directory of each image's pictures.

    `result_names` explains its name.
    """
    return [output / name for name in result_names(root, images)]


def choose_stages(stages: Sequence[int] | None, loaded: LoadedModel) -> list[int]:
    """Returns the stages to draw: the given ones, or all with super tokens."""
    possible = stages_of(loaded)
    for stage in stages or []:
        if stage not in possible:
            raise CommandError(
                f"--stage {stage}: {loaded.title} has no super tokens there; choose from "
                f"{', '.join(map(str, possible))}"
            )
    return sorted(set(stages)) if stages else possible


def find_checkpoints(sources: Sequence[str]) -> list[tuple[str, Path]]:
    """Returns the label and path of each checkpoint, oldest first in each run."""
    found: list[tuple[str, Path]] = []
    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise CommandError(f"--checkpoints {source}: no such file or directory")
        if path.is_file():
            found.append((_label(path), path))
            continue
        files = Checkpoints(path / "checkpoints").paths() + sorted(
            (path / "weights").glob("epoch*.pt"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0)
        )
        files = files or sorted(path.glob("*.pt")) or sorted((path / "weights").glob("*.pt"))
        if not files:
            raise CommandError(f"--checkpoints {source}: no checkpoint found there, in checkpoints/ or in weights/")
        found += [(_label(file), file) for file in files]
    return found


def _label(path: Path) -> str:
    """Returns the epoch of a checkpoint, counted from 1, or its name if unknown."""
    ours = re.fullmatch(r"(\d{5})-(\d{8})", path.stem)
    if ours:  # named by train_cls.py: finished epochs, and steps of the next epoch
        epoch, step = map(int, ours.groups())
        return f"epoch {epoch}" if step == 0 else f"epoch {epoch + 1}, step {step}"
    theirs = re.fullmatch(r"epoch(\d+)", path.stem)  # named by Ultralytics, which counts from 0
    return f"epoch {int(theirs[1]) + 1}" if theirs else path.stem
