"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request
from fuseline.api.prompt.features import render_chat
from fuseline.api.protocol.chat import DetokenizeRequest, TokenizeRequest
from fuseline.api.routes.completions import encode
from fuseline.api.routes.http import json_response, read_body
from fuseline.api.served import Served

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request, TokenizeRequest)
    served.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.prompt is not None:
        text, adds = body.prompt, body.add_special_tokens is not False
    else:
        text = render_chat(body, served.config, served.template, served.need_tokenizer())
        adds = bool(body.add_special_tokens)
    ids = await encode(served, text, adds)
    answer = {"count": len(ids), "max_model_len": served.ready.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [served.need_tokenizer().token_name(token) for token in ids]
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request, DetokenizeRequest)
    served.check_model(body.model)
    tokenizer = served.need_tokenizer()
    for token in body.tokens:
        if not 0 <= token < max(tokenizer.vocab_size, served.ready.vocab_size):
            raise bad_request(f"Token id {token} is out of vocabulary", "tokens")
    return json_response({"prompt": tokenizer.decode(body.tokens, False)})
