"""The server of the page: address, private files, look, and its end by signals."""

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..common.cli import CommandError, reason
from .config import DemoConfig, LimitsConfig, ServerConfig
from .page_guard import Guard, Hosts
from .scratch import Storage, private_folder

__all__ = ["end_by_signals", "find_port", "launch", "open_storage"]

PORTS = range(7860, 7960)
# Seconds until uploads and pictures are deleted. The page promises an hour.
MAX_AGE_S = 3000.0
# A picture is not higher than the screen, and a line of text not too long to read. Gradio leaves the list of models
# open when the Tab key moves the focus to another field; the rule for `.options` hides it.
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
.result img {max-height: 75vh; object-fit: contain}
.result {min-height: 5rem}
.block:not(:focus-within) .options {display: none}
.dark {--color-accent: var(--primary-400)}
"""


def find_port(config: ServerConfig) -> int:
    """Returns the port to listen on.

    It is the port in the settings, or the first free one from 7860. Gradio would search for minutes.

    Raises:
        CommandError: If the port is in use, or all of them.
    """
    for port in [config.port] if config.port else PORTS:
        try:
            with socket.create_server((config.host, port)):
                return port
        except (OSError, OverflowError) as error:
            # Windows denies access to ports that it reserves.
            is_used = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
            if config.port or not is_used:
                raise _listen_error(config.host, port, error) from error
    raise CommandError(f"all ports from {PORTS[0]} to {PORTS[-1]} of {config.host} are in use; pass --port")


def launch(page: Any, config: DemoConfig, port: int, storage: Storage) -> str:
    """Starts the server in the background, and returns the address of the page.

    Args:
        page: The page, a `gradio.Blocks`.
        config: Settings of the command.
        port: Port to listen on.
        storage: Uploads and pictures.

    Raises:
        CommandError: If the server cannot listen on the port.
    """
    host = config.server.host
    hosts = Hosts(host, port, config.server.allow_host)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=f"{config.limits.max_megabytes}mb",
            state_session_capacity=100,
            theme=_create_theme(),
            css=CSS,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(Guard, page=page, hosts=hosts, storage=storage)]},
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise _listen_error(host, port, error) from error
    return str(url)


def _listen_error(host: str, port: int, error: Exception) -> CommandError:
    return CommandError(f"cannot listen on {host}, port {port}: {reason(error)}; pass another --host or --port")


def _create_theme() -> Any:
    """Returns Gradio's theme with more contrast and the reader's own fonts.

    The page loads nothing from other servers.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


@contextmanager
def open_storage(limits: LimitsConfig) -> Iterator[Storage]:
    """Context manager: private folders for uploads, pictures and temporary files.

    Gradio and the computing processes use the folders. They are removed at the end, because a killed process cannot
    remove its temporary files.
    """
    with private_folder("stvit-demo-") as folder:
        uploads, temporary = folder / "uploads", folder / "temporary"
        uploads.mkdir()
        temporary.mkdir()
        storage = Storage(uploads, limits.max_total_megabytes * 2**20, MAX_AGE_S)
        with _set_environment(GRADIO_TEMP_DIR=str(uploads), TMPDIR=str(temporary)), storage.kept_small():
            yield storage


@contextmanager
def _set_environment(**variables: str) -> Iterator[None]:
    """Context manager: sets environment variables, and restores them on exit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def end_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the program like Ctrl-C.

    The program then removes its files.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # A program under nohup must ignore SIGHUP.
    handlers = {
        number: handler
        for number in (getattr(signal, name) for name in names)
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def end(*_: Any) -> None:
        for number in handlers:  # a second signal must not interrupt the removal
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in handlers:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
