"""Tests of the command that pushes weights, against a Hub on 127.0.0.1."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load, load_file, save_file

import stvit
from stvit import hub as hub_module
from stvit.adapters.folder import save_model
from stvit.hub import files as hub_files
from stvit.hub.card import CARD_MARK
from stvit.hub.push import compare_model_with_hub
from stvit.tools import push_to_hub, train_cls, validate_cls
from tests.hub_server import OWNER, READER, STRANGER, Hub

REPO = "org/net"
Push = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a model folder."""
    torch.manual_seed(3)
    hub_module.save(
        timm.create_model("test_stvit", num_classes=4),
        tmp_path / "net",
        details=hub_module.Details(weights="as trained"),
    )
    return tmp_path / "net"


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Push:
    """Returns a function that runs the command and returns its output, or its error if it must fail."""

    def push(source: Path, *flags: str, repo: str = REPO, fails: bool = False) -> str:
        capsys.readouterr()
        try:
            status = push_to_hub.main([str(source), f"--repo-id={repo}", *flags])
        except SystemExit as error:
            status = int(str(error.code))
        said = capsys.readouterr()
        assert not any(token in said.out + said.err for token in (OWNER, READER, STRANGER, "hf_wrong"))
        assert (status != 0) == fails, said.err + said.out
        if fails:
            assert said.err.count("\n") == 1 and said.err.startswith("error: "), said.err
        return said.err if fails else said.out

    return push


def test_push_and_load(hub: Hub, folder: Path, push: Push) -> None:
    said = push(folder)
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "pushed 3 files" in said and "the card states no license" in said
    commit = hub.refs(REPO)["main"]
    count = len(load_file(folder / "model.safetensors"))
    assert f"loaded commit {commit} from the Hub: all {count} tensors and the checksums are equal" in said
    names: dict[str, Any] = {}
    exec(said.strip().splitlines()[-1], names)
    image = torch.randn(1, 3, 64, 64)
    own: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(names["model"].eval()(image), own(image))
    # The token is sent to the Hub, but not to the storage of its files.
    put = [request for request in hub.requests if request.method == "PUT"]
    assert put and all(request.token is None for request in put)
    assert all(request.token == OWNER for request in hub.requests if "/commit/" in request.path)


def test_pushing_the_same_again_sends_nothing(hub: Hub, folder: Path, push: Push) -> None:
    push(folder, "--license=mit")
    before, requests = hub.history(REPO), len(hub.requests)
    said = push(folder, "--license=mit")
    assert f"nothing to push, {REPO} already has all files" in said and "are equal" in said
    assert hub.history(REPO) == before
    assert not [r for r in hub.requests[requests:] if r.method in ("POST", "PUT") and "validate-yaml" not in r.path]
    weights = load_file(folder / "model.safetensors")
    weights["head.fc.bias"][0] = 9
    save_file(weights, folder / "model.safetensors")
    assert "pushed 2 files" in push(folder, "--license=mit")  # the card contains the checksum
    assert load(hub.files(REPO)["model.safetensors"])["head.fc.bias"][0] == 9


def test_card(hub: Hub, folder: Path, push: Push, tmp_path: Path) -> None:
    push(folder, "--license=apache-2.0")
    text = hub.files(REPO)["README.md"].decode()
    card = ModelCard(text)
    assert card.data.library_name == "timm" and card.data.license == "apache-2.0"
    assert {"timm", "stvit", "image-classification"} <= set(card.data.tags or ())
    assert "transformers" not in text and "@inproceedings{huang2023stvit" in text and "Not measured." in text
    snippet = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    assert snippet.startswith("import stvit")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["model"].num_classes == 4 and len(names["backbone"](torch.randn(1, 3, 64, 64))) == 4
    # A card edited on the Hub is kept. A card edited in the folder is pushed.
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\nMy own words.\n"})
    assert "the card on the Hub was edited by a person, and is kept" in push(folder, "--license=apache-2.0")
    assert hub.files(REPO)["README.md"].endswith(b"My own words.\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nOther words.\n")
    assert "was edited by a person, and is pushed unchanged" in push(folder)
    assert hub.files(REPO)["README.md"].endswith(b"Other words.\n")


@pytest.mark.parametrize("name", ["test_resnet", "fastvit_t8"])
def test_only_the_card_of_an_stvit_names_stvit(hub: Hub, push: Push, tmp_path: Path, name: str) -> None:
    """`fastvit` contains the letters of `stvit`."""
    hub_module.save(timm.create_model(name, num_classes=4), tmp_path / "net")
    push(tmp_path / "net")
    text = hub.files(REPO)["README.md"].decode()
    own = text.replace(CARD_MARK, "").replace("fastvit", "")
    assert not any(word in own.lower() for word in ("stvit", "super token", "super-token", "huang", "citation"))
    assert ModelCard(text).data.tags == ["image-classification", "timm"] and "An image classifier for timm." in text
    snippet = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    assert snippet.startswith("import timm")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["model"].num_classes == 4


def test_card_of_a_run_has_its_results(hub: Hub, digits_folder: Path, tmp_path: Path, push: Push) -> None:
    flags = "--model=test_stvit --img-size=32 --epochs=2 --batch-size=20 --workers=0 --lr=3e-3 --warmup-epochs=0"
    data = f"--data-dir={digits_folder}"
    assert train_cls.main([*flags.split(), data, f"--output={tmp_path}", "--experiment=run"]) == 0
    rows = (tmp_path / "run/summary.csv").read_text().splitlines()
    column = rows[0].split(",").index("eval_top1")
    best = max(float(row.split(",")[column]) for row in rows[1:])
    push(tmp_path / "run")
    files = hub.files(REPO)
    assert files["model.safetensors"] == (tmp_path / "run/best/model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert f"| top-1 | {best:.2f} % | images in {digits_folder.name} | 20 images of validation at 32 pixels" in card
    assert "classes: 4 (`digit_0`, `digit_1`, `digit_2`, `digit_3`)" in card and "imagenet" not in card.lower()
    assert ModelCard(card).data.eval_results[0].metric_value == pytest.approx(best)
    assert str(tmp_path) not in card + files["config.json"].decode()

    push(tmp_path / "run", "--weights=last", "--revision=last")
    assert hub.files(REPO, "last")["model.safetensors"] == (tmp_path / "run/last/model.safetensors").read_bytes()

    report = tmp_path / "report"
    assert validate_cls.main([f"--checkpoint={tmp_path / 'run'}", data, "--workers=0", f"--output={report}"]) == 0
    push(tmp_path / "run", f"--results={report / 'results.json'}")
    results, card = json.loads((report / "results.json").read_text()), hub.files(REPO)["README.md"].decode()
    assert (
        f"| top-5 | {results['top5']:.2f} %" in card
        and "95 % confidence interval" in card
        and torch.__version__ in card
    )
    (report / "results.json").write_text("{}")
    assert "pass a results.json of tools/validate_cls.py" in push(
        tmp_path / "run", f"--results={report / 'results.json'}", fails=True
    )


@pytest.mark.parametrize("adapter", ["torchvision", "segmentation"])
def test_models_of_adapters(hub: Hub, push: Push, tmp_path: Path, adapter: str) -> None:
    """The folder of a detector or a segmentation model is pushed, loaded by its commit and compared."""
    module = importlib.import_module(f"stvit.adapters.{adapter}")
    builder = module.faster_rcnn if adapter == "torchvision" else module.semantic_fpn
    model = builder("test_stvit", num_classes=3)
    save_model(model, tmp_path / "run/best", label_names=["cat", "dog", "bird"][: 2 if adapter == "torchvision" else 3])
    said = push(tmp_path / "run", "--license=mit", "--tag=v1")
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert b"license: mit" in files["README.md"] and b"mit" in files["config.json"]
    assert f"all {len(model.state_dict())} tensors and the checksums are equal" in said
    names: dict[str, Any] = {}
    exec(said.strip().splitlines()[-1], names)
    assert all(torch.equal(value, names["model"].state_dict()[key]) for key, value in model.state_dict().items())
    assert "nothing to push" in push(tmp_path / "run", "--license=mit")
    assert "--space cannot be combined with" in push(tmp_path / "run", "--space", fails=True)
    assert "--model cannot be combined with" in push(tmp_path / "run", "--model=stvit_pico", fails=True)


def test_checkpoint_with_moving_average(hub: Hub, tmp_path: Path, push: Push) -> None:
    model = timm.create_model("test_stvit")
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "it.pth")
    assert "pass --no-use-ema or --use-ema" in push(tmp_path / "it.pth", fails=True)
    assert "weights: moving average (EMA)" in push(tmp_path / "it.pth", "--use-ema")
    pushed = load(hub.files(REPO)["model.safetensors"])
    assert all(torch.equal(value, pushed[key]) for key, value in model.state_dict().items())


def test_dry_run_sends_nothing(
    hub: Hub, folder: Path, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")  # a dry run needs no token
    said = push(folder, "--dry-run", "--license=mit")
    assert hub.requests == []
    out = tmp_path / "hub" / REPO
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for file in out.iterdir():
        assert re.search(rf"{file.stat().st_size:,} bytes  sha256 {hub_files.file_sha256(file)}  {file.name}\n", said)
    assert (out / "README.md").read_text() in said and "nothing was sent" in said
    push(folder, "--dry-run", "--license=apache-2.0")  # replaces the folder
    assert "license: apache-2.0" in (out / "README.md").read_text()
    (out / "own.txt").write_text("mine")
    assert "already exists; choose another" in push(folder, "--dry-run", fails=True)
    push(folder, "--dry-run", f"--output={tmp_path / 'elsewhere'}")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3 and hub.requests == []


def test_revision_tag_and_message(hub: Hub, folder: Path, push: Push) -> None:
    push(folder)
    main = hub.refs(REPO)["main"]
    said = push(folder, "--revision=dev", "--tag=v1")
    assert hub.refs(REPO) == {"main": main, "dev": main, "v1": main}  # a new branch with the same files needs no commit
    assert f"'hf-hub:{REPO}@v1'" in said
    said = push(folder, "--license=mit", "--revision=next", "--tag=v2", "--message=With a license")
    refs = hub.refs(REPO)
    assert refs["main"] == main and refs["next"] == refs["v2"] != main
    assert hub.history(REPO, "next")[1:] == hub.history(REPO, "main")
    assert "license: mit" in hub.files(REPO, "v2")["README.md"].decode()
    push(folder, "--license=mit", "--revision=next", "--tag=v2")  # changes nothing
    assert hub.refs(REPO) == refs
    said = push(folder, "--license=apache-2.0", "--tag=v1", fails=True)
    assert f"tag 'v1' of {REPO} is on another commit, {main}; choose another tag" in said
    assert "'v1' of org/net is a tag or a commit, which cannot receive files; pass a branch" in push(
        folder, "--revision=v1", fails=True
    )
    assert hub.refs(REPO) == refs


def test_new_repository_with_a_revision(hub: Hub, folder: Path, push: Push) -> None:
    push(folder, "--revision=dev")
    assert "model.safetensors" in hub.files(REPO, "dev") and "model.safetensors" not in hub.files(REPO, "main")


def test_pull_request(hub: Hub, folder: Path, push: Push) -> None:
    push(folder)
    refs = hub.refs(REPO)
    said = push(folder, "--license=mit", "--create-pr")
    now = hub.refs(REPO)
    assert now["main"] == refs["main"] and "license: mit" in hub.files(REPO, now["refs/pr/1"])["README.md"].decode()
    assert f"loaded commit {now['refs/pr/1']}" in said and "/discussions/1" in said
    assert "nothing to push" in (said := push(folder, "--create-pr")) and "no pull request was opened" in said
    count = len(hub.requests)
    for flags, why in (
        (["--create-pr", "--tag=v1"], "remove revision and tag, or create_pr"),
        (["--tag=a b"], "tag 'a b' is not the name of a branch or tag"),
        (["--revision=../x"], "revision '../x' is not the name"),
        (["--license=a: b"], "license 'a: b' is not an identifier"),
    ):
        for dry in ([], ["--dry-run"]):
            assert why in push(folder, *flags, *dry, fails=True)
    assert len(hub.requests) == count


def test_private(hub: Hub, folder: Path, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, "--private")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    with pytest.raises(stvit.PretrainedDownloadError, match="has no access"):
        stvit.create_model(f"hf-hub:{REPO}", pretrained=True)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    assert stvit.create_model(f"hf-hub:{REPO}", pretrained=True).num_classes == 4
    push(folder, "--private")  # it is private already
    hub.create_repo("org/open")
    assert "org/open already exists and is public; push without private" in push(
        folder, "--private", repo="org/open", fails=True
    )


def test_tokens(hub: Hub, folder: Path, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create_repo(REPO)
    before = hub.history(REPO)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "permission denied (403" in (said := push(folder, fails=True)) and "of type 'write'" in said
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert "permission denied" in (said := push(folder, fails=True)) and f"{REPO} is unchanged" in said
    assert "permission denied" in push(folder, repo="org/new", fails=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub does not know the access token" in push(folder, fails=True)
    monkeypatch.delenv("HF_TOKEN")
    count = len(hub.requests)
    assert "no token; log in with `hf auth login`, or set HF_TOKEN" in push(folder, fails=True)
    assert len(hub.requests) == count and hub.history(REPO) == before
    for flags in (["--token", "hf_wrong"], ["--token=hf_wrong"], ["--hf-token=hf_wrong"]):
        assert "a token on the command line is visible" in push(folder, *flags, fails=True)
    token = "hf_" + "wrong" * 7
    assert "unrecognized arguments: --hub-token hf_***" in push(folder, "--hub-token", token, fails=True)


def test_repository_id_without_a_namespace(hub: Hub, folder: Path, push: Push) -> None:
    said = push(folder, repo="mine")
    assert "hf-hub:owner/mine" in said and "model.safetensors" in hub.files("owner/mine")


@pytest.mark.parametrize(
    "fault",
    [
        "PUT cut",
        "PUT reset",
        "PUT status:500",
        "commit/main status:500",
        "commit/main reset",
        "commit/other reset",
        "preupload status:503",
    ],
)
def test_failed_push_changes_nothing(hub: Hub, folder: Path, push: Push, fault: str) -> None:
    push(folder)
    before, refs = hub.files(REPO), hub.refs(REPO)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / "model.safetensors")
    hub.fail(*fault.split())
    said = push(folder, "--revision=other" if "main" not in fault else "--tag=v1", fails=True)
    assert f"cannot push to {REPO}: " in said and "is unchanged, and the same push can be repeated" in said
    assert hub.files(REPO) == before and hub.refs(REPO) == refs
    hub.heal()
    assert "pushed 2 files" in push(folder)


def test_commit_with_a_lost_answer_is_recognized(hub: Hub, folder: Path, push: Push) -> None:
    for revision in ("main", "new"):
        hub.fail(f"POST .*/commit/{revision}", "lost")
        assert "pushed" in push(
            folder, "--license=mit" if revision == "new" else "--message=first", f"--revision={revision}"
        )
        hub.heal()
        assert hub.files(REPO, revision)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.history(REPO, "new")) == len(hub.history(REPO)) + 1
    # The Hub does not answer, so the commit may or may not have arrived.
    weights = load_file(folder / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / "model.safetensors")
    hub.fail("POST .*/commit/", "lost")
    hub.fail("GET .*/refs", "slow:0", times=1)
    hub.fail("GET .*/refs", "status:500")
    assert "it is unknown whether the commit arrived" in push(folder, fails=True)
    hub.heal()
    assert "nothing to push" in push(folder)


def test_commits_of_others_are_not_mixed_with_ours(
    hub: Hub, folder: Path, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder)
    prepare = HfApi.preupload_lfs_files

    def meanwhile(branch: str) -> None:
        def preupload(*args: Any, **kwargs: Any) -> None:
            prepare(*args, **kwargs)
            if branch not in hub.refs(REPO):
                HfApi().create_branch(REPO, branch=branch)
            hub.commit(REPO, {"theirs.txt": b"theirs"}, revision=branch)

        monkeypatch.setattr(HfApi, "preupload_lfs_files", preupload)

    for branch in ("main", "dev"):
        meanwhile(branch)
        said = push(folder, "--license=mit", f"--revision={branch}", fails=True)
        assert f"cannot push to {REPO}: " in said
        assert hub.files(REPO, branch)["theirs.txt"] == b"theirs" and "theirs.txt" not in str(said)
        assert b"license: mit" not in hub.files(REPO, branch)["README.md"]
    # On a branch that this push created.
    monkeypatch.setattr(HfApi, "preupload_lfs_files", prepare)
    create = HfApi.create_branch

    def create_branch(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        hub.commit(REPO, {"theirs.txt": b"theirs"}, revision="new")

    monkeypatch.setattr(HfApi, "create_branch", create_branch)
    push(folder, "--license=mit", "--revision=new", fails=True)
    assert hub.files(REPO, "new")["theirs.txt"] == b"theirs"
    meanwhile("main")
    assert "somebody else pushed at the same time" in push(folder, "--license=mit", fails=True)


def test_next_push_creates_a_missing_tag(hub: Hub, folder: Path, push: Push) -> None:
    hub.fail("POST .*/tag/", "status:500")
    assert "the files were pushed as commit" in push(folder, "--tag=v1", fails=True)
    hub.heal()
    assert "nothing to push" in push(folder, "--tag=v1")
    assert hub.refs(REPO)["v1"] == hub.refs(REPO)["main"]


def test_damaged_upload_is_an_error(hub: Hub, folder: Path, push: Push) -> None:
    hub.fail("GET .*model.safetensors", "flip")
    assert "pushed, but loading it failed: " in (said := push(folder, fails=True)) and "corrupt files" in said
    hub.heal()
    hub.fail("model.safetensors$", "truncate")
    assert "pushed, but loading it failed: " in (said := push(folder, fails=True)) and "is truncated" in said


def test_unreachable(hub: Hub, folder: Path, push: Push) -> None:
    hub.__exit__()
    assert f"no connection to {hub.url}" in push(folder, fails=True)


def test_errors_name_the_reason(hub: Hub, folder: Path, push: Push, tmp_path: Path) -> None:
    assert "'a b' is not a repository id" in push(folder, repo="a b", fails=True)
    assert "no such file or folder" in push(tmp_path / "none", fails=True)
    assert "--example needs a detector" in push(folder, "--example=a.jpg", fails=True)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no model.safetensors in" in push(folder, fails=True)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert "config.json" in push(folder, fails=True)
    assert hub.requests == []
    (folder / "extra.pt").write_bytes(b"x")
    with pytest.raises(hub_module.HubError, match=r"contains pickles, which can run code: extra\.pt; remove"):
        hub_module.push(folder, REPO)
    assert hub.requests == []


def test_only_files_of_the_model_are_pushed(hub: Hub, folder: Path, push: Push) -> None:
    (folder / "notes.txt").write_text("private")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    push(folder)
    assert hub.files(REPO).keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}


@pytest.mark.long
def test_killed_push_is_repeated(hub: Hub, folder: Path, push: Push, tmp_path: Path) -> None:
    """The push runs in another process, which finds the Hub by its environment."""
    push(folder, "--license=mit")
    before, refs = hub.files(REPO), hub.refs(REPO)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / "model.safetensors")
    env = hub.environment(tmp_path / "other", OWNER) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stvit.tools.push_to_hub", str(folder), f"--repo-id={REPO}", "--license=mit"]
    hub.fail("PUT", "hang")
    count = len(hub.requests)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not any("objects/batch" in request.path for request in hub.requests[count:]):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert (hub.files(REPO), hub.refs(REPO)) == (before, refs)
    hub.heal()
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "pushed 2 files" in said.stdout and "are equal" in said.stdout and OWNER not in said.stdout + said.stderr
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_every_tensor_is_compared(hub: Hub, folder: Path, push: Push) -> None:
    push(folder)
    weights = load_file(folder / "model.safetensors")
    weights["stages.0.blocks.0.mlp.fc1.bias"][0] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        hub_module.HubError, match=r"1 tensors of hf-hub:.* differ from the folder: stages.0.blocks.0.mlp.fc1.bias"
    ):
        compare_model_with_hub(folder, REPO, hub.refs(REPO)["main"])


def test_no_file_of_a_push_comes_from_outside_its_folder(hub: Hub, folder: Path, push: Push, tmp_path: Path) -> None:
    """A link could publish any file that the user can read."""
    secret = tmp_path / "secret"
    secret.mkdir()
    push(folder, "--dry-run", f"--output={tmp_path / 'out'}")
    (folder / "README.md").write_bytes((tmp_path / "out/README.md").read_bytes())
    for name in ("README.md", "config.json", "model.safetensors"):
        outside = (folder / name).rename(secret / name)
        (folder / name).symlink_to(outside)
        said = push(folder, fails=True)
        assert f"{name} in {folder} is a link to {outside}; links are not followed" in said and "cp -RL" in said
        (folder / name).unlink()
        outside.rename(folder / name)
    assert not [request for request in hub.requests if request.method in ("POST", "PUT")]

    def refused(said: str) -> None:
        with pytest.raises(hub_module.HubError, match=said):
            hub_module.push(folder, REPO)

    odd = folder / "odd"
    for target in (
        secret,
        folder / "config.json",
        Path("config.json"),
        Path("nowhere"),
    ):  # and broken links
        odd.symlink_to(target)
        refused(f"odd in .* is a link to {re.escape(str(target))}")
        odd.unlink()
    odd.mkdir()
    (odd / "more").symlink_to(secret)
    refused("odd/more in .* is a link")
    (odd / "more").unlink()
    os.mkfifo(odd / "more")
    refused("odd/more in .* is not a regular file but a pipe")
    (odd / "more").unlink()
    assert not [request for request in hub.requests if request.method in ("POST", "PUT")]

    # Hidden files are not pushed. The folder itself may be a link.
    (odd / ".hidden").symlink_to(secret)
    (odd / ".git").mkdir()
    (odd / ".git/config").write_text("token")
    (tmp_path / "link").symlink_to(folder)
    hub_module.push(tmp_path / "link", REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert not list(tmp_path.glob(".net*"))


def test_file_that_becomes_a_link_during_the_push(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("secret")
    own = (folder / "config.json").read_bytes()

    def swap(function: Any) -> Any:
        def swapping(*args: Any, **kwargs: Any) -> Any:
            (folder / "config.json").unlink(missing_ok=True)
            (folder / "config.json").symlink_to(tmp_path / "secret")
            return function(*args, **kwargs)

        return swapping

    with monkeypatch.context() as patch:  # after the files were copied
        patch.setattr(HfApi, "repo_info", swap(HfApi.repo_info))
        hub_module.push(folder, REPO)
    assert hub.files(REPO)["config.json"] == own
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(own)
    with monkeypatch.context() as patch:  # between the check of a file and its opening
        patch.setattr(hub_files, "_open_file", swap(hub_files._open_file))
        with pytest.raises(hub_module.HubError, match=r"config\.json in .* is a link"):
            hub_module.push(folder, REPO)
    assert b"secret" not in b"".join(hub.files(REPO).values())
