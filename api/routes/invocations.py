"""POST /invocations: SageMaker's one door, a chat where there are messages and a completion elsewhere (SPEC 17)."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from fuseline.api.routes.chat import chat_completions
from fuseline.api.routes.completions import completions
from fuseline.api.routes.http import read_body
from fuseline.api.served import Served

router = APIRouter()


class _Messages(msgspec.Struct):
    """All of a body that decides; the rest is skipped, not made."""

    messages: msgspec.Raw = msgspec.Raw()


@router.post("/invocations")
async def invocations(request: Request) -> Response:
    served: Served = request.app.state.served
    with served.bodies.hold() as held:
        body = b"".join(await read_body(request, held))
    return await (chat_completions if _has_messages(body) else completions)(_replayed(request, body))


def _has_messages(body: bytes) -> bool:
    """What is no JSON object is left to the route, which says so."""
    try:
        return bytes(msgspec.json.decode(body, type=_Messages).messages) not in (b"", b"null")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _replayed(request: Request, body: bytes) -> Request:
    """The same request with its body still to come."""
    left: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await request.receive()

    return Request(request.scope, receive)
