"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients call them."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.output.anthropic_messages import FRAMING, MessagesWriter
from fuseline.api.output.response import Answer
from fuseline.api.routes.http import new_id, prepare, raw_response
from fuseline.api.served import Served

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_ready()
    with ExitStack() as stack:
        places = stack.enter_context(served.admission.hold())
        prepared = await prepare(request, "messages", places)
        served.check_ready()
        places.take(prepared.num_sequences)
        id = new_id("msg_", request)
        prompts = served.prompts(prepared)
        writer = MessagesWriter(served.shape(prepared, id), prompts[0])
        runs = served.runs(prepared, prompts, id)
        held = stack.pop_all()
        keep_alive = served.keep_alive(prepared)
        return Answer(served.client, runs, writer, held, keep_alive, framing=FRAMING, turns=served.turns)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    return raw_response((await prepare(request, "count_tokens")).pieces)
