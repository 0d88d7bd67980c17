"""The page of tools/demo.py as a Space of the Hugging Face Hub: a folder that runs by itself."""

import json
import re
import shutil
from importlib import metadata
from pathlib import Path

import stvit
import stvit.adapters
import stvit.configs
import stvit.tools
from stvit import hub
from stvit.safe_text import escape_markdown
from stvit.tools.common.cli import CommandError, reason

FILES = {"app.py", "requirements.txt", "stvit", "model", "LICENSE", "NOTICE", hub.CARD}
# Below these nothing of a former version stays.
REPLACED = ("stvit/*", "stvit/*/*", "stvit/*/*/*", "model/*")
_APP = '''"""The page of stvit's tools/demo.py, as a Space: written by stvit, and anew with each push."""

import os
import sys
from pathlib import Path

os.chdir(Path(__file__).resolve().parent)

from stvit.tools.demo import main  # noqa: E402

# In a Space the page is served to its front, under the names that the Hub gives it; elsewhere it is for this machine
# alone.
HOST = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
PORT = os.environ.get("GRADIO_SERVER_PORT", "7860")
NAMES = [f"--allow-host={name}" for name in os.environ.get("SPACE_HOST", "").split(",") if name]
FLAGS = ["--runs=", "--no-hub", "--no-random", "--host", HOST, "--port", PORT, *NAMES]

if __name__ == "__main__":
    sys.exit(main([{model}, *FLAGS, *sys.argv[1:]]))
'''
_CARD = """---
title: {quoted}
emoji: 🧩
colorFrom: yellow
colorTo: gray
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
{license}short_description: What an image model sees
---

{mark}

# {heading}

What {model} sees in your image. Your image is deleted within the hour.

It runs on your machine, too: `pip install -r requirements.txt gradio=={gradio} && python app.py`.
"""


def write_space(folder: Path, repo_id: str, model: str, what: str, license: str | None = None) -> None:
    """Writes app.py, the packages it needs (by name, and stvit itself, of this version), and the Space's card.

    Args:
        folder: Where to; its folder `model` holds the weights, if they are not the Hub's.
        repo_id: 'org/name' of the Space.
        model: What the page is given: a path in the folder, or 'hf-hub:org/name'.
        what: The model's name.
        license: Of the weights; None for none stated.

    Raises:
        CommandError: If Gradio is missing, or it cannot be written.
    """
    try:
        gradio, requirements = metadata.version("gradio"), _requirements()
    except metadata.PackageNotFoundError as error:
        raise CommandError(
            f"a Space runs what is installed here, pip install 'stvit[demo]': {reason(error)}"
        ) from error
    title = repo_id.rsplit("/", 1)[-1]
    card = _CARD.format(
        heading=escape_markdown(title),
        quoted=json.dumps(title),  # no and 123 are others in YAML
        gradio=gradio,
        mark=hub.CARD_MARK,
        model=escape_markdown(what),
        license=f"license: {license}\n" if license else "",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for module, name in (
            (stvit, ""),
            (stvit.adapters, "adapters"),
            (stvit.configs, "configs"),
            (stvit.tools, "tools"),
        ):
            _copy_package(Path(str(module.__file__)).parent, folder / "stvit" / name)
        for file in metadata.files("stvit") or []:
            if file.name in ("LICENSE", "NOTICE"):
                shutil.copyfile(str(file.locate()), folder / file.name)
        (folder / "app.py").write_text(_APP.replace("{model}", json.dumps(model)), encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        (folder / hub.CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {reason(error)}") from error


def _copy_package(source: Path, target: Path) -> None:
    """Copies the files of an installed package, without compiled and temporary ones.

    Raises:
        stvit.hub.HubError: If the package holds a link to a file.
    """
    for name in hub.list_files(source):
        if "__pycache__" not in name.split("/") and not name.endswith((".pyc", ".tmp")):
            hub.copy_file(source, name, target / name)


def _requirements() -> list[str]:
    """What stvit needs, and Ultralytics and its company: those of the extra `yolo`."""
    needed = metadata.requires("stvit") or []
    ours = [re.sub(r"\s*;.*", "", line) for line in needed if ";" not in line or 'extra == "yolo"' in line]
    return sorted(ours)
