"""Tests which addresses and requests the guard of the page accepts.

tests/test_demo.py sends requests to a page.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from stvit.tools.demonstration.page_guard import MAX_MESSAGE, Guard, Hosts
from stvit.tools.demonstration.scratch import Storage


@pytest.mark.parametrize(
    ("listens", "allowed", "taken", "refused"),
    [
        (
            "127.0.0.1",
            [],
            ["127.0.0.1:7860", "localhost:7860", "LOCALHOST:7860", "localhost.:7860"],
            [
                "",
                "localhost",
                "localhost:7861",
                "127.0.0.2:7860",
                "evil.com:7860",
                "127.0.0.1.evil.com:7860",
                "[::1]:7860",
            ],
        ),
        ("localhost", [], ["127.0.0.1:7860", "localhost:7860"], ["evil.com"]),
        (
            "0.0.0.0",
            ["demo.org", "other.org:8080"],
            [
                "localhost:7860",
                "192.168.1.5:7860",
                "10.0.0.1",
                "[2001:db8::1]:443",
                "demo.org",
                "demo.org:9",
                "other.org:8080",
            ],
            [
                "other.org",
                "other.org:7860",
                "evil.com",
                "evil.com:7860",
                "1.2.3.4.evil.com",
                "demo.org.evil.com",
                "localhost:1",
            ],
        ),
        ("0.0.0.0", ["user-page.hf.space"], ["user-page.hf.space"], ["user-other.hf.space", "hf.space"]),
        ("192.168.1.5", [], ["192.168.1.5:7860"], ["localhost:7860", "192.168.1.6:7860"]),
        ("box.lan", [], ["box.lan:7860", "BOX.lan:7860"], ["box.lan", "evil.com:7860"]),
        ("127.0.0.1", ["http://a"], [], ["", "a", "http://a", "a b"]),
        ("127.0.0.1", ["localhost:8000"], ["localhost:8000"], ["localhost:8001", "a b", "a:b", "localhost:99999999"]),
    ],
)
def test_hosts(listens: str, allowed: list[str], taken: list[str], refused: list[str]) -> None:
    hosts = Hosts(listens, 7860, allowed)
    assert [host for host in taken if not hosts.takes(host)] == []
    assert [host for host in refused if hosts.takes(host)] == []


def test_port_80_is_not_named() -> None:
    hosts = Hosts("127.0.0.1", 80)
    assert hosts.takes("localhost") and hosts.takes("localhost:80") and not hosts.takes("localhost:81")
    assert hosts.takes_origin("http://localhost", "localhost")


@pytest.mark.parametrize(
    ("origin", "host", "taken"),
    [
        ("http://127.0.0.1:7860", "127.0.0.1:7860", True),
        ("http://localhost:7860", "127.0.0.1:7860", True),
        ("https://demo.org", "demo.org", True),
        ("https://demo.org", "127.0.0.1:7860", True),  # a proxy that names itself in Origin only
        ("http://192.168.1.5:7860", "192.168.1.5:7860", True),
        ("http://192.168.1.6:7860", "192.168.1.5:7860", False),
        ("http://192.168.1.5", "192.168.1.5:7860", False),
        ("https://demo.org.evil.com", "demo.org", False),
        ("http://evil.com", "127.0.0.1:7860", False),
        ("null", "127.0.0.1:7860", False),
        ("", "127.0.0.1:7860", False),
        ("file://", "127.0.0.1:7860", False),
        ("http://127.0.0.1:7860@evil.com", "127.0.0.1:7860", False),
        ("http://[", "127.0.0.1:7860", False),
        ("http://a:99999999", "127.0.0.1:7860", False),
    ],
)
def test_origins(origin: str, host: str, taken: bool) -> None:
    assert Hosts("0.0.0.0", 7860, ["demo.org"]).takes_origin(origin, host) == taken


def ask(guard: Guard, messages: list[dict[str, Any]], **scope: Any) -> tuple[int, str]:
    """Sends a request; returns status and text of the answer."""
    whole = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [(b"host", b"a:1")], **scope}
    answers: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.sleep(600)

    async def send(message: Any) -> None:
        answers.append(message)

    asyncio.run(guard(whole, receive, send))
    return answers[0]["status"], b"".join(message.get("body", b"") for message in answers).decode()


def part(size: int, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": bytes(size), "more_body": more}


def guard(folder: Path, fail: Exception | None = None) -> Guard:
    """Returns a guard of an application that answers with the size of the body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if fail is not None:
            raise fail
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    return Guard(app, page=None, hosts=Hosts("a", 1), storage=Storage(folder, 100_000, 3000))


def test_uploads_end_at_the_limit_while_they_arrive(tmp_path: Path) -> None:
    """Requests with and without a Content-Length count, also several at a time.

    Finished requests no longer count.
    """
    page = guard(tmp_path)
    assert ask(page, [part(60_000), part(30_000, more=False)]) == (200, "90000")
    status, text = ask(page, [part(60_000)] * 3)
    assert status == 413 and text == (
        "the uploads of all users exceed the limit of 0.0953674 MB; try again in a few minutes\n"
    )
    assert page._receiving == 0 == page._uploads
    told = [(b"host", b"a:1"), (b"content-length", b"100001")]
    assert ask(page, [], headers=told)[0] == 413
    (tmp_path / "stored").write_bytes(bytes(90_000))
    assert ask(page, [part(1, more=False)]) == (200, "1")  # and measures the stored files
    assert ask(page, [part(60_000, more=False)])[0] == 413
    page._receiving = 99_999
    page.storage.stored = 0
    assert ask(page, [part(2, more=False)])[0] == 413


def test_unfinished_and_failed_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each of these requests gets one line.

    The client disconnects or never ends, there are too many uploads, or the page fails.
    """
    page = guard(tmp_path)
    assert ask(page, [part(10), {"type": "http.disconnect"}]) == (
        400,
        "the connection was closed before the request was complete\n",
    )
    monkeypatch.setattr("stvit.tools.demonstration.page_guard.UPLOAD_S", 0.05)
    monkeypatch.setattr("stvit.tools.demonstration.page_guard.MESSAGE_S", 0.05)
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        status, text = ask(page, [part(10)], path=path)
        assert status == 408 and text == "the request took longer than 0.05 seconds to arrive\n"
    page._uploads = 32
    assert ask(page, [part(1)])[0] == 503
    status, text = ask(guard(tmp_path, KeyError("a\nb")), [part(1, more=False)])
    assert (status, text) == (500, "the page cannot answer this request\n")
    assert capsys.readouterr().err == "error: POST /gradio_api/upload: KeyError: KeyError 'a\\nb'\n"


@pytest.mark.parametrize(
    ("scope", "status", "words"),
    [
        ({"headers": []}, 403, "Host '' is not an address of this page"),
        ({"headers": [(b"host", b"a:1"), (b"host", b"a:1")]}, 403, "is not an address of this page"),
        ({"headers": [(b"host", b"evil\x1b[2J")]}, 403, "Host 'evil\\x1b[2J' is not an address"),
        (
            {"headers": [(b"host", b"a:1"), (b"origin", b"http://evil")]},
            403,
            "Origin 'http://evil' is another page; only requests of this page",
        ),
        ({"path": "/gradio_api/run/predict"}, 404, "no such address"),
        ({"path": "/gradio_api/component_server"}, 404, "no such address"),
        ({"path": "/login"}, 404, "no such address"),
        ({"method": "PUT"}, 404, "no such address"),
        ({"method": "GET", "path": "/gradio_api/file=HTTP://1.1.1.1/a"}, 404, "no such address"),
        ({"method": "GET", "path": "/gradio_api/proxy=http://a"}, 404, "no such address"),
        ({"method": "GET", "path": "/gradio_api/deep_link"}, 404, "no such address"),
        ({"method": "HEAD", "path": "/monitoring/key"}, 404, "no such address"),
        ({"path": "/gradio_api/queue/join"}, 400, "the message is not JSON"),
    ],
)
def test_refused_requests(scope: dict[str, Any], status: int, words: str, tmp_path: Path) -> None:
    answer = ask(guard(tmp_path), [part(1, more=False)], **scope)
    assert answer[0] == status and words in answer[1] and answer[1].count("\n") == 1


def test_long_and_deep_messages(tmp_path: Path) -> None:
    path = "/gradio_api/queue/join"
    assert ask(guard(tmp_path), [part(MAX_MESSAGE), part(1, more=False)], path=path)[0] == 413
    for text in ("[" * 60_000, '{"a":' * 10_000, "\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1")):
        message = {"type": "http.request", "body": text.encode("latin-1")}
        assert ask(guard(tmp_path), [message], path=path)[0] == 400
    whole: dict[str, Any] = {"session_hash": "a-1", "fn_index": 3, "event_id": "b"}
    for path in ("/gradio_api/cancel", "/gradio_api/reset"):
        cases: list[tuple[Any, dict[str, Any]]] = [
            ({**whole, "more": [1]}, whole),
            ({**whole, "event_id": "\ud800", "fn_index": "3"}, {"session_hash": "a-1"}),
            ([], {}),
        ]
        for sent, rest in cases:
            size = str(len(json.dumps(rest)))
            body = {"type": "http.request", "body": json.dumps(sent).encode()}
            assert ask(guard(tmp_path), [body], path=path) == (200, size)


def test_websockets_are_refused(tmp_path: Path) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    for host in (b"evil", b"a:1"):
        asyncio.run(guard(tmp_path)({"type": "websocket", "path": "/", "headers": [(b"host", host)]}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"] * 2
