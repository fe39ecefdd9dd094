"""`fuseline run`: commands of the terminal chat, and streaming from a server by URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fuseline.api.run import Chat, converse, run_chat, stream_url


def lines_then_end(*lines: str):
    remaining = list(lines)

    def read(prompt: str) -> str:
        if not remaining:
            raise EOFError
        return remaining.pop(0)

    return read


def test_conversation_grows_and_resets(capsys) -> None:
    asked = []

    def answer(messages):
        asked.append(list(messages))
        yield from ("hel", "lo")

    chat = Chat(system="be kind")
    assert converse(chat, answer, lines_then_end("one", "", "two", "/reset", "three", "/exit", "never")) == 0
    assert [len(messages) for messages in asked] == [2, 4, 2]
    assert asked[1][0] == {"role": "system", "content": "be kind"}
    assert asked[1][2] == {"role": "assistant", "content": "hello"}
    assert asked[2][-1] == {"role": "user", "content": "three"}
    assert capsys.readouterr().out.count("hello\n") == 3


def test_failed_turns_leave_no_trace(capsys) -> None:
    def answer(messages):
        raise ValueError("too long")
        yield ""

    chat = Chat()
    assert converse(chat, answer, lines_then_end("one", "/what")) == 0
    captured = capsys.readouterr()
    assert captured.err == "error: too long\n" and chat.turns == []
    assert captured.out.count("/exit") == 2


def test_interrupted_answers_stay(capsys) -> None:
    def answer(messages):
        yield "part"
        raise KeyboardInterrupt

    chat = Chat()
    converse(chat, answer, lines_then_end("one"))
    assert chat.turns[-1] == {"role": "assistant", "content": "part"}
    assert "(stopped)" in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    bodies: list[dict] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "remote"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({**body, "key": self.headers["Authorization"]})
        if body["messages"][-1]["content"] == "fail":
            self.send_error(400, "bad")
            return
        events = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "b")]
        events.append({"error": {"message": "died"}} if body["messages"][-1]["content"] == "die" else {"choices": []})
        self._send(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n")

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_streams_from_a_server(url: str, monkeypatch) -> None:
    monkeypatch.setenv("FUSELINE_API_KEY", "k")
    assert list(stream_url(url, "", [{"role": "user", "content": "x"}], {"max_tokens": 3})) == ["a", "b"]
    body = Handler.bodies[-1]
    assert body["model"] == "remote" and body["max_tokens"] == 3 and body["stream"] and body["key"] == "Bearer k"
    with pytest.raises(ValueError, match="400"):
        list(stream_url(url, "m", [{"role": "user", "content": "fail"}], {}))
    with pytest.raises(ValueError, match="died"):
        list(stream_url(url, "m", [{"role": "user", "content": "die"}], {}))


def test_command_with_a_url(url: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lines_then_end("hi"))
    assert run_chat(["--url", url, "--system", "s", "--temperature", "0"]) == 0
    assert "ab\n" in capsys.readouterr().out
    assert Handler.bodies[-1]["temperature"] == 0 and Handler.bodies[-1]["messages"][0]["role"] == "system"


def test_no_server_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lines_then_end("hi"))
    assert run_chat(["--url", "http://127.0.0.1:9"]) == 0
    assert "is the server up?" in capsys.readouterr().err
