"""Dataclasses as flags: parsing, defaults of commands, and the recipe of a run."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stvit.tools.common.cli import CommandLineSwitch, Parser, positive
from stvit.tools.common.config import ImageConfig, RunConfig
from stvit.tools.common.flags import add_flags, add_sections, flag, from_flags, section, to_recipe
from stvit.tools.common.recipes import parse_with_recipe


@dataclass
class Colors:
    names: list[str] = flag(["red"], "names", nargs="+")
    count: int = flag(3, "number", type=positive, short="-n")
    is_bright: bool = flag(False, "bright")
    is_allowed: bool = flag(False, "allowed", action=CommandLineSwitch)
    once: str | None = flag(None, "once", in_recipe=False)


@dataclass
class Everything:
    colors: Colors = section("colors", Colors)
    image: ImageConfig = section("image", ImageConfig)


def parse(*argv: str, **options: Any) -> Colors:
    parser = Parser(prog="colors")
    add_flags(parser, Colors, **options)
    return from_flags(Colors, parser.parse_args(argv))


def test_fields_are_flags() -> None:
    assert parse() == Colors()
    config = parse("--names", "blue", "green", "-n", "5", "--is-bright")
    assert (config.names, config.count, config.is_bright) == (["blue", "green"], 5, True)
    assert parse("--is-bright", "--no-is-bright").is_bright is False
    assert parse(defaults={"count": 7}).count == 7
    with pytest.raises(SystemExit):
        parse("--count=2", omit={"count"})
    assert parse(omit={"count"}).count == 3


def test_instances_do_not_share_lists() -> None:
    one, two = Colors(), Colors()
    one.names.append("blue")
    assert two.names == Colors().names == parse().names == ["red"]


def test_recipe_has_all_flags_but_those_of_one_command() -> None:
    parser = Parser(prog="everything")
    add_sections(parser, Everything)
    config = from_flags(Everything, parser.parse_args(["--is-allowed", "--once=x", "--img-size=32"]))
    recipe = to_recipe(config)
    assert {"names": ["red"], "count": 3, "is_bright": False, "img_size": 32}.items() <= recipe.items()
    assert not {"is_allowed", "once", "colors", "image"} & set(recipe)
    assert not {"resume", "allow_changed_data"} & set(to_recipe(RunConfig(resume="auto")))


@dataclass
class Light:
    is_on: bool = flag(True, "on", action=argparse.BooleanOptionalAction)
    is_bright: bool = flag(False, "bright")


@pytest.mark.parametrize("value", [True, False])
def test_recipe_turns_flags_on_and_off(value: bool, tmp_path: Path) -> None:
    """Also a flag that is on by default."""

    def create_parser() -> Parser:
        parser = Parser(prog="light")
        parser.add_argument("--config")
        add_flags(parser, Light)
        return parser

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"is_on: {str(value).lower()}\nis_bright: {str(value).lower()}\n")
    assert from_flags(Light, parse_with_recipe(create_parser, [f"--config={recipe}"])) == Light(value, value)
