"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.errors import bad_request
from fuseline.api.routes.http import json_response, prepare, raw_response

router = APIRouter()
info_router = APIRouter()
"""Mounted with --enable-tokenizer-info-endpoint."""


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    return raw_response((await prepare(request, "tokenize")).pieces)


@info_router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """tokenizer_config.json as served; 400 without a tokenizer."""
    tokenizer = request.app.state.served.tokenizer
    if tokenizer is None:
        raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init)")
    return json_response({**tokenizer.settings, "chat_template": tokenizer.chat_template})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    return raw_response((await prepare(request, "detokenize")).pieces)
