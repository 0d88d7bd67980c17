"""Tests of stvit.hub, and of the folders that commands write."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import stvit
from stvit.hub import Details, HubError, Metric, Release, Repository, push, save, write_card
from stvit.hub.folder import read_config
from stvit.tools.common.cli import CommandError
from stvit.tools.common.release import open_output
from tests.hub_server import Hub

REPO = "org/net"
METRIC = Metric("top-1", 81.5, "digits", "validation", "20 images at 32 pixels")
DETAILS = Details("as trained", "a.pth", "mit", "in1k", ["org/data"], [METRIC, replace(METRIC, split=None)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a model folder."""
    torch.manual_seed(3)
    save(timm.create_model("test_stvit", num_classes=2), tmp_path / "net", label_names=["a", "b"], details=DETAILS)
    return tmp_path / "net"


def test_facts_about_weights_are_read_back(folder: Path) -> None:
    config = read_config(folder)
    assert config.details == DETAILS and Details.from_dict({}) == Details()
    assert (config.architecture, config.pretrained_cfg["label_names"]) == ("test_stvit", ["a", "b"])


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ([1], r"stvit must be a mapping, got \[1\]"),
        ({"license": 1}, "stvit.license must be text, got 1"),
        ({"datasets": "imagenet"}, "stvit.datasets must be a list of names, got 'imagenet'"),
        ({"metrics": {}, "weights": "x"}, None),
        ({"metrics": [{"name": "top-1", "value": "high"}]}, "stvit.metrics must be a list of metrics with name, value"),
    ],
)
def test_facts_from_elsewhere_are_checked(folder: Path, details: Any, message: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "stvit": details}))
    if message is None:
        assert read_config(folder).details == Details("x")
        return
    with pytest.raises(HubError, match=f"cannot read .*config.json: {message}.*; save the model again"):
        write_card(folder, "hf-hub:org/net")


def test_a_release_is_loaded_and_saved(folder: Path, tmp_path: Path) -> None:
    release = Release.from_folder(folder)
    release.check()
    assert release.name == "test_stvit.in1k" and release.label_names == ["a", "b"]
    release.details.license = "apache-2.0"
    assert release.save(tmp_path / "copy", "hf-hub:org/net")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert read_config(tmp_path / "copy").details == replace(DETAILS, license="apache-2.0")
    assert "license: apache-2.0" in (tmp_path / "copy/README.md").read_text()
    # From a model, and without overwriting the card of a person.
    (tmp_path / "copy/README.md").write_text("My own words.")
    assert not replace(Release.from_folder(tmp_path / "copy")).save(tmp_path / "again", "hf-hub:org/net")
    assert (tmp_path / "again/README.md").read_text() == "My own words."
    assert replace(release, folder=None).save(tmp_path / "new", "hf-hub:org/net")
    assert load_file(tmp_path / "new/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_release_with_broken_weights_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["head.fc.bias"][1] = torch.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(HubError, match=r"test_stvit\.in1k: NaN or infinity in head\.fc\.bias; use an earlier"):
        Release.from_folder(folder).check()


def test_a_private_folder_is_pushed_without_a_copy(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run copies its files for a snapshot. Its push does not copy them again."""
    module = importlib.import_module("stvit.hub.push")
    monkeypatch.delattr(module, "private_copy")
    repository = Repository(REPO)
    (folder / ".hidden").write_text("secret")
    pushed = repository.upload(folder, tag="v1")
    assert pushed.files == 2 and not repository.upload(folder).changed and ".hidden" not in hub.files(REPO)
    (folder / "link").symlink_to(folder / "config.json")
    with pytest.raises(HubError, match=r"link in .* is a link to"):
        repository.upload(folder)
    assert repository.read_file("config.json", "v1") == (folder / "config.json").read_bytes()
    assert repository.read_file("none.json") is None and Repository("org/none").read_file("config.json") is None
    assert repository.download(tmp_path / "down", ["*.json"]) == pushed.commit
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["config.json"]
    with pytest.raises(HubError, match=r"cannot read org/none \(revision main\): it does not exist"):
        Repository("org/none").check_exists()


def test_a_card_that_cannot_be_read_is_not_replaced(hub: Hub, folder: Path) -> None:
    write_card(folder, "hf-hub:org/net")
    push(folder, REPO)
    hub.commit(REPO, {"README.md": b"My own words."})
    hub.fail("(GET|HEAD) .*/README.md", "status:500")
    (folder / "extra.txt").write_text("more")
    with pytest.raises(HubError, match="cannot push to org/net"):
        push(folder, REPO)
    assert hub.files(REPO)["README.md"] == b"My own words." and "extra.txt" not in hub.files(REPO)
    hub.heal()
    assert push(folder, REPO).kept_card and hub.files(REPO)["README.md"] == b"My own words."


def test_deleted_files_match_a_pattern(hub: Hub, folder: Path) -> None:
    push(folder, REPO)
    hub.commit(REPO, {"old/a/b.txt": b"1", "old/c.txt": b"2", "other.txt": b"3", "config.json": b"{}"})
    pushed = push(folder, REPO, delete=["old/*", "config.json"])
    assert pushed.files == 1 and hub.files(REPO).keys() == {
        *(".gitattributes", "config.json", "model.safetensors", "other.txt")
    }
    assert hub.files(REPO)["config.json"] == (folder / "config.json").read_bytes()


def test_an_output_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    names = {"README.md", "model", "stale.txt"}
    target = tmp_path / "out"
    with open_output(str(target), names) as output:
        (output.fresh / "model").mkdir()
        (output.fresh / "model/old.txt").write_text("1")
        (output.fresh / "stale.txt").write_text("1")
        (output.fresh / "README.md").write_text(stvit.hub.card.CARD_MARK)
        assert not target.exists() and output.finish() == target
    with pytest.raises(CommandError, match="already exists; choose another folder"), open_output(str(target), names):
        pass
    with pytest.raises(ZeroDivisionError), open_output(str(target), names, replace=True) as output:
        (output.fresh / "README.md").write_text("half")
        1 / 0  # noqa: B018
    assert (target / "model/old.txt").exists() and (target / "README.md").read_text() != "half"
    with open_output(str(target), names, replace=True) as output:
        (output.fresh / "model").mkdir()
        (output.fresh / "model/new.txt").write_text("2")
        (output.fresh / "README.md").write_text("whole")
        output.finish()
    found = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    assert found == {"README.md", "model", "model/new.txt"} and [path.name for path in tmp_path.iterdir()] == ["out"]
    # A second command with the same place is refused at its beginning.
    with (
        open_output(str(tmp_path / "new"), names),
        pytest.raises(CommandError, match="new: another command is writing it; choose another folder"),
        open_output(str(tmp_path / "new"), names),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Without a place the folder is temporary.
    with open_output(None) as output:
        folder = output.finish()
        assert folder.is_dir()
    assert not folder.exists()
