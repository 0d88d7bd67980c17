"""Images that cannot be read: counted, recorded, and limited in number."""

import json
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from stvit.images import UnreadableImageError

from .cli import OneProcessError, reason
from .files import open_append, read_utf8

# Largest image. Decoding takes 3 to 12 bytes per pixel in each loader worker.
MAX_PIXELS = 1 << 27
# After this many unreadable images in a row, the storage must be at fault.
MAX_BAD_IN_A_ROW = 10


@dataclass
class BadImages:
    """Unreadable images that were skipped.

    All processes of a machine count each image once, also when a run is resumed.

    Attributes:
        limit: Number of images that may be skipped.
        log: Log file of their names and problems, as JSON lines; None if no image may be skipped.
    """

    limit: int = 0
    log: Path | None = None

    def add(self, name: str, problem: str) -> None:
        """Records an unreadable image.

        Raises:
            OneProcessError: If it exceeds the limit.
        """
        if self.limit == 0 or self.log is None:
            raise OneProcessError(
                f"cannot read image {name}: {problem}; repair or remove it, or skip some images with --max-bad-images"
            )
        with FileLock(f"{self.log}.lock"):
            known = self.names()
            if name in known:
                return
            if len(known) >= self.limit:
                raise OneProcessError(
                    f"cannot read image {name}: {problem}; {len(known)} others were skipped (see {self.log}), and "
                    f"--max-bad-images is {self.limit}"
                )
            with open_append(self.log) as file:
                file.write(json.dumps({"image": name, "reason": problem}) + "\n")

    def names(self) -> set[str]:
        """Returns the names of the images skipped so far.

        Raises:
            OneProcessError: If the log is damaged.
        """
        if self.log is None or not self.log.exists():
            return set()
        try:
            complete_lines = read_utf8(self.log).rpartition("\n")[0].splitlines()
            return {str(json.loads(line)["image"]) for line in complete_lines}
        except (ValueError, LookupError, TypeError) as error:
            raise OneProcessError(
                f"{self.log} is damaged ({reason(error)}); repair it, or remove it to count the images again"
            ) from error


def describe_problem(error: Exception) -> str:
    """Returns why an image cannot be read, without the image's name."""
    return error.problem if isinstance(error, UnreadableImageError) else reason(error)
