"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fuseline.api.routes.http import prepare, raw_response

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    return raw_response((await prepare(request, "tokenize")).pieces)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    return raw_response((await prepare(request, "detokenize")).pieces)
