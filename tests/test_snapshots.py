"""Tests runs that are uploaded to a Hub while they train, and resumed from it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import stvit
from stvit.hub import write_card
from stvit.tools import train_cls
from stvit.tools.common import snapshots
from tests.hub_server import OWNER, STRANGER, Hub
from tests.torchrun import torchrun

REPO = "org/run"
# Everything with a state, in a run of a second or two.
FLAGS = (
    "--model=test_stvit --img-size=32 --in-chans=1 --batch-size=20 --workers=0 --lr=3e-3 --warmup-epochs=1 --drop=0.1 "
    "--drop-path=0.2 --mixup=0.2 --reprob=0.5 --model-ema --model-ema-decay=0.9 --sched-on-updates"
).split()
RESULTS = ("best/model.safetensors", "last/model.safetensors", "last_ema/model.safetensors", "summary.csv")
Train = Callable[..., str]


@pytest.fixture
def train(digits_folder: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Returns a function that trains and returns the output."""

    def train(output: Path, *flags: str, status: int = 0) -> str:
        capsys.readouterr()
        assert train_cls.main([*FLAGS, f"--data-dir={digits_folder}", f"--output={output}", *flags]) == status
        said = capsys.readouterr()
        assert OWNER not in said.out + said.err
        return said.out + said.err

    return train


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


def test_run_resumes_exactly_from_the_hub(hub: Hub, train: Train, tmp_path: Path, digits_folder: Path) -> None:
    train(tmp_path / "whole", "--epochs=4", "--experiment=it")

    # The same run, killed in its third epoch by a signal that cannot be caught.
    env = hub.environment(tmp_path / "home2", OWNER) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stvit.tools.train_cls", *FLAGS, f"--data-dir={digits_folder}", "--epochs=4"]
    more = [
        f"--output={tmp_path / 'first'}",
        "--experiment=it",
        f"--repo-id={REPO}",
        "--hub-every=2",
        "--checkpoint-steps=1",
    ]
    process = subprocess.Popen([*command, *more], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not any("/commit/last" in request.path and request.status == 200 for request in list(hub.requests)):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()
    files = hub.files(REPO, "last")
    assert {"README.md", "config.json", "model.safetensors", "config.yaml", "summary.csv", *RESULTS} <= files.keys()
    [checkpoint] = [name for name in files if name.startswith("checkpoints/")]
    assert checkpoint == "checkpoints/00002-00000000.pt"

    said = train(tmp_path / "second", "--epochs=4", f"--resume=hf-hub:{REPO}@last")
    assert "2 epochs and 0 updates are done" in said
    assert results(tmp_path / "second/it") == results(tmp_path / "whole/it")
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == ["it"]


def test_both_branches_load(hub: Hub, train: Train, tmp_path: Path) -> None:
    train(tmp_path, "--epochs=3", "--experiment=it", f"--repo-id={REPO}", "--hub-every=2", "--hub-private")
    run = tmp_path / "it"
    uploads = events(run, "hub_upload")
    assert uploads[-1]["epoch"] == 3 and uploads[-1]["commit"] == hub.refs(REPO)["last"]
    assert hub.files(REPO)["model.safetensors"] == (run / "best/model.safetensors").read_bytes()
    assert hub.files(REPO, "last")["model.safetensors"] == (run / "last/model.safetensors").read_bytes()
    assert [name for name in hub.files(REPO, "last") if name.startswith("checkpoints/")] == [
        "checkpoints/00003-00000000.pt"
    ]
    assert ".pt" not in "".join(hub.files(REPO))
    for revision, part in (("main", "best"), ("last", "last")):
        model: Any = stvit.create_model(f"hf-hub:{REPO}@{revision}", pretrained=True, verify=True)
        own = timm.create_model(f"local-dir:{run / part}", pretrained=True)
        assert all(torch.equal(value, own.state_dict()[key]) for key, value in model.state_dict().items())
        assert model.pretrained_cfg["label_names"] == [f"digit_{n}" for n in range(4)]
        card = hub.files(REPO, revision)["README.md"].decode()
        assert card.count("hf-hub:org/run") == 2 and "top-1" in card
    assert not (run / "hub.tmp").exists()


def test_failed_upload_is_a_warning(hub: Hub, train: Train, tmp_path: Path) -> None:
    train(tmp_path / "plain", "--epochs=3", "--experiment=it")
    hub.fail("PUT", "status:500")
    said = train(tmp_path / "own", "--epochs=3", "--experiment=it", f"--repo-id={REPO}", "--hub-every=1")
    assert "warning: the snapshot after epoch 3 was not uploaded: cannot push to org/run: the Hub answered with" in said
    assert not (tmp_path / "own/it/hub.tmp").exists()
    assert events(tmp_path / "own/it", "hub_failed") and not events(tmp_path / "own/it", "hub_upload")
    assert results(tmp_path / "own/it") == results(tmp_path / "plain/it")
    assert "model.safetensors" not in hub.files(REPO)


def test_no_network_and_no_write_access(
    hub: Hub, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create_repo(REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    flags = ("--epochs=1", f"--repo-id={REPO}")
    said = train(tmp_path, *flags, "--experiment=a")
    assert "warning: the snapshot after epoch 1 was not uploaded: " in said and STRANGER not in said
    hub.__exit__()
    assert f"no connection to {hub.url}" in train(tmp_path, *flags, "--experiment=b")
    # Errors that can be found at once stop the command before the training.
    monkeypatch.delenv("HF_TOKEN")
    assert "error: --repo-id: no token; log in" in train(tmp_path, *flags, "--experiment=c", status=1)
    assert "is not a repository id" in train(tmp_path, "--epochs=1", "--repo-id=a b", status=1)
    assert not (tmp_path / "c").exists()


def test_slow_upload_does_not_delay_the_training(hub: Hub, train: Train, tmp_path: Path) -> None:
    """Epochs end during the first upload. The next upload is the newest snapshot."""
    hub.fail("POST .*/commit/", "slow:600", times=1)
    log_file = tmp_path / "it" / "log.jsonl"

    def answer_after_the_last_epoch() -> None:
        while not log_file.exists() or log_file.read_text().count('"event": "epoch"') < 4:
            time.sleep(0.05)
        hub.heal()

    threading.Thread(target=answer_after_the_last_epoch, daemon=True).start()
    train(tmp_path, "--epochs=4", "--experiment=it", f"--repo-id={REPO}", "--hub-every=1")
    log = [(line["event"], line.get("epoch")) for line in events_in_order(tmp_path / "it")]
    first = log.index(("hub_upload", 1))
    assert log.index(("epoch", 3)) < first  # numbered from 0
    assert log[first + 1 :] == [("hub_upload", 4)]
    assert [path for path in hub.files(REPO, "last") if path.startswith("checkpoints/")] == [
        "checkpoints/00004-00000000.pt"
    ]


@pytest.mark.long
def test_hub_that_never_answers(
    hub: Hub, train: Train, tmp_path: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled upload is abandoned for the next one.

    At the end of the run Ctrl-C abandons it.
    """
    monkeypatch.setattr(snapshots, "STALLED_S", 0.1)
    hub.fail("POST .*/commit/main", "hang", times=1)
    said = train(tmp_path, "--epochs=4", "--experiment=it", f"--repo-id={REPO}", "--hub-every=1")
    assert "warning: the snapshot after epoch 1 was not uploaded: it did not end within 0.1 s" in said
    assert len(events(tmp_path / "it", "epoch")) == 4

    hub.fail("POST .*/commit/main", "hang")
    env = hub.environment(tmp_path / "home2", OWNER) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stvit.tools.train_cls", *FLAGS, f"--data-dir={digits_folder}", "--epochs=1"]
    more = [f"--output={tmp_path}", "--experiment=hung", "--repo-id=org/hung"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, *more], env=env, **pipes)
    count = len(hub.requests)
    while not any("/preupload/" in request.path for request in hub.requests[count:]):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "after epoch 1 was not uploaded: the upload was abandoned" in said, said
    assert (tmp_path / "hung/best/model.safetensors").exists()


def events_in_order(folder: Path, names: Sequence[str] = ("epoch", "hub_upload", "hub_failed")) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in names]


def test_runs_that_cannot_be_resumed(hub: Hub, train: Train, tmp_path: Path) -> None:
    train(tmp_path, "--epochs=1", "--experiment=it", f"--repo-id={REPO}")
    out = tmp_path / "new"

    def refused(*flags: str, output: Path = out) -> str:
        said = train(output, "--epochs=1", *flags, status=1)
        assert "Traceback" not in said
        assert [path for path in out.glob("*") if path.name != "other"] == []
        return said

    assert "no checkpoint of a run with --repo-id; pass the branch last" in refused(f"--resume=hf-hub:{REPO}")
    assert "(revision v9): revision 'v9' does not exist" in refused(f"--resume=hf-hub:{REPO}@v9")
    assert "it does not exist, or it is private" in refused("--resume=hf-hub:org/none@last")
    assert "was started with other flags (drop 0.1, now 0.5)" in refused(f"--resume=hf-hub:{REPO}@last", "--drop=0.5")
    assert "already exists; resume it with --resume auto --experiment it" in refused(
        f"--resume=hf-hub:{REPO}@last", output=tmp_path
    )
    content = next(content for name, content in hub.files(REPO, "last").items() if name.startswith("checkpoints/"))
    hub.commit(REPO, {"checkpoints/00001-00000000.pt": content[:-200]}, revision="last")
    assert "is damaged" in refused(f"--resume=hf-hub:{REPO}@last")
    torch.save({"progress": {}, "model": {}}, tmp_path / "odd.pt")
    hub.commit(REPO, {"checkpoints/00001-00000000.pt": (tmp_path / "odd.pt").read_bytes()}, revision="last")
    assert "is not a checkpoint of this program" in refused(f"--resume=hf-hub:{REPO}@last")
    hub.commit(REPO, {"checkpoints/00001-00000000.pt": content}, revision="last")
    hub.fail("GET .*checkpoints", "flip")
    assert "differ from the Hub's record of their checksums; download again" in refused(f"--resume=hf-hub:{REPO}@last")
    hub.heal()
    evil = {"config.yaml": b"experiment: ../../outside\n"}
    hub.commit(REPO, evil, revision="last")
    train(out, "--epochs=1", f"--resume=hf-hub:{REPO}@last")
    assert (out / "outside/best").is_dir() and not (tmp_path / "outside").exists()


def test_repository_has_one_run(hub: Hub, train: Train, tmp_path: Path) -> None:
    """A second run is refused before it trains. A card that a person edited is kept."""
    flags = ["--experiment=a", f"--repo-id={REPO}", "--hub-every=1"]
    train(tmp_path, "--epochs=2", *flags)
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\nMy own words.\n"})
    before = hub.refs(REPO)
    said = train(tmp_path, "--epochs=2", "--experiment=b", f"--repo-id={REPO}", status=1)
    assert f"{REPO} already contains a run; resume it with --resume hf-hub:{REPO}@last, or choose another" in said
    train(tmp_path, "--epochs=2", "--experiment=c", "--seed=5", "--checkpoint-steps=1")
    (tmp_path / "c/summary.csv").unlink()
    [checkpoint] = (tmp_path / "c/checkpoints").glob("00002*")
    checkpoint.unlink()
    other = ["--experiment=c", "--seed=5", "--resume=auto", f"--repo-id={REPO}"]
    said = train(tmp_path, "--epochs=2", *other, status=1)
    assert f"{REPO} contains another run, with a different seed; choose" in said
    assert hub.refs(REPO) == before
    # The same run, resumed on another machine, is still uploaded.
    train(tmp_path / "new", "--epochs=2", f"--resume=hf-hub:{REPO}@last", f"--repo-id={REPO}")
    assert hub.files(REPO)["README.md"].endswith(b"My own words.\n")


def test_end_of_a_run_is_uploaded_later(hub: Hub, train: Train, tmp_path: Path) -> None:
    flags = ["--epochs=1", "--experiment=it", f"--repo-id={REPO}"]
    hub.fail("POST .*/commit/", "status:500", times=1)
    assert "warning: the snapshot after epoch 1 was not uploaded" in train(tmp_path / "a", *flags)
    assert hub.refs(REPO)["last"] == events(tmp_path / "a/it", "hub_upload")[-1]["commit"]  # in the second attempt
    hub.fail("POST .*/commit/", "status:500")
    flags[-1] = "--repo-id=org/other"
    said = train(tmp_path / "b", *flags)
    assert "the end of the run is not on the Hub (org/other); run the same command with --resume auto" in said
    hub.heal()
    for attempt in range(2):
        heads = hub.refs("org/other")
        assert "is finished: 1 epochs are done" in train(tmp_path / "b", *flags, "--resume=auto")
        assert hub.files("org/other")["model.safetensors"] == (tmp_path / "b/it/best/model.safetensors").read_bytes()
        assert (hub.refs("org/other") == heads) == (attempt == 1)  # the second time changes nothing
    assert len(hub.history("org/other")) == 2


@pytest.mark.long
def test_primary_process_uploads(hub: Hub, tmp_path: Path, digits_folder: Path) -> None:
    """The run resumes exactly on as many processes."""
    env = hub.environment(tmp_path / "home2", OWNER) | {"OMP_NUM_THREADS": "1"}

    def train(output: Path, *flags: str) -> None:
        command = [
            *torchrun(2),
            "-m",
            "stvit.tools.train_cls",
            *FLAGS,
            f"--data-dir={digits_folder}",
            f"--output={output}",
        ]
        done = subprocess.run([*command, "--epochs=3", *flags], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and OWNER not in done.stdout + done.stderr, done.stderr

    train(tmp_path / "whole", "--experiment=it", f"--repo-id={REPO}", "--hub-every=1")
    assert events(tmp_path / "whole/it", "hub_upload")[-1]["epoch"] == 3
    commits = [request for request in hub.requests if "/commit/last" in request.path]
    assert len(commits) == len(events(tmp_path / "whole/it", "hub_upload"))
    # The first snapshot is the second commit of the branch, after the one that the branch started from.
    first = next(
        commit
        for commit in reversed(hub.history(REPO, "last"))
        if any(name.startswith("checkpoints/") for name in hub.files(REPO, commit))
    )
    train(tmp_path / "again", f"--resume=hf-hub:{REPO}@{first}")
    assert results(tmp_path / "again/it") == results(tmp_path / "whole/it")


def test_snapshot_follows_no_links(hub: Hub, train: Train, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    said = train(tmp_path, "--experiment=run", "--epochs=1")
    run = tmp_path / "run"
    for name in ("best/config.json", "checkpoints/99999-00000000.pt", "curve.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "secret")
        with pytest.raises(stvit.hub.HubError, match=f"{name} in .* is a link to .*secret"):
            snapshots._copy_run(run, tmp_path / "aside")
        (run / name).unlink()
    (run / "best").rename(tmp_path / "moved")
    (run / "best").symlink_to(tmp_path / "moved")
    reported: list[tuple[str, dict[str, Any]]] = []
    uploads = snapshots.Snapshots(
        REPO, 1, run, False, write_card, lambda name, values: reported.append((name, values)), bool
    )
    uploads.after_epoch(1)
    assert [name for name, _ in reported] == ["hub_failed"] and "best in " in reported[0][1]["error"], said
    assert hub.requests == []
