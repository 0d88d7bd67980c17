"""Checks docstrings. `make lint` runs it.

Public modules, classes, functions and methods have a docstring. The first line of every docstring, also of private
objects, is shorter than 80 characters and does not begin with a word that hides its subject.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("stvit", "adapters", "configs", "tools", "docs")
WORDS = {"Of", "What", "Whether", "Where", "Without"}
LIMIT = 80
# Functions that everybody knows, and methods that the base class describes.
_KNOWN = {"error", "extra_repr", "forward", "main", "print_help"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find_problems(path: Path) -> Iterator[str]:
    """Yields a line for each docstring that is missing or that begins badly.

    Args:
        path: Python file.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from _check(tree, path, is_public=True, name=path.stem)


def _check(node: ast.Module | _Definition, path: Path, is_public: bool, name: str) -> Iterator[str]:
    place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {name}"
    text = ast.get_docstring(node)
    if text is None:
        if is_public:
            yield f"{place} has no docstring"
    else:
        first = text.splitlines()[0] if text else ""
        if len(first) >= LIMIT:
            yield f"{place}: the first line has {len(first)} characters, the limit is {LIMIT - 1}"
        word = re.match(r"\w*", first)[0]
        if word in WORDS:
            yield f"{place}: the first line begins with {word!r}; say what the object does or returns"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            is_described = is_public and not child.name.startswith("_") and child.name not in _KNOWN
            is_described &= isinstance(node, ast.Module | ast.ClassDef) and not _is_overload(child)
            yield from _check(child, path, is_described, child.name)


def _is_overload(node: ast.AST) -> bool:
    return any("overload" in ast.unparse(item) for item in getattr(node, "decorator_list", []))


if __name__ == "__main__":
    problems = [
        line for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) for line in find_problems(path)
    ]
    print("\n".join(problems))
    sys.exit(bool(problems))
