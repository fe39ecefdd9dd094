"""`fuseline run`: commands of the terminal chat, and streaming from a server by URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fuseline.api.cli import main
from fuseline.api.config import ConfigError
from fuseline.api.remote import Remote, server_url
from fuseline.api.run import Chat, converse, run_chat
from fuseline.api.run_tools import MAX_ROUNDS, Tools, answer_with_tools


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


TOOL_CALL = [
    {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1,'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": ' "b": 2}'}}]},
]


class Handler(BaseHTTPRequestHandler):
    bodies: list[dict] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "remote"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({**body, "key": self.headers["Authorization"], "path": self.path})
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if asked == "fail":
            self.send_error(400, "bad")
            return
        deltas = TOOL_CALL if asked == "add" else [{"content": text} for text in ("a", "b")]
        choices = [{"delta": delta} if "messages" in body else {"text": delta["content"]} for delta in deltas]
        events = [{"choices": [choice]} for choice in choices]
        events.append({"error": {"message": "died"}} if asked == "die" else {"choices": []})
        self._send(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n")

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_streams_from_a_server(url: str, path: str, monkeypatch) -> None:
    monkeypatch.setenv("FUSELINE_API_KEY", "k")

    def ask(text: str) -> list[dict]:
        return list(Remote(url + path).stream_chat([{"role": "user", "content": text}], {"max_tokens": 3}))

    assert ask("x") == [{"content": "a"}, {"content": "b"}]
    body = Handler.bodies[-1]
    assert body["model"] == "remote" and body["max_tokens"] == 3 and body["stream"] and body["key"] == "Bearer k"
    assert body["path"] == "/v1/chat/completions"
    with pytest.raises(ValueError, match="400"):
        ask("fail")
    with pytest.raises(ValueError, match="died"):
        ask("die")


def test_addresses_end_before_the_version() -> None:
    for text in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert server_url(text) == "http://h:1"
    assert server_url("https://h/proxy/v1") == "https://h/proxy"


def test_command_with_a_url(url: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lines_then_end("hi"))
    assert run_chat(["--url", url, "--system", "s", "--temperature", "0"]) == 0
    assert "ab\n" in capsys.readouterr().out
    assert Handler.bodies[-1]["temperature"] == 0 and Handler.bodies[-1]["messages"][0]["role"] == "system"


def test_no_server_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lines_then_end("hi"))
    assert run_chat(["--url", "http://127.0.0.1:9"]) == 0
    assert "is the server up?" in capsys.readouterr().err


def test_chat_with_a_running_server(url: str, capsys, monkeypatch) -> None:
    assert main(["chat", "--url", f"{url}/v1", "-q", "hi", "--system-prompt", "s", "--api-key", "k"]) == 0
    assert capsys.readouterr().out == "ab\n"
    assert Handler.bodies[-1]["key"] == "Bearer k" and Handler.bodies[-1]["messages"][0]["content"] == "s"
    monkeypatch.setattr("builtins.input", lines_then_end("hi", "/exit"))
    assert main(["chat", "--url", url, "--model-name", "m", "--temperature", "0"]) == 0
    assert "ab\n" in capsys.readouterr().out and Handler.bodies[-1]["model"] == "m"
    assert main(["chat", "--url", url, "-q", "fail"]) == 1
    assert capsys.readouterr().err.startswith("fuseline: error: ")


def test_completions_of_a_running_server(url: str, capsys, monkeypatch) -> None:
    assert main(["complete", "--url", url, "--quick", "Once", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == "ab\n"
    assert (Handler.bodies[-1]["path"], Handler.bodies[-1]["max_tokens"]) == ("/v1/completions", 4)
    monkeypatch.setattr("builtins.input", lines_then_end("fail", "Once"))
    assert main(["complete", "--url", url]) == 0
    captured = capsys.readouterr()
    assert "400" in captured.err and "ab\n" in captured.out


TOOLS = '''
import json as _json


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one
        b: the other
    """
    return a + b


def broken() -> str:
    """Fails."""
    raise RuntimeError("out of order")


def _hidden():
    pass
'''


@pytest.fixture
def tools_file(tmp_path) -> str:
    (tmp_path / "my_tools.py").write_text(TOOLS)
    return str(tmp_path / "my_tools.py")


def test_tools_of_a_file(tools_file: str) -> None:
    tools = Tools(tools_file)
    assert [schema["function"]["name"] for schema in tools.schemas] == ["add", "broken"]
    assert tools.schemas[0]["function"]["parameters"]["required"] == ["a", "b"]
    assert tools.call("add", '{"a": 1, "b": 2}') == "3"
    for name, arguments, words in (("add", "{", "JSONDecodeError"), ("add", '{"a": 1}', "missing"),
                                   ("add", "[1]", "error"), ("none", "{}", "no tool"),
                                   ("broken", "", "RuntimeError: out of order")):  # fmt: skip
        assert tools.call(name, arguments).startswith("error: ") and words in tools.call(name, arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [("def f(x): pass", "type hints and a docstring"), ("x = 1", "defines no function"), ("def f(", "SyntaxError"),
     (None, "no such Python file")],
)  # fmt: skip
def test_files_that_hold_no_tools(tmp_path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "t.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        Tools(str(tmp_path / "t.py"))


def test_called_tools_are_run_and_their_results_sent(url: str, tools_file: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lines_then_end("add"))
    assert run_chat(["--url", f"{url}/v1", "--tools", tools_file]) == 0
    out = capsys.readouterr().out
    assert '[add({"a": 1, "b": 2}) -> 3]' in out and out.rstrip().endswith("ab")
    first, second = Handler.bodies[-2:]
    assert first["tools"][0]["function"]["name"] == "add"
    assert second["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]  # fmt: skip


def test_an_engine_here_needs_to_know_how_tools_are_called(tools_file: str, capsys) -> None:
    assert main(["run", "--tools", tools_file]) == 1
    assert "--tools needs --tool-call-parser" in capsys.readouterr().err


def test_a_model_that_only_calls_tools_is_stopped(tools_file: str) -> None:
    rounds = []

    def stream(messages):
        rounds.append(len(messages))
        yield from TOOL_CALL

    with pytest.raises(ValueError, match="in a row"):
        list(answer_with_tools(stream, Tools(tools_file), lambda line: None)([{"role": "user", "content": "x"}]))
    assert len(rounds) == MAX_ROUNDS
