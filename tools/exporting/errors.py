"""Silences other libraries, and explains their failures."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from ..common.cli import CommandError, reason


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Context manager that suppresses output, logs and warnings of libraries."""
    disabled = logging.root.manager.disable
    silent = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def explain_failure(library: str) -> Iterator[None]:
    """Context manager that turns any error of an exporter into one line.

    Args:
        library: Name of the exporter, for the message.

    Raises:
        CommandError: If the library fails.
    """
    try:
        yield
    except (CommandError, OSError):
        raise
    except Exception as error:  # models of other libraries fail in many ways
        message = reason(error)
        message = message if len(message) <= 300 else f"{message[:300]}…"
        raise CommandError(f"the model cannot be exported by {library}: {type(error).__name__}: {message}") from error
