"""Removes secrets, control characters and markup from text before it is shown.

Messages, logs and cards contain names of files and classes, arguments, and answers of servers. Any of these may contain
an access token, an escape sequence of the terminal, a line break or HTML.
"""

import base64
import html
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from huggingface_hub import get_token

__all__ = ["clipped", "code_span", "escape_markdown", "one_line", "printable", "redact", "redact_values"]

HIDDEN = "***"
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
_URL_VARIABLES = ("HF_ENDPOINT", "WANDB_BASE_URL", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
# Shorter values could be ordinary words, which must stay readable.
_SHORTEST_SECRET = 6
_PATTERNS = (
    # Access tokens of the Hub: 34 letters and digits, or longer. Names such as hf_finetune1 stay readable.
    (re.compile(r"\bhf_(?:(?:oauth|jwt)_[\w.-]{20,}|[A-Za-z0-9]{30,})"), f"hf_{HIDDEN}"),
    (re.compile(r"""(?i)\b(authorization["']?\s*[:=]\s*["']?)(?:[a-z]+\s+)?[^\s"',;)\]}]+"""), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    # User and password in a URL. They contain no slash.
    (re.compile(r"""(?<=://)[^\s/"'\\<>]+@"""), f"{HIDDEN}@"),
    (
        re.compile(
            r"""(?i)([?&](?:access_token|api_?key|token|password|secret|sig(?:nature)?|x-amz-[a-z-]+)=)[^&\s"'\\<>]+"""
        ),
        rf"\1{HIDDEN}",
    ),
)
# Joiners, which emoji and words of some scripts contain.
_HARMLESS_FORMATS = "\u200c\u200d"


def redact(text: str) -> str:
    """Replaces access tokens, and users and passwords in URLs, with '***'.

    Replaced are the access token of the Hub, the values of variables such as `WANDB_API_KEY`, the user and the password
    in `HF_ENDPOINT` and in the addresses of proxies, and any text that looks like one of these.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_values(value: Any) -> Any:
    """Returns a copy of nested dictionaries and lists in which all text is redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redact_values, value))
    return value


def printable(text: str, kept: str = "") -> str:
    r"""Escapes control characters.

    A line break becomes '\n', an escape character '\x1b'.

    Args:
        text: Any text, such as the name of a file.
        kept: Control characters that are not escaped.
    """
    return "".join(
        char.encode("unicode_escape").decode("ascii") if _is_control(char) and char not in kept else char
        for char in text
    )


def one_line(text: object) -> str:
    """Returns a message in one line, without secrets and control characters."""
    return printable(redact(str(text).strip()))


def clipped(value: Any, length: int = 100) -> str:
    """Returns the `repr` of a value, cut to a number of characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= length else f"{text[:length]}…"


def code_span(text: object) -> str:
    """Returns text as inline code of Markdown.

    HTML and Markdown in the text have no effect, in tables either.
    """
    line = one_line(text) or " "  # two backticks would open a code span that ends in a later text
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def escape_markdown(text: object) -> str:
    """Returns text in one line, with HTML and Markdown escaped."""
    # An underscore between letters or digits does not emphasize.
    return re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", html.escape(one_line(text), quote=False))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _HARMLESS_FORMATS


def _secrets() -> set[str]:
    found = {get_token(), *(os.environ.get(name) for name in _TOKEN_VARIABLES)}
    for name in (*_URL_VARIABLES, *map(str.lower, _URL_VARIABLES)):
        found.update(_credentials(os.environ.get(name, "")))
    return {secret for secret in found if secret and len(secret) >= _SHORTEST_SECRET}


def _credentials(url: str) -> Iterator[str]:
    """Yields the user and password of a URL in each form that libraries print."""
    match = re.match(r"[\w+.-]+://(.+)@", url)
    if match is None:
        return
    for user in {match[1], unquote(match[1])}:
        yield user
        yield user.partition(":")[2]
        yield base64.b64encode(user.encode()).decode()
