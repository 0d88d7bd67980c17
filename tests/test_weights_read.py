"""Tests that all readers refuse hostile weight files before they use memory."""

import argparse
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import stvit
from stvit.tools import convert_checkpoint
from stvit.tools.common.checkpoint import load_checkpoint
from stvit.tools.common.cli import CommandError
from stvit.tools.common.viewing import is_detector
from stvit.weights.check import WeightsFileError, check_file, class_names, count_elements
from stvit.weights.read import read_file
from tests.hub_server import Hub

WEIGHTS: dict[str, Any] = {
    "a": torch.randn(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.nn.Parameter(torch.zeros(2)),
    "view": torch.arange(8)[2:6].reshape(2, 2),
    "of one": torch.zeros(0),
    "nested": OrderedDict(z=[torch.zeros(1), 1.5, None]),
    "args": argparse.Namespace(lr=0.1),
}


def rewrite(
    source: Path,
    target: Path,
    edit: Callable[[str, bytes], bytes] = lambda name, content: content,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copies the members of an archive to a new archive, and edits their contents."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return target


@pytest.mark.parametrize("is_new", [True, False])
def test_intact_files_are_read(tmp_path: Path, is_new: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=is_new)
    read = read_file(path)
    assert torch.equal(read["a"], WEIGHTS["a"]) and torch.equal(read["view"], WEIGHTS["view"])
    assert count_elements(path) == 12 + 5 + 2 + 8 + 0 + 1
    assert "argparse.Namespace" in class_names(path)
    save_file({"a": WEIGHTS["a"]}, tmp_path / "w.safetensors")
    assert count_elements(tmp_path / "w.safetensors") == 12


def test_large_archives_are_read(tmp_path: Path) -> None:
    """The archive has the zip64 fields that members of more than 4 GB need."""
    path = tmp_path / "large.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        storage = pickle.dumps({}, 2)
        with archive.open("w/data.pkl", "w", force_zip64=True) as member:
            member.write(storage)
    check_file(path)


def bomb(folder: Path, name: str = "bomb.pt", content: Any = None) -> Path:
    """Writes a compressed checkpoint, by default 0.1 MB that expand to 120 MB."""
    torch.save({"w": torch.zeros(30_000_000)} if content is None else content, folder / "plain")
    path = rewrite(folder / "plain", folder / name, compression=zipfile.ZIP_DEFLATED)
    (folder / "plain").unlink()
    return path


def test_compressed_members_are_refused_by_every_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, said = bomb(tmp_path), "which torch.save never writes"
    assert path.stat().st_size < 1_000_000
    # A new process, so that its peak memory includes only these calls.
    script = (
        "import resource, sys, stvit, timm\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, path = peak(), sys.argv[1]\n"
        "for create in (stvit.create_model, timm.create_model):\n"
        "    for name in ('test_stvit', 'test_resnet')[: 2 if create is stvit.create_model else 1]:\n"
        "        try: create(name, pretrained=True, pretrained_cfg_overlay=dict(file=path))\n"
        "        except stvit.PretrainedError as error: print(error)\n"
        "print(peak() - before < 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=300)
    *lines, is_small = done.stdout.strip().splitlines()
    assert len(lines) == 3 and all(said in line and str(path) in line for line in lines), done.stdout + done.stderr
    assert is_small == "True"
    with pytest.raises(CommandError, match=said):
        load_checkpoint(path)
    assert convert_checkpoint.main([str(path), f"--output={tmp_path / 'out'}"]) == 1
    assert said in capsys.readouterr().err
    assert not is_detector(str(path))
    with pytest.raises(stvit.PretrainedError, match=said):
        stvit.create_model("test_resnet", checkpoint_path=path)
    # The file in a folder, under the name that timm looks for.
    stvit.hub.save(timm.create_model("test_resnet", num_classes=2), tmp_path / "net")
    (tmp_path / "net/model.safetensors").unlink()
    path.rename(tmp_path / "net/pytorch_model.bin")
    with pytest.raises(stvit.PretrainedError, match=said):
        stvit.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)


def test_compressed_members_are_refused_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    stvit.hub.save(timm.create_model("test_stvit", num_classes=2), tmp_path / "ours")
    stvit.hub.save(timm.create_model("test_resnet", num_classes=2), tmp_path / "theirs")
    content = bomb(tmp_path, content={"w": torch.zeros(1000)}).read_bytes()
    for name in ("ours", "theirs"):
        hub.create_repo(f"org/{name}")
        config = (tmp_path / name / "config.json").read_bytes()
        hub.commit(f"org/{name}", {"config.json": config, "pytorch_model.bin": content})
        with pytest.raises(stvit.PretrainedError, match=rf"org/{name} .*compressed or encrypted"):
            stvit.create_model(f"hf-hub:org/{name}", pretrained=True)
        assert stvit.create_model(f"hf-hub:org/{name}").num_classes == 2
    with pytest.raises(stvit.PretrainedError, match=r"org/ours .*compressed or encrypted"):
        timm.create_model("hf-hub:org/ours", pretrained=True)


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


@pytest.mark.parametrize(
    ("function", "argument"),
    [(bytearray, 10**12), (torch.Tensor, 10**12), (torch.FloatStorage, 10**12), (torch.nn.Linear, 10**6)],
)
def test_calls_that_allocate_a_given_size_are_refused(tmp_path: Path, function: Any, argument: int) -> None:
    for is_new in (True, False):
        torch.save({"x": Call(function, argument)}, tmp_path / "w.pt", _use_new_zipfile_serialization=is_new)
        with pytest.raises(WeightsFileError, match=rf"would run .*{function.__name__}\({argument}\)"):
            check_file(tmp_path / "w.pt")


def test_nested_calls_are_refused(tmp_path: Path) -> None:
    torch.save({"x": Call(torch._tensor._rebuild_from_type_v2, bytearray, object, (10**12,), {})}, tmp_path / "w.pt")
    with pytest.raises(WeightsFileError, match=r"would run .*bytearray\(1000000000000\)"):
        check_file(tmp_path / "w.pt")


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for is_new in (True, False):
        torch.save(
            {"w": torch.zeros(4).as_strided((10**6, 10**6), (0, 0))}, path, _use_new_zipfile_serialization=is_new
        )
        with pytest.raises(WeightsFileError, match=r"tensor of shape \[1000000, 1000000\] on a storage of 4 elements"):
            check_file(path)
    torch.save(WEIGHTS, path)

    def shorten(name: str, content: bytes) -> bytes:
        return content[:4] if name.endswith("data/0") else content

    with pytest.raises(WeightsFileError, match="need 48 bytes of data/0, which has 4"):
        check_file(rewrite(path, tmp_path / "short.pt", shorten))
    # The pickle of the older format contains the sizes of the storages, too.
    torch.save({"w": torch.zeros(77777)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    huge = content.replace(struct.pack("<cHH", b"J", 77777 & 0xFFFF, 77777 >> 16), b"J\xff\xff\xff\x7f")
    assert huge != content
    path.write_bytes(huge)
    with pytest.raises(WeightsFileError, match=r"need 8,589,934,588 bytes, and the file has"):
        check_file(path)


def test_ambiguous_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(WEIGHTS, path)
    whole = path.read_bytes()
    for content in (
        whole[:-30],
        whole[:100] + whole,  # Python's zipfile accepts data before an archive
        whole + b"more",
        whole[:-2] + b"\x04\x00more",  # a comment
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsFileError, match="the table of contents is not at its end"):
            check_file(path)
    with zipfile.ZipFile(path, "w") as archive:  # readers may differ in which member they read
        archive.writestr("w/data.pkl", pickle.dumps({}, 2))
        archive.writestr("w/DATA.pkl", pickle.dumps({}, 2))
    with pytest.raises(WeightsFileError, match="damaged"):
        check_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("w/data.pkl", "w/data/0"):
            archive.writestr(name, pickle.dumps({}, 2))
    table = bytearray(path.read_bytes())
    second = table.rindex(b"PK\x01\x02")
    table[second + 42 : second + 46] = b"\0\0\0\0"  # the second member has the offset of the first
    path.write_bytes(bytes(table))
    with pytest.raises(WeightsFileError, match="members of the archive overlap"):
        check_file(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for content, said in (
        (b"", "is empty"),
        (b"nothing", "is damaged or not a file of weights"),
        (b"PK\x03\x04", "is damaged"),
        (pickle.dumps([1]), "not a file of weights"),
        (pickle.dumps(Call(os.mkdir, "x")), "would run posix.mkdir"),
        (b"\x80\x02" + b"\x96" + struct.pack("<Q", 1 << 40), "not a file of weights"),  # BYTEARRAY8
        (b"\x80\x02" + b"r" + struct.pack("<L", (1 << 32) - 1), "not a file of weights"),  # LONG_BINPUT
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsFileError, match=said):
            check_file(path)
    path.unlink()
    os.mkfifo(path)
    for suffix in (".pt", ".safetensors"):
        pipe = path.rename(path.with_suffix(suffix))
        with pytest.raises(WeightsFileError, match="is not a file"):
            check_file(pipe)
    (tmp_path / "w.safetensors").unlink()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 10**11) + b"{}")
    with pytest.raises(WeightsFileError, match="is not an intact safetensors file"):
        check_file(tmp_path / "w.safetensors")
    odd = tmp_path / "caf\udce9"  # a byte that is not UTF-8
    odd.mkdir()
    shutil.copy(tmp_path / "w.safetensors", odd)
    with pytest.raises(WeightsFileError, match="has a path that is not valid UTF-8; rename the file or its folder"):
        check_file(odd / "w.safetensors")


def test_many_tensors_are_counted(tmp_path: Path) -> None:
    torch.save({f"stages.{i}.weight": torch.zeros(1) for i in range(3000)}, tmp_path / "w.pt")
    assert count_elements(tmp_path / "w.pt") == 3000
