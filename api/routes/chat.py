"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.output.openai_chat import ChatWriter
from fuseline.api.routes.http import new_id, prepare, raw_response, stream, until_disconnect
from fuseline.api.served import Served

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_ready()
    prepared = await prepare(request, "chat")
    served.check_ready()
    id = new_id("chatcmpl-", request, prepared.answer.request_id)
    prompt = served.prompts(prepared)[0]
    writer = ChatWriter(served.shape(prepared, id), prompt.ids, prepared.params.n)
    events = served.events(prepared, 0, id)
    if prepared.answer.stream:
        return await stream(request, writer.chunks(events), served.config.sse_keep_alive_interval)
    return raw_response(await until_disconnect(request, writer.whole(events)))
