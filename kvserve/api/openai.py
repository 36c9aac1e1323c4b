"""The OpenAI endpoints: models, chat completions, completions."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvserve.api.answer import Answer
from kvserve.api.bodies import body_schema, read_body
from kvserve.api.config import ApiConfig
from kvserve.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
)
from kvserve.api.specs import chat_specs, completion_specs
from kvserve.api.wire import ChatFormat, CompletionFormat, Format
from kvserve.errors import InvalidRequest, ModelNotFound
from kvserve.supervisor.admission import GenerationSpec
from kvserve.supervisor.service import Service


def openai_router(service: Service, config: ApiConfig) -> APIRouter:
    """The routes under `/v1`."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_object(service, config)]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, config)
        return _model_object(service, config)

    @router.post(
        "/chat/completions", openapi_extra=body_schema(ChatCompletionRequest, messages=Message)
    )
    async def chat_completions(request: Request) -> Response:
        body, specs = await read_body(request, ChatCompletionRequest, chat_specs)
        _check(body, service, config)
        wire_format = ChatFormat(
            config.model_id,
            int(config.clock()),
            keeps_reasoning=(body.reasoning_format or config.reasoning_format) == "none",
        )
        return answer(body, specs, wire_format)

    @router.post("/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        body, specs = await read_body(request, CompletionRequest, completion_specs)
        _check(body, service, config)
        wire_format = CompletionFormat(config.model_id, int(config.clock()))
        return answer(body, specs, wire_format)

    def answer(
        body: GenerationRequest, specs: tuple[GenerationSpec, ...], wire_format: Format
    ) -> Answer:
        options = body.stream_options
        return Answer(
            service,
            specs,
            wire_format,
            n_choices=body.n or 1,
            stream=bool(body.stream),
            with_usage=options is not None and bool(options.include_usage),
            ping_seconds=config.ping_seconds,
        )

    return router


def _model_object(service: Service, config: ApiConfig) -> dict[str, Any]:
    plan = service.status().plan
    launch = None if plan is None else plan.chosen.launch
    return {
        "id": config.model_id,
        "object": "model",
        "created": config.created,
        "owned_by": "kvserve",
        "max_model_len": None if launch is None else launch.n_ctx,
        "cache_type_k": None if launch is None else str(launch.pair.k),
        "cache_type_v": None if launch is None else str(launch.pair.v),
    }


def _check(body: GenerationRequest, service: Service, config: ApiConfig) -> None:
    """Refuse what depends on the served model, not on the body alone."""
    if body.model is not None:
        _check_model(body.model, config)
    wanted = None if body.kvserve is None else body.kvserve.ctx
    plan = None if wanted is None else service.status().plan
    if wanted is not None and plan is not None and wanted > plan.shape.n_ctx_train:
        raise InvalidRequest(
            f"the model was trained for {plan.shape.n_ctx_train} tokens, not {wanted}: ask for "
            "that many or fewer",
            param="kvserve.ctx",
        )


def _check_model(name: str, config: ApiConfig) -> None:
    if not config.serves(name):
        raise ModelNotFound(
            f"there is no model {name[:100]!r} here: {config.model_id!r} is served", param="model"
        )
