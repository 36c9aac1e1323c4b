"""A supervisor that does what the test's script says, and ways to ask the API in front of it."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import uvicorn

from kvserve.api.app import create_app
from kvserve.api.config import ApiConfig
from kvserve.core.lifecycle import Phase
from kvserve.core.plan import Plan, Request
from kvserve.core.selector import select
from kvserve.errors import KvserveError
from kvserve.ipc.messages import MemoryReport
from kvserve.metrics import Metrics
from kvserve.supervisor.admission import Done, GenerationSpec, Served, Text, Ticket, TicketEvent
from kvserve.supervisor.news import News
from kvserve.supervisor.status import Measured, ReloadOutcome, ReloadRecord, Status
from tests.core.shapes import llama3_8b, machine

Script = Callable[[Ticket, GenerationSpec], None]

NOW = 1_700_000_000.0
CONFIG = ApiConfig(
    model_id="llama-3-8b",
    created=1_600_000_000,
    aliases=frozenset({"Meta-Llama-3-8B.Q4_K_M"}),
    clock=lambda: NOW,
)
SERVED = Served(n_prompt_tokens=7, n_ctx=32768, cache_type="q8_0:q8_0", fingerprint="fp_1")
PLAN = select(llama3_8b(), machine(7.6), Request(n_ctx=32768))
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def done(reason: str = "stop", n_generated: int = 2, n_cached: int = 3) -> Done:
    return Done(reason, SERVED.n_prompt_tokens, n_generated, n_cached, None)


def answers(*texts: str, reason: str = "stop") -> Script:
    def script(ticket: Ticket, _spec: GenerationSpec) -> None:
        ticket.put(SERVED)
        for text in texts:
            ticket.put(Text(text, (1,)))
        ticket.put(done(reason))

    return script


def begins(*texts: str, error: KvserveError | None = None) -> Script:
    """Serve some text, then fail, or say nothing more."""

    def script(ticket: Ticket, _spec: GenerationSpec) -> None:
        ticket.put(SERVED)
        for text in texts:
            ticket.put(Text(text, (1,)))
        if error is not None:
            ticket.put(error)

    return script


def refuses(error: KvserveError) -> Script:
    return lambda ticket, _spec: ticket.put(error)


def stays_in_line(_ticket: Ticket, _spec: GenerationSpec) -> None:
    pass


SERVING = Status(
    phase=Phase.SERVING,
    plan=PLAN,
    measured=Measured(
        MemoryReport(kv_bytes=2_281_701_376, weights_bytes=4_800_000_000), 7_400_000_000, 0
    ),
    load_fraction=None,
    template="model file",
    engine="llama.cpp b1",
    worker_pid=42,
    n_waiting=1,
    n_running=2,
    n_answered=3,
    n_failed=4,
    n_worker_deaths=0,
    n_cells_used=512,
    speculation="ngram",
    n_drafted=10,
    n_accepted=7,
    error=None,
    retry_at=None,
    reloads=(ReloadRecord("start", NOW - 60, 4.5, "done", None, None, "q8_0:q8_0", 32768),),
    started_at=NOW - 100,
)


class ScriptedService:
    """A `Service`. `gave_up` holds the ids of cancelled requests, `all_gave_up` is set when every
    request so far is among them; `on_plan` answers plans and changes."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or answers("Hello", " world")
        self.ready = True
        self.now = SERVING
        self.specs: list[GenerationSpec] = []
        self.news = News()
        self.listen = self.news.listen
        self._tickets: list[Ticket] = []
        self.asked: list[int | None] = []
        self.on_plan: Callable[[int | None], Plan] = lambda _n_ctx: PLAN
        self.gave_up: list[int] = []
        self.submitted = threading.Event()
        self.all_gave_up = threading.Event()

    def submit(self, spec: GenerationSpec) -> Ticket:
        ticket = Ticket(len(self.specs), self._cancel)
        self.specs.append(spec)
        self._tickets.append(ticket)
        self._loop = asyncio.get_running_loop()
        self.script(ticket, spec)
        self.submitted.set()
        return ticket

    def tell(self, *events: TicketEvent | KvserveError) -> None:
        """Go on with the latest request; from any thread."""
        for event in events:
            self._loop.call_soon_threadsafe(self._tickets[-1].put, event)

    def status(self) -> Status:
        return self.now

    async def plan(self, n_ctx: int | None) -> Plan:
        self.asked.append(n_ctx)
        return self.on_plan(n_ctx)

    async def change_context(self, n_ctx: int | None) -> ReloadOutcome:
        self.asked.append(n_ctx)
        return ReloadOutcome(self.on_plan(n_ctx), changed=True, seconds=1.5)

    async def stop(self) -> None:
        pass

    def _cancel(self, request_id: int) -> None:
        self.gave_up.append(request_id)
        if len(self.gave_up) == len(self.specs):
            self.all_gave_up.set()


def ask(
    method: str,
    path: str,
    *,
    service: ScriptedService | None = None,
    base_url: str = "http://localhost:8000",
    config: dict[str, Any] | None = None,
    **request: Any,
) -> httpx.Response:
    """One request to an app without a server; `config` replaces fields of CONFIG.

    `json` may hold what httpx would not send, such as half of a surrogate pair.
    """
    if "json" in request:
        request["content"] = json.dumps(request.pop("json"))
        request["headers"] = {"content-type": "application/json", **request.get("headers", {})}
    app = create_app(service or ScriptedService(), replace(CONFIG, **(config or {})))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def chat(service: ScriptedService | None = None, **fields: Any) -> httpx.Response:
    return ask("POST", "/v1/chat/completions", service=service, json={**CHAT, **fields})


def complete(service: ScriptedService | None = None, **fields: Any) -> httpx.Response:
    return ask("POST", "/v1/completions", service=service, json={"prompt": "hi", **fields})


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, `[DONE]` as itself; comments are left out."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass(frozen=True)
class Live:
    """A real server in front of a scripted service."""

    service: ScriptedService
    url: str


@contextmanager
def live_server(
    service: ScriptedService,
    config: ApiConfig = CONFIG,
    metrics: Metrics | None = None,
    **options: Any,
) -> Iterator[Live]:
    """The app under uvicorn on a port of its own, in a thread of its own; `options` are
    uvicorn's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(service, config, metrics),
                log_level="critical",
                lifespan="off",
                timeout_graceful_shutdown=1,
                **options,
            )
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield Live(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
