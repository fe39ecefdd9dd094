"""Subcommands given what they cannot use: one line that names the flag, status 1 or 2, never a traceback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from fuseline.api.cli import main

URLS = ("zzz", "ftp://h", "http://", "http://a b", "localhost:8000", "://x", "http://h:port")
CASES = [
    *((f"{command} --url {url}", "--url") for command in ("chat -q x", "complete -q x", "run") for url in URLS),
    ("chat -q x --url http://127.0.0.1:1", "does not answer"), ("complete -q x --url http://127.0.0.1:1", "not answer"),
    *((f"bench serve --base-url {url}", "--base-url") for url in ("zzz", "ftp://h")),
    ("chat --temperature hot -q x", "--temperature"), ("complete --max-tokens many -q x", "--max-tokens"),
    ("run-batch -i /none -o /tmp/x", "--input-file"), ("run --config /none.yaml", "--config"),
    ("explain --model /none", "/none"), ("explain --dtype x", "--dtype"), ("cache zzz", "zzz"),
    ("completion zzz", "zzz"),
    ("bench zzz", "zzz"), ("bench offline --model /none", "/none"), ("run --tools /none.py", "--tools"),
    ("version x", "x"), ("collect-env x", "x"), ("zzz", "zzz"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "name"), CASES, ids=[case[0] for case in CASES])
def test_wrong_arguments(words: str, name: str, capsys, monkeypatch) -> None:
    arguments = words.replace("http://a b", "http://a\0b").split()
    try:
        status = main([part.replace("\0", " ") for part in arguments])
    except SystemExit as exit_:
        status = exit_.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert status in (1, 2) and name in last and "error: " in last
    assert not any(inner in last for inner in ("Traceback", "unknown url type", "Errno"))


ANSWERS = {
    "not http": b"hello\r\n\r\n",
    "no models": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "no json": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n<p",
    "refused": b'HTTP/1.1 401 No\r\nContent-Length: 33\r\n\r\n{"error": {"message": "bad key"}}',
}


@pytest.fixture
def impostor(request) -> Iterator[str]:
    """A server that gives every request one fixed answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(ANSWERS[request.param])

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("impostor", ANSWERS, indirect=True)
def test_what_is_no_such_server_is_told_in_one_line(impostor: str, capsys) -> None:
    assert main(["chat", "-q", "x", "--url", impostor]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fuseline: error: ") and impostor in line and "Expecting value" not in line
    assert "{" not in line
