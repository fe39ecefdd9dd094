"""What a start refuses without reading weights: --print-config refuses it too, in one line that names the flag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tls_files import AUTHORITY, SERVER, SERVER_KEY

from fuseline.api import server
from fuseline.api.cli import main
from fuseline.api.config_resolve import resolve

FILES = {
    "broken.jinja": "{% if %}",
    "endless.jinja": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "list.yaml": "port: [1, 2]",
    "mapping.yaml": "port: {a: 1}",
    "true.yaml": "host: true",
    "twice.yaml": "port: 1\nport: 2",
    "nested.yaml": "hf-overrides: [1]",
    "log.json": '{"version": 7}',
    "no.pem": "x",
    "hot/generation_config.json": '{"temperature": "hot"}',
    "empty/x.txt": "",
    "savanna.py": "raise KeyError('elephant')",
    "authority.pem": AUTHORITY,
    "server.pem": SERVER,
    "key.pem": SERVER_KEY,
    "foreign/config.json": '{"model_type": "vit", "max_position_embeddings": 64}',
    "cut/config.json": '{"model_type": "llama", "max_position_embeddings": 64}',
    "cut/model.safetensors": "12345678",
    "socket.txt": "no socket",
}
TLS = "--ssl-certfile DIR/server.pem --ssl-keyfile DIR/key.pem"
CASES = [
    ("--chat-template DIR/broken.jinja", "--chat-template", "does not parse"),
    ("--chat-template {{x", "--chat-template", "does not parse"),
    ("--prompt-timeout 1 --chat-template DIR/endless.jinja", "--chat-template", "1 seconds"),
    ('--override-generation-config {"temperature":9}', "--override-generation-config", "temperature"),
    ('--override-generation-config {"top_k":"many"}', "--override-generation-config", "top_k"),
    ('--override-generation-config {"tempe":1}', "--override-generation-config", "tempe"),
    ("--generation-config DIR/hot", "--generation-config", "temperature"),
    ("--generation-config DIR/empty", "--generation-config", "generation_config.json"),
    ("--middleware no.such", "--middleware", "cannot be imported"),
    ("--middleware nodots", "--middleware", "cannot be imported"),
    ("--middleware json.dumps", "--middleware", "neither"),
    ("--middleware savanna.lion", "--middleware", "elephant"),
    ("--scheduler-cls json.JSONDecoder", "--scheduler-cls", "no subclass"),
    ("--scheduler-cls savanna.lion", "--scheduler-cls", "elephant"),
    ("--config DIR/list.yaml", "--port", "list"),
    ("--config DIR/mapping.yaml", "--port", "mapping"),
    ("--config DIR/true.yaml", "--host", "takes a value"),
    ("--config DIR/twice.yaml", "port", "twice"),
    ("--config DIR/nested.yaml", "--hf-overrides", "list"),
    ("--host 1.2.3.4", "--host", "listen"),
    ("--host no.such.invalid", "--host", "listen"),
    ("--uds DIR/none/socket", "--uds", "no directory"),
    ("--uds DIR/socket.txt", "--uds", "no socket"),
    (f"--uds DIR/{'x' * 108}", "--uds", "107 bytes"),
    ("--ssl-certfile DIR/no.pem --ssl-keyfile DIR/key.pem", "--ssl-certfile", "cannot be used"),
    (f"{TLS} --ssl-ca-certs DIR/no.pem", "--ssl-ca-certs", "cannot be used"),
    (f"{TLS} --ssl-ciphers NONE", "--ssl-ciphers", "cannot be used"),
    ("--ssl-ca-certs DIR/authority.pem", "--ssl-ca-certs", "needs --ssl-keyfile"),
    ("--ssl-ciphers HIGH", "--ssl-ciphers", "needs --ssl-keyfile"),
    ("--log-config-file DIR/log.json", "DIR/log.json", "version"),
    ("--load-format pt", "--load-format pt", "no weights"),
    ("--ignore-patterns *.safetensors", "", "no weights"),
    ("--tokenizer DIR/empty", "--tokenizer", "no tokenizer"),
    ("--tool-call-parser hf --chat-template {{x}}", "--tool-call-parser", "no known format"),
    ("--reasoning-parser granite --tokenizer DIR/empty", "--tokenizer", "no tokenizer"),
    ('--hf-overrides {"hidden":1}', "--hf-overrides", "hidden"),
    ('--rope-scaling {"rope_type":"x"}', "--rope-scaling", "rope_type"),
    ("--model DIR/foreign", "vit", "generates text"),
    ("--model DIR/cut", "DIR/cut/model.safetensors", "get the file again"),
]  # fmt: skip
"""Arguments, what the line names, other words of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(text)
    return made


@pytest.mark.parametrize(("arguments", "name", "words"), CASES, ids=[case[0] for case in CASES])
def test_what_a_start_refuses(arguments: str, name: str, words: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    asked = [part.replace("DIR", str(folder)) for part in arguments.split()]
    assert main(["serve", *asked, "--print-config"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("fuseline: error: ")
    assert name.replace("DIR", str(folder)) in err and words in err


@pytest.mark.parametrize(
    "arguments",
    [TLS, f"{TLS} --ssl-ca-certs DIR/authority.pem --ssl-cert-reqs 2", "--middleware http.server.HTTPServer",
     "--uds DIR/socket", "--chat-template {{messages[0].content}}", '--override-generation-config {"top_k":3}'],
)  # fmt: skip
def test_what_a_start_takes(arguments: str, folder: Path, capsys) -> None:
    assert main(["serve", *(part.replace("DIR", str(folder)) for part in arguments.split()), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "demo"


def test_files_that_are_still_to_come_are_not_missed(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    assert main(["serve", str(tmp_path), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["max_model_len"] == 64


class EndlessEngine:
    """Never gets ready."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    async def start(self, progress: object) -> None:
        await server.asyncio.Event().wait()

    async def shutdown(self, timeout: float) -> None:
        pass


def test_a_start_does_not_wait_for_the_engine_to_say_what_is_wrong(monkeypatch, capsys) -> None:
    monkeypatch.setattr(server, "EngineClient", EndlessEngine)
    assert server.run_server(resolve({"model": "demo", "port": 0, "middleware": ["no.such"]})) == 1
    assert "--middleware no.such" in capsys.readouterr().err
