"""A server on 127.0.0.1 that hands out a folder as the Hugging Face Hub does: real requests, no network."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY = "someone/digits"
COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    files: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if f"/{REPOSITORY}" not in path:
            return self._send(b"", with_body, 404, {"X-Error-Code": "RepoNotFound"})
        entries = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "1" * 40}
            for file in sorted(self.files.iterdir())
        ]
        if "/resolve/" in path:
            file = self.files / path.rsplit("/", 1)[-1]
            if not file.is_file():
                return self._send(b"", with_body, 404, {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(content, with_body, 200, {"X-Repo-Commit": COMMIT, "ETag": tag})
        info = {"id": REPOSITORY, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        answer: Any = entries if "/tree/" in path else info | {"downloads": 0, "likes": 0, "siblings": siblings}
        return self._send(json.dumps(answer).encode(), with_body, 200, {"Content-Type": "application/json"})

    def _send(self, content: bytes, with_body: bool, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, home: Path) -> Iterator[dict[str, str]]:
    """Serves the files of a folder as REPOSITORY; gives the environment of a process that is to find it there.

    Args:
        folder: Of a model or a dataset.
        home: Where that process caches.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    left_out = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    env = {key: value for key, value in os.environ.items() if key not in left_out and "proxy" not in key.lower()}
    here = f"http://127.0.0.1:{server.server_port}"
    try:
        yield env | {"HF_ENDPOINT": here, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    finally:
        server.shutdown()
        server.server_close()
