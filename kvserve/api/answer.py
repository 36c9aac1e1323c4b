"""The answer to one generation request, from its place in line to the last byte.

The response holds the tickets: whatever ends it (the answer's end, a failure, a client that hangs
up, also while still in line) gives them up on the way out.

Headers wait until the worker takes the request up, so that a refusal has its HTTP status in a
stream too. A stream that waits longer than a ping interval begins without it, with the headers of
the plan in force at that moment; a later failure then is an event `{"error": …}`, after which the
stream ends without `[DONE]`. The chunks' `system_fingerprint` is that of the worker that answers.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kvserve.api.choices import Choice
from kvserve.api.errors import error_body, internal_error
from kvserve.api.hangup import while_connected
from kvserve.api.likelihoods import Entry, Json, Transcript
from kvserve.api.request_id import request_id_of
from kvserve.api.sse import EventStream
from kvserve.api.wire import ChunkWriter, Format, encode, usage_of
from kvserve.dialects.form import Form
from kvserve.dialects.parts import Content, Part
from kvserve.dialects.reader import Reader
from kvserve.errors import KvserveError
from kvserve.supervisor.admission import (
    Done,
    Echoed,
    GenerationSpec,
    Served,
    Text,
    Ticket,
    TicketEvent,
)
from kvserve.supervisor.service import Service

Indexed = tuple[int, TicketEvent]


class Answer(Response):
    """Submits `specs` when it is sent, and writes one choice for each, in `wire_format`.

    Each prompt has `n_choices` of them, one after the other.
    """

    def __init__(
        self,
        service: Service,
        specs: Sequence[GenerationSpec],
        wire_format: Format,
        *,
        n_choices: int,
        stream: bool,
        with_usage: bool,
        ping_seconds: float,
    ) -> None:
        super().__init__()
        self._service = service
        self._specs = specs
        self._format = wire_format
        self._n_choices = n_choices
        self._stream = stream
        self._with_usage = with_usage
        self._ping_seconds = ping_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send; returns early when the client hangs up."""
        async with AsyncExitStack() as held:
            tickets = [
                await held.enter_async_context(self._service.submit(spec)) for spec in self._specs
            ]
            if self._stream:
                await while_connected(receive, self._send_stream(tickets, scope, send))
            else:
                await while_connected(receive, self._send_whole(tickets, scope, receive, send))

    async def _send_whole(
        self, tickets: Sequence[Ticket], scope: Scope, receive: Receive, send: Send
    ) -> None:
        parts: list[list[Part]] = [[] for _ in tickets]
        entries: list[list[Entry]] = [[] for _ in tickets]
        tellings = self._tellings()
        ends: dict[int, Done] = {}
        served: Served | None = None
        async with aclosing(_events(tickets)) as events:
            async for index, event in events:
                if isinstance(event, Served):
                    served = served or event
                    tellings[index].begin(event.form)
                    continue
                more, likelihoods = tellings[index].take(event)
                parts[index].extend(more)
                entries[index].extend(likelihoods)
                if isinstance(event, Done):
                    ends[index] = event
        assert served is not None
        choices = [
            Choice(
                tuple(parts[index]),
                ends[index].reason,
                None if spec.n_logprobs is None else tuple(entries[index]),
            )
            for index, spec in enumerate(self._specs)
        ]
        body = self._format.whole(choices, self._usage(ends), served.fingerprint, served.form)
        await JSONResponse(body, headers=_headers(served))(scope, receive, send)

    async def _send_stream(self, tickets: Sequence[Ticket], scope: Scope, send: Send) -> None:
        async with EventStream(
            send, ping_seconds=self._ping_seconds, early_headers=self._headers_in_force
        ) as out:
            try:
                await self._send_chunks(tickets, out)
            except Exception as error:
                if not out.begun:
                    raise
                known = error if isinstance(error, KvserveError) else None
                told = known or internal_error(request_id_of(scope))
                await out.event(encode(error_body(told)))
                await out.close()
                if known is None:
                    raise

    async def _send_chunks(self, tickets: Sequence[Ticket], out: EventStream) -> None:
        writers: dict[int, ChunkWriter] = {}
        tellings = self._tellings()
        ends: dict[int, Done] = {}
        fingerprint = ""
        async with aclosing(_events(tickets)) as events:
            async for index, event in events:
                if isinstance(event, Served):
                    fingerprint = event.fingerprint
                    await out.begin(_headers(event))
                    tellings[index].begin(event.form)
                    writer = self._format.writer(
                        index,
                        fingerprint,
                        event.form,
                        with_usage=self._with_usage,
                        with_logprobs=self._specs[index].n_logprobs is not None,
                    )
                    writers[index] = writer
                    if writer.opening is not None:
                        await out.event(writer.opening)
                    continue
                parts, entries = tellings[index].take(event)
                if entries and not parts:
                    parts = [Content("")]
                for part in parts:
                    await out.event(writers[index].part(part, entries))
                    entries = ()
                if isinstance(event, Done):
                    ends[index] = event
                    await out.event(writers[index].closing(event.reason))
        if self._with_usage:
            await out.event(self._format.usage_chunk(self._usage(ends), fingerprint))
        await out.event("[DONE]")
        await out.close()

    def _tellings(self) -> "list[_Telling]":
        return [_Telling(spec, self._format) for spec in self._specs]

    def _usage(self, ends: Mapping[int, Done]) -> Json:
        return usage_of([ends[index] for index in range(len(ends))], self._n_choices)

    def _headers_in_force(self) -> dict[str, str]:
        plan = self._service.status().plan
        if plan is None:
            return {}
        launch = plan.chosen.launch
        return {"x-kvserve-ctx": str(launch.n_ctx), "x-kvserve-cache-type": str(launch.pair)}


class _Telling:
    """Follows one choice: what its text says, and the likelihoods of its tokens."""

    def __init__(self, spec: GenerationSpec, wire_format: Format) -> None:
        self._spec = spec
        self._format = wire_format
        self._transcript = Transcript(spec, tells_end=wire_format.tells_end)
        self._reader: Reader | None = None

    def begin(self, form: Form | None) -> None:
        """A worker took the choice up."""
        self._reader = self._format.reader(self._spec.prompt, form)

    def take(self, event: Echoed | Text | Done) -> tuple[Sequence[Part], Sequence[Entry]]:
        """What can be told after this event."""
        said = self._transcript.take(event)
        if self._reader is None:
            return [Content(said.text)] if said.text else [], said.entries
        parts = self._reader.push(said.text)
        if isinstance(event, Done):
            parts += self._reader.finish()
        return parts, said.entries


def _headers(served: Served) -> dict[str, str]:
    headers = {"x-kvserve-ctx": str(served.n_ctx), "x-kvserve-cache-type": served.cache_type}
    if served.warning is not None:
        headers["x-kvserve-warning"] = served.warning.encode("ascii", "replace").decode()
    return headers


async def _events(tickets: Sequence[Ticket]) -> AsyncGenerator[Indexed, None]:
    """The events of all tickets as they come, each with its ticket's index.

    Raises the first KvserveError of any of them.
    """
    if len(tickets) == 1:
        async for event in tickets[0]:
            yield 0, event
        return
    queue: asyncio.Queue[Indexed | Exception] = asyncio.Queue()

    async def forward(index: int, ticket: Ticket) -> None:
        try:
            async for event in ticket:
                queue.put_nowait((index, event))
        except Exception as error:
            queue.put_nowait(error)

    forwarders = [asyncio.create_task(forward(i, ticket)) for i, ticket in enumerate(tickets)]
    n_open = len(tickets)
    try:
        while n_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            n_open -= isinstance(item[1], Done)
            yield item
    finally:
        for forwarder in forwarders:
            forwarder.cancel()
        await asyncio.gather(*forwarders, return_exceptions=True)
