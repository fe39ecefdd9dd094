"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.output.openai_chat import ChatWriter
from fuseline.api.output.response import Answer
from fuseline.api.routes.http import new_id, prepare
from fuseline.api.served import Served

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_ready()
    with ExitStack() as stack:
        places = stack.enter_context(served.admission.hold())
        prepared = await prepare(request, "chat", places)
        served.check_ready()
        places.take(prepared.num_sequences)
        id = new_id("chatcmpl-", request, prepared.answer.request_id)
        prompts = served.prompts(prepared)
        writer = ChatWriter(served.shape(prepared, id), prompts[0], prepared.answer.n)
        runs = served.runs(prepared, prompts, id)
        return Answer(
            served.client, runs, writer, stack.pop_all(), served.keep_alive(prepared), prepared.answer.is_one_event,
            turns=served.turns,
        )  # fmt: skip
