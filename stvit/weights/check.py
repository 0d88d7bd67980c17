"""Checks the structure of a file of weights before anything loads it.

A hostile file could run code or fill the memory. `check_file` needs memory proportional to the size of the file, and
restores nothing. A file that passes can be loaded with `torch.load(weights_only=True)`, by timm and Ultralytics too.
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

# Largest pickle in a file, in bytes. It holds names and shapes: about 20 MB for 100,000 tensors. Restored, it takes up
# to 60 times its size in memory.
MAX_PICKLE = 32 << 20
MAX_KINDS = 10_000
# Bytes per element, by the name of the storage class.
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
# Functions and classes that take numbers in a pickle. A number could make any other one allocate that much memory.
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
    """Raised when a file of weights is damaged or could fill the memory.

    Attributes:
        problem: Predicate of a sentence about the file, such as "is empty".
    """

    def __init__(self, problem: str, path: Path | None = None) -> None:
        super().__init__(problem if path is None else f"{path} {problem}")
        self.problem = problem


def check_file(path: Path) -> None:
    """Checks that a file of weights is intact and cannot fill the memory.

    Raises:
        WeightsFileError: If the file is damaged or could fill the memory.
        OSError: If the file cannot be read.
    """
    count_elements(path)


def count_elements(path: Path) -> int:
    """Checks a file like `check_file`; returns the number of elements."""
    if path.suffix == ".safetensors":
        return _count_safetensors(path)
    return _inventory(path).elements


def class_names(path: Path) -> set[str]:
    """Checks a file like `check_file`; returns the classes and functions it names."""
    return set(_inventory(path).kinds)


def _inventory(path: Path) -> "_Inventory":
    try:
        # Reading a pipe or a device could wait forever.
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
    """Returns the number of elements in a safetensors file.

    The library checks that header and tensors fill the file exactly.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise WeightsFileError("is not a file", path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise WeightsFileError("has a path that is not valid UTF-8; rename the file or its folder", path) from None
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    except SafetensorError as error:
        raise WeightsFileError(f"is not an intact safetensors file ({error})", path) from error


# ---------------------------------------------------------------------------------------------------------------------
# torch.save writes a zip archive (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT) with a pickle and a
# member for each storage


def _check_archive(file: BinaryIO, size: int) -> "_Inventory":
    """Checks an archive of `torch.save` and returns its inventory.

    Python's zipfile and PyTorch's reader find the members of a malformed archive in different places. This check
    therefore accepts only archives as `torch.save` writes them: uncompressed members that do not overlap, with the
    table of contents at the very end of the file.
    """
    members = _members(file, size)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsFileError("is not a file of torch.save: expected one data.pkl in the archive")
    folder = pickles[0].removesuffix("data.pkl")
    start, length = members[pickles[0]]
    if length > MAX_PICKLE:
        raise WeightsFileError(
            f"contains a pickle of {length:,} bytes, more than the limit of {MAX_PICKLE:,}; a pickle needs many times "
            "its size in memory; save only the tensors"
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
    """Returns the offset and size of each member of an archive, by lower-case name.

    PyTorch ignores case when it looks up a member.

    Raises:
        WeightsFileError: If the archive differs from archives of `torch.save`.
    """
    damaged = WeightsFileError("is damaged or not a file of torch.save: the table of contents is not at its end")
    file.seek(max(0, size - 98))
    tail = file.read()
    end = len(tail) - 22
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
        raise damaged
    count, length, start = struct.unpack("<HLL", tail[end + 10 : end + 20])
    stop = size - 22
    if tail[end - 20 : end - 16] == b"PK\x06\x07" and end >= 76:  # the record of archives above 4 GB
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
        raise WeightsFileError("is a TorchScript program; pass the checkpoint that it was made from")
    if packed_names:
        raise WeightsFileError(
            f"has a compressed or encrypted member, {packed_names[0]}, which torch.save never writes and which could "
            "fill the memory; if you trust the file, load it with torch.load and save it again with torch.save"
        )
    spans.sort()
    if any(one[1] > two[0] for one, two in zip(spans, spans[1:])):  # noqa: B905, RUF007
        raise WeightsFileError("is damaged: members of the archive overlap")
    return members


def _large_sizes(extra: bytes, unpacked: int, packed: int, header: int) -> tuple[int, int, int]:
    """Returns sizes and offset of a member; values above 32 bits are in `extra`."""
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
    """Checks a file of PyTorch before 1.6 and returns its inventory.

    The file has four pickles (a magic number, the version, the system and the contents), then the bytes of the tensors.
    """
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE))
    first = _Inventory(stream)
    if first.run() != torch.serialization.MAGIC_NUMBER:
        if first.kinds:
            raise WeightsFileError(f"would run {', '.join(sorted(first.kinds))}, and code in files is never run")
        raise WeightsFileError("is damaged or not a file of weights")
    for _ in range(2):
        _Inventory(stream).run()
    inventory = _Inventory(stream)
    inventory.run()
    wanted = sum(inventory.storages.values())
    if wanted > size:
        raise WeightsFileError(f"is damaged: its tensors need {wanted:,} bytes, and the file has {size:,}")
    return inventory


class _Storage:
    """Stand-in for a storage."""

    def __init__(self, elements: int) -> None:
        self.elements = elements


class _Thing:
    """Stand-in for an object of any class. Accepts all calls and keeps nothing."""

    source = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Thing":
        if not cls.source.startswith(_TAKES_NUMBERS):
            for value in (*args, *kwargs.values()):
                if isinstance(value, int | float) and not isinstance(value, bool):
                    raise WeightsFileError(
                        f"would run {cls.source}({value}), and code in files of weights is never run"
                    )
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _check_tensor(state)  # older files keep storage and shape of a tensor in its state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


_PythonUnpickler: Any = pickle._Unpickler


class _Inventory(_PythonUnpickler):
    """Lists the tensors of a pickle without running or allocating anything.

    This is Python's unpickler, because the one in C allocates whatever sizes the file states.

    Attributes:
        storages: Bytes of each storage, by key.
        elements: Number of elements of all storages.
        kinds: Stand-ins for classes and functions, by name.
    """

    # This opcode allocates as many bytes as the file states. Protocol 2, which torch.save writes, lacks it.
    dispatch = {  # noqa: RUF012  # as in the base class
        key: value for key, value in _PythonUnpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, int] = {}
        self.elements = 0
        self.kinds: dict[str, type] = {}

    def run(self) -> Any:
        """Reads the pickle and returns its contents with stand-ins.

        Raises:
            WeightsFileError: If the pickle is damaged, or a tensor is larger than its storage.
        """
        try:
            return self.load()
        except WeightsFileError:
            raise
        except Exception as error:  # an arbitrary file raises nearly any error
            raise WeightsFileError("is damaged or not a file of weights") from error

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
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # a class in the format before 1.6
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            return _Thing()
        _, kind, key, _, elements = pid[:5]
        item_size = _ITEM_SIZES.get(getattr(kind, "source", "").rpartition(".")[2])
        if item_size is None or type(elements) is not int or elements < 0:
            raise WeightsFileError("is damaged: it has a storage of an unknown type")
        key = str(key)
        if key not in self.storages:
            self.elements += elements
        self.storages[key] = max(self.storages.get(key, 0), elements * item_size)
        return _Storage(elements)


def _tensor(*args: Any) -> _Thing:
    """Stand-in for the functions that create a tensor."""
    _check_tensor(args)
    return _Thing()


def _subclass_tensor(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Stand-in for the function that creates a tensor of a subclass."""
    return function(*args)


def _check_tensor(args: Any) -> None:
    """Refuses a tensor that is larger than its storage.

    A copy of such a view could fill the memory.
    """
    if not isinstance(args, tuple) or len(args) < 4 or not isinstance(args[0], _Storage):
        return
    shape = args[2]
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise WeightsFileError("is damaged: it has a tensor without a shape")
    if math.prod(shape) > args[0].elements:
        raise WeightsFileError(
            f"has a tensor of shape {list(shape)} on a storage of {args[0].elements:,} elements, whose copy could fill "
            "the memory; save a copy of the tensor, tensor.clone()"
        )


def find_corruption(path: Path) -> str | None:
    """Returns the visible defect of a file, such as "is empty"; None if it has none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if size == 0:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return (
                "is a Git LFS pointer, a few lines of text in place of the weights (run `git lfs pull` in the clone to "
                "download them)"
            )
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "is a web page, not weights"
        if path.suffix != ".safetensors":
            return None
        try:
            # Length of the header, header, tensors: https://github.com/huggingface/safetensors#format
            (length,) = struct.unpack("<Q", start[:8])
            file.seek(8)
            # safetensors refuses headers above 100 MB.
            header = json.loads(file.read(length) if length < min(size, 100_000_000) else b"")
            end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return f"is truncated or not a safetensors file ({size} bytes)"
    return f"is truncated: it has {size} bytes of {end}" if size < end else None
