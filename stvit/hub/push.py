"""Pushes folders to the Hub, compares them with it, and downloads them."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors.torch import load_file

from stvit.hub.card import CARD, is_edited
from stvit.hub.files import HubError, list_files, private_copy
from stvit.hub.folder import WEIGHTS
from stvit.safe_text import redact
from stvit.weights.create import create_model
from stvit.weights.errors import describe_hub_error, is_network_error
from stvit.weights.source import Source

__all__ = [
    "Pushed",
    "Repository",
    "check_license",
    "check_push_options",
    "check_repo_id",
    "check_token",
    "compare_model_with_hub",
    "mismatched_tensors",
    "push",
]

PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar"}
_REF_NAME = re.compile(r"(?!.*(\.\.|//|/$|\.$))[A-Za-z0-9_][A-Za-z0-9_./+-]*")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo_id: Id of the repository, 'org/name'.
        commit: Commit with the files.
        url: Address of the commit, or of the pull request.
        changed: Whether a commit was created. False if the repository already had all files.
        files: Number of uploaded files.
        kept_card: Whether the card on the Hub was kept, because a person wrote or edited it.
    """

    repo_id: str
    commit: str
    url: str
    changed: bool
    files: int
    kept_card: bool


def push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str = "Add model",
    allow_pickles: bool = False,
    delete: Sequence[str] = (),
    repo_type: Literal["model", "space"] = "model",
) -> Pushed:
    """Pushes the files of a folder in one commit.

    Files that the repository already has are not uploaded. Without a change there is no commit.

    Links are refused. The files are copied to a private folder first (as hard links), so that the uploaded files are
    the checked files. `Repository.upload` explains the order of the steps.

    Args:
        folder: Folder to push.
        repo_id: Id of the repository, 'org/name', or 'name' in your own namespace. A missing repository is created.
        revision: Branch; None for main. A missing branch is created.
        tag: Tag for the commit. An existing tag is never moved.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of committing to main.
        message: Commit message.
        allow_pickles: Whether the folder may contain files in Python's pickle format.
        delete: Patterns of files to delete in the repository if the folder does not contain them, as for `fnmatch`.
        repo_type: 'model', or 'space' for a Gradio page.

    Raises:
        HubError: If the folder contains a link, a pickle or nothing at all, or if the push fails.
    """
    repository = Repository(repo_id, repo_type)
    files = _check_files(Path(folder), allow_pickles)
    check_push_options(revision, tag, create_pr)
    check_token()
    with repository._explain_failure(revision), private_copy(Path(folder), files) as copy:
        return repository.upload(
            copy, revision=revision, tag=tag, private=private, create_pr=create_pr, message=message, delete=delete
        )


class Repository:
    """A repository on the Hugging Face Hub.

    It is accessed with the token of the environment (HF_TOKEN) or of the login.

    Attributes:
        repo_id: Id of the repository, 'org/name', or 'name' in the namespace of the token.
        repo_type: 'model' or 'space'.
        api: Client of huggingface_hub.

    Raises:
        HubError: If the id is not valid.
    """

    def __init__(self, repo_id: str, repo_type: Literal["model", "space"] = "model") -> None:
        check_repo_id(repo_id)
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.api = HfApi(library_name="stvit")

    def upload(
        self,
        folder: Path,
        *,
        revision: str | None = None,
        tag: str | None = None,
        private: bool = False,
        create_pr: bool = False,
        message: str = "Add model",
        delete: Sequence[str] = (),
    ) -> Pushed:
        """Pushes a folder that no other program writes to.

        For any other folder, call `stvit.hub.push`.

        The files are uploaded first, then the branch is created, and the commit comes last. An interrupted push thus
        changes no file of the repository, and the same push can be repeated. It may leave an empty repository or a new
        branch behind.

        Args:
            folder: Folder to push. Hidden files are skipped.
            revision: Branch. `stvit.hub.push` documents all arguments.
            tag: Tag for the commit.
            private: Whether a new repository is private.
            create_pr: Whether to open a pull request.
            message: Commit message.
            delete: Patterns of files to delete.

        Raises:
            HubError: If the folder contains a link, or if the push fails.
        """
        with self._explain_failure(revision):
            self._create(private)
            refs = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
            tags = {ref.name: ref.target_commit for ref in refs.tags}
            branch = self._find_branch(revision or "main", refs)
            change = self._find_change(folder, branch.head, delete)
            if tag in tags and (change or tags[tag] != branch.head):
                raise HubError(
                    f"tag {tag!r} of {self.repo_id} is on another commit, {tags[tag]}; choose another tag, as tags "
                    "are never moved"
                )
            if change or branch.head is None:
                commit, url = self._commit(change, branch, message, create_pr)
            else:
                commit, url = branch.head, self._commit_url(branch.head)
                if branch.is_new:
                    self.api.create_branch(self.repo_id, branch=branch.name, revision=commit, repo_type=self.repo_type)
        if tag and tag not in tags:
            with self._explain_failure(revision, f"the files were pushed as commit {commit}, but the tag is missing"):
                self.api.create_tag(self.repo_id, tag=tag, revision=commit, repo_type=self.repo_type)
        return Pushed(self.repo_id, commit, url, bool(change), len(change.additions), change.keeps_card)

    def compare_files(self, folder: Path, pushed: Pushed) -> int:
        """Compares the checksum of each pushed file with the Hub's record.

        Returns:
            Number of equal files: all files, except a card that was kept.

        Raises:
            HubError: If a file differs or is missing, or if the Hub does not answer.
        """
        files = list_files(folder)
        with self._explain_failure(pushed.commit, "the files were pushed, but not compared"):
            wrong = self._find_changed(folder, pushed.commit)
        if pushed.kept_card:
            files.pop(CARD, None)
        wrong = [name for name in wrong if name in files]
        if wrong:
            raise HubError(f"pushed, but {', '.join(wrong[:5])} in {pushed.repo_id} differ from the folder; push again")
        return len(files)

    def download(self, folder: Path, patterns: Sequence[str], revision: str | None = None) -> str:
        """Downloads files to a folder and compares their checksums with the Hub's record.

        Args:
            folder: Folder to write.
            patterns: Patterns of the files, as for `fnmatch`.
            revision: Branch, tag or commit; None for main.

        Returns:
            Commit of the files.

        Raises:
            HubError: If the download fails or a file differs from the record.
        """
        try:
            commit = self._info(revision).sha
            self.api.snapshot_download(
                self.repo_id, revision=commit, local_dir=folder, allow_patterns=list(patterns), repo_type=self.repo_type
            )
            found = self.api.verify_repo_checksums(
                self.repo_id, revision=commit, local_dir=folder, repo_type=self.repo_type
            )
        except Exception as error:  # of any library below
            why = describe_hub_error(error, self.repo_id, revision, from_cache=False)
            raise HubError(f"cannot download {self.repo_id} (revision {revision or 'main'}): {why}") from error
        if found.mismatches:
            files = ", ".join(file["path"] for file in found.mismatches)
            raise HubError(f"{files} of {self.repo_id} differ from the Hub's record of their checksums; download again")
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes about the download
        return str(commit)

    def read_file(self, name: str, revision: str | None = None) -> bytes | None:
        """Returns the contents of a file; None if it cannot be read.

        The file, the revision or the repository may be missing, or the Hub may not answer.
        """
        with TemporaryDirectory() as cache:
            try:
                # The download alone would try again and again if the Hub is down.
                self._info(revision, timeout=10)
                path = self.api.hf_hub_download(
                    self.repo_id, name, revision=revision, cache_dir=cache, repo_type=self.repo_type
                )
            except Exception:  # of any library below
                return None
            return Path(path).read_bytes()

    def check_exists(self, revision: str | None = None) -> None:
        """Checks that the repository and the revision exist and can be read.

        Raises:
            HubError: If one is missing or out of reach.
        """
        try:
            self._info(revision)
        except Exception as error:  # of any library below
            why = describe_hub_error(error, self.repo_id, revision, from_cache=False)
            raise HubError(f"cannot read {self.repo_id} (revision {revision or 'main'}): {why}") from error

    def _info(self, revision: str | None = None, timeout: float | None = None) -> Any:
        return self.api.repo_info(self.repo_id, revision=revision, timeout=timeout, repo_type=self.repo_type)

    def _create(self, private: bool) -> None:
        """Creates the repository if it is missing, and completes its id."""
        if "/" not in self.repo_id:
            self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
        info: Any = None
        with suppress(errors.RepositoryNotFoundError):  # the chain of a later error must not contain this one
            info = self._info()
        if info is None:
            sdk = "gradio" if self.repo_type == "space" else None
            self.api.create_repo(self.repo_id, private=private, exist_ok=True, repo_type=self.repo_type, space_sdk=sdk)
        elif private and not info.private:
            raise HubError(
                f"{self.repo_id} already exists and is public; push without private, choose another name, or make it "
                "private on the Hub"
            )

    def _find_branch(self, name: str, refs: Any) -> "_Branch":
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        if name in {ref.name for ref in refs.tags} or (name not in heads and _COMMIT.fullmatch(name)):
            raise HubError(
                f"revision {name!r} of {self.repo_id} is a tag or a commit, which cannot receive files; pass a branch"
            )
        is_new = name not in heads
        return _Branch(name, heads.get("main" if is_new else name), is_new)

    def _find_change(self, folder: Path, head: str | None, delete: Sequence[str]) -> "_Change":
        """Compares a folder with a commit."""
        additions = self._find_changed(folder, head)
        if head is None:
            return _Change(folder, additions)
        keeps_card = CARD in additions and not is_edited(folder / CARD) and self._has_edited_card(head)
        if keeps_card:
            additions.remove(CARD)
        gone: list[str] = []
        if delete:
            there = self.api.list_repo_files(self.repo_id, revision=head, repo_type=self.repo_type)
            gone = [
                name for name in filter_repo_objects(there, allow_patterns=list(delete)) if not (folder / name).exists()
            ]
        return _Change(folder, additions, gone, keeps_card)

    def _find_changed(self, folder: Path, commit: str | None) -> list[str]:
        """Returns the files of a folder that a commit lacks or has with another checksum."""
        files = list_files(folder)
        if commit is None:
            return list(files)
        found = self.api.verify_repo_checksums(
            self.repo_id, revision=commit, local_dir=folder, repo_type=self.repo_type
        )
        changed = {*(file["path"] for file in found.mismatches), *found.extra_paths}
        return [name for name in files if name in changed]

    def _has_edited_card(self, commit: str) -> bool:
        """Returns whether a person wrote or edited the card in a commit."""
        with TemporaryDirectory() as cache:
            try:
                path = self.api.hf_hub_download(
                    self.repo_id, CARD, revision=commit, cache_dir=cache, repo_type=self.repo_type
                )
            except errors.RemoteEntryNotFoundError:
                return False
            return is_edited(Path(path))

    def _commit(self, change: "_Change", branch: "_Branch", message: str, create_pr: bool) -> tuple[str, str]:
        """Creates a commit; returns its id and address.

        The commit fails if the branch has moved. Files that somebody else pushed meanwhile are never mixed with ours.
        """
        repo: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        additions = [CommitOperationAdd(name, str(change.folder / name)) for name in change.additions]
        # A missing branch is created after the upload; until then main stands in for it.
        target = "main" if branch.is_new else branch.name
        self.api.preupload_lfs_files(additions=additions, revision=target, create_pr=create_pr, **repo)
        if branch.is_new:
            self.api.create_branch(branch=branch.name, revision=branch.head, **repo)
        try:
            info = self.api.create_commit(
                operations=[*additions, *map(CommitOperationDelete, change.deletions)],
                commit_message=message,
                revision=branch.name,
                create_pr=create_pr,
                parent_commit=branch.head,
                **repo,
            )
        except Exception as error:
            if create_pr:
                raise
            head = self._find_head_after(branch, error)
            if head == branch.head and branch.is_new:
                with suppress(Exception):  # the error of the commit says more
                    self.api.delete_branch(branch=branch.name, **repo)
            if head != branch.head and not set(change.additions) & set(self._find_changed(change.folder, head)):
                return head, self._commit_url(head)  # the commit arrived, and only the answer was lost
            raise
        return info.oid, info.pr_url or info.commit_url

    def _find_head_after(self, branch: "_Branch", error: Exception) -> str:
        """Returns the head of a branch after a failed commit.

        Raises:
            HubError: If the commit got no answer, and the head cannot be read either.
        """
        try:
            branches = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type).branches
            return next(ref.target_commit for ref in branches if ref.name == branch.name)
        except Exception:
            if not is_network_error(error):
                return str(branch.head)  # the Hub answered and refused the commit
            why = describe_hub_error(error, self.repo_id, branch.name, from_cache=False)
            raise HubError(
                f"cannot push to {self.repo_id}: {why}; it is unknown whether the commit arrived; push again, which "
                "uploads nothing if it did"
            ) from error

    def _commit_url(self, commit: str) -> str:
        prefix = "spaces/" if self.repo_type == "space" else ""
        return redact(f"{self.api.endpoint}/{prefix}{self.repo_id}/commit/{commit}")

    @contextmanager
    def _explain_failure(self, revision: str | None, outcome: str | None = None) -> Iterator[None]:
        """Context manager that turns any error into a `HubError`.

        The message says in which state the repository is.
        """
        try:
            yield
        except HubError:
            raise
        except Exception as error:  # of any library below
            why = describe_hub_error(error, self.repo_id, revision, from_cache=False)
            outcome = outcome or f"{self.repo_id} is unchanged, and the same push can be repeated"
            raise HubError(f"cannot push to {self.repo_id}: {why}; {outcome}") from error


@dataclass(frozen=True)
class _Branch:
    """Branch to push to.

    `head` is its commit, or the commit that a new branch starts from.
    """

    name: str
    head: str | None
    is_new: bool


@dataclass(frozen=True)
class _Change:
    """Difference between a folder and a commit. It is false if they are equal."""

    folder: Path
    additions: list[str]
    deletions: Sequence[str] = ()
    keeps_card: bool = False

    def __bool__(self) -> bool:
        return bool(self.additions or self.deletions)


def check_repo_id(repo_id: str) -> None:
    """Checks the id of a repository.

    Raises:
        HubError: If the id is not valid.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository id; pass ORG/NAME ({error})") from error


def check_push_options(revision: str | None = None, tag: str | None = None, create_pr: bool = False) -> None:
    """Checks the options of a push without access to the Hub.

    Raises:
        HubError: If a branch or tag has no valid name, or if the options contradict each other.
    """
    if create_pr and (tag or revision):
        raise HubError("a pull request is always based on main and has no tag; remove revision and tag, or create_pr")
    for kind, name in (("revision", revision), ("tag", tag)):
        if name is not None and not _REF_NAME.fullmatch(name):
            raise HubError(f"{kind} {name!r} is not the name of a branch or tag; use letters, digits and . _ - / +")


def check_license(license: str | None) -> None:
    """Checks the spelling of a license.

    Raises:
        HubError: If it is not an identifier of the Hub.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise HubError(
            f"license {license!r} is not an identifier of the Hub; pass mit, apache-2.0 or other, for example"
        )


def check_token() -> None:
    """Checks that the environment or the login has a token.

    Raises:
        HubError: If there is no token.
    """
    if not get_token():
        raise HubError(
            "no token; log in with `hf auth login`, or set HF_TOKEN to a token with write access to the repository"
        )


def compare_model_with_hub(folder: Path, repo_id: str, commit: str) -> int:
    """Loads a pushed model by its commit, and compares tensors and checksums.

    The model is downloaded to an empty cache.

    Args:
        folder: Folder that was pushed.
        repo_id: Id of the repository, 'org/name'.
        commit: Commit of the push.

    Returns:
        Number of equal tensors: all tensors.

    Raises:
        HubError: If a tensor differs or the model cannot be loaded.
    """
    name = str(Source.hub(repo_id, commit))
    with TemporaryDirectory() as cache:
        try:
            model = create_model(name, pretrained=True, verify=True, cache_dir=cache)
        except (OSError, RuntimeError, ValueError) as error:
            raise HubError(f"pushed, but loading it failed: {error}") from error
        tensors = load_file(folder / WEIGHTS)
        wrong = mismatched_tensors(tensors, model.state_dict())
    if wrong:
        raise HubError(f"pushed, but {len(wrong)} tensors of {name} differ from the folder: {', '.join(wrong[:5])}")
    return len(tensors)


def mismatched_tensors(here: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names of tensors that differ between two state dicts.

    Tensors differ in dtype or in any value, or are missing in one state dict.
    """
    return [
        key
        for key in here.keys() | there.keys()
        if key not in here
        or key not in there
        or here[key].dtype != there[key].dtype
        or not torch.equal(here[key], there[key])
    ]


def _check_files(folder: Path, allow_pickles: bool) -> dict[str, int]:
    """Returns the files of a folder and their sizes.

    Raises:
        HubError: If the folder is empty or contains a link, or a pickle that is not allowed.
    """
    files = list_files(folder)
    if not files:
        raise HubError(f"{folder} contains no files to push")
    pickled = [name for name in files if Path(name).suffix in PICKLES]
    if pickled and not allow_pickles:
        raise HubError(f"{folder} contains pickles, which can run code: {', '.join(pickled)}; remove them")
    return files
