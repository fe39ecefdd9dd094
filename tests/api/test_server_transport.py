"""Flags of the HTTP server itself, each observed from outside: TLS files, Unix sockets, access lines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import tls_files

from fuseline.api import certificates, server
from fuseline.api.cli_log import PathFilter
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.config_resolve import resolve


async def app(scope: dict, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@contextlib.asynccontextmanager
async def serving(**flags: object) -> AsyncIterator[tuple[ServerConfig, str]]:
    """The configured HTTP server around a small app, without an engine; yields the configuration and its port."""
    config = resolve({"model": "demo", "port": 0, "shutdown_timeout": 1, **flags})
    listener = server.bind(config)
    http = server._Server(config, listener, lambda phase: None)
    uvicorn_server = http._uvicorn_server(app)
    running = asyncio.create_task(server._serve_without_signals(uvicorn_server, listener))
    try:
        while not uvicorn_server.started:
            await asyncio.sleep(0.005)
        yield config, "" if config.uds else f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        await running
        for task in http._tasks:
            task.cancel()
        listener.close()


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    key, certificate = tls_files.write_pair(tmp_path, "server", tls_files.SERVER, tls_files.SERVER_KEY)
    return {"ssl_keyfile": key, "ssl_certfile": certificate}


def trusting(tmp_path: Path, **client: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=tls_files.AUTHORITY)
    if client:
        key, certificate = tls_files.write_pair(tmp_path, "client", client["certificate"], client["key"])
        context.load_cert_chain(certificate, key)
    return context


async def test_answers_come_over_tls(pair: dict[str, str], tmp_path: Path) -> None:
    async with serving(**pair) as (_, url), httpx.AsyncClient(verify=trusting(tmp_path)) as client:
        assert (await client.get(url)).text == "https"
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError, match="(?i)certificate"):
                await stranger.get(url)
            with pytest.raises(httpx.HTTPError):
                await stranger.get(url.replace("https", "http"))


async def test_clients_need_a_certificate_where_it_is_required(pair: dict[str, str], tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text(tls_files.AUTHORITY)
    known = trusting(tmp_path, certificate=tls_files.CLIENT, key=tls_files.CLIENT_KEY)
    for required, is_open in ((0, True), (1, True), (2, False)):
        async with serving(**pair, ssl_ca_certs=str(authority), ssl_cert_reqs=required) as (_, url):
            async with httpx.AsyncClient(verify=known) as client:
                assert (await client.get(url)).status_code == 200
            async with httpx.AsyncClient(verify=trusting(tmp_path)) as client:
                if is_open:
                    assert (await client.get(url)).status_code == 200
                else:
                    with pytest.raises(httpx.HTTPError):
                        await client.get(url)


async def test_ciphers_are_those_given(pair: dict[str, str], tmp_path: Path) -> None:
    context = trusting(tmp_path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(**pair, ssl_ciphers="ECDHE-ECDSA-AES256-GCM-SHA384") as (_, url):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), ssl=context)
        assert writer.get_extra_info("cipher")[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
        writer.close()
    with pytest.raises(ConfigError, match="--ssl-"):
        async with serving(**pair, ssl_ciphers="NO-SUCH-CIPHER"):
            pass


async def test_renewed_files_are_used_and_open_connections_stay(
    pair: dict[str, str], tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(certificates.refresh_certificates, "__defaults__", (0.02,))
    caplog.set_level(logging.INFO, "fuseline.tls")

    async def name() -> str:
        port = int(url.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(tmp_path))
        shown = writer.get_extra_info("peercert")
        writer.close()
        return dict(part[0] for part in shown["subject"])["commonName"]

    async with serving(**pair, enable_ssl_refresh=True) as (_, url):
        async with httpx.AsyncClient(verify=trusting(tmp_path)) as client:
            assert (await client.get(url)).status_code == 200 and await name() == "server"
            Path(pair["ssl_certfile"]).write_text(tls_files.RENEWED)  # half of the pair: it cannot be used
            async with asyncio.timeout(10):
                while "cannot be used" not in caplog.text:
                    await asyncio.sleep(0.01)
            assert await name() == "server"
            Path(pair["ssl_keyfile"]).write_text(tls_files.RENEWED_KEY)
            async with asyncio.timeout(10):
                while await name() != "renewed":
                    await asyncio.sleep(0.01)
            assert (await client.get(url)).status_code == 200
    assert "are in use" in caplog.text


async def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left:  # of a server that was killed
        left.bind(str(path))
    async with serving(uds=str(path)) as (config, _):
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.get("http://any/")).text == "http"
        with pytest.raises(OSError, match="in use"):
            server.bind(config)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError):
        server.bind(resolve({"model": "demo", "uds": str(file)}))
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "paths"),
    [
        ({}, ["/a", "/b?x=1"]),
        ({"disable_access_log_for_endpoints": "/b, /c"}, ["/a"]),
        ({"disable_uvicorn_access_log": True}, []),
        ({"uvicorn_log_level": "warning"}, []),
    ],
)
async def test_access_lines(tmp_path: Path, capsys, monkeypatch, flags: dict, paths: list[str]) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.access"), "filters", [])
    async with serving(uds=str(tmp_path / "s"), **flags):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
        async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
            for path in ("/a", "/b?x=1"):
                await client.get(path)
    assert re.findall(r"GET (\S+) HTTP", capsys.readouterr().out) == paths


def test_other_records_pass_the_filter() -> None:
    record = SimpleNamespace(args=("/b",))
    assert PathFilter("/b").filter(record)
