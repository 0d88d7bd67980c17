"""A Hugging Face Hub on 127.0.0.1, in memory. The real clients send it real requests, without a network.

    with Hub() as hub:
        hub.add_user("someone", "hf_someone")
        hub.enter(monkeypatch, tmp_path / "home", "hf_someone")  # this process; `environment` is for another one
        HfApi().create_repo("someone/digits")

`Hub.files`, `refs`, `history` and `requests` return the state of the server itself, not a client's view of it.
"""

import base64
import fnmatch
import hashlib
import itertools
import json
import os
import re
import runpy
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, unquote

if TYPE_CHECKING:
    import pytest

REPOSITORY = "someone/digits"
COMMIT = "0" * 40
# Tokens of the users that the fixture `hub` creates.
OWNER, READER, STRANGER = "hf_owner_secret", "hf_reader_secret", "hf_stranger_secret"

_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_LFS = (".safetensors", ".pt", ".bin", ".pth", ".png", ".jpg")
_FAULTS = re.compile(r"cut|reset|lost|truncate|flip|pointer|html|hang|echo|slow:[0-9.]+|status:[1-5]\d\d")
_PAGE = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>Log in to use this network.</body></html>\n"
# Variables that would point a process to another Hub, or keep it offline.
_LEFT_OUT = (
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_CO_STAGING", "HF_OIDC_RESOURCE"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
    *("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HUGGINGFACE_ASSETS_CACHE", "HF_XET_CACHE"),
    *("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_DOWNLOADED_DATASETS_PATH"),
)


@dataclass(frozen=True)
class Request:
    """A request that the server received. `status` is 0 if it sent no answer."""

    method: str
    path: str  # as sent: quoted, with its query
    status: int
    token: str | None


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        known = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = _json({"error": message}, status, known | {key.replace("_", "-"): headers[key] for key in headers})


@dataclass(frozen=True)
class _User:
    name: str
    role: str
    orgs: tuple[str, ...]

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class _Blob:
    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry | ({"lfs": lfs} if self.lfs else {})


@dataclass(frozen=True)
class _Commit:
    id: str
    parent: "_Commit | None"
    files: dict[str, _Blob]
    title: str
    message: str = ""
    author: str = "test"
    date: str = field(default_factory=lambda: f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}")

    def line(self) -> Iterator["_Commit"]:
        commit: _Commit | None = self
        while commit:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> dict[str, str]:
        def inside(commit: _Commit) -> dict[str, str]:
            return {key: commit.files[key].oid for key in commit.files if f"{key}/".startswith(f"{path}/")}

        last = next(c for c in self.line() if c.parent is None or inside(c) != inside(c.parent))
        return {"id": last.id, "title": last.title, "date": last.date}

    def tree(self, folder: str = "", recursive: bool = True, expand: bool = False) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(key for key in self.files if key.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                above = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(f"{self.id} {above}".encode()).hexdigest()
                entries.setdefault(above, {"type": "directory", "path": above, "size": 0, "oid": oid})
            if recursive or len(parts) == 1:
                entries[path] = self.files[path].entry(path)
        if folder and not entries:
            raise _RefusedError(404, f"{folder} does not exist on this revision", "EntryNotFound")
        return [entry | ({"lastCommit": self.last_change(path)} if expand else {}) for path, entry in entries.items()]


class _Repository:
    def __init__(self, repo_id: str, kind: str, private: bool, gated: bool) -> None:
        self.id, self.kind, self.private, self.gated = repo_id, kind, private, gated
        self.commits: dict[str, _Commit] = {}
        self.refs: dict[str, _Commit] = {}  # by whole names: refs/heads/main
        self.objects: dict[str, bytes] = {}  # LFS objects, uploaded but perhaps not committed
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS)
        self.add("refs/heads/main", None, {".gitattributes": _Blob(rules.encode(), False)}, "initial commit")

    def at(self, revision: str) -> _Commit:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        if revision not in self.commits:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def head(self, revision: str) -> str:
        """Returns the full name of a branch or a pull request, on which a commit can be made."""
        name = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if name not in self.refs or name.startswith("refs/tags/"):
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def add(
        self, ref: str, parent: _Commit | None, files: dict[str, _Blob], title: str, message: str = "", **more: str
    ) -> _Commit:
        # The count gives two commits of the same files different ids.
        content = [len(self.commits), parent and parent.id, title, {path: blob.oid for path, blob in files.items()}]
        commit_id = more.pop("id", hashlib.sha1(json.dumps(content).encode()).hexdigest())
        commit = _Commit(commit_id, parent, files, title, message, **more)
        self.commits[commit.id] = self.refs[ref] = commit
        self.objects.update((blob.sha256, blob.content) for blob in files.values() if blob.lfs)
        return commit


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes
    headers: dict[str, str]
    blob: _Blob | None = None  # of an answer that is a file


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Reply:
    return _Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def _file(blob: _Blob, commit_id: str) -> _Reply:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "X-Repo-Commit": commit_id}
    headers["ETag"] = f'"{blob.etag}"'
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    return _Reply(200, blob.content, headers, blob)


def _spoiled(reply: _Reply, fault: str) -> _Reply:
    """Applies a fault that changes the contents of an answer."""
    middle = len(reply.body) // 2
    if fault == "html":
        return _Reply(200, _PAGE, {"Content-Type": "text/html; charset=utf-8"})
    if fault == "truncate":
        linked = {"X-Linked-Size": str(middle)} if "X-Linked-Size" in reply.headers else {}
        return replace(reply, body=reply.body[:middle], headers=reply.headers | linked)
    if fault == "flip" and reply.body:
        flipped = bytes([reply.body[middle] ^ 1])
        return replace(reply, body=reply.body[:middle] + flipped + reply.body[middle + 1 :])
    if fault == "pointer" and reply.blob:
        return _file(_Blob(reply.blob.pointer, False), reply.headers["X-Repo-Commit"])
    return reply


def _part(reply: _Reply, wanted: str | None) -> _Reply:
    """Returns the part of an answer that a Range header requests.

    Clients use it to resume a download.
    """
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if not match or not reply.blob:
        return reply
    size, first = len(reply.body), int(match[1])
    last = min(int(match[2] or size), size - 1)
    if first > last:
        return _RefusedError(416, "Range Not Satisfiable", Content_Range=f"bytes */{size}").reply
    headers = reply.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
    return replace(reply, status=206, body=reply.body[first : last + 1], headers=headers)


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (path.endswith(_LFS) or size > 10 * 1024**2 or b"\0" in sample)


def _blob(path: str, content: bytes) -> _Blob:
    return _Blob(content, _is_lfs(path, len(content), content[:512]))


def _is_ignored(path: str, rules: str) -> bool:
    """Returns whether .gitignore excludes a path.

    Only names with wildcards are supported.
    """
    names = [*path.split("/"), path]
    return any(fnmatch.fnmatch(name, rule.strip("/ ")) for rule in rules.splitlines() for name in names)


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # saves 40 ms per answer, because head and body are sent separately

    def _handle(self) -> None:
        hub = self.server.hub
        healed = hub._healed
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        who = token if scheme.lower() == "bearer" else None
        fault, _, value = hub._fault(self.command, self.path).partition(":")
        length = int(self.headers.get("Content-Length", 0))
        cut = fault in ("cut", "reset")
        body = self.rfile.read(length // 2 if cut else length)
        if (cut and length) or len(body) < length or fault == "hang":
            hub._log(self.command, self.path, 0, who)
            if fault == "hang":
                healed.wait()
            return self._hang_up(fault)
        if fault == "slow":
            healed.wait(float(value))
        if fault == "status":
            reply = _RefusedError(int(value), f"A fault of the test: {value}").reply
        elif fault == "echo":
            reply = _RefusedError(400, f"Bad header (Authorization: {self.headers.get('Authorization')})").reply
        else:
            reply = _part(_spoiled(hub._answer(self.command, self.path, body, who), fault), self.headers.get("Range"))
        if fault == "lost":
            hub._log(self.command, self.path, 0, who)
            return self._hang_up("reset")
        # Logged before it is sent, because the test may look at once.
        hub._log(self.command, self.path, reply.status, who)
        self.send_response(reply.status)
        request_id = {"X-Request-Id": self.headers.get("X-Amzn-Trace-Id", "none")}
        for name, text in (reply.headers | request_id | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)
        if cut:
            self._hang_up(fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _hang_up(self, fault: str = "") -> None:
        self.close_connection = True
        if fault == "reset":
            # With a linger time of 0, the connection is reset. Otherwise the server would close it properly.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: "Hub") -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """Ignores clients that hang up.

        A bug in this file gives status 500 with its traceback.
        """


class Hub:
    """The server, its state, and methods for tests to change it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._users: dict[str, _User] = {}
        self._repositories: dict[str, _Repository] = {}  # by the paths of their pages: datasets/a/b
        self._faults: list[tuple[re.Pattern[str], str, Iterator[bool]]] = []
        self._healed = threading.Event()
        self._lock = threading.RLock()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()
        # The server would go on answering the open connections of a client's pool.
        for connection in list(self._server.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    # Methods for tests. They send no request.

    def add_user(self, name: str, token: str, role: str = "write", orgs: Sequence[str] = ()) -> None:
        """Adds a token of a user. A user may have several tokens.

        Args:
            name: Name of the user and of the user's namespace.
            token: Access token. Unknown tokens are refused.
            role: "read" or "write", in the user's namespace and those of `orgs`.
            orgs: Organizations that the user is a member of.
        """
        with self._lock:
            self._users[token] = _User(name, role, tuple(orgs))

    def create_repo(self, repo_id: str, private: bool = False, kind: str = "model", gated: bool = False) -> None:
        """Creates a repository with one commit that contains `.gitattributes`, like the Hub."""
        with self._lock:
            self._repositories[_PREFIXES[kind] + repo_id] = _Repository(repo_id, kind, private, gated)

    def commit(self, repo_id: str, files: Mapping[str, bytes | None], revision: str = "main") -> str:
        """Commits files to a branch (None deletes a file) and returns the id of the commit."""
        with self._lock:
            repo = self._find(repo_id)
            ref = repo.head(revision)
            blobs = dict(repo.refs[ref].files)
            blobs |= {path: _blob(path, content) for path, content in files.items() if content is not None}
            for path in [path for path, content in files.items() if content is None]:
                del blobs[path]
            return repo.add(ref, repo.refs[ref], blobs, "commit of the test").id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the files of a branch, tag, pull request or commit."""
        with self._lock:
            return {path: blob.content for path, blob in sorted(self._find(repo_id).at(revision).files.items())}

    def refs(self, repo_id: str) -> dict[str, str]:
        """Returns the commits of branches, tags and pull requests ("refs/pr/1")."""
        with self._lock:
            refs = sorted(self._find(repo_id).refs.items(), reverse=True)  # a branch over a tag of the same name
            return {re.sub("^refs/(heads|tags)/", "", name): commit.id for name, commit in refs}

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """Returns the ids of all commits, newest first."""
        with self._lock:
            return [commit.id for commit in self._find(repo_id).at(revision).line()]

    def fail(self, pattern: str, how: str, times: int | None = None) -> None:
        """Makes matching requests fail. If several patterns match a request, the first call counts.

        Args:
            pattern: Regular expression, searched in "METHOD /path?query" as it is sent.
            how: Fault:
                "cut": half of the body of the answer or upload, then the connection ends;
                "reset": the same, but the connection breaks;
                "lost": the request is executed, but not answered;
                "hang": no answer until `heal`;
                "slow:SECONDS": the answer is late;
                "status:CODE": the answer has this status;
                "echo": status 400, with the Authorization header in the message;
                "truncate": half of the body, with matching headers;
                "flip": one bit of the body is flipped;
                "pointer": the pointer of Git LFS instead of the file;
                "html": the login page of a public network.
            times: Number of requests that fail; None for all. A download sends HEAD and GET. The faults "cut", "reset"
                and "flip" skip HEAD, which has no body.
        """
        if not _FAULTS.fullmatch(how):
            raise ValueError(f"No such fault: {how}")
        with self._lock:
            turns = itertools.repeat(True) if times is None else itertools.repeat(True, times)
            self._faults.append((re.compile(pattern), how, turns))

    def heal(self) -> None:
        """Ends all faults. Hanging connections are closed."""
        with self._lock:
            self._faults.clear()
            self._healed.set()
            self._healed = threading.Event()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Returns the environment of a process that uses this Hub only, with its caches in `home`."""
        env = {key: value for key, value in os.environ.items() if key not in _LEFT_OUT and "proxy" not in key.lower()}
        # The client would use Xet if the package is installed, and this server does not support it.
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return env | ({"HF_TOKEN": token} if token else {})

    def enter(self, monkeypatch: "pytest.MonkeyPatch", home: Path, token: str | None = None) -> None:
        """Makes this process use this Hub only, with its caches in `home`, until the test ends."""
        # Imported first: a module imported later would keep copies of the patched values.
        from huggingface_hub import constants, hf_api, hf_file_system
        from huggingface_hub.utils import _cache_manager, _git_credential, _http  # noqa: F401

        env = self.environment(home, token)
        for name in os.environ.keys() - env.keys():
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        # The client reads its environment when it is imported: read it again, and put that in place, copies too.
        for name, value in runpy.run_path(str(constants.__file__)).items():
            old = getattr(constants, name, None)
            # Not the numbers, which a test may have changed: timeouts, sizes.
            if name.startswith("__") or not isinstance(value, (str, bool, frozenset)) or old == value:
                continue
            for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "huggingface_hub"]:
                if module is constants or vars(module).get(name, value) == old:
                    monkeypatch.setattr(module, name, value)
        for api in (hf_api.api, hf_file_system.hffs._api):
            monkeypatch.setattr(api, "endpoint", self.url)
            monkeypatch.setattr(api, "_whoami_cache", {})
        monkeypatch.setattr(hf_file_system.hffs, "endpoint", self.url)
        for name in ("_repo_and_revision_exists_cache", "dircache"):
            monkeypatch.setattr(hf_file_system.hffs, name, {})
        if hasattr(_http, "_HUB_ORIGINS"):  # huggingface-hub 2.1 and newer
            monkeypatch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(self.url)})
        # The shared session may go through a proxy; it comes back when the test ends.
        monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
        if config := sys.modules.get("datasets.config"):
            url, cache = f"{self.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}", home / "datasets"
            copies: dict[str, Any] = {"HF_ENDPOINT": self.url, "HUB_DATASETS_URL": url, "HF_DATASETS_CACHE": cache}
            copies |= {"DOWNLOADED_DATASETS_PATH": cache / "downloads", "HF_HUB_OFFLINE": False}
            copies |= {"EXTRACTED_DATASETS_PATH": cache / "downloads/extracted", "HF_DATASETS_OFFLINE": False}
            for name, value in copies.items():
                monkeypatch.setattr(config, name, value)

    # What a request does

    def _find(self, repo_id: str) -> _Repository:
        found = [name for prefix in _PREFIXES.values() if (name := prefix + repo_id) in self._repositories]
        assert len(found) == 1, f"{len(found)} repositories are called {repo_id}: say spaces/… or datasets/…"
        return self._repositories[found[0]]

    def _log(self, method: str, path: str, status: int, token: str | None) -> None:
        # The client may send this request at any time.
        if path != "/api/agent-harnesses":
            with self._lock:
                self.requests.append(Request(method, path, status, token))

    def _fault(self, method: str, path: str) -> str:
        with self._lock:
            for pattern, how, turns in self._faults:
                fits = pattern.search(f"{method} {path}") and not (method == "HEAD" and how in ("cut", "reset", "flip"))
                if fits and next(turns, False):
                    return how
        return ""

    def _answer(self, method: str, path: str, body: bytes, token: str | None) -> _Reply:
        try:
            with self._lock:
                return self._route(method, path, body, token)
        except _RefusedError as error:
            return error.reply
        except Exception:  # a bug in this file, which the test shows
            return _json({"error": traceback.format_exc()}, 500)

    def _route(self, method: str, path: str, body: bytes, token: str | None) -> _Reply:
        path, _, query = path.partition("?")
        if method == "PUT" and (match := re.fullmatch(r"/presigned/(.+)/([0-9a-f]{64})", path)):
            return self._store(match[1], match[2], body)
        user = self._users.get(token) if token else None
        if token and not user:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        if path == "/api/agent-harnesses":
            return _json({"standardEnvVars": [], "harnesses": {}})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/((?:datasets/|spaces/)?[^/]+(?:/[^/]+)?)/resolve/(.+)", path):
            return self._resolve(self._repository(match[1], user), user, *_split(match[2]))
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(match[1], user, json.loads(body))
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+(?:/[^/]+)?)(?:/([a-z-]+)(?:/(.+))?)?", path):
            name = _PREFIXES[match[1]] + match[2]
            flags = {key: values[0].lower() in ("1", "true") for key, values in parse_qs(query).items()}
            return self._api(method, name, user, match[3] or "revision", match[4] or "", body, flags)
        if user is None and path.startswith("/api/"):
            raise _RefusedError(401, "Invalid username or password.")
        if path == "/api/whoami-v2":
            user = cast(_User, user)
            orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": user.role} for org in user.orgs]
            access = {"displayName": "test", "role": user.role, "createdAt": "2026-01-01T00:00:00.000Z"}
            answer = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False}
            return _json(answer | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": access}})
        if path == "/api/repos/create":
            return self._create(cast(_User, user), json.loads(body))
        raise _RefusedError(404, "Not Found")

    def _repository(self, name: str, user: _User | None, write: bool = False, pull: bool = False) -> _Repository:
        repo = self._repositories.get(name)
        owner = repo is not None and user is not None and user.owns(repo.id)
        if user is None and (repo is None or repo.private or write):
            # The client interprets a 401 from HTTPS addresses itself; from others it needs the code.
            raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not owner):
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        if write and user and user.role != "write":
            raise _RefusedError(403, "Your token has no permission to write: it is read-only")
        if write and not owner and not pull:
            raise _RefusedError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _create(self, user: _User, data: dict[str, Any]) -> _Reply:
        kind, namespace = data.get("type") or "model", data.get("organization") or user.name
        if kind not in _PREFIXES:
            raise _RefusedError(400, f"This server of tests has no repositories of type {kind}")
        if kind == "space" and not data.get("sdk"):
            raise _RefusedError(400, "sdk is required for spaces")
        repo_id = f"{namespace}/{data['name']}"
        name = _PREFIXES[kind] + repo_id
        if user.role != "write" or not user.owns(repo_id):
            raise _RefusedError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        answer = {"url": f"{self.url}/{name}", "name": repo_id}
        if name in self._repositories:
            return _json(answer | {"error": f"You already created this {kind} repo"}, 409)
        self.create_repo(repo_id, data.get("visibility") == "private" or bool(data.get("private")), kind)
        return _json(answer | {"id": repo_id})

    def _resolve(self, repo: _Repository, user: _User | None, revision: str, path: str) -> _Reply:
        if repo.gated and not (user and user.owns(repo.id)):
            message = f"Access to {repo.kind} {repo.id} is restricted and you are not in the authorized list."
            raise _RefusedError(403 if user else 401, message, "GatedRepo")
        commit = repo.at(revision)
        if path not in commit.files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        return _file(commit.files[path], commit.id)

    def _batch(self, name: str, user: _User | None, data: dict[str, Any]) -> _Reply:
        # A request without a revision is for a pull request, which needs no right to write.
        repo = self._repository(name, user, write=True, pull="ref" not in data)
        objects = []
        for item in data["objects"]:
            href = f"{self.url}/presigned/{name}/{item['oid']}?X-Amz-Signature=0123456789abcdef"
            there = item["oid"] in repo.objects
            objects.append(item if there else item | {"actions": {"upload": {"href": href}}})
        return _json({"transfer": "basic", "objects": objects})

    def _store(self, name: str, oid: str, body: bytes) -> _Reply:
        if name not in self._repositories or hashlib.sha256(body).hexdigest() != oid:
            return _Reply(400, b"<Error><Code>BadDigest</Code></Error>", {"Content-Type": "application/xml"})
        self._repositories[name].objects[oid] = body
        return _Reply(200, b"", {"ETag": f'"{oid[:32]}"'})

    def _api(
        self, method: str, name: str, user: _User | None, action: str, rest: str, body: bytes, flags: dict[str, bool]
    ) -> _Reply:
        pull = flags.get("create_pr", False)
        repo = self._repository(name, user, action in ("preupload", "commit", "branch", "tag"), pull)
        if action == "refs":
            return _json(_refs(repo, any(flags.get(key) for key in ("include_prs", "include_pull_requests"))))
        if action in ("branch", "tag"):
            return self._mark(method, repo, action, unquote(rest), json.loads(body or b"{}"))
        revision, path = _split(rest or "main")
        if action == "commit":
            return self._change(repo, cast(_User, user), revision, pull, body)
        commit = repo.at(revision)
        if action == "revision":
            return _json(_info(repo, commit, flags.get("blobs", False)))
        if action == "tree":
            return _json(commit.tree(path, flags.get("recursive", False), flags.get("expand", False)))
        if action == "commits":
            keys = ("id", "title", "message", "date")
            line = [{key: getattr(c, key) for key in keys} | {"authors": [{"user": c.author}]} for c in commit.line()]
            return _json(line)
        if action == "paths-info":
            form = parse_qs(body.decode())
            paths = [item.strip("/") for item in form.get("paths", [])]
            entries = commit.tree(expand=form.get("expand") == ["true"])
            return _json([entry for entry in entries if entry["path"] in paths])
        if action == "preupload":
            data = json.loads(body)
            ignore = commit.files.get(".gitignore")
            rules = data.get("gitIgnore") or (ignore.content.decode() if ignore else "")
            return _json({"files": [_upload_mode(commit, item, rules) for item in data["files"]]})
        raise _RefusedError(404, "Not Found")

    def _mark(self, method: str, repo: _Repository, action: str, name: str, data: dict[str, Any]) -> _Reply:
        start, tag = ("refs/heads/", None) if action == "branch" else ("refs/tags/", data.get("tag"))
        ref = start + (tag or name)
        if method == "DELETE":
            if ref == "refs/heads/main":
                raise _RefusedError(403, "Cannot delete protected branch: main")
            if ref not in repo.refs:
                raise _RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del repo.refs[ref]
            return _json({})
        if (tag or name).startswith("refs/"):
            raise _RefusedError(400, f"Invalid reference for a {action}: {tag or name}")
        target = repo.at(data.get("startingPoint") or "main" if action == "branch" else name)
        if ref in repo.refs:
            raise _RefusedError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = target
        return _json({})

    def _change(self, repo: _Repository, user: _User, revision: str, pull: bool, body: bytes) -> _Reply:
        ref = repo.head(revision)
        parent = repo.refs[ref]
        if pull:
            ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}"
        blobs, header = dict(parent.files), {}
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            path = value.get("path", "")
            if key == "header":
                header = value
                if not parent.id.startswith(value.get("parentCommit", "")):
                    raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                blobs[path] = _Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                content = repo.objects.get(value["oid"])
                if content is None or len(content) != value.get("size", len(content)):
                    message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    raise _RefusedError(400, f"{message} Offending file: {path}")
                blobs[path] = _Blob(content, True)
            else:
                folder = f"{path.rstrip('/')}/"
                gone = [item for item in blobs if item == path or (key == "deletedFolder" and item.startswith(folder))]
                if not gone:
                    raise _RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
                for item in gone:
                    del blobs[item]
        commit = repo.add(ref, parent, blobs, header["summary"], header.get("description", ""), author=user.name)
        page = f"{self.url}/{_PREFIXES[repo.kind]}{repo.id}"
        answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{page}/commit/{commit.id}"}
        return _json(answer | ({"pullRequestUrl": f"{page}/discussions/{ref.split('/')[-1]}"} if pull else {}))


def _split(rest: str) -> tuple[str, str]:
    """Splits the end of an address into revision and path.

    Pull requests are quoted or not.
    """
    match = re.fullmatch(r"(refs/(?:pr|convert)/[^/]+|[^/]+)(?:/(.*))?", rest)
    return (unquote(match[1]), unquote(match[2] or "")) if match else (unquote(rest), "")


def _refs(repo: _Repository, pulls: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"branches": [], "converts": [], "tags": []} | ({"pullRequests": []} if pulls else {})
    for key, start in (("branches", "refs/heads/"), ("tags", "refs/tags/"), ("pullRequests", "refs/pr/")):
        for ref, commit in repo.refs.items():
            if key in answer and ref.startswith(start):
                name = ref if key == "pullRequests" else ref.removeprefix(start)
                answer[key].append({"name": name, "ref": ref, "targetCommit": commit.id})
    return answer


def _info(repo: _Repository, commit: _Commit, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
        more = {"blobId": blob.oid, "size": len(blob.content)} | ({"lfs": lfs} if blob.lfs else {})
        siblings.append({"rfilename": path} | (more if blobs else {}))
    first = list(commit.line())[-1]
    answer = {"_id": first.id[:24], "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.id}
    answer |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
    answer |= {"downloads": 0, "likes": 0, "tags": [], "createdAt": first.date, "lastModified": commit.date}
    return answer | {"siblings": siblings}


def _upload_mode(commit: _Commit, item: dict[str, Any], rules: str) -> dict[str, Any]:
    path = item["path"]
    lfs = _is_lfs(path, item["size"], base64.b64decode(item["sample"]))
    there = {"oid": commit.files[path].etag} if path in commit.files else {}
    ignored = {"shouldIgnore": _is_ignored(path, rules)}
    return {"path": path, "uploadMode": "lfs" if lfs else "regular"} | ignored | there


@contextmanager
def serve(folder: Path, home: Path) -> Iterator[dict[str, str]]:
    """Context manager: serves a folder as REPOSITORY and yields the environment of a process that uses it.

    Args:
        folder: Folder of a model or a dataset.
        home: Cache folder of the process.
    """
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with Hub() as hub:
        for kind, prefix in _PREFIXES.items():
            hub.create_repo(REPOSITORY, kind=kind)
            repo = hub._find(prefix + REPOSITORY)
            blobs = {path: _blob(path, content) for path, content in files.items()}
            repo.add("refs/heads/main", None, blobs, "files of the test", id=COMMIT)
        yield hub.environment(home)
