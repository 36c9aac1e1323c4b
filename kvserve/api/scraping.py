"""`/metrics`: the counters, with the levels of the moment read from the status."""

from fastapi import APIRouter
from starlette.responses import Response

from kvserve.api.config import ApiConfig
from kvserve.api.documents import memory_check
from kvserve.metrics import CONTENT_TYPE, Levels, Metrics
from kvserve.supervisor.service import Service
from kvserve.supervisor.status import Status


def metrics_router(service: Service, config: ApiConfig, metrics: Metrics) -> APIRouter:
    """The route that Prometheus asks."""
    router = APIRouter()

    @router.get("/metrics")
    async def scrape() -> Response:
        levels = _levels(service.status(), ready=service.ready, model_id=config.model_id)
        return Response(metrics.render(levels), media_type=CONTENT_TYPE)

    return router


def _levels(status: Status, *, ready: bool, model_id: str) -> Levels:
    plan: dict[str, str] = {"model": model_id}
    predicted: dict[str, int] = {}
    measured: dict[str, int | None] = {}
    n_cells = 0
    if status.plan is not None:
        chosen = status.plan.chosen
        launch = chosen.launch
        n_cells = launch.n_ctx
        plan |= {
            "cache_type_k": str(launch.pair.k),
            "cache_type_v": str(launch.pair.v),
            "n_ctx": str(launch.n_ctx),
            "parallel": str(launch.n_parallel),
            "device": str(launch.backend),
            "n_gpu_layers": str(launch.n_gpu_layers),
            "n_cpu_moe": str(launch.n_cpu_moe),
            "engine": status.engine or "",
        }
        for name, figures in memory_check(chosen, status.measured).items():
            item = name.removesuffix("_bytes")
            predicted[item] = figures["predicted"]
            measured[item] = figures["measured"]
    return Levels(
        ready=ready,
        phase=str(status.phase),
        n_waiting=status.n_waiting,
        n_running=status.n_running,
        n_cells_used=status.n_cells_used,
        n_cells=n_cells,
        plan=plan,
        predicted_bytes=predicted,
        measured_bytes=measured,
    )
