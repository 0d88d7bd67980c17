"""Checks a model and writes it as a model folder with its card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import nn

from stvit.hub.card import CARD, write_card
from stvit.hub.files import HubError, copy_file
from stvit.hub.folder import CONFIG, WEIGHTS, Details, read_config, save, write_details
from stvit.weights.create import create_model
from stvit.weights.source import Source

__all__ = ["Release"]


@dataclass
class Release:
    """A model and its metadata, ready to be saved or pushed.

    Attributes:
        model: Model created by timm, with its weights.
        data_config: Preprocessing settings of timm.
        label_names: Class names, in order; None if unknown.
        details: Facts about the weights, for the card.
        folder: Model folder whose files are copied; None to write the files from `model`.
    """

    model: nn.Module
    data_config: dict[str, Any]
    label_names: list[str] | None = None
    details: Details = field(default_factory=Details)
    folder: Path | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "Release":
        """Loads a model folder.

        Raises:
            HubError: If config.json cannot be read.
            stvit.PretrainedError: If the model cannot be loaded.
        """
        model: Any = create_model(str(Source.folder(folder)), pretrained=True).eval()
        config = read_config(folder)
        names = config.pretrained_cfg.get("label_names")
        return cls(model, resolve_input_data_config(model), names, config.details, folder)

    @property
    def name(self) -> str:
        """timm's name of the model, with the tag of published weights."""
        config: Any = self.model.pretrained_cfg
        return f"{config['architecture']}.{self.details.tag}" if self.details.tag else str(config["architecture"])

    def check(self) -> None:
        """Runs the model on a random image.

        Raises:
            HubError: If the model does not take the image, or if the weights or the output contain NaN or infinity.
        """
        try:
            output = self._run(self.model)
        except Exception as error:  # a foreign model may refuse the resolution in any way
            channels, height, width = self.data_config["input_size"]
            raise HubError(
                f"{self.name} does not take images of {channels}x{height}x{width} ({error}); pass another image size"
            ) from error
        broken = [key for key, value in self.model.state_dict().items() if not torch.isfinite(value.float()).all()]
        if broken:
            raise HubError(f"{self.name}: NaN or infinity in {', '.join(broken[:5])}; use an earlier checkpoint")
        if not torch.isfinite(output).all():
            raise HubError(f"{self.name}: NaN or infinity in the output; use an earlier checkpoint")

    def save(self, folder: Path, name: str, license: str | None = None) -> bool:
        """Writes a model folder with its card, and checks that it loads again.

        Loading the folder must give the same output.

        Args:
            folder: Folder to write. It must be missing or empty.
            name: Name that will load the model in timm, such as 'hf-hub:org/name', for the card.
            license: License of the weights; None for the license in `details`.

        Returns:
            Whether the card was written. False if a person wrote or edited the card in `self.folder`.

        Raises:
            HubError: If a file is a link, or if the saved model gives another output.
            OSError, ValueError, safetensors.SafetensorError: If a file cannot be written.
        """
        if self.folder is None:
            save(
                self.model,
                folder,
                label_names=self.label_names,
                data_config=self.data_config,
                details=self.details,
            )
        else:
            for file in (WEIGHTS, CONFIG, CARD):
                if (self.folder / file).exists() or (self.folder / file).is_symlink():
                    copy_file(self.folder, file, folder / file)
            write_details(folder, self.details)
        again = create_model(str(Source.folder(folder)), pretrained=True).eval()
        if not torch.equal(self._run(again), self._run(self.model)):
            raise HubError(f"{self.name} gives another output after saving and loading; report this as a bug")
        return write_card(folder, name, license=license)

    def _run(self, model: nn.Module) -> torch.Tensor:
        image = torch.randn(1, *self.data_config["input_size"], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return model(image)
