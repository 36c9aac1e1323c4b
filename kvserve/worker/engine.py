"""The loop: takes messages, decodes a batch, draws tokens, sends one `Step`, again.

Everything that changes a request's state happens on the thread that calls `Engine.run`.
"""

import os
import queue
import sys
import time

from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import (
    Cancel,
    CarryReport,
    CopyAhead,
    Delta,
    Echo,
    End,
    Failed,
    Generate,
    NeedsContext,
    Pause,
    Started,
    Step,
    TakeAhead,
    TakeIn,
    TakenAhead,
    TakenIn,
    TokenLogprobs,
    ToWorker,
)
from kvserve.worker.arriving import Incoming, Paths, incoming_for, log_refusals
from kvserve.worker.batches import Batch as Plan
from kvserve.worker.carrying import ExportFiles, export
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.cold_tier import ColdTier
from kvserve.worker.copying_ahead import Copies
from kvserve.worker.drawing import Drawer, Drawn, Wish
from kvserve.worker.executor import Executor
from kvserve.worker.job import Job
from kvserve.worker.llama import CacheFull, Context, DecodeError
from kvserve.worker.outbox import Outbox
from kvserve.worker.pace import Pace
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.prepare import Prepared, Preparer, Refused
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.speculation.proposal import Ask
from kvserve.worker.speculation.speculator import Draft, Outcome, Speculator

_MOST_SAMPLING_THREADS = 8

Inbox = queue.SimpleQueue[ToWorker | Prepared | Refused]


class Engine:
    """Serves requests from `inbox` with `context`, until the process ends.

    `n_slots` requests run at a time, and up to `cold_bytes` of host memory hold conversations that
    left the KV cache. With a `speculator` steps check up to `n_draft` proposed tokens. The caller's
    reader thread feeds the inbox.
    """

    def __init__(
        self,
        context: Context,
        channel: WorkerChannel,
        renderer: ChatRenderer,
        inbox: Inbox,
        n_slots: int,
        cold_bytes: int = 0,
        speculator: Speculator | None = None,
        n_draft: int = 0,
    ) -> None:
        self._context = context
        self._outbox = Outbox(channel, holds=context.asynchronous)
        self._inbox = inbox
        self._cache = PrefixCache(
            context.n_ctx,
            n_slots,
            context.reuse_rules,
            context.first_position,
            stores=cold_bytes > 0 and context.state_layout is not None,
        )
        n_threads = min(len(os.sched_getaffinity(0)), n_slots, _MOST_SAMPLING_THREADS)
        self._executor = Executor(
            context,
            Drawer(n_threads, context.vocab.piece),
            store=lambda operation: self._cold.keep(operation),  # noqa: PLW0108 - not there yet
            meanwhile=self._outbox.flush,
        )
        self._cold = ColdTier(context, self._cache, cold_bytes, self._executor.change_memory)
        self._scheduler = Scheduler(
            context.n_ctx, n_slots, context.n_batch, self._cache, n_draft, context.n_ubatch
        )
        self._speculator = speculator
        self._may_draft = True
        self._pace = Pace(context.n_batch)
        self._jobs: dict[int, Job] = {}
        self._preparing: set[int] = set()
        self._paused = False
        self._files: ExportFiles | None = None
        self._copies = Copies(context, self._cache)
        self._incoming: Incoming | None = None
        self._preparer = Preparer(
            context.vocab,
            renderer,
            context.n_ctx,
            context.n_ctx_train,
            wanted=self._preparing.__contains__,
            deliver=inbox.put,
        )

    def take_in(self, incoming: Incoming, sequences: tuple[Paths, ...]) -> CarryReport:
        """Bring what an earlier worker left into the cache, before the first request."""
        arrived, report = incoming.import_into(self._context, self._cache.free_ids, sequences)
        # The first to come is the most important: it is to be given up last.
        for one in reversed(arrived):
            self._cache.adopt(one.slot, one.tokens, one.salt)
        log_refusals(report)
        return report

    def run(self) -> None:
        """Serve; blocks where there is nothing to do. Never returns."""
        self._preparer.start()
        while True:
            self._take_messages()
            files, has_work = self._files, self._scheduler.has_work
            if files is not None and (files.ready or not has_work):
                self._pause(files)
                continue
            if self._copies.busy:
                copied = self._copies.advance(self._scheduler.sequences, wait=not has_work)
                if copied is not None:
                    self._outbox.send(copied)
            if has_work:
                self._step()

    def _take_messages(self) -> None:
        try:
            while True:
                busy = self._files is not None or self._copies.busy
                idle = self._paused or not (busy or self._scheduler.has_work)
                if idle:
                    self._outbox.flush()
                self._handle(self._inbox.get(block=idle))
        except queue.Empty:
            return

    def _handle(self, message: ToWorker | Prepared | Refused) -> None:
        if self._paused:
            return
        match message:
            case Generate(id=request) if request not in self._jobs:
                self._preparing.add(request)
                self._preparer.submit(message)
            case Prepared(id=request) if request in self._preparing:
                self._preparing.discard(request)
                self._admit(message)
            case Refused(id=request) if request in self._preparing:
                self._preparing.discard(request)
                self._outbox.send(message.answer)
            case Cancel(id=request):
                self._preparing.discard(request)
                self._forget(request)
            case CopyAhead(export_bytes=limit_bytes):
                self._copies.begin(self._scheduler.sequences, limit_bytes)
            case Pause(export_bytes=limit_bytes):
                self._copies.stop()
                sequences = self._scheduler.sequences if limit_bytes else ()
                self._files = ExportFiles(self._context, sequences, limit_bytes, self._copies)
            case TakeAhead():
                self._incoming = incoming_for(message)
                ids = self._cache.free_ids
                self._incoming.take_ahead(self._context, ids, message.carried)
                self._outbox.send(TakenAhead())
            case TakeIn():
                incoming, self._incoming = self._incoming or incoming_for(message), None
                report = self.take_in(incoming, message.carried)
                self._outbox.send(TakenIn(report if message.carried else None))
            case Prepared() | Refused():
                pass
            case _:
                print(f"unexpected message: {message!r}", file=sys.stderr, flush=True)

    def _pause(self, files: ExportFiles) -> None:
        self._paused, self._files = True, None
        self._cache.make_room(1)  # for the canaries
        self._executor.change_memory(self._cache.take_operations())
        sequences = self._scheduler.sequences if files.limit_bytes else ()
        self._outbox.flush()
        self._outbox.send(export(self._context, sequences, files, self._copies, self._cache))

    def _admit(self, prepared: Prepared) -> None:
        job = Job.of(prepared)
        generation, echo = job.generation, job.echo
        if generation.finish is None or (echo is not None and not echo.complete):
            self._jobs[job.id] = job
            n_to_score = 0 if echo is None else echo.n_to_score
            self._scheduler.add(
                job.id, generation.buffer, generation.n_tokens, prepared.salt, n_to_score
            )
            return
        self._outbox.send(Started(job.id, job.generation.n_prompt, job.form))
        deltas = (Delta(job.id, prepared.late_text, ()),) if prepared.late_text else ()
        echoes = () if echo is None else (echo.message(),)
        self._send_step(deltas, (job.end(0),), echoes=echoes)

    def _forget(self, request: int, *, broken: bool = False) -> None:
        if self._jobs.pop(request, None) is not None:
            self._scheduler.remove(request, broken=broken)
            if self._speculator is not None:
                self._speculator.forget(request)

    def _step(self) -> None:
        self._cold.restore(self._scheduler)
        asks = self._asks()
        plan = self._scheduler.plan(
            self._pace.limit(self._scheduler.n_decoding), self._propose(asks)
        )
        self._executor.change_memory(plan.operations)
        for request in plan.admitted:
            job = self._jobs[request]
            if not job.started:
                job.started = True
                self._outbox.send(Started(job.id, job.generation.n_prompt, job.form))
        begun = time.monotonic()
        if not self._decode(plan):
            return
        self._pace.observe(plan.n_prefill, plan.n_tokens, time.monotonic() - begun)
        self._scheduler.commit(plan)
        drawn = self._executor.draw(plan, self._jobs)
        echoes, ends = self._take_echoes(plan)
        outcomes = self._settle(plan)
        if self._speculator is not None:
            asked = {ask.id for ask in asks}
            decoded = {id_: one for id_, one in outcomes.items() if id_ in asked}
            self._speculator.observe(decoded, time.monotonic() - begun, plan.n_prefill)
        self._deliver(plan, drawn, echoes, ends, outcomes)

    def _asks(self) -> list[Ask]:
        """The requests that generate, and how many tokens beside the next one each may get."""
        if self._speculator is None:
            return []
        n_ctx = self._context.n_ctx
        return [self._jobs[request].ask(n_ctx) for request in self._scheduler.decoding]

    def _propose(self, asks: list[Ask]) -> dict[int, Draft]:
        if self._speculator is None:
            return {}
        drafts = self._speculator.propose(asks)
        may_draft, self._may_draft = self._may_draft, True
        return drafts if may_draft else {}

    def _settle(self, plan: Plan) -> dict[int, Outcome]:
        """Keep the cells of accepted drafts, free the others; what came of each request that has
        drawn."""
        outcomes = {}
        for chunk in plan.chunks:
            job = self._jobs.get(chunk.id)
            if job is None:
                continue
            if chunk.draft:
                # Of what was drawn, all but the last token were drafted, and are in the cache.
                self._scheduler.settle(chunk, max(len(job.tokens) - 1, 0))
            if job.tokens:
                outcomes[chunk.id] = Outcome(tuple(job.tokens), len(chunk.draft))
        self._executor.change_memory(self._cache.take_operations())
        return outcomes

    def _deliver(
        self,
        plan: Plan,
        drawn: list[tuple[Wish, Drawn]],
        echoes: tuple[Echo, ...],
        ends: list[End],
        outcomes: dict[int, Outcome],
    ) -> None:
        deltas, logprobs = [], []
        outgrown: list[Job] = []
        refused: list[Job] = []
        for wish, draws in drawn:
            job = self._jobs[wish.id]
            n_tokens = len(job.tokens)
            if n_tokens:
                deltas.append(job.take_delta())
                logprobs += [one for _, one in draws[:n_tokens] if one is not None]
            if job.broken:
                refused.append(job)
            elif job.generation.finish is None:
                self._scheduler.grow(job.id, n_tokens)
                if job.generation.n_tokens >= self._context.n_ctx:
                    outgrown.append(job)
            else:
                ends.append(job.end(self._scheduler.n_cached(job.id)))
                self._forget(job.id)
        n_accepted = sum(len(one.drawn) - 1 for one in outcomes.values())
        self._send_step(
            tuple(deltas),
            tuple(ends),
            plan.n_prefill,
            tuple(logprobs),
            echoes,
            n_drafted=plan.n_drafted,
            n_accepted=n_accepted,
        )
        for job in refused:
            self._refuse(job)
        for job in outgrown:
            self._outbox.send(NeedsContext(job.id, job.generation.n_tokens))
            self._forget(job.id)

    def _take_echoes(self, plan: Plan) -> tuple[tuple[Echo, ...], list[End]]:
        """The prompts that are ready to be sent back, and the ends of requests that wanted no
        more than that."""
        echoes, ends = [], []
        for chunk in plan.chunks:
            job = self._jobs[chunk.id]
            if job.echo is None or not job.echo.complete or not (chunk.last or chunk.scored):
                continue
            echoes.append(job.echo.message())
            job.echo = None
            if job.generation.finish is not None:
                ends.append(job.end(self._scheduler.n_cached(job.id)))
                self._forget(job.id)
        return tuple(echoes), ends

    def _decode(self, plan: Plan) -> bool:
        try:
            self._executor.decode(plan, self._jobs)
        except CacheFull:
            self._make_room(plan)
            return False
        except DecodeError as error:
            self._fail(plan, str(error))
            return False
        return True

    def _make_room(self, plan: Plan) -> None:
        if plan.n_drafted:
            self._may_draft = False
        elif self._scheduler.relieve():
            print("KV cache fuller than expected: made room", file=sys.stderr, flush=True)
        else:
            self._fail(plan, "the KV cache is full")

    def _fail(self, plan: Plan, reason: str) -> None:
        for chunk in plan.chunks:
            self._forget(chunk.id, broken=True)
            self._outbox.send(Failed(chunk.id, "internal_error", f"decoding failed: {reason}"))

    def _refuse(self, job: Job) -> None:
        assert job.constraint is not None
        self._forget(job.id)
        message = (
            "what the answer must look like became too complex to follow "
            f"({job.constraint.error}): simplify the schema, expression or grammar"
        )
        self._outbox.send(Failed(job.id, "invalid_request", message, job.constrained_by))

    def _send_step(
        self,
        deltas: tuple[Delta, ...],
        ends: tuple[End, ...],
        n_prefilled: int = 0,
        logprobs: tuple[TokenLogprobs, ...] = (),
        echoes: tuple[Echo, ...] = (),
        *,
        n_drafted: int = 0,
        n_accepted: int = 0,
    ) -> None:
        self._outbox.send_step(
            Step(
                deltas,
                ends,
                n_prefilled,
                self._cache.n_pinned,
                self._cache.n_kept,
                logprobs,
                echoes,
                n_drafted,
                n_accepted,
            )
        )
