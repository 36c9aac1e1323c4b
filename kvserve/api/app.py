"""The HTTP application: routes, middleware and error handling put together."""

from fastapi import FastAPI
from starlette.middleware import Middleware

from kvserve import __version__
from kvserve.api.admin import admin_router, health_router
from kvserve.api.auth import AccessMiddleware
from kvserve.api.body_limit import BodyLimitMiddleware
from kvserve.api.config import ApiConfig
from kvserve.api.errors import install_error_handlers
from kvserve.api.openai import openai_router
from kvserve.api.request_id import RequestIdMiddleware
from kvserve.api.scraping import metrics_router
from kvserve.metrics import Metrics
from kvserve.supervisor.service import Service


def create_app(service: Service, config: ApiConfig, metrics: Metrics | None = None) -> FastAPI:
    """The app that serves `service`, and `metrics` where they are kept.

    It must run in the event loop that the service lives in.
    """
    app = FastAPI(
        title="kvserve",
        version=__version__,
        # The documentation pages load their scripts from a CDN; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Outermost first.
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(AccessMiddleware, config=config),
            Middleware(
                BodyLimitMiddleware,
                max_bytes=config.max_body_bytes,
                pause_seconds=config.body_seconds,
            ),
        ],
    )
    install_error_handlers(app)
    app.include_router(openai_router(service, config))
    app.include_router(admin_router(service, config))
    app.include_router(health_router(service, config))
    if metrics is not None:
        app.include_router(metrics_router(service, config, metrics))
    return app
