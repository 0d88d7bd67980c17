"""Fingerprints of image datasets, to detect changes when a run is resumed."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from .data import Images
from .examples import ExampleDataset
from .shards import ShardDataset
from .structure import find_mismatch

MOST_CHANGES = 4
_LONGEST_LABEL = 1000
_DIGEST_BYTES = 16


def fingerprint(images: Images) -> dict[str, Any]:
    """Returns the class names of a run, and digests of its image paths and labels.

    Paths are relative to the dataset, so that it may be moved. The contents of the images do not count, but those of
    annotations do.

    Args:
        images: The training and validation sets.

    Returns:
        `class_names`, and for `train` and `val` a digest of all images in order (`all`) and, for each label, the number
        of images and their digest (`labels`), and the digest of masks or label maps (`contents`), or None if they are
        unknown. A wds/ dataset has only the digest of its description.
    """
    return {
        "class_names": images.class_names,
        "train": _describe(images.train),
        "val": _describe(images.val),
    }


def _describe(dataset: Any) -> dict[str, Any]:
    everything = _new_digest()
    by_label: dict[str, tuple[int, Any]] = {}
    for name, label in _names_and_labels(dataset):
        line = f"{label}\0{name}\n".encode("utf-8", "surrogatepass")  # file names may be invalid UTF-8
        everything.update(line)
        number, digest = by_label.get(label) or (0, _new_digest())
        digest.update(line)
        by_label[label] = number + 1, digest
    labels = {label: [number, digest.hexdigest()] for label, (number, digest) in by_label.items()}
    source: Any = getattr(dataset, "source", None)
    contents = source.contents_digest() if hasattr(source, "contents_digest") else None
    return {"all": everything.hexdigest(), "labels": labels, "contents": contents}


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _names_and_labels(dataset: Any) -> Iterator[tuple[str, str]]:
    """Yields the name and label of each image, without reading the image.

    The name may be empty.
    """
    if isinstance(dataset, ShardDataset):
        info = dataset.reader.split_info
        lengths = info.shard_lengths or [""] * len(info.filenames)
        yield from ((f"{name} {length}", "shards") for name, length in zip(info.filenames, lengths, strict=False))
        yield f"{info.num_samples} {info.alt_label}", "shards"
        return
    assert isinstance(dataset, ExampleDataset)
    source = dataset.source
    if hasattr(source, "names_and_labels"):  # of detection and segmentation: the label is empty
        pairs: Iterable[tuple[Any, Any]] = source.names_and_labels()
    elif hasattr(source, "paths_and_labels"):  # ours
        pairs = source.paths_and_labels()
    elif hasattr(source, "samples"):  # torchvision's folders
        pairs = ((_relative(path, source.root), label) for path, label in source.samples)
    elif hasattr(source, "targets") or hasattr(source, "labels"):  # torchvision's arrays
        labels = source.targets if hasattr(source, "targets") else source.labels
        pairs = (("", label) for label in (labels.tolist() if hasattr(labels, "tolist") else labels))
    elif isinstance(source, list):
        pairs = (("", label) for _, label in source)
    else:
        pairs = (("", "") for _ in range(len(source)))
    yield from ((str(name), str(label)) for name, label in pairs)


def _relative(path: str, root: str) -> str:
    try:
        return PurePath(path).relative_to(root).as_posix()
    except ValueError:
        return PurePath(path).name


def find_fingerprint_mismatch(value: Any) -> str | None:
    """Returns the first error in the structure of a fingerprint from a file, or None."""
    mismatch = find_mismatch(value, {split: {"all": "", "labels": {}} for split in ("train", "val")}, "data")
    if mismatch is not None:
        return mismatch
    names = value.get("class_names")
    if names is not None:
        mismatch = find_mismatch(names, [], "data.class_names") or find_mismatch(names, [""] * len(names), "data.names")
    for split in ("train", "val"):
        labels = value[split]["labels"]
        if not all(isinstance(label, str) and len(label) <= _LONGEST_LABEL for label in labels):
            return mismatch or f"data.{split}.labels has a key that is not a class number"
        mismatch = mismatch or find_mismatch(labels, {label: [0, ""] for label in labels}, f"data.{split}.labels")
        mismatch = mismatch or find_mismatch(value[split].get("contents"), None, f"data.{split}.contents")
    return mismatch


def find_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compares two fingerprints.

    Args:
        then: Fingerprint in a checkpoint.
        now: Fingerprint of the current images.

    Returns:
        A short description of each change. Each description names at most `MOST_CHANGES` classes.
    """
    names = now["class_names"]
    changes = _class_changes(then.get("class_names"), names)
    for split, title in (("train", "training"), ("val", "validation")):
        if then[split]["all"] == now[split]["all"]:
            contents = [value[split].get("contents") for value in (then, now)]
            if None not in contents and contents[0] != contents[1]:
                changes.append(f"{title} annotations: other masks, areas or label maps")
            continue
        before, after = then[split]["labels"], now[split]["labels"]
        totals = [sum(number for number, _ in labels.values()) for labels in (before, after)]
        found = []
        for label in sorted(before.keys() | after.keys(), key=lambda label: (len(label), label)):
            (number, digest), (new_number, new_digest) = (labels.get(label, [0, ""]) for labels in (before, after))
            if number == new_number and digest == new_digest:
                continue
            name = repr(names[int(label)]) if names and label.isdecimal() and int(label) < len(names) else label
            how = f"{number}, now {new_number}" if number != new_number else f"{number}, different or in another order"
            if label == "shards":
                how = "the list of shards in _info.json"
            found.append(f"of class {name} {how}" if label not in ("shards", "") else how)
        total = f" ({totals[0]}, now {totals[1]} in all)" if totals[0] != totals[1] and "shards" not in after else ""
        found = found or ["another order"]
        changes.append(f"{title} images{total}: {_some(found)}")
    return changes


def keep_contents(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Copies the digests of contents that the current fingerprint lacks.

    It lacks them if the files were not read (--no-check-data).

    Args:
        then: Fingerprint in a checkpoint.
        now: Fingerprint of the current images, which is changed.
    """
    for split in ("train", "val"):
        if now[split]["contents"] is None and then[split]["all"] == now[split]["all"]:
            now[split]["contents"] = then[split].get("contents")


def _class_changes(then: list[str] | None, now: list[str] | None) -> list[str]:
    if then == now:
        return []
    if then is None or now is None:
        return [f"the class names are {'known' if now else 'unknown'} now"]
    pairs = [f"{old!r} is now {new!r}" for old, new in zip(then, now, strict=False) if old != new]
    return [f"class names: {_some(pairs)}" if pairs else f"{len(then)} classes, now {len(now)}"]


def _some(items: list[str]) -> str:
    more = f" and {len(items) - MOST_CHANGES} more" if len(items) > MOST_CHANGES else ""
    return ", ".join(items[:MOST_CHANGES]) + more
