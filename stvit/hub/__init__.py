"""The Hugging Face Hub: a folder that timm loads, its card, and pushing it there.

A folder holds model.safetensors, config.json (timm's, with what is known of the weights below the key `stvit`) and the
card README.md. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and from the Hub `"hf-hub:org/name"`.
"""

from stvit.hub.card import CARD, CARD_MARK, CITATION_SECTION, model_card, write_card
from stvit.hub.files import HubError, copy_file, file_sha256, list_files
from stvit.hub.folder import read_config, remove_repeated_arguments, save
from stvit.hub.push import (
    Pushed,
    check_options,
    check_push,
    check_repo_id,
    check_there,
    check_token,
    compare_files_with_hub,
    compare_with_hub,
    fetch,
    mismatched_tensors,
    push,
    read_file,
)

__all__ = [
    "CARD",
    "CARD_MARK",
    "CITATION_SECTION",
    "HubError",
    "Pushed",
    "check_options",
    "check_push",
    "check_repo_id",
    "check_there",
    "check_token",
    "compare_files_with_hub",
    "compare_with_hub",
    "copy_file",
    "fetch",
    "file_sha256",
    "list_files",
    "mismatched_tensors",
    "model_card",
    "push",
    "read_config",
    "read_file",
    "remove_repeated_arguments",
    "save",
    "write_card",
]
