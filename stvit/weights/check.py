"""Checks that a file of weights can be read without running code and without exhausting memory.

`check_file` looks at the structure of a file before anything is restored from it. Its memory is bounded by the size of
the file. Whatever passes can be given to `torch.load(weights_only=True)`, by this package, by timm or by Ultralytics.
"""

import io
import json
import math
import os
import pickle
import stat
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["WeightsFileError", "check_file", "class_names", "count_elements", "find_corruption"]

# Bytes of the pickle in a file, which holds the names and shapes. 100,000 tensors take about 20 MB. Restored, a pickle
# takes up to 60 times its size.
MAX_PICKLE = 32 << 20
MAX_KINDS = 10_000
# Bytes of an element of a storage, by the name of its class.
_ITEM_SIZES = {
    "UntypedStorage": 1,
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "ShortStorage": 2,
    "IntStorage": 4,
    "LongStorage": 8,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "FloatStorage": 4,
    "DoubleStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt2x4Storage": 1,
    "QUInt4x2Storage": 1,
}
# Functions and classes of a pickle that take numbers. Any other that is given one could allocate that much.
_TAKES_NUMBERS = (
    "torch._utils.",
    "torch._tensor.",
    "torch.serialization.",
    "torch.Size",
    "torch.device",
    "numpy.",
    "builtins.complex",
)


class WeightsFileError(ValueError):
    """Raised when a file of weights is damaged, or could exhaust the memory.

    Attributes:
        problem: What is wrong, as the rest of a sentence about the file.
    """

    def __init__(self, problem: str, path: Path | None = None) -> None:
        super().__init__(problem if path is None else f"{path} {problem}")
        self.problem = problem


def check_file(path: Path) -> None:
    """Checks that reading a file of weights takes no more memory than its size promises. Restores nothing from it.

    Raises:
        WeightsFileError: If the file is damaged, or could exhaust the memory.
        OSError: If it cannot be read.
    """
    count_elements(path)


def count_elements(path: Path) -> int:
    """Checks a file of weights as `check_file` does, and returns the number of elements of its tensors."""
    if path.suffix == ".safetensors":
        return _count_safetensors(path)
    return _inventory(path).elements


def class_names(path: Path) -> set[str]:
    """Checks a file of `torch.save` as `check_file` does, and returns the names of the classes and functions in it."""
    return set(_inventory(path).kinds)


def _inventory(path: Path) -> "_Inventory":
    try:
        # A pipe or a device would wait or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise WeightsFileError("is not a file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(4)
            if not start:
                raise WeightsFileError("is empty")
            return _check_archive(file, size) if start == b"PK\x03\x04" else _check_legacy(file, size)
    except WeightsFileError as error:
        raise WeightsFileError(error.problem, path) from error.__cause__


def _count_safetensors(path: Path) -> int:
    """The library checks that header and tensors fill the file exactly."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise WeightsFileError("is not a file", path)
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    except SafetensorError as error:
        raise WeightsFileError(f"is no whole safetensors file ({error})", path) from error


# ---------------------------------------------------------------------------------------------------------------------
# torch.save: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, and in it a pickle and a file per storage


def _check_archive(file: BinaryIO, size: int) -> "_Inventory":
    """Checks an archive of `torch.save`.

    Python's zipfile and the reader in PyTorch find the members of a malformed archive in different places. This one
    therefore takes only what `torch.save` writes: members that are stored, apart from each other, and listed at the
    very end of the file.
    """
    members = _members(file, size)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsFileError("is no file of torch.save: it must hold one data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    start, length = members[pickles[0]]
    if length > MAX_PICKLE:
        raise WeightsFileError(
            f"holds a pickle of {length:,} bytes, and {MAX_PICKLE:,} is the limit, since it takes many times its size "
            "in memory; save the tensors without what is beside them"
        )
    file.seek(start)
    inventory = _Inventory(io.BytesIO(file.read(length)))
    inventory.run()
    for key, wanted in inventory.storages.items():
        found = members.get(f"{folder}data/{key}".lower(), (0, 0))[1]
        if wanted > found:
            raise WeightsFileError(f"is damaged: its tensors need {wanted:,} bytes of data/{key}, which has {found:,}")
    return inventory


def _members(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Returns the place and the size of each member of an archive, by its name in lower case, as PyTorch looks it up.

    Raises:
        WeightsFileError: If the archive is not as `torch.save` writes it.
    """
    damaged = WeightsFileError("is damaged, or is no file of torch.save: its table of contents is not at its end")
    file.seek(max(0, size - 98))
    tail = file.read()
    end = len(tail) - 22
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
        raise damaged
    count, length, start = struct.unpack("<HLL", tail[end + 10 : end + 20])
    stop = size - 22
    if tail[end - 20 : end - 16] == b"PK\x06\x07" and end >= 76:  # the form for large archives, before the other
        stop -= 76
        if struct.unpack("<Q", tail[end - 12 : end - 4])[0] != stop or tail[end - 76 : end - 72] != b"PK\x06\x06":
            raise damaged
        count, length, start = struct.unpack("<QQQ", tail[end - 44 : end - 20])
    if start + length != stop:
        raise damaged
    file.seek(start)
    table = file.read(length)
    members: dict[str, tuple[int, int]] = {}
    spans = []
    packed_names = []
    place = 0
    for _ in range(count):
        if table[place : place + 4] != b"PK\x01\x02" or place + 46 > length:
            raise damaged
        flags, method = struct.unpack("<HH", table[place + 8 : place + 12])
        packed, unpacked, name_length, extra_length, comment_length = struct.unpack(
            "<LLHHH", table[place + 20 : place + 34]
        )
        (header,) = struct.unpack("<L", table[place + 42 : place + 46])
        name = table[place + 46 : place + 46 + name_length].decode("utf-8", "replace").lower()
        extra = table[place + 46 + name_length : place + 46 + name_length + extra_length]
        unpacked, packed, header = _large_sizes(extra, unpacked, packed, header)
        place += 46 + name_length + extra_length + comment_length
        if method != 0 or flags & 1 or packed != unpacked:
            packed_names.append(name)
            unpacked = packed
        file.seek(header)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise damaged
        begin = header + 30 + sum(struct.unpack("<HH", local[26:30]))
        if name in members or begin + unpacked > start:
            raise damaged
        members[name] = (begin, unpacked)
        spans.append((header, begin + unpacked))
    if any(name.endswith("/constants.pkl") for name in members):
        raise WeightsFileError("is a TorchScript program, give the checkpoint that it was made from")
    if packed_names:
        raise WeightsFileError(
            f"holds {packed_names[0]} compressed or encrypted, which torch.save never does, and unpacked it could fill "
            "the memory; if you trust the file, load it with torch.load and save it again with torch.save"
        )
    spans.sort()
    if any(one[1] > two[0] for one, two in zip(spans, spans[1:])):  # noqa: B905, RUF007
        raise WeightsFileError("is damaged: members of the archive overlap")
    return members


def _large_sizes(extra: bytes, unpacked: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and place of a member, from its extra field where they do not fit into 32 bits."""
    values: list[int] = []
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[place : place + 4])
        if kind == 1:
            field = extra[place + 4 : place + 4 + length]
            values = [value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            break
        place += 4 + length
    rest = iter(values)
    return (
        next(rest, unpacked) if unpacked == 0xFFFFFFFF else unpacked,
        next(rest, packed) if packed == 0xFFFFFFFF else packed,
        next(rest, header) if header == 0xFFFFFFFF else header,
    )


def _check_legacy(file: BinaryIO, size: int) -> "_Inventory":
    """Checks a file of PyTorch before 1.6: pickles of a number, a version, a system and the contents, then bytes."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE))
    first = _Inventory(stream)
    if first.run() != torch.serialization.MAGIC_NUMBER:
        if first.kinds:
            raise WeightsFileError(f"wants to run {', '.join(sorted(first.kinds))}, and no code of a file is run")
        raise WeightsFileError("is no file of weights, or a damaged one")
    for _ in range(2):
        _Inventory(stream).run()
    inventory = _Inventory(stream)
    inventory.run()
    wanted = sum(inventory.storages.values())
    if wanted > size:
        raise WeightsFileError(f"is damaged: its tensors need {wanted:,} bytes, and the file has {size:,}")
    return inventory


class _Storage:
    """Stands for the bytes of tensors."""

    def __init__(self, elements: int) -> None:
        self.elements = elements


class _Thing:
    """Stands for an object of any class: takes what a pickle gives it, and keeps nothing."""

    source = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Thing":
        if not cls.source.startswith(_TAKES_NUMBERS):
            for value in (*args, *kwargs.values()):
                if isinstance(value, int | float) and not isinstance(value, bool):
                    raise WeightsFileError(
                        f"wants to run {cls.source}({value}), and no code of a file of weights is run"
                    )
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _check_tensor(state)  # the state of a tensor was what it is made of

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


_PythonUnpickler: Any = pickle._Unpickler


class _Inventory(_PythonUnpickler):
    """Lists the tensors of a pickle. Imports nothing, calls nothing of it, and allocates nothing for a tensor.

    Python's own unpickler in place of the one in C, whose memory follows numbers in the file.

    Attributes:
        storages: Bytes of each storage, by its key.
        elements: Elements of all storages.
        kinds: Stand-ins for the classes and functions, by their names.
    """

    # This opcode allocates a number of bytes that the file names. torch.save writes protocol 2, which lacks it.
    dispatch = {  # noqa: RUF012  # as there
        key: value for key, value in _PythonUnpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, int] = {}
        self.elements = 0
        self.kinds: dict[str, type] = {}

    def run(self) -> Any:
        """Reads the pickle; returns what it holds, with stand-ins.

        Raises:
            WeightsFileError: If it is damaged, or a tensor is larger than its storage.
        """
        try:
            return self.load()
        except WeightsFileError:
            raise
        except Exception as error:  # what is no pickle raises nearly everything
            raise WeightsFileError("is no file of weights, or a damaged one") from error

    def find_class(self, module: str, name: str) -> Any:
        source = f"{module}.{name}"
        if source.startswith("torch._utils._rebuild_") and "tensor" in name:
            return _tensor
        if source == "torch._tensor._rebuild_from_type_v2":
            return _subclass_tensor
        if source not in self.kinds:
            if len(self.kinds) >= MAX_KINDS:
                raise WeightsFileError(f"is damaged: it names more than {MAX_KINDS:,} classes")
            self.kinds[source] = type("Thing", (_Thing,), {"source": source})
        return self.kinds[source]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # a class, in the older format
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            return _Thing()
        _, kind, key, _, elements = pid[:5]
        item_size = _ITEM_SIZES.get(getattr(kind, "source", "").rpartition(".")[2])
        if item_size is None or type(elements) is not int or elements < 0:
            raise WeightsFileError("is damaged: it holds a storage of an unknown kind")
        key = str(key)
        if key not in self.storages:
            self.elements += elements
        self.storages[key] = max(self.storages.get(key, 0), elements * item_size)
        return _Storage(elements)


def _tensor(*args: Any) -> _Thing:
    """Stands for the functions that make a tensor of its storage, its place there, its shape and more."""
    _check_tensor(args)
    return _Thing()


def _subclass_tensor(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Stands for the function that makes a tensor of a subclass by calling another one."""
    return function(*args)


def _check_tensor(args: Any) -> None:
    """Checks a tensor: a view of a few bytes with a huge size would fill the memory once it is copied."""
    if not isinstance(args, tuple) or len(args) < 4 or not isinstance(args[0], _Storage):
        return
    shape = args[2]
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise WeightsFileError("is damaged: it holds a tensor without a shape")
    if math.prod(shape) > args[0].elements:
        raise WeightsFileError(
            f"holds a tensor of shape {list(shape)} on a storage of {args[0].elements:,} elements: copied it could "
            "fill the memory; save a copy of it, tensor.clone()"
        )


def find_corruption(path: Path) -> str | None:
    """What is wrong with a file of weights at first sight, as the rest of a sentence; None if nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if size == 0:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return (
                "is a Git LFS pointer, the few lines that stand for the weights and not the weights (in a clone, `git "
                "lfs pull` fetches them)"
            )
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "is a web page, not weights"
        if path.suffix != ".safetensors":
            return None
        try:
            # The header's length, the header, and the tensors: https://github.com/huggingface/safetensors#format
            (length,) = struct.unpack("<Q", start[:8])
            file.seek(8)
            # safetensors refuses a header of more than 100 MB.
            header = json.loads(file.read(length) if length < min(size, 100_000_000) else b"")
            end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return f"is truncated or no safetensors at all ({size} bytes)"
    return f"is truncated: it has {size} bytes of {end}" if size < end else None
