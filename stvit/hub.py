"""The Hugging Face Hub: a folder that timm loads, its card, and pushing it there.

A folder holds model.safetensors, config.json (timm's, with what is known of the weights below the key `stvit`) and the
card README.md. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and from the Hub `"hf-hub:org/name"`.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    errors,
    get_token,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from stvit.safe_text import code_span, escape_markdown, one_line, redact
from stvit.weights.config import read_config as check_config
from stvit.weights.create import create_model
from stvit.weights.errors import describe_hub_error, is_network_error, is_own_model

__all__ = [
    "HubError",
    "Pushed",
    "check_options",
    "check_push",
    "check_repo_id",
    "check_there",
    "check_token",
    "compare_files_with_hub",
    "compare_with_hub",
    "copy_file",
    "fetch",
    "file_sha256",
    "list_files",
    "mismatched_tensors",
    "model_card",
    "push",
    "read_config",
    "read_file",
    "remove_repeated_arguments",
    "save",
    "write_card",
]

CARD = "README.md"
# A card without it was written or changed by a person, and is left as it is.
CARD_MARK = "<!-- Written by stvit, and anew with each push. Remove this line to keep your own changes. -->"
CITATION = """@inproceedings{huang2023stvit,
  author    = {Huaibo Huang and Xiaoqiang Zhou and Jie Cao and Ran He and Tieniu Tan},
  title     = {Vision Transformer with Super Token Sampling},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}"""
CITATION_SECTION = f"""
## Citation

```bibtex
{CITATION}
```
"""
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar"}


class HubError(RuntimeError):
    """Raised when a push fails or when the uploaded files differ from the local ones.

    The message is one line without secrets. It says what failed, why, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Pushed:
    """What a push led to.

    Attributes:
        repo_id: 'org/name', whole.
        commit: Commit that holds the files.
        url: Of the commit, or of the pull request.
        changed: Whether anything was sent; False if all of it was there already.
        files: How many files were sent.
        kept_card: Whether the card there was left as it is, for a person has written or changed it.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool
    files: int
    kept_card: bool


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Writes model.safetensors and config.json, as `timm.create_model("local-dir:…")` and the Hub read them.

    Args:
        model: Made by `timm.create_model`.
        folder: Where to; what it holds of these names is replaced.
        label_names: Of the classes, in order.
        data_config: How images are prepared (`timm.data.resolve_data_config`); None for the model's own.
        details: What is known of the weights, for the card: `weights`, `source`, `metrics`, … (see `model_card`).

    Raises:
        OSError, safetensors.SafetensorError: If they cannot be written.
        ValueError: If an argument of the model cannot be written as JSON.
    """
    details, folder = dict(details or {}), Path(folder)
    save_for_hf(
        # safetensors takes contiguous tensors alone
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
        str(folder),
        model_config={
            **({"label_names": list(label_names)} if label_names else {}),
            **({"stvit": details} if details else {}),
            # Of the weights that this model began with, if any; not of these.
            "pretrained_cfg": {"license": details.get("license")},
        },
        safe_serialization=True,
        data_config=None if data_config is None else dict(data_config),
    )
    remove_repeated_arguments(folder)


def remove_repeated_arguments(folder: Path) -> None:
    """Removes the number of classes from the model's arguments in config.json, which states it beside them too.

    timm writes and reads both. transformers passes both to `timm.create_model`, which fails.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_args", {}).pop("num_classes", None) is not None:
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Its card


def model_card(folder: Path, name: str, *, license: str | None = None) -> str:
    """Returns the card of a folder: what it is, how to load it, what was measured and how, what to cite.

    Only the card of an STViT names and cites STViT. A model of timm loads without this package.

    Args:
        folder: With config.json and model.safetensors. Of its key `stvit` the card takes `weights` and `source`
            (sentences), `license`, `datasets` (ids of the Hub), and `metrics`: a list of `name`, `value` (percent),
            `dataset`, `split` and `how`.
        name: By which timm loads it, such as 'hf-hub:org/name'.
        license: Of the weights, as the Hub names it; None for what the details say, if anything.

    Raises:
        HubError: If config.json cannot be read.
    """
    config = read_config(folder)
    cfg, details = config["pretrained_cfg"], config.get("stvit", {})
    metrics = details.get("metrics", [])
    architecture, title = config["architecture"], Path(name.partition(":")[2]).resolve().name
    is_ours = is_own_model(architecture)
    license = license or details.get("license")
    data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["stvit", "super-token-attention"] if is_ours else [])],
        datasets=details.get("datasets"),
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=re.sub(r"[^\w.-]+", "-", metric["dataset"]),
                dataset_name=metric["dataset"],
                dataset_split=metric.get("split"),
                metric_type="accuracy",
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
            for metric in metrics
        ]
        or None,
    )
    quoted = json.dumps(one_line(name), ensure_ascii=False)  # the backslashes of a Windows path, too
    names = config.get("label_names")
    size = "x".join(str(n) for n in cfg["input_size"])
    facts = [
        f"architecture: {code_span(architecture)}, {_parameters(folder):.2f} M parameters",
        f"images: {escape_markdown(size)}, crop {escape_markdown(cfg.get('crop_pct'))}, "
        f"{escape_markdown(cfg.get('interpolation'))}, mean {_numbers(cfg['mean'])}, standard deviation "
        f"{_numbers(cfg['std'])}",
        f"classes: {escape_markdown(config['num_classes'])}{_some(list(names)) if names else ''}",
        *([f"weights: {escape_markdown(details['weights'])}"] if details.get("weights") else []),
        *([f"made from: {escape_markdown(details['source'])}"] if details.get("source") else []),
        f"sha256 of model.safetensors: `{file_sha256(folder / 'model.safetensors')}`",
        *([] if license else ["license: not stated by their owner"]),
    ]
    rows = [
        f"| {escape_markdown(m['name'])} | {m['value']:.2f} % | {escape_markdown(m['dataset'])} | "
        f"{escape_markdown(m['how'])} |"
        for m in metrics
    ]
    measured = "\n".join(["| | | on | measured |", "|---|---:|---|---|", *rows] if metrics else [])
    text = f"""
{CARD_MARK}

# {escape_markdown(title)}

{"A Super Token Vision Transformer" if is_ours else "An image classifier"} for timm.

```python
{"import stvit  # registers the architecture in timm" + chr(10) if is_ours else ""}import timm
import torch

model = timm.create_model({quoted}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
backbone = timm.create_model({quoted}, pretrained=True, features_only=True)
```

{chr(10).join(f"- {fact}" for fact in facts)}

## Results

{measured or "Not measured."}
{CITATION_SECTION if is_ours else ""}"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def write_card(folder: Path, name: str, *, license: str | None = None) -> bool:
    """Writes the card of a folder, unless a person has written or changed the one that is there.

    Args:
        folder: See `model_card`, for `name` and `license` too.
        name: By which timm loads it.
        license: Of the weights.

    Returns:
        Whether it was written.
    """
    path = folder / CARD
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8"):
        return False
    path.write_text(model_card(folder, name, license=license), encoding="utf-8")
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        HubError: If it cannot be read, is not one of timm's, or a field has a wrong type or range.
    """
    path = folder / "config.json"
    try:
        check_config(path)
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config.get("pretrained_cfg"), dict):
            raise ValueError("it has no architecture and pretrained_cfg, as timm writes them")
    except (OSError, KeyError, ValueError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise HubError(f"cannot read {path}: {problem}; make the folder anew") from error
    config["num_classes"] = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    return config


def _parameters(folder: Path) -> float:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(buffers)) / 1e6


def _some(names: Sequence[str]) -> str:
    """Returns the first class names, in parentheses. They may come from anybody's folders."""
    return f" ({', '.join(map(code_span, names[:10]))}{', …' if len(names) > 10 else ''})"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


# ---------------------------------------------------------------------------------------------------------------------
# Pushing it


def check_push(folder: Path, repo_id: str, *, pickles: bool = False) -> dict[str, int]:
    """The files that a push would send, and their sizes in bytes; asks nobody.

    Args:
        folder: What to push.
        repo_id: 'org/name', or 'name' for one's own.
        pickles: Whether files of Python's pickle format are meant to be there.

    Raises:
        HubError: If the name is none, or the folder is empty, holds a link, or holds a pickle that is not meant to be
            there.
    """
    check_repo_id(repo_id)
    files = list_files(folder)
    if not files:
        raise HubError(f"{folder} holds no files to push")
    unsafe = [path for path in files if Path(path).suffix in PICKLES]
    if unsafe and not pickles:
        raise HubError(f"{folder} holds {', '.join(unsafe)}: pickles are not pushed, move them away")
    return files


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository.

    Raises:
        HubError: If it is none.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository: give it as ORG/NAME ({error})") from error


def check_options(revision: str | None, tag: str | None, create_pr: bool, license: str | None = None) -> None:
    """Refuses what a push cannot do, before anything is made or asked.

    Raises:
        HubError: If the options contradict each other, or a name is none.
    """
    if create_pr and (tag or revision):
        raise HubError("a pull request goes to main and has no tag: leave revision and tag out, or the pull request")
    for kind, name in (("revision", revision), ("tag", tag)):
        if name is not None and not re.fullmatch(r"(?!.*(\.\.|//|/$|\.$))[A-Za-z0-9_][A-Za-z0-9_./+-]*", name):
            raise HubError(f"{kind} {name!r} is no name of a branch or tag: use letters, digits and . _ - / +")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise HubError(f"license {license!r} is no identifier of the Hub's, such as mit, apache-2.0 or other")


def check_there(repo_id: str, revision: str | None) -> None:
    """Refuses a repository of a model that cannot be had.

    Raises:
        HubError: If it, or the revision, is missing or out of reach.
    """
    try:
        HfApi(library_name="stvit").model_info(repo_id, revision=revision)
    except Exception as error:  # of any of the libraries below
        why = describe_hub_error(error, repo_id, revision, from_cache=False)
        raise HubError(f"cannot take {repo_id} (revision {revision or 'main'}): {why}") from error


def check_token() -> None:
    """Refuses to go on without a token of the environment or the login.

    Raises:
        HubError: If there is none.
    """
    if not get_token():
        raise HubError("no token: log in with `hf auth login`, or set HF_TOKEN, of an account that may write there")


def list_files(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each file of a folder, by its path there with slashes.

    Hidden files and folders, whose names begin with a dot, do not count. The folder itself may be a link. A hard link
    looks like any other file and cannot be recognized.

    Raises:
        HubError: If something in the folder is a link or is neither a file nor a folder, or cannot be read.
    """
    files = {}
    try:
        for place, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in folders + [name for name in names if not name.startswith(".")]:
                path = Path(place, name)
                relative = path.relative_to(folder).as_posix()
                _refuse_link(folder, relative)
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    files[relative] = path.lstat().st_size
                elif not stat.S_ISDIR(mode):
                    raise _not_a_file(folder, relative)
    except OSError as error:
        raise HubError(f"cannot read {folder}: {error.strerror or error}") from error
    return dict(sorted(files.items()))


def copy_file(folder: Path, name: str, target: Path, *, link: bool = False) -> None:
    """Copies a file of a folder and follows no link on the way, even if somebody puts one there meanwhile.

    Args:
        folder: The folder, which may itself be a link.
        name: Path of the file in the folder, with slashes.
        target: Path of the copy. Its folder is made if it is missing.
        link: Whether a hard link is as good as a copy. It is for a file that programs replace but never write to.

    Raises:
        HubError: If the file or a folder on the way is a link, or it is not a file.
        OSError: If it cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _refuse_link(folder, name)
    with _opened_file(folder, name) as (descriptor, parent):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_a_file(folder, name)
        if link and parent is not None:
            with suppress(OSError):  # another file system, or one without hard links
                os.link(PurePosixPath(name).name, target, src_dir_fd=parent, follow_symlinks=False)
                if os.path.samestat(target.lstat(), os.fstat(descriptor)):
                    return
                target.unlink()
        with open(descriptor, "rb", closefd=False) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


@contextmanager
def _opened_file(folder: Path, name: str) -> Iterator[tuple[int, int | None]]:
    """Opens a file without following links below the folder; gives its descriptor and that of the folder it is in.

    Windows opens no folders: there the second is None, and only `_refuse_link` looks for links.
    """
    if os.open not in os.supports_dir_fd:
        descriptor = os.open(folder / name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            yield descriptor, None
        finally:
            os.close(descriptor)
        return
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        *folders, last = PurePosixPath(name).parts
        try:
            for part in folders:
                opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
            # Without O_NONBLOCK a pipe would wait for somebody to write to it.
            opened.append(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
        except OSError:
            _refuse_link(folder, name)  # where a link is the reason, its error says more
            raise
        yield opened[-1], opened[-2]
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _refuse_link(folder: Path, name: str) -> None:
    """Refuses a link at any place of a path below a folder.

    Raises:
        HubError: If there is one.
    """
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink() or getattr(os.path, "isjunction", os.path.islink)(path):
            raise HubError(
                f"{path.relative_to(folder).as_posix()} in {folder} is a link to {os.readlink(path)}: links are not "
                "followed, because they can publish files from outside the folder; replace it by a copy of the file, "
                "or copy the whole folder with `cp -RL` (a snapshot of the Hub's cache, for example)"
            )


def _not_a_file(folder: Path, name: str) -> HubError:
    return HubError(f"{name} in {folder} is not a file but a pipe, a socket or a device: remove it")


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _own_files(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Copies files to a private folder for a push, so that no other program can replace one by a link meanwhile."""
    try:
        private = TemporaryDirectory(dir=folder.resolve().parent, prefix=f".{folder.resolve().name}-")
    except OSError:  # nothing can be written there
        private = TemporaryDirectory(prefix="stvit-")
    with private as place:
        for name in names:
            copy_file(folder, name, Path(place, name), link=True)
        yield Path(place)


def push(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    pickles: bool = False,
    delete: Sequence[str] = (),
    repo_type: str = "model",
) -> Pushed:
    """Pushes the files of a folder in one commit, unless they are there already.

    No link is followed. All files are set aside first, so that what is checked is what is sent.

    The token is that of the environment (HF_TOKEN) or of the login. Files travel first, the branch is made next, and
    the commit comes last: until it stands, no file of the repository is changed, and a push that was cut off can be
    repeated. What may be left of it is a new repository, empty, or a new branch, as its beginning.

    Args:
        folder: What to push.
        repo_id: 'org/name', or 'name' for one's own; made if it is missing.
        revision: Branch, made if it is missing; None for main.
        tag: Tag to put on the commit. One that is there must stand there already: tags do not move.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of committing.
        message: Of the commit.
        pickles: Whether files of Python's pickle format are meant to be there.
        delete: Patterns of files to delete there, as for `Path.match`, that are not in the folder.
        repo_type: 'model', or 'space' for a page of Gradio.

    Raises:
        HubError: If the folder holds a link or something else that is not pushed, or the push fails.
    """
    files = check_push(folder, repo_id, pickles=pickles)
    check_options(revision, tag, create_pr)
    check_token()
    api = HfApi(library_name="stvit")
    of_type: dict[str, Any] = {"repo_type": repo_type}
    outcome = f"{repo_id} is as it was, and the same can be pushed again"
    with _explained(repo_id, revision, outcome), _own_files(folder, files) as own:
        repo_id = _prepare_repository(api, repo_id, private, repo_type)
        refs = api.list_repo_refs(repo_id, **of_type)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        branch = revision or "main"
        if branch in tags or (branch not in branches and re.fullmatch("[0-9a-f]{40}", branch)):
            raise HubError(f"revision {branch!r} of {repo_id} is a tag or a commit, which do not move: give a branch")
        is_new = branch not in branches
        head = branches.get("main" if is_new else branch)  # where a new branch begins
        there = _files_there(api, repo_id, head, repo_type)
        sent = _changed(own, files, there)
        kept_card = CARD in sent and CARD in there and _is_own_card(api, repo_id, head, own / CARD, repo_type)
        if kept_card:
            sent.remove(CARD)
        gone = [path for path in there if path not in files and any(Path(path).match(pattern) for pattern in delete)]
        if tag in tags and (sent or gone or tags[tag] != head):
            raise HubError(
                f"tag {tag!r} of {repo_id} is on another commit, {tags[tag]}: choose another tag, tags do not move"
            )
        if head is not None and not sent and not gone:
            commit, url = head, _commit_url(api, repo_id, head, repo_type)
            if is_new:
                api.create_branch(repo_id, branch=branch, revision=head, **of_type)
        else:
            commit, url = _commit(api, repo_id, own, sent, gone, branch, head, is_new, message, create_pr, repo_type)
    if tag and tag not in tags:
        with _explained(repo_id, revision, f"the files are there as commit {commit}, without the tag"):
            api.create_tag(repo_id, tag=tag, revision=commit, **of_type)
    return Pushed(repo_id, commit, url, bool(sent or gone), len(sent), kept_card)


def compare_with_hub(folder: Path, repo_id: str, commit: str) -> int:
    """Loads a pushed model back by its commit, into a cache of its own, and compares every tensor and checksum.

    Args:
        folder: What was pushed.
        repo_id: 'org/name'.
        commit: Commit of the push.

    Returns:
        How many tensors are equal: all of them.

    Raises:
        HubError: If one differs, or it cannot be loaded.
    """
    name = f"hf-hub:{repo_id}@{commit}"
    with TemporaryDirectory() as cache:
        try:
            model = create_model(name, pretrained=True, verify=True, cache_dir=cache)
        except (OSError, RuntimeError, ValueError) as error:
            raise HubError(f"pushed, but it does not load back: {error}") from error
        here, there = load_file(folder / "model.safetensors"), model.state_dict()
        wrong = mismatched_tensors(here, there)
    if wrong:
        raise HubError(f"pushed, but {len(wrong)} tensors of {name} read back otherwise: {', '.join(wrong[:5])}")
    return len(here)


def compare_files_with_hub(folder: Path, pushed: Pushed, repo_type: str) -> int:
    """Compares each file's checksum with the Hub's record of the commit.

    Args:
        folder: What was pushed.
        pushed: What the push led to.
        repo_type: As for `push`.

    Returns:
        How many files are equal: all of them, but for a card that was left as it is.

    Raises:
        HubError: If one differs, or the Hub cannot be asked.
    """
    with _explained(pushed.repo_id, pushed.commit, "the files were sent, and could not be compared"):
        there = _files_there(HfApi(library_name="stvit"), pushed.repo_id, pushed.commit, repo_type)
    files = [path for path in list_files(folder) if not (pushed.kept_card and path == CARD)]
    wrong = _changed(folder, files, there)
    if wrong:
        raise HubError(f"pushed, but {', '.join(wrong[:5])} of {pushed.repo_id} are otherwise there: push again")
    return len(files)


def fetch(repo_id: str, revision: str | None, folder: Path, patterns: Sequence[str]) -> str:
    """Downloads files of a repository to a folder, and compares each with the Hub's record of its checksum.

    Args:
        repo_id: 'org/name'.
        revision: Branch, tag or commit; None for main.
        folder: Where to.
        patterns: Which files, as for `fnmatch`.

    Returns:
        The commit they are of.

    Raises:
        HubError: If they cannot be had, or differ from the record.
    """
    check_repo_id(repo_id)
    api = HfApi(library_name="stvit")
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=list(patterns))
        wrong = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder).mismatches
    except Exception as error:  # of any of the libraries below
        why = describe_hub_error(error, repo_id, revision, from_cache=False)
        raise HubError(f"cannot download {repo_id} (revision {revision or 'main'}): {why}") from error
    if wrong:
        files = ", ".join(file["path"] for file in wrong)
        raise HubError(f"{files} of {repo_id} differ from the Hub's record, bits have flipped: download again")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
    return str(commit)


def read_file(repo_id: str, name: str, revision: str | None = None) -> bytes | None:
    """What a file of a repository holds; None if there is no such repository, revision or file, or no way to ask."""
    api = HfApi(library_name="stvit")
    with TemporaryDirectory() as cache:
        try:
            # Asked first, for a download tries a Hub that is down again and again.
            api.model_info(repo_id, revision=revision, timeout=10)
            path = api.hf_hub_download(repo_id, name, revision=revision, cache_dir=cache)
        except Exception:  # of any of the libraries below; who needs the file asks again
            return None
        return Path(path).read_bytes()


def mismatched_tensors(here: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not on both sides the same, dtype and every element."""
    return [
        key
        for key in here.keys() | there.keys()
        if key not in here
        or key not in there
        or here[key].dtype != there[key].dtype
        or not torch.equal(here[key], there[key])
    ]


def _prepare_repository(api: HfApi, repo_id: str, private: bool, repo_type: str) -> str:
    """The whole id of the repository, which is made if it is missing."""
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info: Any = api.repo_info(repo_id, repo_type=repo_type)
    except errors.RepositoryNotFoundError:
        info = None
    if info is None:
        of_space: dict[str, Any] = {"space_sdk": "gradio"} if repo_type == "space" else {}
        return api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, **of_space).repo_id
    if private and not info.private:
        raise HubError(
            f"{repo_id} is there and public: leave private out, choose another name, or make it private on the Hub"
        )
    return repo_id


def _files_there(api: HfApi, repo_id: str, commit: str | None, repo_type: str) -> dict[str, str]:
    """Hash of each file of a commit: sha256 of those in LFS, else Git's."""
    if commit is None:
        return {}
    return {
        entry.path: entry.blob_id if entry.lfs is None else entry.lfs.sha256
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
        if isinstance(entry, RepoFile)
    }


def _is_own_card(api: HfApi, repo_id: str, commit: str | None, card: Path, repo_type: str) -> bool:
    """Whether the card there is a person's work, and the one to push is not."""
    if CARD_MARK not in card.read_text(encoding="utf-8"):
        return False
    with TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, CARD, revision=commit, cache_dir=cache, repo_type=repo_type)
        return CARD_MARK not in Path(path).read_text(encoding="utf-8")


def _commit_url(api: HfApi, repo_id: str, commit: str | None, repo_type: str) -> str:
    return redact(f"{api.endpoint}/{'spaces/' if repo_type == 'space' else ''}{repo_id}/commit/{commit}")


def _changed(folder: Path, paths: Iterable[str], there: Mapping[str, str]) -> list[str]:
    """Those files of a folder that the Hub does not have as they are here, by its hashes."""
    return [path for path in paths if there.get(path) != _hash_as(folder / path, there.get(path))]


def _hash_as(path: Path, there: str | None) -> str | None:
    """A file's hash, of the kind that the Hub has of it."""
    if there is None:
        return ""
    if len(there) == 64:
        return file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    sent: Sequence[str],
    gone: Sequence[str],
    branch: str,
    head: str | None,
    is_new: bool,
    message: str | None,
    create_pr: bool,
    repo_type: str,
) -> tuple[str, str]:
    """Commit and its URL. Onto `head` alone: where somebody else has pushed meanwhile nothing is mixed with theirs."""
    of_type: dict[str, Any] = {"repo_type": repo_type}
    additions = [CommitOperationAdd(path, str(folder / path)) for path in sent]
    # Of a branch that is not there yet main takes its place while the files travel.
    api.preupload_lfs_files(repo_id, additions, revision="main" if is_new else branch, create_pr=create_pr, **of_type)
    if is_new:
        api.create_branch(repo_id, branch=branch, revision=head, **of_type)
    try:
        info = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path) for path in gone)],
            commit_message=message or "Add model",
            revision=branch,
            create_pr=create_pr,
            parent_commit=head,
            **of_type,
        )
    except Exception as error:
        if create_pr:
            raise
        now = _head_after(api, repo_id, branch, head, error, repo_type)
        if now != head:
            if not _changed(folder, sent, _files_there(api, repo_id, now, repo_type)):
                return now, _commit_url(api, repo_id, now, repo_type)  # it stands, and only the answer was lost
        elif is_new:
            with suppress(Exception):  # what was wrong with the commit says more
                api.delete_branch(repo_id, branch=branch, **of_type)
        raise
    return info.oid, info.pr_url or info.commit_url


def _head_after(api: HfApi, repo_id: str, branch: str, head: str | None, error: Exception, repo_type: str) -> str:
    """The branch's commit after a commit that failed, or whose answer was lost.

    Raises:
        HubError: If the Hub cannot be asked.
    """
    try:
        branches = api.list_repo_refs(repo_id, repo_type=repo_type).branches
        return next(ref.target_commit for ref in branches if ref.name == branch)
    except Exception:
        if not is_network_error(error):
            return str(head)  # the Hub has refused it, in an answer
        why = describe_hub_error(error, repo_id, branch, from_cache=False)
        raise HubError(
            f"cannot push to {repo_id}: {why}; whether the commit arrived all the same cannot be seen: push again, "
            "which sends nothing if it has"
        ) from error


@contextmanager
def _explained(repo_id: str, revision: str | None, outcome: str) -> Iterator[None]:
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # of any of the libraries below
        why = describe_hub_error(error, repo_id, revision, from_cache=False)
        raise HubError(f"cannot push to {repo_id}: {why}; {outcome}") from error
