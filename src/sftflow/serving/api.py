"""The addresses of the server: an OpenAI-compatible API, our own `/v1/render`, health and metrics, and the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse

from sftflow.serving.chat import chat_response
from sftflow.serving.completions import completion_response
from sftflow.serving.engine_thread import MAX_RUNNING, MAX_WAITING, unusable
from sftflow.serving.errors import ApiError, add_error_handlers
from sftflow.serving.host_check import LOOPBACK
from sftflow.serving.metrics import CONTENT_TYPE, Metrics
from sftflow.serving.middleware import Auth, RequestLog, RootPath, UnforeseenErrors
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.request_body import ReaderPool, parse_json, read_body
from sftflow.serving.responses import Responder, ResponseShape, slices
from sftflow.serving.schemas import ChatBody, CompletionBody, SamplingBody
from sftflow.serving.tokens import Find, detokenized, rendered, tokenized

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

FILES = Path(__file__).parent / "page"
PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")} | {
    f"/{script.name}": (script.name, "text/javascript") for script in FILES.glob("*.js")
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
HEALTH = ("/health", "/ready")
READ = ["GET", "HEAD"]
router = APIRouter()
Body = TypeVar("Body", bound=SamplingBody)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What the routes of one app share."""

    models: Mapping[str, ServedModel]
    metrics: Metrics = field(default_factory=Metrics)
    readers: ReaderPool = field(default_factory=ReaderPool)
    created: int = field(default_factory=lambda: int(time.time()))

    def find(self, name: str) -> ServedModel:
        if name not in self.models:
            fact = f"no such model; served: {', '.join(self.models)}"
            raise ApiError(404, fact, param="model", code="model_not_found")
        return self.models[name]

    def card(self, model: ServedModel) -> dict[str, Any]:
        """The model as /v1/models shows it."""
        about = {"id": model.name, "object": "model", "created": self.created, "owned_by": "sftflow"}
        return {**about, "max_model_len": model.context}

    def stop(self) -> None:
        for model in self.models.values():
            model.thread.close()

    def unproven(self) -> BaseException | None:
        """What kept a model from being proven, where there is one."""
        return next((m.thread.broken for m in self.models.values() if m.thread.unproven), None)


def _serving(request: Request) -> Serving:
    found: Serving = request.app.state.serving
    return found


@router.api_route("/health", methods=READ)
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.api_route("/ready", methods=READ)
async def ready(request: Request) -> dict[str, str]:
    threads = [model.thread for model in _serving(request).models.values()]
    if any(thread.broken is not None for thread in threads):
        raise unusable()
    if not all(thread.ready for thread in threads):
        raise ApiError(503, "the models are being prepared", code="not_ready", Retry_After="2")
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    serving = _serving(request)
    threads = {name: model.thread for name, model in serving.models.items()}
    return Response(serving.metrics.text(threads), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    serving = _serving(request)
    return {"object": "list", "data": [serving.card(model) for model in serving.models.values()]}


@router.get("/v1/models/{model:path}")
async def one_model(request: Request, model: str) -> dict[str, Any]:
    serving = _serving(request)
    return serving.card(serving.find(model))


@router.post("/v1/render")
async def render(request: Request) -> Response:
    """The exact prompt of a chat, token by token."""
    return await _computed(request, rendered)


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The ids of a chat's prompt, or of a text; vLLM's address and shape."""
    return await _computed(request, tokenized)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    return await _computed(request, detokenized)


async def _computed(request: Request, answer: Callable[[Find, dict[str, Any]], dict[str, Any]]) -> Response:
    """What a thread makes of the body, without the engine."""
    serving, data = _serving(request), await read_body(request)

    def encoded() -> bytes:
        return "".join(slices(answer(serving.find, parse_json(data)))).encode()

    return Response(await serving.readers.run(encoded, len(data)), media_type="application/json")


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    return await _answered(request, ChatBody, chat_response)


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    return await _answered(request, CompletionBody, completion_response)


async def _answered(
    request: Request, schema: type[Body], shape_of: Callable[[ServedModel, Body], ResponseShape]
) -> Response:
    """From a body to its replies: read it, put what it asks in line, give back what comes."""
    serving, data = _serving(request), await read_body(request)

    def read() -> ResponseShape:
        body = schema.read(parse_json(data))
        model = serving.find(body.model)
        model.thread.check_room(body.n or 1)  # before the work of rendering
        return shape_of(model, body)

    shape = await serving.readers.run(read, len(data))
    record = request.state.record
    record.model, record.n_prompt = shape.model.name, shape.n_prompt
    generations = shape.model.thread.submit(shape.requests, streamed=bool(shape.body.stream), client=request)
    responder = Responder(shape, generations, record, serving.metrics)
    if shape.body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(responder.events(), media_type="text/event-stream", headers=headers)
    return Response(await responder.whole(), media_type="application/json")


async def page(request: Request) -> Response:
    file, kind = PAGE[request.url.path]
    return Response((FILES / file).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)


for address in PAGE:
    router.add_api_route(address, page, methods=READ)


def make_app(
    assistants: Mapping[str, Assistant],
    *,
    api_key: str | None = None,
    allow_origin: str | Iterable[str] = (),
    root_path: str = "",
    hosts: Container[str] = LOOPBACK,
    max_running: int = MAX_RUNNING,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """The app that serves these models under their names.

    allow_origin: whose pages may call, or `*`.   root_path: below which a proxy shows it, such as `/llm`.   hosts: the
    Host names it answers to, see `host_names`.   max_running: replies of each model that are computed side
    by side.   max_waiting: those that may stand in line besides.
    """
    limits = {"max_running": max_running, "max_waiting": max_waiting}
    serving = Serving(models={name: ServedModel(name, a, **limits) for name, a in assistants.items()})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.stop()

    app = FastAPI(
        title="sftflow", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.serving = serving
    free = frozenset({*HEALTH, *PAGE})
    origins = listed(allow_origin)
    app.add_middleware(Auth, api_key=api_key, allow_origins=origins, hosts=hosts, free=free)
    app.add_middleware(UnforeseenErrors)
    if origins:  # outside the guard: a preflight has no key, and a refusal must be readable, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestLog, metrics=serving.metrics)
    if root_path:
        app.add_middleware(RootPath, root_path=root_path)
    add_error_handlers(app)
    app.include_router(router)
    return app


def listed(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
