"""The loop: takes messages, decodes a batch, draws tokens, sends one `Step`, again.

Everything that changes a request's state happens on the thread that calls `Engine.run`.
"""

import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import (
    Cancel,
    Delta,
    End,
    Failed,
    Generate,
    Pause,
    Paused,
    Started,
    Step,
    ToWorker,
)
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.llama import Batch, CacheFull, Context, DecodeError
from kvserve.worker.pace import Pace
from kvserve.worker.prepare import Prepared, Preparer, Refused
from kvserve.worker.sampling import Row, Sampler
from kvserve.worker.scheduler import Batch as Plan
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.sequences import Generation

_MOST_SAMPLING_THREADS = 8

Inbox = queue.SimpleQueue[ToWorker | Prepared | Refused]


@dataclass(slots=True)
class _Job:
    id: int
    generation: Generation
    sampler: Sampler
    started: bool = False


@dataclass(frozen=True, slots=True)
class _Draw:
    """A row of logits to draw from: the batch's token `output`."""

    job: _Job
    output: int
    row: Row


class Engine:
    """Serves requests from `inbox` with `context`, until the process ends.

    `n_slots` requests run at a time. The caller's reader thread feeds the inbox.
    """

    def __init__(
        self,
        context: Context,
        channel: WorkerChannel,
        renderer: ChatRenderer,
        inbox: Inbox,
        n_slots: int,
    ) -> None:
        self._context = context
        self._channel = channel
        self._inbox = inbox
        self._scheduler = Scheduler(context.n_ctx, n_slots, context.n_batch)
        self._pace = Pace(context.n_batch)
        self._batch = Batch(context.n_batch)
        self._jobs: dict[int, _Job] = {}
        self._preparing: set[int] = set()
        self._paused = False
        self._preparer = Preparer(
            context.vocab,
            renderer,
            context.n_ctx,
            wanted=self._preparing.__contains__,
            deliver=inbox.put,
        )
        n_threads = min(len(os.sched_getaffinity(0)), n_slots, _MOST_SAMPLING_THREADS)
        self._pool = ThreadPoolExecutor(n_threads, "sample") if n_threads > 1 else None

    def run(self) -> None:
        """Serve; blocks where there is nothing to do. Never returns."""
        self._preparer.start()
        while True:
            self._take_messages()
            self._step()

    def _take_messages(self) -> None:
        try:
            while True:
                idle = self._paused or not self._scheduler.has_work
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
                self._channel.send(message.answer)
            case Cancel(id=request):
                self._preparing.discard(request)
                self._forget(request)
            case Pause():
                self._paused = True
                self._channel.send(Paused())
            case Prepared() | Refused():
                pass
            case _:
                print(f"unexpected message: {message!r}", file=sys.stderr, flush=True)

    def _admit(self, prepared: Prepared) -> None:
        job = _Job(prepared.id, prepared.generation, prepared.sampler)
        if job.generation.finish is None:
            self._jobs[job.id] = job
            self._scheduler.add(job.id, job.generation.n_tokens)
            return
        self._channel.send(Started(job.id, job.generation.n_prompt))
        deltas = (Delta(job.id, prepared.late_text, ()),) if prepared.late_text else ()
        self._send_step(deltas, (_end(job),))

    def _forget(self, request: int) -> None:
        if self._jobs.pop(request, None) is None:
            return
        slot = self._scheduler.remove(request)
        if slot is not None:
            self._context.clear_slot(slot)

    def _step(self) -> None:
        plan = self._scheduler.plan(self._pace.limit(self._scheduler.n_decoding))
        for preempted in plan.preempted:
            self._context.clear_slot(preempted.slot)
        for request in plan.admitted:
            job = self._jobs[request]
            if not job.started:
                job.started = True
                self._channel.send(Started(job.id, job.generation.n_prompt))
        begun = time.monotonic()
        if not self._decode(plan):
            return
        self._pace.observe(plan.n_prefill, plan.n_tokens, time.monotonic() - begun)
        self._scheduler.commit(plan)
        draws = self._draws(plan)
        deltas, ends = [], []
        for draw, token in zip(draws, self._sample(draws), strict=True):
            job = draw.job
            deltas.append(self._accept(job, token))
            if job.generation.finish is None:
                self._scheduler.grow(job.id)
            else:
                ends.append(_end(job))
                self._forget(job.id)
        self._send_step(tuple(deltas), tuple(ends), plan.n_prefill)

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
            )
        try:
            self._context.decode(batch)
        except CacheFull:
            self._make_room(plan)
            return False
        except DecodeError as error:
            self._fail(plan, str(error))
            return False
        return True

    def _make_room(self, plan: Plan) -> None:
        preempted = self._scheduler.preempt_youngest()
        if preempted is None:
            self._fail(plan, "the KV cache is full")
            return
        print(f"KV cache full: request {preempted.id} waits again", file=sys.stderr, flush=True)
        self._context.clear_slot(preempted.slot)

    def _fail(self, plan: Plan, reason: str) -> None:
        for chunk in plan.chunks:
            self._forget(chunk.id)
            self._channel.send(Failed(chunk.id, "internal_error", f"decoding failed: {reason}"))

    def _draws(self, plan: Plan) -> list[_Draw]:
        wanted = [chunk for chunk in plan.chunks if chunk.last]
        if not wanted:
            return []
        rows = self._context.logits(len(wanted))
        return [
            _Draw(self._jobs[chunk.id], output, row)
            for chunk, output, row in zip(wanted, self._batch.outputs, rows, strict=True)
        ]

    def _sample(self, draws: list[_Draw]) -> list[int]:
        if self._pool is not None and sum(not draw.job.sampler.greedy for draw in draws) > 1:
            return list(self._pool.map(self._sample_one, draws))
        return [self._sample_one(draw) for draw in draws]

    def _sample_one(self, draw: _Draw) -> int:
        return draw.job.sampler.sample(self._context, draw.output, draw.row)

    def _accept(self, job: _Job, token: int) -> Delta:
        vocab = self._context.vocab
        text = job.generation.accept(token, vocab.piece(token), ends=vocab.ends(token))
        return Delta(job.id, text, (token,))

    def _send_step(
        self, deltas: tuple[Delta, ...], ends: tuple[End, ...], n_prefilled: int = 0
    ) -> None:
        self._channel.send(Step(deltas, ends, n_prefilled, self._scheduler.n_cells_used))


def _end(job: _Job) -> End:
    generation = job.generation
    assert generation.finish is not None
    return End(
        job.id,
        generation.finish.reason,
        generation.n_prompt,
        generation.n_generated,
        stop_text=generation.finish.stop_text,
    )
