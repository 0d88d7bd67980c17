#!/usr/bin/env python3
"""Builds the documentation site from docs/ and checks it.

    python docs/build_site.py

`make docs` is the same. The pages that are written by hand are copied to build/docs. The reference of the commands and
of the modules and the page of the notebook are generated there. Zensical then builds build/site in strict mode, in
which a broken link or anchor is an error. The network is not used.
"""

import argparse
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from stvit.tools.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BUILD = ROOT / "build"
COPIED = (".css", ".csv", ".ipynb", ".jpg", ".md", ".png", ".svg")

# Page of the reference, its title, its introduction and the modules or packages on it.
REFERENCE = {
    "operator": ("Operator", "Super token attention and its two halves.", ["stvit.ops"]),
    "models": ("Models", "The model that is registered in timm.", ["stvit.stvit"]),
    "weights": (
        "Weights",
        "How weights are named, read and checked. `stvit.create_model` is `stvit.weights`' `create_model`.",
        ["stvit.weights"],
    ),
    "inference": (
        "Inference",
        "Copies of a model that compute the same outputs faster.",
        ["stvit.inference", "stvit.cuda_graphs"],
    ),
    "hub": ("Hub", "Model folders, their cards, and uploads to the Hugging Face Hub.", ["stvit.hub"]),
    "visualize": (
        "Visualize",
        "Super tokens of a model over an image, as arrays and as pictures.",
        ["stvit.visualize", "stvit.superpixels"],
    ),
    "images": ("Images", "How image files are opened.", ["stvit.images"]),
    "yolo": ("YOLO adapter", "Ultralytics' YOLO26 on the backbones of timm.", ["stvit.adapters.yolo"]),
    "detection": (
        "torchvision adapter",
        "torchvision's detectors on the backbones of timm.",
        ["stvit.adapters.torchvision"],
    ),
    "segmentation": (
        "Segmentation adapter",
        "Decoders of segmentation_models.pytorch on the backbones of timm.",
        ["stvit.adapters.segmentation"],
    ),
    "other": ("Other modules", "What the modules above have in common.", ["stvit"]),
}


def main() -> int:
    """Builds the site and returns the exit status."""
    copy_pages()
    write_commands(BUILD / "docs/reference/commands.md")
    write_reference(BUILD / "docs/reference")
    write_notebook(DOCS / "tutorial.ipynb", BUILD / "docs/tutorial.md")
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        return 1
    problems = [*find_missing_files(BUILD / "site"), *find_foreign_assets(BUILD / "site")]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def copy_pages() -> None:
    """Copies the pages and their pictures to build/docs, and links the package."""
    shutil.rmtree(BUILD / "docs", ignore_errors=True)
    shutil.rmtree(BUILD / "site", ignore_errors=True)
    shutil.rmtree(BUILD / "package", ignore_errors=True)
    for path in DOCS.rglob("*"):
        if path.suffix in COPIED:
            target = BUILD / "docs" / path.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    # adapters/ is installed as stvit.adapters: the reference reads the names that users import.
    for path in (ROOT / "stvit").rglob("*.py"):
        _copy_module(path, BUILD / "package" / path.relative_to(ROOT))
    for path in (ROOT / "adapters").rglob("*.py"):
        _copy_module(path, BUILD / "package/stvit" / path.relative_to(ROOT))


_SECTION = re.compile(r" *(Args|Attributes|Examples?|Notes?|Raises|Returns|Shapes|Sources?|Yields):")


def _copy_module(path: Path, target: Path) -> None:
    """Copies a module, with lists and citations of its docstrings as Markdown."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    docstrings = [
        node.body[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    ]
    for node in sorted(docstrings, key=lambda node: -node.lineno):
        start, end = node.lineno - 1, node.end_lineno or node.lineno
        lines[start:end] = _mark_lists(lines[start:end])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _mark_lists(lines: list[str]) -> list[str]:
    """Turns indented lines of a docstring into lists and code.

    Lines `name: text` below a sentence that ends in a colon become a list, other indented lines code.
    """
    marked: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        indent = len(line) - len(line.lstrip())
        marked.append(line)
        position += 1
        block = []
        while line.strip() and position < len(lines) and lines[position].startswith(" " * (indent + 4)):
            block.append(lines[position])
            position += 1
        if line.startswith("@inproceedings"):
            while position < len(lines) and lines[position - 1] != "}":
                block.append(lines[position])
                position += 1
            marked[-1:] = ["", *(f"    {part}" for part in [line, *block]), ""]
        elif not line.rstrip().endswith(":") or _SECTION.fullmatch(line):
            marked += block
        elif block and re.match(r" *\w+: ", block[0]):
            items = [
                re.sub(r"^ {4}( *)(\w+): ", r"\1- `\2`: ", part) if _is_item(part, block[0]) else part[4:]
                for part in block
            ]
            marked += ["", *(item if "- `" in item else f"  {item}" for item in items), ""]
        elif block:
            marked += ["", *block, ""]
    return marked


def _is_item(line: str, first: str) -> bool:
    return re.match(r" *\w+: ", line) is not None and len(line) - len(line.lstrip()) == len(first) - len(first.lstrip())


def find_modules(package: Path) -> list[str]:
    """Returns the dotted names of the modules that have an `__all__`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        names = path.relative_to(package.parent).with_suffix("").parts
        if names[-1] == "__init__":
            names = names[:-1]
        if not any(name.startswith("_") for name in names) and _public_names(path):
            found.append(".".join(names))
    return sorted(found)


def _public_names(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def write_reference(folder: Path) -> None:
    """Writes a page for each group of modules. Each public module is on one page."""
    left = find_modules(BUILD / "package/stvit")
    for page, (title, introduction, prefixes) in REFERENCE.items():
        modules = [name for name in left if any(name == p or name.startswith(p + ".") for p in prefixes)]
        if page == "other":
            modules = [name for name in modules if name != "stvit"]  # its names are documented where they are defined
        left = [name for name in left if name not in modules]
        text = "\n\n".join(f"::: {name}" for name in modules) or "There is no such module."
        (folder / f"{page}.md").write_text(f"# {title}\n\n{introduction}\n\n{text}\n", encoding="utf-8")


def write_commands(path: Path) -> None:
    """Writes the descriptions and flags of the commands, taken from the programs."""
    lines = [
        "# Commands",
        "",
        "`stvit NAME` runs a command. `stvit NAME --help` shows the same flags as this page. In a checkout,",
        "`python tools/FILE.py` is the same program; anywhere else, `python -m stvit.tools.FILE` is.",
        "",
        "| command | file | purpose |",
        "|---|---|---|",
    ]
    sections = []
    for name, (module_name, purpose) in COMMANDS.items():
        module = importlib.import_module(f"stvit.tools.{module_name}")
        lines.append(f"| [`stvit {name}`](#stvit-{name}) | `{module_name}.py` | {purpose} |")
        sections += [f"## stvit {name}", "", *_describe((module.__doc__ or "").strip()), ""]
        create_parser = getattr(module, "create_parser", None)
        if create_parser is not None:
            sections += _parser_lines(create_parser(), f"stvit {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "", *sections]) + "\n", encoding="utf-8")


def _describe(text: str) -> Iterator[str]:
    """Yields a module's docstring as Markdown: indented blocks become code."""
    for block in re.split(r"\n\n+", "\n".join(_mark_lists(text.splitlines()))):
        if block.startswith("    "):
            yield from ("```sh", *(line[4:] for line in block.splitlines()), "```", "")
        elif block.strip():
            yield from (" ".join(block.split()).replace("<", "&lt;").replace("*", "\\*"), "")


def _parser_lines(parser: argparse.ArgumentParser, name: str) -> list[str]:
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        subparsers = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
        rows = [
            f"| {_flag(action)} | {_default(action)} | {_escape(_help(action))} |"
            for action in actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        ]
        if rows:
            title = {"options": "other flags", "positional arguments": "arguments"}.get(
                group.title or "", group.title or ""
            )
            lines += [f"**{title.capitalize()}**", "", "| flag | default | meaning |", "|---|---|---|", *rows, ""]
        for action in subparsers:
            for subname, subparser in action.choices.items():
                lines += [f"### {name} {subname}", ""]
                if subparser.description:
                    lines += [_escape(subparser.description), ""]
                lines += _parser_lines(subparser, f"{name} {subname}")
    return lines


def _flag(action: argparse.Action) -> str:
    metavar = action.metavar
    is_switch = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
    if metavar is None and not is_switch:
        metavar = action.dest.upper()
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar or ""
    if action.nargs in ("+", "*"):
        value += " …"
    if not action.option_strings:
        return f"`{value}`".replace("|", "\\|")
    names = list(action.option_strings)
    if isinstance(action, argparse.BooleanOptionalAction):
        names = [name for name in names if not name.startswith("--no-")]
    return ", ".join(f"`{name}`" for name in names) + (f" `{value}`".replace("|", "\\|") if value else "")


def _default(action: argparse.Action) -> str:
    if action.default in (None, argparse.SUPPRESS, {}, []) or not action.option_strings:
        return ""
    if isinstance(action.default, bool):
        return "on" if action.default else "off"
    value = action.default
    return _escape(" ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%").replace("(default: %(default)s)", "").replace("%(default)s", "")
    if action.choices is not None:
        text += f" (one of {', '.join(map(str, action.choices))})"
    return text.strip()


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def write_notebook(source: Path, target: Path) -> None:
    """Writes a notebook as a page: text, code and stored outputs."""
    notebook = json.loads(source.read_text(encoding="utf-8"))
    lines = []
    pictures = target.parent / "tutorial_files"
    for number, cell in enumerate(notebook["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [text, ""]
            continue
        lines += ["```python", text, "```", ""]
        for output in cell.get("outputs", []):
            lines += _output_lines(output, pictures, number)
    target.write_text("\n".join(lines), encoding="utf-8")


def _output_lines(output: dict[str, Any], pictures: Path, number: int) -> list[str]:
    data = output.get("data", {})
    for kind, suffix in (("image/jpeg", "jpg"), ("image/png", "png")):
        if kind in data:
            pictures.mkdir(exist_ok=True)
            (pictures / f"{number}.{suffix}").write_bytes(b64decode("".join(data[kind])))
            return [f"![Output of the cell](tutorial_files/{number}.{suffix})", ""]
    text = "".join(output.get("text", data.get("text/plain", [])))
    return ["```text", text.rstrip(), "```", ""] if text.strip() else []


# ---------------------------------------------------------------------------------------------------------------------
# Checks of the built site


class _Links(HTMLParser):
    """Collects the files that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("img", "script", "source", "iframe", "video"):
            self.loaded += [value for key in ("src", "srcset") if (value := values.get(key))]
        elif tag == "link" and set((values.get("rel") or "").split()) & {"stylesheet", "icon", "preload", "preconnect"}:
            self.loaded.append(values.get("href") or "")


def _loaded_files(site: Path) -> Iterator[tuple[Path, str]]:
    for page in sorted(site.rglob("*.html")):
        links = _Links()
        links.feed(page.read_text(encoding="utf-8"))
        for url in links.loaded:
            yield page, url


def find_missing_files(site: Path) -> list[str]:
    """Returns a line for each missing picture, script and style sheet."""
    problems = []
    for page, url in _loaded_files(site):
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        path = unquote(parts.path)
        target = site / path.lstrip("/") if path.startswith("/") else page.parent / path
        if not target.exists():
            problems.append(f"{page.relative_to(site)}: {url} does not exist")
    return problems


def find_foreign_assets(site: Path) -> list[str]:
    """Returns a line for each file that pages load from another host."""
    problems = [
        f"{page.relative_to(site)}: {url} is on another host; copy it to docs/"
        for page, url in _loaded_files(site)
        if urlsplit(url).netloc
    ]
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"(?:url\(|@import )[\"']?(https?://[^\"')]+)", sheet.read_text(encoding="utf-8")):
            problems.append(f"{sheet.relative_to(site)}: {url} is on another host; copy it to docs/")
    return problems


if __name__ == "__main__":
    sys.exit(main())
