"""The loop: takes messages, decodes a batch, draws tokens, sends one `Step`, again.

Everything that changes a request's state happens on the thread that calls `Engine.run`.
"""

import os
import queue
import sys
import time
from dataclasses import dataclass, field
from functools import partial

from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import (
    Cancel,
    CarryReport,
    Delta,
    Echo,
    End,
    Failed,
    FromWorker,
    Generate,
    NeedsContext,
    Pause,
    Started,
    Step,
    TakeIn,
    TakenIn,
    TokenLogprobs,
    ToWorker,
)
from kvserve.worker.carrying import Blanks, Incoming, export, incoming_of, log_refusals
from kvserve.worker.cell_rules import Clear, Copy, Cut, Operation, Store
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.cold_tier import ColdTier
from kvserve.worker.drawing import Drawer, Drawn, Rows, Wish
from kvserve.worker.grammar import Constraint
from kvserve.worker.llama import Batch, CacheFull, Context, DecodeError
from kvserve.worker.pace import Pace
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.prepare import Prepared, Preparer, Refused
from kvserve.worker.sampling import Sampler
from kvserve.worker.scheduler import Batch as Plan
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.scoring import PromptEcho
from kvserve.worker.sequences import Generation
from kvserve.worker.speculation.proposal import Ask
from kvserve.worker.speculation.speculator import Draft, Outcome, Speculator

_MOST_SAMPLING_THREADS = 8

Inbox = queue.SimpleQueue[ToWorker | Prepared | Refused]


@dataclass(slots=True)
class _Job:
    id: int
    generation: Generation
    sampler: Sampler
    n_logprobs: int | None = None
    constraint: Constraint | None = None
    echo: PromptEcho | None = None
    started: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether its grammar cannot be followed any further."""
        return self.constraint is not None and self.constraint.error is not None


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
        self._channel = channel
        self._inbox = inbox
        self._cache = PrefixCache(
            context.n_ctx,
            n_slots,
            context.reuse_rules,
            context.first_position,
            stores=cold_bytes > 0 and context.state_layout is not None,
        )
        self._cold = ColdTier(context, self._cache, cold_bytes, self._change_memory)
        self._scheduler = Scheduler(
            context.n_ctx, n_slots, context.n_batch, self._cache, n_draft, context.n_ubatch
        )
        self._speculator = speculator
        self._may_draft = True
        self._pace = Pace(context.n_batch)
        self._batch = Batch(context.n_batch)
        self._jobs: dict[int, _Job] = {}
        self._preparing: set[int] = set()
        self._paused = False
        self._blanks: Blanks | None = None
        self._unsent: Step | None = None
        self._preparer = Preparer(
            context.vocab,
            renderer,
            context.n_ctx,
            context.n_ctx_train,
            wanted=self._preparing.__contains__,
            deliver=inbox.put,
        )
        n_threads = min(len(os.sched_getaffinity(0)), n_slots, _MOST_SAMPLING_THREADS)
        self._drawer = Drawer(n_threads, context.vocab.piece)

    def take_in(self, incoming: Incoming) -> CarryReport:
        """Bring what an earlier worker left into the cache, before the first request."""
        arrived, report = incoming.import_into(self._context, self._cache.free_ids)
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
            blanks = self._blanks
            if blanks is not None and (blanks.ready or not self._scheduler.has_work):
                self._pause(blanks)
            else:
                self._step()

    def _take_messages(self) -> None:
        try:
            while True:
                pausing = self._blanks is not None
                idle = self._paused or not (pausing or self._scheduler.has_work)
                if idle:
                    self._flush()
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
                self._send(message.answer)
            case Cancel(id=request):
                self._preparing.discard(request)
                self._forget(request)
            case Pause(export_bytes=limit_bytes):
                sequences = self._scheduler.sequences if limit_bytes else ()
                self._blanks = Blanks(self._context, sequences, limit_bytes)
            case TakeIn():
                incoming = incoming_of(message)
                self._channel.send(TakenIn(self.take_in(incoming) if incoming else None))
            case Prepared() | Refused():
                pass
            case _:
                print(f"unexpected message: {message!r}", file=sys.stderr, flush=True)

    def _pause(self, blanks: Blanks) -> None:
        self._paused, self._blanks = True, None
        self._cache.make_room(1)  # for the canaries
        self._change_memory(self._cache.take_operations())
        sequences = self._scheduler.sequences if blanks.limit_bytes else ()
        self._flush()
        self._channel.send(export(self._context, sequences, blanks, self._cache.shortest))

    def _admit(self, prepared: Prepared) -> None:
        job = _Job(
            prepared.id,
            prepared.generation,
            prepared.sampler,
            prepared.n_logprobs,
            prepared.constraint,
            prepared.echo,
        )
        generation, echo = job.generation, job.echo
        if generation.finish is None or (echo is not None and not echo.complete):
            self._jobs[job.id] = job
            n_to_score = 0 if echo is None else echo.n_to_score
            self._scheduler.add(
                job.id, generation.buffer, generation.n_tokens, prepared.salt, n_to_score
            )
            return
        self._send(Started(job.id, job.generation.n_prompt))
        deltas = (Delta(job.id, prepared.late_text, ()),) if prepared.late_text else ()
        echoes = () if echo is None else (echo.message(),)
        self._send_step(deltas, (_end(job, 0),), echoes=echoes)

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
        self._change_memory(plan.operations)
        for request in plan.admitted:
            job = self._jobs[request]
            if not job.started:
                job.started = True
                self._send(Started(job.id, job.generation.n_prompt))
        begun = time.monotonic()
        if not self._decode(plan):
            return
        self._pace.observe(plan.n_prefill, plan.n_tokens, time.monotonic() - begun)
        self._scheduler.commit(plan)
        n_outputs = len(self._batch.outputs)
        wishes: list[Wish] = []
        drawn: list[Drawn] = []
        if n_outputs:
            logits = self._context.logits(n_outputs)
            wishes = self._wishes(plan, logits)
            drawn = self._drawer.draw(logits, wishes)
        echoes, ends = self._take_echoes(plan)
        outcomes = self._settle(plan)
        if self._speculator is not None:
            asked = {ask.id for ask in asks}
            decoded = {id_: one for id_, one in outcomes.items() if id_ in asked}
            self._speculator.observe(decoded, time.monotonic() - begun, plan.n_prefill)
        self._deliver(plan, list(zip(wishes, drawn, strict=True)), echoes, ends, outcomes)

    def _asks(self) -> list[Ask]:
        """The requests that generate, and how many tokens beside the next one each may get."""
        if self._speculator is None:
            return []
        asks = []
        for request in self._scheduler.decoding:
            generation = self._jobs[request].generation
            n_left = generation.limits.max_tokens - generation.n_generated
            n_most = min(n_left, self._context.n_ctx - generation.n_tokens) - 1
            asks.append(Ask(request, generation.buffer, generation.n_tokens, n_most))
        return asks

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
        self._change_memory(self._cache.take_operations())
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
        outgrown: list[_Job] = []
        refused: list[_Job] = []
        for wish, draws in drawn:
            job = self._jobs[wish.id]
            n_tokens = len(job.tokens)
            if n_tokens:
                deltas.append(Delta(job.id, job.text, tuple(job.tokens)))
                logprobs += [one for _, one in draws[:n_tokens] if one is not None]
                job.text, job.tokens = "", []
            if job.broken:
                refused.append(job)
            elif job.generation.finish is None:
                self._scheduler.grow(job.id, n_tokens)
                if job.generation.n_tokens >= self._context.n_ctx:
                    outgrown.append(job)
            else:
                ends.append(_end(job, self._scheduler.n_cached(job.id)))
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
            self._send(NeedsContext(job.id, job.generation.n_tokens))
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
                ends.append(_end(job, self._scheduler.n_cached(job.id)))
                self._forget(job.id)
        return tuple(echoes), ends

    def _change_memory(self, operations: tuple[Operation, ...]) -> None:
        context = self._context
        for operation in operations:
            match operation:
                case Copy(source, target, n_tokens):
                    context.copy_slot(source, target, n_tokens)
                case Cut(slot, n_tokens):
                    context.cut_slot(slot, n_tokens)
                case Clear(slot):
                    context.clear_slot(slot)
                case Store():
                    self._cold.keep(operation)

    def _decode(self, plan: Plan) -> bool:
        batch = self._batch
        batch.clear()
        for chunk in plan.chunks:
            tokens = self._jobs[chunk.id].generation.tokens
            batch.add(
                tokens[chunk.start : chunk.start + chunk.count],
                chunk.start,
                chunk.slot,
                last=chunk.last,
                scored=chunk.scored,
            )
            if chunk.draft:
                batch.add(chunk.draft, chunk.start + chunk.count, chunk.slot, scored=True)
        try:
            self._context.submit(batch)
            self._flush()
            self._context.wait()
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
            self._send(Failed(chunk.id, "internal_error", f"decoding failed: {reason}"))

    def _refuse(self, job: _Job) -> None:
        assert job.constraint is not None
        self._forget(job.id)
        message = f"the grammar cannot be followed: {job.constraint.error}"
        self._send(Failed(job.id, "invalid_request", message, "response_format"))

    def _wishes(self, plan: Plan, logits: Rows) -> list[Wish]:
        wishes, first = [], 0
        for chunk in plan.chunks:
            job, end = self._jobs[chunk.id], first + chunk.n_outputs
            if chunk.scored and job.echo is not None:
                job.echo.take(chunk.start, logits[first:end])
            elif chunk.last:
                accept = partial(self._accept, job)
                wishes.append(Wish(job.id, first, job.sampler, accept, job.n_logprobs, chunk.draft))
            first = end
        return wishes

    def _accept(self, job: _Job, token: int) -> bool:
        """Add a token to a request's text, and tell whether it goes on; on any thread."""
        if job.broken:
            return False
        vocab = self._context.vocab
        generation = job.generation
        text = generation.accept(token, vocab.piece(token), ends=vocab.ends(token))
        if generation.finish is None and job.constraint is not None and job.constraint.complete:
            text += generation.end()
        job.text += text
        job.tokens.append(token)
        return generation.finish is None

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
        """Send a step's answers: on a GPU only while it computes the next step."""
        self._flush()
        self._unsent = Step(
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
        if not self._context.asynchronous:
            self._flush()

    def _send(self, message: FromWorker) -> None:
        self._flush()
        self._channel.send(message)

    def _flush(self) -> None:
        if self._unsent is not None:
            step, self._unsent = self._unsent, None
            self._channel.send(step)


def _end(job: _Job, n_cached: int) -> End:
    generation = job.generation
    assert generation.finish is not None
    return End(
        job.id,
        generation.finish.reason,
        generation.n_prompt,
        generation.n_generated,
        min(n_cached, generation.n_prompt),
        stop_text=generation.finish.stop_text,
    )
