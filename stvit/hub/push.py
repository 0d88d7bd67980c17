"""Pushing folders to the Hugging Face Hub, comparing them with it, and downloading them."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file

from stvit.hub.card import CARD, CARD_MARK
from stvit.hub.files import HubError, file_sha256, list_files, own_files
from stvit.safe_text import redact
from stvit.weights.create import create_model
from stvit.weights.errors import describe_hub_error, is_network_error

PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar"}


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
    with _explained(repo_id, revision, outcome), own_files(folder, files) as own:
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
