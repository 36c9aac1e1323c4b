"""What operators and the CLI ask: health, status, plans, and a change of context."""

from typing import Any

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from kvserve.api.config import ApiConfig
from kvserve.api.documents import describe_phase, reload_document, status_document
from kvserve.api.errors import error_response
from kvserve.api.events import Events
from kvserve.api.plan_documents import plan_document
from kvserve.api.schemas import INT32_MAX, ContextRequest
from kvserve.errors import InvalidRequest, NotReady
from kvserve.supervisor.service import Service

_RETRY_SECONDS = 2.0


def admin_router(service: Service, config: ApiConfig) -> APIRouter:
    """The routes under `/admin`."""
    router = APIRouter(prefix="/admin")

    def now() -> dict[str, Any]:
        return status_document(
            service.status(),
            model_id=config.model_id,
            ready=service.ready,
            now=config.clock(),
        )

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return now()

    @router.get("/events")
    async def events() -> Response:
        return Events(service, now, config.clock, config.ping_seconds)

    @router.get("/plan")
    async def plan(ctx: str = Query("max", description="Tokens, or `max`.")) -> dict[str, Any]:
        digits = ctx.isascii() and ctx.isdecimal() and len(ctx) <= 10
        n_ctx = _context(int(ctx) if digits else ctx, param="ctx")
        return plan_document(await service.plan(n_ctx))

    @router.post("/context")
    async def context(body: ContextRequest) -> dict[str, Any]:
        n_ctx = _context(body.n_ctx, param="n_ctx")
        return reload_document(await service.change_context(n_ctx))

    return router


def health_router(service: Service, config: ApiConfig) -> APIRouter:
    """`/health/live` and `/health/ready`; `/health` is the latter, as in llama-server."""
    router = APIRouter(prefix="/health")

    @router.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @router.head("", include_in_schema=False)
    @router.head("/ready", include_in_schema=False)
    @router.get("")
    @router.get("/ready")
    async def ready() -> Response:
        return _readiness(service, config)

    return router


def _readiness(service: Service, config: ApiConfig) -> Response:
    """200, or 503 with the phase and when to ask again."""
    status = service.status()
    if service.ready:
        return JSONResponse({"status": "ok", "phase": str(status.phase)})
    retry_after = _RETRY_SECONDS
    if status.retry_at is not None:
        retry_after = max(1.0, status.retry_at - config.clock())
    message = describe_phase(status.phase, status.load_fraction)
    if status.error is not None:
        message += f": {status.error}"
    return error_response(
        NotReady(message, retry_after=retry_after),
        details={"phase": str(status.phase), "load_fraction": status.load_fraction},
    )


def _context(value: object, *, param: str) -> int | None:
    """Tokens, or None for "max"."""
    if value == "max":
        return None
    if type(value) is int and 1 <= value <= INT32_MAX:
        return value
    raise InvalidRequest(f"{param} is a number of tokens from 1, or max", param=param)
