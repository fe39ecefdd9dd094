"""HTTP/1 connections: uvicorn's httptools protocol with bounds on size and time, half-closed clients and h2c offers.

A client that shuts down its sending side still gets its answer. Whether it has gone altogether, a FIN does not tell:
it shows when the peer answers a write with a reset. Streams write anyway; an answer that is still being made is
preceded by `100 Continue`, which every HTTP/1.1 client skips, from PROBE_SECONDS on.
"""

from __future__ import annotations

import asyncio
import socket
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import is_ssl

from fuseline.api.config import ServerConfig
from fuseline.api.errors import ApiError, bad_request
from fuseline.api.http1_cycle import Cycle

LINGER_SECONDS = 5.0
"""How long what a refused client still sends is read and dropped, so that no reset overtakes the answer."""
PEER_SECONDS = 0.5
"""Between two looks at a connection whose client has shut down its sending side."""
PROBE_SECONDS = 2.0
"""Between two probes of such a client, and before the first one."""
TCP_CLOSE = 7
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
KEEP_ALIVE_OPTIONS = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of a connection, in bytes and seconds."""

    header_bytes: int
    num_headers: int
    num_pipelined: int
    header_seconds: float
    body_seconds: float
    body_rate: int
    idle_seconds: float
    write_seconds: float


def connection_limits(config: ServerConfig) -> ConnectionLimits:
    return ConnectionLimits(
        header_bytes=config.h11_max_incomplete_event_size, num_headers=config.h11_max_header_count,
        num_pipelined=config.max_pipelined_requests,
        header_seconds=config.request_header_timeout, body_seconds=config.request_body_timeout,
        body_rate=config.request_body_min_rate, idle_seconds=config.keep_alive_timeout,
        write_seconds=config.response_write_timeout,
    )  # fmt: skip


class Connection(HttpToolsProtocol):
    """One TCP connection. `_phase` tells what is being received: nothing (idle), a head, or a body."""

    def __init__(self, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._phase = "idle"
        self._answering: Cycle | None = None
        """The cycle of the request that is being answered; `cycle` is that of the newest one."""
        self._timer: asyncio.TimerHandle | None = None
        self._writing_timer: asyncio.TimerHandle | None = None
        self._peer_timer: asyncio.TimerHandle | None = None
        self._refusal: ApiError | None = None
        self._is_deaf = False
        """Whatever still comes is read and dropped."""
        self._is_half_closed = False
        self._num_head_bytes = 0
        self._num_open_bytes = 0
        """Bytes of the line of the head that has not ended."""
        self._body_deadline = 0.0

    # Called by the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _find_dead_peers(transport.get_extra_info("socket"))
        self._arm(self._limits.header_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._writing_timer, self._peer_timer):
            if timer is not None:
                timer.cancel()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        is_head = self._phase != "body"
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal or bad_request("this is no valid HTTP/1 request"))
            return
        if is_head and self._phase == "head":  # a line without an end reaches no callback
            start = data.rfind(b"\n") + 1
            self._num_open_bytes = len(data) - start + (0 if start else self._num_open_bytes)
            if self._num_open_bytes > self._limits.header_bytes:
                self._refuse(self._too_long())

    def eof_received(self) -> bool:
        """True keeps the connection for the answers under way. TLS knows no half-closed connections."""
        self._is_half_closed = True
        if self._phase != "idle" and not self._is_deaf:
            self._refuse(bad_request("the connection ended in the middle of the request"))
        if self._answering is None or self._answering.response_complete or is_ssl(self.transport):
            return False
        self.cycle.keep_alive = False
        if self._peer_timer is None:
            self._peer_timer = self.loop.call_later(PEER_SECONDS, self._look_at_peer, self.loop.time() + PROBE_SECONDS)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing_timer is not None:
            self._writing_timer.cancel()

    # Called by the parser.

    def _feed(self, data: bytes) -> None:
        """Parse. An offered upgrade (h2c, ...) is not taken up: the request is read again without it, as HTTP/1.1."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            method = self.parser.get_method()
            if method == b"CONNECT":
                self._refusal = ApiError(405, "CONNECT is not served here")
                raise httptools.HttpParserError("CONNECT") from offer
            kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
            head = b"\r\n".join([method + b" " + self.url + b" HTTP/1.1", *kept, b"", b""])
            self.parser = _new_parser(self)
            self._feed(head + data[offer.args[0] :])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._phase = "head"
        self._num_head_bytes = self._num_open_bytes = 0
        self._arm(self._limits.header_seconds, self._on_late)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)
        if len(self.headers) > (limit := self._limits.num_headers):
            self._refusal = ApiError(431, f"the request has more than {limit} headers (--h11-max-header-count)")
            raise self._refusal

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > self._limits.header_bytes:
            self._refusal = self._too_long()
            raise self._refusal

    def _too_long(self) -> ApiError:
        limit = self._limits.header_bytes
        message = f"the request line and headers are larger than {limit} bytes (--h11-max-incomplete-event-size)"
        return ApiError(431, message)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= (limit := self._limits.num_pipelined):
            message = f"at most {limit} requests may wait on one connection (--max-pipelined-requests)"
            self._refusal = ApiError(429, message)
            raise self._refusal
        version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        self._address(self.parser.get_method().decode(), url.path or b"/", url.query or b"")
        self.scope["http_version"] = version
        self._phase = "body"
        self._body_deadline = self.loop.time() + self._limits.body_seconds
        self._arm(self._limits.body_seconds, self._on_late)
        self._begin(self._make_cycle(self.expect_100_continue and version != "1.0", self.parser.should_keep_alive()))

    def on_body(self, body: bytes) -> None:
        self._body_deadline += len(body) / self._limits.body_rate
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._phase = "idle"
        self._disarm()
        super().on_message_complete()
        if self.cycle.response_complete:
            self._rest()

    # Requests, refusals and the end.

    def _address(self, method: str, raw_path: bytes, query: bytes) -> None:
        path = urllib.parse.unquote(raw_path.decode("ascii"))
        self.scope |= {
            "method": method, "path": self.root_path + path, "raw_path": self.root_path.encode("ascii") + raw_path,
            "query_string": query,
        }  # fmt: skip

    def _make_cycle(self, expect_100_continue: bool, keep_alive: bool) -> Cycle:
        return Cycle(
            scope=self.scope, transport=self.transport, flow=self.flow, logger=self.logger,
            access_logger=self.access_logger, access_log=self.access_log,
            default_headers=self.server_state.default_headers, message_event=asyncio.Event(),
            expect_100_continue=expect_100_continue, keep_alive=keep_alive, on_response=self.on_response_complete,
        )  # fmt: skip

    def _begin(self, cycle: Cycle) -> None:
        """Run the request, or queue it behind the one that is being answered."""
        self.cycle = cycle
        if self._answering is None or self._answering.response_complete:
            self._start(cycle)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _start(self, cycle: Cycle) -> None:
        self._answering = cycle
        task = self.loop.create_task(cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _refuse(self, error: ApiError) -> None:
        """Answer what is being received with `error`, after the answers before it, and close."""
        self._is_deaf = True
        self._disarm()
        if self._phase != "body":
            if self._phase == "idle":
                super().on_message_begin()
            self._address("GET", b"/", b"")
            self._begin(self._make_cycle(False, False))
            self.cycle.more_body = False
            self.cycle.refuse(error)
        elif self.cycle.response_started:
            self._close()
        else:
            self.cycle.refuse(error)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self._answering.closes or (self._is_half_closed and not self.pipeline):
            self._close()
        elif self.pipeline:
            self._start(self.pipeline.pop()[0])
        else:
            self._rest()
        self.flow.resume_reading()

    def _rest(self) -> None:
        """Wait for the next request, for a while."""
        if self._phase == "idle":
            self._arm(self._limits.idle_seconds, self.transport.close)

    def _close(self) -> None:
        """Read the rest of a request for a moment before closing: a reset would overtake the answer."""
        if self._is_half_closed or not (self._is_deaf or self._phase == "body"):
            self.transport.close()
            return
        self._is_deaf = True
        self._arm(LINGER_SECONDS, self.transport.close)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # Time.

    def _arm(self, seconds: float, action: Callable[[], object]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_late(self) -> None:
        """The head or the body took too long. While we do not read, time does not count."""
        flag = "header"
        if self._phase == "body":
            flag, now = "body", self.loop.time()
            if self.flow.read_paused:
                self._body_deadline = now + self._limits.body_seconds
            if self._body_deadline > now:
                self._arm(self._body_deadline - now, self._on_late)
                return
        self._refuse(ApiError(408, f"the {flag} of the request took too long to arrive (--request-{flag}-timeout)"))

    def _look_at_peer(self, probe_at: float) -> None:
        """Look whether a half-closed client has reset the connection; probe it where nothing has been written yet."""
        if self.transport.is_closing():
            return
        if _is_reset(self.transport.get_extra_info("socket")):
            self.transport.abort()
            return
        cycle, now = self._answering, self.loop.time()
        if now >= probe_at and not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
            probe_at = now + PROBE_SECONDS
        self._peer_timer = self.loop.call_later(PEER_SECONDS, self._look_at_peer, probe_at)


def _new_parser(connection: Connection) -> httptools.HttpRequestParser:
    """As uvicorn makes it: data after a request with `Connection: close` is no error of that request."""
    parser = httptools.HttpRequestParser(connection)
    with suppress(AttributeError):  # httptools before 0.6.3
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _find_dead_peers(peer: socket.socket | None) -> None:
    """TCP keep-alive: a client whose machine has vanished is found even while nothing is written to it."""
    with suppress(OSError, AttributeError):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE_OPTIONS:
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_reset(peer: socket.socket | None) -> bool:
    """Whether the kernel has dropped the connection. Without a reader on the socket nothing else tells."""
    with suppress(OSError, AttributeError):
        return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE
    return False
