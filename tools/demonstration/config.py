"""Settings of the command, in a module that imports nothing heavy."""

import argparse
import re
from dataclasses import dataclass, field

from ..common.cli import CommandError, positive
from ..common.flags import flag, section

__all__ = ["MAX_DOWNLOAD", "MAX_DOWNLOADS", "DemoConfig", "LimitsConfig", "ModelsConfig", "ServerConfig"]

# Bytes of the largest model that users can download, and of all of them.
MAX_DOWNLOAD = 2**30
MAX_DOWNLOADS = 10 * 2**30


def _host_name(text: str) -> str:
    """Parses the name of a host, with or without a port."""
    if not re.fullmatch(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", text):
        raise argparse.ArgumentTypeError(f"expected NAME or NAME:PORT, got {text!r}")
    return text


def _port(text: str) -> int:
    """Parses the number of a port."""
    if positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port of at most 65535, got {text}")
    return int(text)


@dataclass
class ModelsConfig:
    """Chooses the models that the page offers.

    Attributes:
        names: Runs, files, models on the Hub, and names of models.
    """

    names: list[str] = field(default_factory=list)
    runs: str = flag("runs", "folder whose runs the page offers", metavar="DIR")
    hub: bool = flag(
        True,
        f"accept hf-hub:ORG/NAME on the page, up to {MAX_DOWNLOAD // 2**30} GB for a model and "
        f"{MAX_DOWNLOADS // 2**30} GB in all",
        action=argparse.BooleanOptionalAction,
    )
    examples: bool = flag(
        True,
        "offer the classifier of the package and a detector with random weights",
        action=argparse.BooleanOptionalAction,
    )


@dataclass
class ServerConfig:
    """Address of the page."""

    host: str = flag("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int | None = flag(None, "port to listen on (default: the first free one from 7860)", type=_port, metavar="N")
    allow_host: list[str] = flag(
        [],
        "further address that the page answers to; may be repeated (always included: the address that it listens on; "
        "with --host 0.0.0.0, localhost and all IP addresses)",
        type=_host_name,
        action="append",
        metavar="NAME[:PORT]",
    )


@dataclass
class LimitsConfig:
    """Limits on uploads and computations."""

    max_megabytes: int = flag(10, "largest image file", type=_port, metavar="N")
    max_megapixels: int = flag(25, "largest image", type=_port, metavar="N")
    max_total_megabytes: int = flag(
        1000,
        "disk space for uploads and pictures of all users; above half of it, the oldest ones are deleted",
        type=positive,
        metavar="N",
    )
    max_seconds: int = flag(60, "longest computation of a request", type=_port, metavar="N")
    max_gigabytes: int = flag(8, "memory for models that users type in (Linux only)", type=_port, metavar="N")
    img_size: int = flag(
        640, "largest width and height that a detector or the super tokens see", type=_port, metavar="N"
    )

    def check(self) -> None:
        """Checks that an upload fits into the disk space.

        Raises:
            CommandError: If it does not fit.
        """
        if self.max_total_megabytes < self.max_megabytes:
            raise CommandError(
                f"--max-total-megabytes {self.max_total_megabytes} is less than --max-megabytes "
                f"{self.max_megabytes}; raise it"
            )


@dataclass
class DemoConfig:
    """Settings of the command."""

    models: ModelsConfig = section("models", ModelsConfig)
    server: ServerConfig = section("server", ServerConfig)
    limits: LimitsConfig = section("limits", LimitsConfig)
