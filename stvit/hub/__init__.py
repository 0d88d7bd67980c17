"""Saves models as folders that timm loads, and pushes them to the Hub.

A model folder contains:

- model.safetensors: the weights
- config.json: timm's configuration, with facts about the weights below the key `stvit`
- README.md: the model card

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder, and after a push
`timm.create_model("hf-hub:ORG/NAME", pretrained=True)`.
"""

from stvit.hub.card import write_card
from stvit.hub.files import HubError
from stvit.hub.folder import Details, Metric, save
from stvit.hub.push import Pushed, Repository, check_repo_id, check_token, push
from stvit.hub.release import Release

__all__ = [
    "Details",
    "HubError",
    "Metric",
    "Pushed",
    "Release",
    "Repository",
    "check_repo_id",
    "check_token",
    "push",
    "save",
    "write_card",
]
