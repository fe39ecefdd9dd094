"""`fuseline serve`: port, engine, application, and an orderly end (SPEC 1.1)."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from fuseline.api.certificates import check_tls, refresh_certificates
from fuseline.api.cli_log import PathFilter
from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.progress import StartupProgress, startup_table
from fuseline.api.route_table import route_table
from fuseline.engine.client import EngineClient, EngineStartError

if TYPE_CHECKING:
    import uvicorn

    from fuseline.api.prompt.encode import TextTokenizer
    from fuseline.api.served import Served
    from fuseline.engine.messages import EngineReady

LOG = logging.getLogger("fuseline.server")
OnPhase = Callable[[str], None]
REST_SECONDS = 0.5
"""After the start, until what no request has needed so far is started: the first request has the cores for itself."""
ENGINE_PHASES = {("capturing", False): "engine imports", ("capturing", True): "graph", ("loading", True): "weights"}
"""(progress of the engine, whether it is complete) -> the phase of the start that ends with it."""


def run_server(config: ServerConfig, on_phase: OnPhase | None = None) -> int:
    """Serves until a signal; returns the exit status. Start-up errors are one line on stderr.

    `on_phase` is told when each phase of the start ends (names: bench/startup.py).
    """
    try:
        listener = bind(config)
    except OSError as error:
        return fail(cannot_listen(config, error))
    try:
        return asyncio.run(_Server(config, listener, on_phase or _tell_no_one).run())
    except (EngineStartError, ConfigError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 0
    finally:
        listener.close()
        if config.uds:
            with suppress(OSError):
                os.unlink(config.uds)


def _tell_no_one(phase: str) -> None:
    """No one times this start."""


def fail(message: str) -> int:
    print(f"fuseline: error: {message}", file=sys.stderr)
    return 1


def cannot_listen(config: ServerConfig, error: OSError) -> str:
    """What `bind` met, with the flag that is to change."""
    place = config.uds or f"{config.host}:{config.port}"
    is_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
    flag = "--uds" if config.uds else "--host" if is_address else "--port"
    return f"cannot listen on {place}: {error.strerror or error}; choose another {flag}"


def bind(config: ServerConfig) -> socket.socket:
    """The listening port, taken before the engine is built. Raises OSError."""
    if config.uds:
        return _bind_unix(config.uds)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio leaves Nagle on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_unix(path: str) -> socket.socket:
    """A socket that a server has left behind is replaced; nothing else is. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode) and not _is_served(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def prepare(config: ServerConfig) -> TextTokenizer | None:
    """Imports, the tokenizer and a trial of all parts but the engine, while that starts. Raises ConfigError."""
    import uvicorn  # noqa: F401

    from fuseline.api import app, http1  # noqa: F401
    from fuseline.api.start_check import try_parts

    return try_parts(config)


class _Server:
    """One run: start, serve, drain."""

    def __init__(self, config: ServerConfig, listener: socket.socket, on_phase: OnPhase) -> None:
        self._config, self._listener, self._on_phase = config, listener, on_phase
        self._client = EngineClient(config.engine, own_process=not config.disable_frontend_multiprocessing)
        self._served: Served | None = None
        self._exit_status = 0
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            preparing = asyncio.ensure_future(asyncio.to_thread(prepare, self._config))
            ready = await self._start_engine(preparing)
            if ready is None:
                return 0
            tokenizer = await preparing
            from fuseline.api.app import build_app

            app = build_app(self._config, self._client, ready, tokenizer)
            self._served = app.state.served
            server = self._uvicorn_server(app)
            self._announce(app, ready)
            self._on_phase("application")
            if ready.wants_vocabulary:
                self._spawn(self._client.send_vocabulary())
            await self._serve(server)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._served is not None:
                self._served.close()
            await self._client.shutdown(5)
        return self._exit_status

    async def _start_engine(self, preparing: asyncio.Future) -> EngineReady | None:
        """The engine's answer, or None when a signal came first. Raises what `preparing` raises as soon as it does."""
        progress = StartupProgress()

        def on_progress(phase: str, done: int, total: int) -> None:
            progress(phase, done, total)
            if name := ENGINE_PHASES.get((phase, done == total)):
                self._on_phase(name)

        self._on_phase("settings")
        starting = asyncio.ensure_future(self._client.start(on_progress))
        stopped = asyncio.ensure_future(self._stop.wait())
        refused = asyncio.ensure_future(_failure(preparing))
        try:
            await asyncio.wait((starting, stopped, refused), return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                refused.result()
            if starting.done():
                self._on_phase("engine")
                return starting.result()
            return None
        finally:
            progress.close()
            for task in (starting, stopped, refused):
                task.cancel()
                with suppress(asyncio.CancelledError, EngineStartError, ConfigError):
                    await task

    def _uvicorn_server(self, app) -> uvicorn.Server:
        import uvicorn

        from fuseline.api.http1 import Connection, connection_limits

        config = self._config
        made = uvicorn.Config(
            app, http=partial(Connection, connection_limits(config)), ws="none", log_level=config.uvicorn_log_level,
            lifespan="off",
            ssl_keyfile=config.ssl_keyfile or None, ssl_certfile=config.ssl_certfile or None,
            ssl_ca_certs=config.ssl_ca_certs or None, ssl_cert_reqs=config.ssl_cert_reqs,
            ssl_ciphers=config.ssl_ciphers or None, access_log=not config.disable_uvicorn_access_log,
            timeout_graceful_shutdown=max(int(config.shutdown_timeout), 1),
        )  # fmt: skip
        check_tls(config)
        made.load()
        if config.disable_access_log_for_endpoints:
            logging.getLogger("uvicorn.access").addFilter(PathFilter(config.disable_access_log_for_endpoints))
        if config.enable_ssl_refresh:
            self._spawn(refresh_certificates(made.ssl, config))
        return uvicorn.Server(made)

    def _announce(self, app, ready) -> None:
        for path, methods in route_table(app):
            LOG.info("route %s %s", ",".join(methods), path)
        print(startup_table(self._config, ready, self._address()), file=sys.stderr, flush=True)

    def _address(self) -> str:
        if self._config.uds:
            return f"unix:{self._config.uds}"
        scheme = "https" if self._config.ssl_certfile else "http"
        host, port = self._listener.getsockname()[:2]
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def _serve(self, server: uvicorn.Server) -> None:
        self._client.on_death.append(self._on_engine_death)
        self._spawn(self._log_stats())
        gc.collect()
        gc.freeze()  # what the start has left is not searched again: a full collection would take tens of milliseconds
        serving = asyncio.ensure_future(_serve_without_signals(server, self._listener))
        asyncio.get_running_loop().call_later(REST_SECONDS, self._served.start_processes)
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not serving.done():
            await self._drain()
            server.should_exit = True
        await serving

    async def _drain(self) -> None:
        """Readiness is false at once; running requests may finish, up to the time-out or a second signal."""
        self._served.is_draining = True
        self._stop.clear()
        second = asyncio.ensure_future(self._stop.wait())
        idle = asyncio.ensure_future(self._until_idle())
        await asyncio.wait((second, idle), timeout=self._config.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in (second, idle):
            task.cancel()
        if self._client.num_in_flight:
            await self._client.shutdown(1)

    async def _until_idle(self) -> None:
        while self._client.num_in_flight:
            await asyncio.sleep(0.05)

    def _on_signal(self) -> None:
        self._stop.set()

    def _on_engine_death(self) -> None:
        LOG.error("the engine died; it is started anew")
        self._spawn(self._restart())

    async def _restart(self) -> None:
        try:
            await self._client.restart()
        except EngineStartError as error:
            fail(str(error))
            self._exit_status = 1
            self._stop.set()

    async def _log_stats(self) -> None:
        from fuseline.api.metrics import LOG_SECONDS

        while self._served.metrics is not None:
            await asyncio.sleep(LOG_SECONDS)
            self._served.metrics.log_line()

    def _spawn(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _failure(preparing: asyncio.Future) -> None:
    """Ends only when `preparing` fails, with its error."""
    await asyncio.shield(preparing)
    await asyncio.Event().wait()


async def _serve_without_signals(server: uvicorn.Server, listener: socket.socket) -> None:
    """uvicorn's loop; its own signal handling stays out, ours drains first."""
    await server._serve([listener])
