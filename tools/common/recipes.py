"""Recipes: YAML files whose keys are flags, from any source."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from stvit.safe_text import clipped

from .cli import CommandLineSwitch, KeyValues, Parser, reason
from .files import read_utf8

# A recipe has a few dozen short lines.
_MAX_YAML_BYTES = 1 << 20
_MAX_YAML_VALUES = 10_000
_MAX_YAML_SCALAR = 3500  # Python does not print integers of more than 4,300 digits


def parse_with_recipe(create_parser: Callable[[], Parser], argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    It overrides the recipe (`--config`), which overrides the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or has a wrong type.
    """
    parser = create_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    config_parser = Parser(prog=parser.prog, add_help=False)
    config_parser.add_argument("--config", "-c")
    config = config_parser.parse_known_args(argv)[0].config
    # A recipe becomes flags, so that it passes the same checks.
    recipe = _recipe_flags(create_parser, Path(config)) if config else []
    return parser.parse_args(recipe + argv)


def load_yaml(text: str) -> Any:
    """Reads YAML from an untrusted source.

    Raises:
        ValueError: If the text is not YAML, repeats a key, is nested too deeply, or has too many or too long values. An
            alias counts as all values that it stands for.
    """
    if len(text) > _MAX_YAML_BYTES:
        raise ValueError(f"{len(text)} characters, more than the limit of {_MAX_YAML_BYTES}")
    try:
        loader = _YamlLoader(text)
    except yaml.YAMLError as error:  # a character that text cannot contain
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
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as a date with month 13
        raise ValueError(reason(error)) from error
    finally:
        loader.dispose()


class _YamlLoader(yaml.SafeLoader):
    """A YAML loader that rejects repeated keys. PyYAML itself keeps the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # PyYAML rejects it
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Counts the values of a YAML document.

    The values of an alias count each time it is used.
    """
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
    """Returns a recipe as command line flags.

    Raises:
        SystemExit: If the recipe cannot be read, or has an unknown key or a value of a wrong type.
    """
    parser = create_parser()
    recipe = _read_recipe(path, parser)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            parser.error(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if value is None:
            continue
        try:
            flags += _value_flags(actions[name], value)
        except ValueError as error:
            parser.error(f"{path}: {key} {error}")
    # Errors in values then name the recipe.
    checker = create_parser()
    checker.error = lambda message: parser.error(f"{path}: {message}")  # type: ignore[method-assign]
    checker.parse_args(flags)
    return flags


def _read_recipe(path: Path, parser: Parser) -> dict[Any, Any]:
    try:
        recipe = load_yaml(read_utf8(path, _MAX_YAML_BYTES)) or {}
    except FileNotFoundError:
        parser.error(f"--config {path} does not exist")
    except (OSError, ValueError) as error:
        is_escape = "unknown escape character" in str(error) or "escape sequence of" in str(error)
        hint = "; write Windows paths without quotes, or in single quotes" if is_escape else ""
        parser.error(f"cannot read --config {path}: {reason(error)}{hint}")
    if not isinstance(recipe, dict):
        parser.error(f"{path}: a recipe must be a mapping of flags to values, got {type(recipe).__name__}")
    return recipe


def _value_flags(action: argparse.Action, value: Any) -> list[str]:
    """Returns the command line arguments that give a flag its value.

    Raises:
        ValueError: If the flag does not accept the value from a recipe. The message continues the name of the key.
    """
    option = action.option_strings[0]
    if isinstance(action, CommandLineSwitch):
        raise ValueError(
            f"must be decided by whoever runs the recipe; remove it, and pass {option} on the command line if you want "
            "it"
        )
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {clipped(value)}")
        off = [name for name in action.option_strings if name.startswith("--no-") and name != option]
        return [option] if value else off[:1]  # a flag may be on by default
    if isinstance(action, KeyValues):
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping, got {clipped(value)}")
        for argument in value:  # an argument that begins with a dash would become a flag
            if not str(argument).isidentifier():
                raise ValueError(f"has the key {clipped(argument)}, expected the name of an argument")
        return [option, *(f"{k}={v!r}" for k, v in value.items())]
    values = value if isinstance(value, list) and action.nargs else [value]
    for item in values:
        # YAML reads 1e-3, without a point, as text. So numbers may be text, but text must be text.
        wanted = str if action.type is None else (int, float, str)
        if isinstance(item, bool) or not isinstance(item, wanted):
            raise ValueError(f"must be {'text' if wanted is str else 'a number'}, got {clipped(value)}")
        if action.nargs and re.match(r"-(?![\d.])", str(item)):
            raise ValueError(f"contains {clipped(item)}, which would become a flag; remove it")
        # A path may have bytes that are not UTF-8, which Python keeps as lone surrogates.
        if isinstance(item, str) and not re.sub("[\udc80-\udcff]", "", item).isprintable():
            raise ValueError(
                f"contains control characters: {clipped(item)}; a backslash in double quotes begins an escape, so "
                "write Windows paths without quotes, or in single quotes"
            )
    if action.nargs:
        return [option, *map(str, values)]
    return [f"{option}={value}"]  # the value may begin with a dash
