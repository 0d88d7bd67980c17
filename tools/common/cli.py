"""Command line helpers: one-line errors, exit statuses, parser and flag types."""

import argparse
import ast
import importlib
import io
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from stvit.safe_text import clipped, one_line, printable, redact

T = TypeVar("T")


class CommandError(Exception):
    """An error that the user can fix.

    The message is one line: what is wrong and what to do. Secrets and control characters in it are replaced, because
    file names and arguments may contain them.

    Attributes:
        status: Exit status of the command.
    """

    status = 1

    def __init__(self, message: str) -> None:
        if message.startswith("Caught ") and " in DataLoader worker process " in message.partition("\n")[0]:
            # PyTorch recreates a worker's error from its traceback. The last line is the error itself.
            message = message.strip().rpartition("\n")[2].partition("Error: ")[2]
        super().__init__(one_line(message))


class OneProcessError(CommandError):
    """An error that occurs in one process only, such as an unreadable image.

    Every process prints such errors. Other errors of the user occur in all processes, and only process 0 prints them.
    """


class Interrupted(CommandError):
    """A signal ended the command, and its state is saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


def silence_libraries() -> None:
    """Hides warnings of timm and huggingface_hub.

    The command prints their errors itself.
    """
    for library in ("timm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def run(command: Callable[[T], None], args: T) -> int:
    """Runs a command, prints its error in one line, and returns the exit status.

    With several processes (torchrun sets RANK), only process 0 prints a `CommandError`. Every process prints a
    `OneProcessError` and errors that are not a `CommandError`. Secrets and escape sequences are removed from standard
    output.
    """
    _import_models()
    print_any_text()
    with redirect_stdout(_SafeOutput(sys.stdout)):
        return _run(command, args)


def _import_models() -> None:
    """Registers the models in timm; see stvit/__init__.py.

    While PyTorch is imported, Ctrl-C ends the process without a traceback. After the import, Ctrl-C raises
    KeyboardInterrupt again.
    """
    if "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    importlib.import_module("stvit.stvit")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(command: Callable[[T], None], args: T) -> int:
    rank = _rank()
    prefix = f"error: process {rank}: " if rank else "error: "
    try:
        command(args)
        return 0
    except CommandError as error:
        if rank == 0 or isinstance(error, OneProcessError):
            print(f"{'' if isinstance(error, Interrupted) else prefix}{error}", file=sys.stderr)
        # The frames of a loader's error keep the loader and its worker processes alive.
        traceback.clear_frames(error.__traceback__)
        return error.status
    except OSError as error:
        print(f"{prefix}{reason(error)}: the run cannot continue; its earlier results are kept", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; results written so far are kept", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("STVIT_TRACEBACK"):
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
            return 1
        lost_worker = _describe_lost_worker(error)
        if lost_worker is not None:
            print(f"{prefix}{lost_worker}", file=sys.stderr)
        elif _is_out_of_memory(error):
            print(
                f"{prefix}out of memory: lower --batch-size or the image size; a training has --grad-checkpointing "
                f"({reason(error)})",
                file=sys.stderr,
            )
        elif _is_lost_process(error):
            if rank == 0:
                print(f"{prefix}another process of the run ended; see its error message", file=sys.stderr)
        else:
            print(
                f"{prefix}unexpected {type(error).__name__}: {reason(error)}; please report it with the output of the "
                "same command under STVIT_TRACEBACK=1",
                file=sys.stderr,
            )
    return 1


def print_any_text() -> None:
    r"""Lets standard output escape characters that its encoding does not have.

    Without this, printing such a character is an error. On Windows, redirected output often has an encoding with few
    characters, but names of files and classes may contain any character. An escape looks like \xe9 or \u4e2d.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _SafeOutput:
    """Standard output without secrets and control characters.

    File and class names may contain both.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(redact(text), kept="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_bar(total: int, unit: str, is_shown: bool, done: int = 0) -> tqdm:
    """Returns a progress bar on standard error.

    Without a terminal, the bar is updated at most every ten seconds, to keep log files short.
    """
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        disable=not is_shown,
    )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether a device ran out of memory.

    PyTorch has no error class for that on mps and CPU.
    """
    words = ("MPS backend out of memory", "can't allocate memory", "not enough memory")
    is_cuda = type(error).__name__ == "OutOfMemoryError"  # importing PyTorch for its class would slow --help
    return is_cuda or isinstance(error, MemoryError) or any(word in str(error) for word in words)


# Reason and next step when a signal ends a data loader worker. The keys are the signal names in PyTorch's messages.
_LOST_WORKERS = {
    "Killed": "most likely the system ended it because memory was full; lower --workers or --batch-size",
    "Bus error": "the shared memory (/dev/shm) was full; enlarge it (docker run --shm-size), or lower --workers",
}


def _describe_lost_worker(error: BaseException) -> str | None:
    """Returns the message for a lost loader worker; None for any other error."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(messages)
    by_signal = re.search(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+)", text)
    ended = re.search(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited unexpectedly", text)
    if by_signal:
        name = by_signal[2].strip()
        who, why = f"{by_signal[1]} ({name})", _LOST_WORKERS.get(name, "check the libraries, or pass --workers 0")
    elif ended:
        who, why = ended[1], _LOST_WORKERS["Killed"]
    else:
        return None
    return f"image loading lost worker process {who}: {why}; continue a training with --resume auto"


def _is_lost_process(error: Exception) -> bool:
    """Returns whether a collective operation failed because another process ended."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(word in str(error) for word in words)


def reason(error: BaseException) -> str:
    """Returns the message of another library's error in one line."""
    if isinstance(error, UnicodeDecodeError) and error.encoding.startswith("utf-8"):
        return f"byte {error.start} is not UTF-8 text; save the file as UTF-8"
    message = one_line(" ".join(str(error).split()))
    return f"{type(error).__name__} {message}".strip() if isinstance(error, KeyError) or not message else message


# ---------------------------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors and without abbreviated flags."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        """Creates the parser.

        Args:
            prog: File name of the command. Under `stvit`, messages show `stvit` and the subcommand instead.
            **kwargs: More arguments of `argparse.ArgumentParser`.
        """
        # argparse passes the whole name of the parent to a subparser, such as "stvit benchmark model".
        if Path(sys.argv[0]).stem == "stvit" and len(sys.argv) > 1 and not prog.startswith("stvit "):
            prog = f"stvit {sys.argv[1]}"
        super().__init__(prog=prog, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def print_help(self, file: Any = None) -> None:
        print_any_text()
        super().print_help(file)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n" if _rank() == 0 else None)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows default values in the help, except None, empty text and empty lists."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or action.default == 0 else action.help


class KeyValues(argparse.Action):
    """A flag with key=value pairs.

    A value that is a Python literal, such as 0.1 or (8,4,2,1), is parsed. Any other value stays a string.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs: dict[str, Any] = {}
        for item in values:
            key, equals, text = item.partition("=")
            if not equals:
                parser.error(f"argument {option_string}: expected key=value, got {item!r}")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


class Switch(argparse.BooleanOptionalAction):
    """A flag that is off by default.

    `--no-…` turns it off again if a recipe turned it on.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **{"default": False, **kwargs})


class CommandLineSwitch(Switch):
    """A switch that recipes cannot set, because only the user may decide it.

    It applies to one command. The recipe that a run writes does not contain it.
    """


# Larger whole numbers overflow in PyTorch, NumPy or a file format.
_LARGEST = 2**31 - 1


def count(text: str) -> int:
    """Parses a whole number of at least 0."""
    return _whole_number(text, 0)


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    return _whole_number(text, 1)


def _whole_number(text: str, least: int) -> int:
    if text.isdecimal() and (len(text) > len(str(_LARGEST)) or int(text) > _LARGEST):
        raise argparse.ArgumentTypeError(f"expected a whole number of at most {_LARGEST}, got {clipped(text)}")
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {clipped(text)}")
    return int(text)


def rate(text: str) -> float:
    """Parses a number from 0 to 1."""
    return _number(text, "from 0 to 1", lambda value: 0.0 <= value <= 1.0)


def below_one(text: str) -> float:
    """Parses a number of at least 0 and below 1."""
    return _number(text, "of at least 0 and below 1", lambda value: 0.0 <= value < 1.0)


def up_to_one(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    return _number(text, "above 0 and at most 1", lambda value: 0.0 < value <= 1.0)


def above_zero(text: str) -> float:
    """Parses a number above 0."""
    return _number(text, "above 0", lambda value: value > 0.0)


def at_least_zero(text: str) -> float:
    """Parses a number of at least 0."""
    return _number(text, "of at least 0", lambda value: value >= 0.0)


def number(text: str) -> float:
    """Parses a finite number."""
    return _number(text, "", lambda value: True)


def _number(text: str, condition: str, is_valid: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not is_valid(value):
        raise argparse.ArgumentTypeError(f"expected a number{' ' if condition else ''}{condition}, got {clipped(text)}")
    return value
