"""Tests how names of weights are parsed, and that no other code parses them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stvit.weights import Source
from stvit.weights.source import find_model_folder, is_own_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a run directory, a model folder and a weights file."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/best/config.json", "run/last/config.json", "model/config.json", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("stvit_small", Source("timm", "stvit_small"), "stvit_small"),
        ("stvit_small.in1k", Source("timm", "stvit_small.in1k"), "stvit_small.in1k"),
        ("resnet18.a1_in1k", Source("timm", "resnet18.a1_in1k"), "resnet18.a1_in1k"),
        ("hf-hub:org/name", Source("hub", "org/name"), "hf-hub:org/name"),
        ("hf-hub:org/name@v1", Source("hub", "org/name", "v1"), "hf-hub:org/name@v1"),
        ("hf_hub:org/name@v1", Source("hub", "org/name", "v1"), "hf-hub:org/name@v1"),
        ("local-dir:anywhere", Source("folder", "anywhere"), "local-dir:anywhere"),
        ("local-dir:C:\\models\\x", Source("folder", "C:\\models\\x"), "local-dir:C:\\models\\x"),
        ("model", Source("folder", "model"), "local-dir:model"),
        ("run", Source("folder", "run/best"), "local-dir:run/best"),
        ("run/last", Source("folder", "run/last"), "local-dir:run/last"),
        ("weights.pth", Source("file", "weights.pth"), None),
        ("model/model.safetensors", Source("file", "model/model.safetensors"), None),
    ],
)
def test_each_form_is_parsed(files: Path, text: str, source: Source, name: str | None) -> None:
    assert Source.parse(text) == source
    assert source.model_name == name
    assert name is None or Source.parse(name) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.pth", "named 'nowhere.pth'; for a model on the Hub, pass hf-hub:ORG/NAME"),
        ("stvit_small.pth", "no file, folder or timm model named 'stvit_small.pth'"),
        ("org/name", "for a model on the Hub, pass hf-hub:org/name"),
        ("hf-hub:", "no file, folder or timm model named 'hf-hub:'"),
        ("ftp:org/name", "no file, folder or timm model named"),
        ("empty", r"no config.json in empty or empty/best"),
    ],
)
def test_unknown_names_are_errors(files: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message).replace("/", r"[/\\]+")):
        Source.parse(text)


def test_a_path_has_priority_over_a_model_name(files: Path) -> None:
    (files / "stvit_small").mkdir()
    (files / "stvit_small/config.json").write_text("{}")
    assert Source.parse("stvit_small") == Source.folder("stvit_small")
    assert Source.parse_model_name("stvit_small") == Source("timm", "stvit_small")


def test_repository_ids() -> None:
    assert Source.hub("org/name@v1") == Source.hub("org/name", "v1") == Source.parse_hub(" hf-hub:org/name@v1 ")
    assert Source.hub("org/name@v1").full_name == "org/name@v1" and Source.hub("org/name").full_name == "org/name"
    assert Source.parse("org/name", allow_bare_repo_id=True) == Source.hub("org/name")
    assert Source.parse("org/name@v1", allow_bare_repo_id=True) == Source.hub("org/name", "v1")
    for text in ("org/name", "local-dir:org/name", "stvit_small", "hf-hub:", "", None, Path("a")):
        assert Source.parse_hub(text) is None


def test_weights_beside_a_config_json_mean_the_folder(files: Path) -> None:
    assert Source.parse("model/model.safetensors").with_config() == Source.folder("model")
    for text in ("weights.pth", "run", "stvit_small"):
        assert Source.parse(text).with_config() == Source.parse(text)


def test_paths(files: Path) -> None:
    assert Source.parse("run").path == Path("run/best") and Source.parse("weights.pth").path == Path("weights.pth")
    with pytest.raises(ValueError, match="hf-hub:org/name is not a path"):
        Source.hub("org/name").path.exists()


def test_model_folders_of_a_run(files: Path) -> None:
    assert find_model_folder(Path("run"), "last") == Path("run/last")
    assert find_model_folder(Path("model"), "last") == Path("model")
    with pytest.raises(ValueError, match=r"no config\.json in run or "):
        find_model_folder(Path("run"), "last_ema")


def test_own_models() -> None:
    assert is_own_model("stvit_small") and is_own_model("stvit_small.in1k")
    assert not is_own_model("resnet18") and not is_own_model("unknown") and not is_own_model(None)


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line number and text of each string in a program, except docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_no_other_code_parses_prefixes() -> None:
    """Only stvit.weights contains the prefixes.

    Examples for the user, such as hf-hub:ORG/NAME, are allowed.
    """
    prefix = re.compile(r"(hf-hub|hf_hub|local-dir):(?!ORG/NAME|FOLDER)")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("stvit", "adapters", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.parent != ROOT / "stvit" / "weights"
        for line, text in strings(path)
        if prefix.search(text)
    ]
    assert not found, found
