"""Writes the page of tools/demo.py as a Space of the Hugging Face Hub.

The folder of a Space contains the page, the model and this package.
"""

import json
import re
import shutil
from importlib import metadata
from pathlib import Path

from huggingface_hub import SpaceCardData

import stvit
import stvit.adapters
import stvit.configs
import stvit.tools
from stvit.hub.card import CARD, Card
from stvit.hub.files import copy_file, list_files
from stvit.safe_text import escape_markdown

from .cli import CommandError, reason

# Names in the folder of a Space.
FILES = {"app.py", "requirements.txt", "stvit", "model", "LICENSE", "NOTICE", CARD}
# Patterns of files that a push deletes if they are not in the folder.
REPLACED = ("stvit/*", "model/*")
_APP = '''"""Runs the page of `stvit demo` as a Space. Written by stvit; each push replaces this file."""

import os
import sys
from pathlib import Path

os.chdir(Path(__file__).resolve().parent)

from stvit.tools.demo import main  # noqa: E402

# In a Space, requests come from the proxy of the Hub, under the names in SPACE_HOST. Elsewhere, only this machine can
# open the page.
HOST = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
PORT = os.environ.get("GRADIO_SERVER_PORT", "7860")
NAMES = [f"--allow-host={name}" for name in os.environ.get("SPACE_HOST", "").split(",") if name]
FLAGS = ["--runs=", "--no-hub", "--no-examples", "--host", HOST, "--port", PORT, *NAMES]

if __name__ == "__main__":
    sys.exit(main([{model}, *FLAGS, *sys.argv[1:]]))
'''


def write_space(folder: Path, repo_id: str, model: str, title: str, license: str | None = None) -> None:
    """Writes the files of a Space.

    These are app.py, requirements.txt, the installed stvit and its license, and the card.

    Args:
        folder: Folder to write. Weights that are not on the Hub are in its folder `model`.
        repo_id: Id of the Space, 'org/name'.
        model: Model for tools/demo.py: a path in the folder, or 'hf-hub:org/name'.
        title: Name of the model, for the card.
        license: License of the weights, in the Hub's spelling; None if unknown.

    Raises:
        stvit.hub.HubError: If the package of stvit contains a link.
        CommandError: If Gradio is missing, or a file cannot be written.
    """
    try:
        gradio, requirements = metadata.version("gradio"), _requirements()
    except metadata.PackageNotFoundError as error:
        raise CommandError(f"a Space needs Gradio; pip install 'stvit[demo]' ({reason(error)})") from error
    packages = [(stvit, ""), (stvit.adapters, "adapters"), (stvit.configs, "configs"), (stvit.tools, "tools")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for module, name in packages:
            _copy_package(Path(str(module.__file__)).parent, folder / "stvit" / name)
        for file in metadata.files("stvit") or []:
            if file.name in ("LICENSE", "NOTICE"):
                shutil.copyfile(str(file.locate()), folder / file.name)
        (folder / "app.py").write_text(_APP.replace("{model}", json.dumps(model)), encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        (folder / CARD).write_text(_card(repo_id, title, gradio, license).render(), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {reason(error)}") from error


def _card(repo_id: str, model: str, gradio: str, license: str | None) -> Card:
    title = repo_id.rsplit("/", 1)[-1]
    return Card(
        metadata=SpaceCardData(
            title=title,
            emoji="🧩",
            colorFrom="yellow",
            colorTo="gray",
            sdk="gradio",
            sdk_version=gradio,
            app_file="app.py",
            pinned=False,
            license=license,
            short_description="See what an image model sees",
        ),
        title=title,
        summary=f"Upload an image and see what {escape_markdown(model)} sees in it. "
        "The image is deleted within an hour.\n\n"
        f"To run the page on your machine: `pip install -r requirements.txt gradio=={gradio} && python app.py`.",
    )


def _copy_package(source: Path, target: Path) -> None:
    """Copies the files of an installed package, without compiled and temporary files."""
    for name in list_files(source):
        if "__pycache__" not in name.split("/") and not name.endswith((".pyc", ".tmp")):
            copy_file(source, name, target / name)


def _requirements() -> list[str]:
    """Returns the requirements of stvit and of its extra `yolo`."""
    needed = metadata.requires("stvit") or []
    ours = [re.sub(r"\s*;.*", "", line) for line in needed if ";" not in line or 'extra == "yolo"' in line]
    return sorted(ours)
