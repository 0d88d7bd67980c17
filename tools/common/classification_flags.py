"""Flags of tools/train_cls.py. The benchmark of data loading reads them, too."""

from collections.abc import Sequence

from .cli import Parser
from .config import ClassificationConfig
from .flags import add_sections, from_flags
from .recipes import parse_with_recipe


def create_parser() -> Parser:
    """Returns the parser. Flags have timm's names."""
    parser = Parser(prog="train_cls.py", description="Trains an image classifier: STViT, or any timm model.")
    parser.add_argument("--config", "-c", metavar="FILE", help="recipe (YAML) whose keys are flags of this program")
    add_sections(parser, ClassificationConfig)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> ClassificationConfig:
    """Parses the command line.

    It overrides the recipe (`--config`), which overrides the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or has a wrong type.
    """
    return from_flags(ClassificationConfig, parse_with_recipe(create_parser, argv))
