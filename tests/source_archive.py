"""Downloads source archives of installed packages.

They contain tests that the wheels lack.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


class ArchiveMissing(Exception):
    """Raised when a source archive cannot be downloaded.

    Attributes:
        output: Output of pip.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def fetch(package: str) -> Path:
    """Downloads the archive of the installed version once and returns its path.

    Raises:
        ArchiveMissing: If the download fails. The message is one line with the reason.
    """
    name = f"{package}-{version(package)}"
    archive = CACHE / name / f"{name}.tar.gz"
    if archive.exists():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", f"--no-binary={package}", f"--dest={archive.parent}"]
    missing = f"the source archive of {package} {version(package)} cannot be downloaded"
    try:
        done = subprocess.run([*pip, f"{package}=={version(package)}"], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise ArchiveMissing(f"{missing}: no answer in five minutes") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip printed no error"])[-1]
        raise ArchiveMissing(f"{missing}: {last}", done.stdout + done.stderr)
    if not archive.exists():
        raise ArchiveMissing(f"{missing}: pip downloaded no {archive.name}", done.stdout + done.stderr)
    return archive
