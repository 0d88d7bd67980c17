"""The command line: errors in one line, flags and their types, recipes whose keys are flags."""

import argparse
import difflib
import importlib
import io
import math
import os
import re
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from timm.utils import ParseKwargs
from tqdm import tqdm

from stvit.safe_text import clipped, one_line, printable, redact


class CommandError(Exception):
    """An error of the user's input or machine: one line that says what is wrong and what to do.

    The message is made one line without secrets and control characters, whatever names and arguments it contains.

    Attributes:
        status: Exit status of the command.
    """

    status = 1

    def __init__(self, message: str) -> None:
        if message.startswith("Caught ") and " in DataLoader worker process " in message.partition("\n")[0]:
            # PyTorch creates the error of a worker process again, from its traceback. The last line is the error.
            message = message.strip().rpartition("\n")[2].partition("Error: ")[2]
        super().__init__(one_line(message))


class OneProcessError(CommandError):
    """An error that one process of several may meet alone, such as an image it cannot read."""


class Interrupted(CommandError):
    """A signal ended the command, in good order."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


def run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Runs a command and prints its error, if any, in one line on standard error; returns the exit status.

    Of several processes (RANK of torchrun) only the first prints, but each prints errors of its own images. What the
    command prints on standard output has no secrets and no escape sequences.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # which a command sets while it imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    print_any_text()
    importlib.import_module("stvit.stvit")  # registers the models in timm; see stvit/__init__.py
    with redirect_stdout(_SafeOutput(sys.stdout)):
        return _run(command, args)


def _run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    rank = _rank()
    prefix = f"error: process {rank}: " if rank else "error: "
    try:
        command(args)
        return 0
    except CommandError as error:
        if rank == 0 or isinstance(error, OneProcessError):
            print(f"{'' if isinstance(error, Interrupted) else prefix}{error}", file=sys.stderr)
        # An error out of a loader is part of a cycle that holds the loader: its workers end at once only without it.
        traceback.clear_frames(error.__traceback__)
        return error.status
    except OSError as error:
        print(f"{prefix}{reason(error)}: the run cannot go on, what it had written is kept", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted: what the run had written is kept", file=sys.stderr)
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
                f"{prefix}out of memory: lower --batch-size or set --grad-checkpointing ({reason(error)})",
                file=sys.stderr,
            )
        elif _is_lost_process(error):
            if rank == 0:
                print(f"{prefix}another process of the run ended; see what it said", file=sys.stderr)
        else:
            print(
                f"{prefix}unforeseen {type(error).__name__}: {reason(error)}; please report it, with what the same "
                "command prints under STVIT_TRACEBACK=1",
                file=sys.stderr,
            )
    return 1


def print_any_text() -> None:
    """Makes standard output replace characters that its encoding lacks, as standard error does by default.

    On Windows the encoding of a redirected output is that of the country: it has few characters, and file and class
    names may have any.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _SafeOutput:
    """Standard output that shows neither secrets nor control characters, which names of files and classes may hold."""

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
    """A progress bar on standard error; where that is no terminal, a line now and then."""
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
    """Whether the memory of a device is full; PyTorch has no class of errors for that on mps and the CPU."""
    words = ("MPS backend out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


# What to say of a loader's process that a signal ended, under the name that PyTorch gives the signal.
_LOST_WORKERS = {
    "Killed": "most likely the memory was full and the system ended the process; lower --workers or --batch-size",
    "Bus error": "the shared memory (/dev/shm) was full; make it larger (docker run --shm-size), or lower --workers",
}


def _describe_lost_worker(error: BaseException) -> str | None:
    """Returns what to say of a process of a data loader that ended unexpectedly; None for another error."""
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
        who, why = f"{by_signal[1]} ({name})", _LOST_WORKERS.get(name, "look for a faulty library, or set --workers 0")
    elif ended:
        who, why = ended[1], _LOST_WORKERS["Killed"]
    else:
        return None
    return f"the loading of images lost its process {who}: {why}; a training goes on with --resume auto"


def _is_lost_process(error: Exception) -> bool:
    """Whether a collective operation failed because a process it needs is gone."""
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
    """A parser with errors of one line and without abbreviated flags."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        """Creates the parser.

        Args:
            prog: File name of the command. Under `stvit`, messages show `stvit` and the subcommand instead.
            **kwargs: More arguments of `argparse.ArgumentParser`.
        """
        if Path(sys.argv[0]).stem == "stvit" and len(sys.argv) > 1:
            prog = f"stvit {sys.argv[1]}"
        super().__init__(prog=prog, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def print_help(self, file: Any = None) -> None:
        print_any_text()
        super().print_help(file)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n" if _rank() == 0 else None)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or action.default == 0 else action.help


class KeyValues(ParseKwargs):
    """key=value pairs, the values in Python's syntax."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"argument {option_string}: must be key=value, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


class Switch(argparse.BooleanOptionalAction):
    """A flag that is off unless given, and that `--no-…` turns off again where a recipe has it on."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **{"default": False, **kwargs})


class CommandLineSwitch(Switch):
    """A switch that a recipe cannot turn on, because it permits something that its author should not decide.

    It holds for one command: the recipe that a run writes does not contain it.
    """


def count(text: str) -> int:
    """A flag's whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A flag's whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    """A flag's number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """A flag's number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def parse_with_recipe(create_parser: Callable[[], Parser], argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags of the command line over those of the recipe (`--config`) over the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or ill-typed.
    """
    parser = create_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    config_parser = Parser(prog=parser.prog, add_help=False)
    config_parser.add_argument("--config", "-c")
    config = config_parser.parse_known_args(argv)[0].config
    # A recipe is turned into flags, and so meets the same checks as they do.
    recipe = _recipe_flags(create_parser, Path(config)) if config else []
    return parser.parse_args(recipe + argv)


# A recipe has a few dozen short lines.
_MAX_YAML_BYTES = 1 << 20
_MAX_YAML_VALUES = 10_000
_MAX_YAML_SCALAR = 3500  # Python does not print integers of more than 4,300 digits


def read_utf8(path: Path, max_bytes: int = 64 << 20) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: The file. A byte order mark at its beginning is removed.
        max_bytes: Largest size.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a regular file (reading a pipe could wait forever), too large, or not UTF-8.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{status.st_size} bytes, more than the limit of {max_bytes}")
    return path.read_text(encoding="utf-8-sig")


def load_yaml(text: str) -> Any:
    """Reads YAML from an untrusted source.

    Raises:
        ValueError: If the text is not YAML, contains a key twice, is nested too deeply, or has too many or too long
            values. An alias counts as all the values that it stands for.
    """
    if len(text) > _MAX_YAML_BYTES:
        raise ValueError(f"{len(text)} characters, more than the limit of {_MAX_YAML_BYTES}")
    try:
        loader = _YamlLoader(text)
    except yaml.YAMLError as error:  # a character that no text has
        raise ValueError(reason(error)) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MAX_YAML_VALUES:
            raise ValueError(f"more than {_MAX_YAML_VALUES} values; write repeated values without aliases (* and &)")
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as a date of a 13th month
        raise ValueError(reason(error)) from error
    finally:
        loader.dispose()


class _YamlLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # which PyYAML refuses
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Counts the values of a YAML document, those of an alias as often as it is used."""
    if node in counts:
        if counts[node] < 0:
            raise ValueError("a value contains itself")
        return counts[node]
    counts[node] = -1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > _MAX_YAML_SCALAR:
            raise ValueError(f"a value of {len(node.value)} characters, more than the limit of {_MAX_YAML_SCALAR}")
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value
    counts[node] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[node]


def _recipe_flags(create_parser: Callable[[], Parser], path: Path) -> list[str]:
    parser = create_parser()
    try:
        recipe = load_yaml(read_utf8(path, _MAX_YAML_BYTES)) or {}
    except (OSError, ValueError) as error:
        is_escape = "unknown escape character" in str(error) or "escape sequence of" in str(error)
        hint = "; write Windows paths without quotes, or in single quotes" if is_escape else ""
        parser.error(f"cannot read --config {path}: {reason(error)}{hint}")
    if not isinstance(recipe, dict):
        parser.error(f"{path}: a recipe is a mapping of flags to values, got {type(recipe).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            parser.error(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if value is None:
            continue
        action = actions[name]
        option = action.option_strings[0]
        if isinstance(action, CommandLineSwitch):
            parser.error(
                f"{path}: {key} must be decided by whoever runs the recipe; remove it, and pass {option} on the "
                "command line if you want it"
            )
        if action.nargs == 0:
            if not isinstance(value, bool):
                parser.error(f"{path}: {key} must be true or false, got {clipped(value)}")
            flags += [option] if value else []
        elif isinstance(action, ParseKwargs):
            if not isinstance(value, dict):
                parser.error(f"{path}: {key} must be a mapping, got {clipped(value)}")
            for argument in value:  # one that begins with a dash would be read as a flag
                if not str(argument).isidentifier():
                    parser.error(f"{path}: {key} has the key {clipped(argument)}, expected the name of an argument")
            flags += [option, *(f"{k}={v!r}" for k, v in value.items())]
        else:
            values = value if isinstance(value, list) and action.nargs else [value]
            for item in values:
                # YAML reads 1e-3, without a point, as text: numbers may be either, text must be text.
                wanted = str if action.type is None else (int, float, str)
                if isinstance(item, bool) or not isinstance(item, wanted):
                    kind = "text" if wanted is str else "a number"
                    parser.error(f"{path}: {key} must be {kind}, got {clipped(value)}")
                if action.nargs and re.match(r"-(?![\d.])", str(item)):
                    parser.error(f"{path}: {key} holds {clipped(item)}, which would be read as a flag; remove it")
                # A path may have bytes that are not UTF-8, which Python keeps as lone surrogates.
                if isinstance(item, str) and not re.sub("[\udc80-\udcff]", "", item).isprintable():
                    parser.error(
                        f"{path}: {key} holds control characters, {clipped(item)}; in double quotes a backslash "
                        "begins an escape: write Windows paths without quotes, or in single quotes"
                    )
            if action.nargs:
                flags += [option, *map(str, values)]
            else:
                flags.append(f"{option}={value}")  # the value may begin with a dash
    # So that a value of the wrong type is reported with the name of the file that holds it.
    checker = create_parser()
    checker.error = lambda message: parser.error(f"{path}: {message}")  # type: ignore[method-assign]
    checker.parse_args(flags)
    return flags
