"""Dataclass fields as command line flags.

Each setting has its default, type and help text in one place.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeVar

from stvit.safe_text import redact_values

from .cli import CommandLineSwitch, Parser, Switch

C = TypeVar("C")


def flag(
    default: Any = None,
    help: str = "",
    *,
    default_factory: Callable[[], Any] | None = None,
    short: str | None = None,
    in_recipe: bool = True,
    **options: Any,
) -> Any:
    """Declares a dataclass field that is also a command line flag.

    A field with the default False becomes a `Switch`.

    Args:
        default: Default value. Lists and dictionaries are copied for each instance.
        help: Help text.
        default_factory: Function that returns the default, instead of `default`.
        short: Short spelling of the flag, such as "-b".
        in_recipe: Whether a run writes the flag to its recipe. A `CommandLineSwitch` is never written.
        options: Options of `ArgumentParser.add_argument`.
    """
    if default is False and "action" not in options:
        options["action"] = Switch
    in_recipe = in_recipe and options.get("action") is not CommandLineSwitch
    metadata = {"short": short, "in_recipe": in_recipe, "options": {"help": help, **options}}
    if default_factory is None and isinstance(default, list | dict):
        default_factory = default.copy
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(title: str, config: Callable[[], Any]) -> Any:
    """Declares a field that contains another dataclass of flags.

    Its flags are a group of the help page.
    """
    return field(default_factory=config, metadata={"title": title, "section": config})


def add_flags(
    group: Any, config: type, *, defaults: Mapping[str, Any] | None = None, omit: Collection[str] = ()
) -> None:
    """Adds the flags of a dataclass to a parser or a group of it.

    Args:
        group: Parser or group.
        config: Dataclass whose fields are declared with `flag`.
        defaults: Defaults of this command that differ from those of the dataclass.
        omit: Fields that this command has no flag for.
    """
    for item in _flags(config):
        if item.name in omit:
            continue
        default = (defaults or {}).get(item.name, _default(item))
        names = [f"--{item.name.replace('_', '-')}", *filter(None, [item.metadata["short"]])]
        group.add_argument(*names, default=default, **item.metadata["options"])


def add_sections(parser: Parser, config: type) -> None:
    """Adds the flags of a dataclass of sections to a parser, each section as a group."""
    for item in _sections(config):
        add_flags(parser.add_argument_group(item.metadata["title"]), item.metadata["section"])


def from_flags(config: type[C], args: argparse.Namespace) -> C:
    """Returns a dataclass, filled from parsed flags.

    Args:
        config: Dataclass of flags or of sections. Fields that `args` lacks keep their defaults.
        args: Parsed flags.
    """
    values = {item.name: getattr(args, item.name) for item in _flags(config) if hasattr(args, item.name)}
    values |= {item.name: from_flags(item.metadata["section"], args) for item in _sections(config)}
    return config(**values)


def to_recipe(config: Any) -> dict[str, Any]:
    """Returns the recipe that repeats a run.

    It contains all flags except those that apply to one command only. Secrets in URLs are removed, because the recipe
    is uploaded with the run.
    """
    recipe: dict[str, Any] = {}
    for item in _sections(type(config)):
        recipe |= to_recipe(getattr(config, item.name))
    for item in _flags(type(config)):
        if item.metadata["in_recipe"]:
            recipe[item.name] = redact_values(getattr(config, item.name))
    return recipe


def _flags(config: type) -> Iterator[Field[Any]]:
    assert is_dataclass(config)
    return (item for item in fields(config) if "options" in item.metadata)


def _sections(config: type) -> Iterator[Field[Any]]:
    assert is_dataclass(config)
    return (item for item in fields(config) if "section" in item.metadata)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
