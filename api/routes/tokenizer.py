"""POST /tokenize and /detokenize."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.config_context import read_json_file
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
    served = request.app.state.served
    if served.tokenizer is None:
        raise bad_request("this server runs without a tokenizer (--skip-tokenizer-init)")
    settings = read_json_file(Path(served.config.tokenizer_dir) / "tokenizer_config.json")
    own = {"chat_template": served.tokenizer.chat_template}
    return json_response({**settings, **served.tokenizer.special_tokens, **own})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    return raw_response((await prepare(request, "detokenize")).pieces)
