"""Models, health, version, load, metrics, and the development routes."""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import Response

import fuseline
from fuseline.api.config_resolve import config_dict
from fuseline.api.errors import ApiError
from fuseline.api.routes.http import json_response
from fuseline.api.served import Served

router = APIRouter()
dev_router = APIRouter()


def _model_card(served: Served, name: str) -> dict:
    permission = {
        "id": f"modelperm-{uuid.uuid4().hex}", "object": "model_permission", "created": served.created,
        "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False,
        "allow_view": True, "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    return {
        "id": name, "object": "model", "created": served.created, "owned_by": "fuseline", "root": served.config.model,
        "parent": None, "max_model_len": served.ready.max_model_len, "permission": [permission],
    }  # fmt: skip


@router.get("/v1/models")
async def models(request: Request) -> Response:
    served: Served = request.app.state.served
    models = [_model_card(served, name) for name in served.config.served_model_name]
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    served: Served = request.app.state.served
    served.check_model(name)
    return json_response(_model_card(served, name))


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def health(request: Request) -> Response:
    served: Served = request.app.state.served
    return Response(status_code=200 if served.client.is_alive and not served.is_draining else 503)


@router.get("/version")
async def version() -> Response:
    return json_response({"version": fuseline.__version__})


@router.get("/load")
async def load(request: Request) -> Response:
    served: Served = request.app.state.served
    counts = served.config.enable_server_load_tracking
    return json_response({"server_load": served.client.num_in_flight if counts else 0})


@router.get("/metrics")
@router.get("/metrics/")
async def metrics(request: Request) -> Response:
    served: Served = request.app.state.served
    return Response(generate_latest(served.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


@dev_router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    await request.app.state.served.client.reset_prefix_cache()
    return json_response({"success": True})


@dev_router.post("/sleep")
async def sleep(request: Request) -> Response:
    served: Served = request.app.state.served
    if not served.config.enable_sleep_mode:
        raise ApiError(400, "sleep mode is off; start the server with --enable-sleep-mode")
    level = request.query_params.get("level", "1")
    if level not in ("0", "1", "2"):
        raise ApiError(400, "level must be 0, 1 or 2", "level")
    await served.client.sleep(int(level))
    return Response()


@dev_router.post("/wake_up")
async def wake_up(request: Request) -> Response:
    tags = request.query_params.getlist("tags")
    if unknown := sorted(set(tags) - {"weights", "kv_cache"}):
        raise ApiError(400, f"there is no tag {unknown[0]!r}; tags are weights and kv_cache", "tags")
    await request.app.state.served.client.wake_up(tags)
    return Response()


@dev_router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    return json_response({"is_sleeping": await request.app.state.served.client.is_sleeping()})


@dev_router.get("/server_info")
async def server_info(request: Request) -> Response:
    return json_response(config_dict(request.app.state.served.config))
