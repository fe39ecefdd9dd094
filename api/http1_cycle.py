"""One request and its answer on a connection: uvicorn's cycle, with HTTP/1.0 and refusals by the connection."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from fuseline.api.errors import ApiError

NO_BODY = (204, 304)


class Cycle(RequestResponseCycle):
    """Adds to uvicorn's: bodies of HTTP/1.0, a refusal while the body comes, and closing left to the connection."""

    closes = False
    """Known once the answer has started: the connection ends with it."""
    _is_close_delimited = False

    def refuse(self, error: ApiError) -> None:
        """Whoever reads the body sees a disconnect, and the application answers with `error` (app.py)."""
        self.scope["state"]["refusal"] = error
        self.keep_alive = False
        self.message_event.set()

    @property
    def is_refused(self) -> bool:
        return "refusal" in self.scope["state"]

    async def receive(self) -> Any:
        message = {"type": "http.disconnect"} if self.is_refused else await super().receive()
        return {"type": "http.disconnect"} if self.is_refused else message

    async def send(self, message: Any) -> None:
        is_start = message["type"] == "http.response.start"
        if is_start:
            if self.waiting_for_100_continue:  # the client may leave its body out, or not: nobody can tell
                self.keep_alive = False
            if self.scope["http_version"] == "1.0":
                message = self._for_old_client(message)
        elif self._is_close_delimited:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
        if is_start:
            self.closes, self.keep_alive = not self.keep_alive, True

    def _for_old_client(self, message: Any) -> Any:
        """HTTP/1.0 has no chunks: a body of unknown length ends with the connection, which is kept after others."""
        headers = [(name.lower(), value) for name, value in message.get("headers", ())]
        has_body = self.scope["method"] != "HEAD" and message["status"] not in NO_BODY
        if has_body and b"content-length" not in dict(headers):
            self._is_close_delimited, self.chunked_encoding, self.keep_alive = True, False, False
            headers = [(name, value) for name, value in headers if name != b"transfer-encoding"]
        elif self.keep_alive:
            headers.append((b"connection", b"keep-alive"))
        return {**message, "headers": headers}
