"""POST /v1/responses, and the responses that it has kept."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request
from fuseline.api.output.openai_responses import FRAMING, ResponsesWriter
from fuseline.api.output.response import Answer
from fuseline.api.prompt.prepared import Prepared
from fuseline.api.protocol.json_body import parse_object
from fuseline.api.routes.http import json_response, new_id, prepare, raw_response
from fuseline.api.served import Served
from fuseline.api.stored_responses import ResponseStore

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_ready()
    with ExitStack() as stack:
        places = stack.enter_context(served.admission.hold())
        prepared = await prepare(request, "responses", places, partial(with_previous, served.stored))
        served.check_ready()
        places.take(prepared.num_sequences)
        id = new_id("resp_", request)
        prompts = served.prompts(prepared)
        keep = _keeper(served.stored, prepared)
        writer = ResponsesWriter(served.shape(prepared, id), prompts[0], prepared.answer.shown or {}, keep)
        runs = served.runs(prepared, prompts, id)
        held = stack.pop_all()
        keep_alive = served.keep_alive(prepared)
        return Answer(served.client, runs, writer, held, keep_alive, framing=FRAMING, turns=served.turns)


@router.get("/v1/responses/{id}")
async def get_response(request: Request, id: str) -> Response:
    return raw_response([request.app.state.served.stored.response(id)])


@router.delete("/v1/responses/{id}")
async def delete_response(request: Request, id: str) -> Response:
    request.app.state.served.stored.delete(id)
    return json_response({"id": id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel")
async def cancel_response(request: Request, id: str) -> Response:
    request.app.state.served.stored.response(id)
    raise bad_request("only responses in the background can be cancelled, and this server runs none there")


def _keeper(stored: ResponseStore, prepared: Prepared) -> Any:
    def keep(response: dict[str, Any]) -> None:
        if response.get("store"):
            stored.keep(response, prepared.answer.items or [])

    return keep


def with_previous(stored: ResponseStore, pieces: list[bytes]) -> list[bytes]:
    """The body with the conversation that it goes on in front of its input. Raises ApiError."""
    raw = b"".join(pieces)
    if b'"previous_response_id"' not in raw:
        return pieces
    fields = parse_object(raw)
    previous, given = fields.get("previous_response_id"), fields.get("input")
    if not isinstance(previous, str) or not isinstance(given, str | list):
        return pieces
    own = given if isinstance(given, list) else [{"role": "user", "content": given}]
    return [msgspec.json.encode({**fields, "input": [*stored.conversation(previous), *own]})]
