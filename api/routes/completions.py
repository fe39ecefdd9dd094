"""POST /v1/completions."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.output.openai_completion import CompletionWriter
from fuseline.api.output.response import Answer
from fuseline.api.routes.http import new_id, prepare
from fuseline.api.served import Served

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_ready()
    with ExitStack() as stack:
        places = stack.enter_context(served.admission.hold())
        prepared = await prepare(request, "completion", places)
        served.check_ready()
        places.take(prepared.num_sequences)
        id = new_id("cmpl-", request, prepared.answer.request_id)
        prompts = served.prompts(prepared)
        writer = CompletionWriter(served.shape(prepared, id), prompts, prepared.answer.n)
        runs = served.runs(prepared, prompts, id)
        return Answer(
            served.client, runs, writer, stack.pop_all(), served.keep_alive(prepared), prepared.answer.is_one_event,
            turns=served.turns,
        )  # fmt: skip
