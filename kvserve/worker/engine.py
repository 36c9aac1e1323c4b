"""The loop: takes messages, lets the stepper take a step, again.

Everything that changes a request's state happens on the thread that calls `Engine.run`.
"""

import os
import queue
import sys

from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import (
    Cancel,
    CarryReport,
    CopyAhead,
    Delta,
    Generate,
    Pause,
    ShareCores,
    Started,
    TakeAhead,
    TakeIn,
    TakenAhead,
    TakenIn,
    Tokenized,
    ToWorker,
)
from kvserve.worker.arriving import Incoming, Paths, incoming_for, log_refusals
from kvserve.worker.carrying import ExportFiles, export
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.cold_tier import ColdTier
from kvserve.worker.copying_ahead import Copies
from kvserve.worker.drawing import Drawer
from kvserve.worker.executor import Executor
from kvserve.worker.job import Job
from kvserve.worker.llama import Context
from kvserve.worker.openmp import BriefWaits
from kvserve.worker.outbox import Outbox
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.prepare import Prepared, Preparer, Refused
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.speculation.speculator import Speculator
from kvserve.worker.step_rows import StepRows
from kvserve.worker.stepping import Stepper

_MOST_SAMPLING_THREADS = 4
_MOST_OPENMP_THREADS = 8

Inbox = queue.SimpleQueue[ToWorker | Prepared | Refused]


class Engine:
    """Serves requests from `inbox` with `context`, until the process ends.

    `n_slots` requests run at a time, and up to `cold_bytes` of host memory hold conversations that
    left the KV cache. With a `speculator` steps check up to `n_draft` proposed tokens. The caller's
    reader thread feeds the inbox. OpenMP's `waits` are brief while another worker is there: until
    the first request, and when the daemon says so.
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
        waits: BriefWaits | None = None,
    ) -> None:
        self._context = context
        self._channel = channel
        self._waits = waits
        self._began = False
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
        # Where llama.cpp computes on the CPU too, as many threads as it has: OpenMP ends those that
        # the next team does not need, and has to start them again.
        n_openmp = context.n_threads
        if context.model.wholly_on_gpu:
            n_openmp = min(n_openmp, _MOST_OPENMP_THREADS)
        self._executor = Executor(
            context,
            Drawer(n_threads, context.vocab.piece, n_openmp),
            store=lambda operation: cold.keep(operation),  # noqa: PLW0108 - not there yet
        )
        cold = ColdTier(context, self._cache, cold_bytes, self._executor.change_memory)
        self._scheduler = Scheduler(
            context.n_ctx,
            n_slots,
            context.n_batch,
            self._cache,
            n_draft,
            context.n_ubatch,
            StepRows(
                context.slower_rows,
                learns=not context.model.wholly_on_gpu and context.cannot_take_back is None,
                n_most=context.n_outputs,
            ),
        )
        self._stepper = Stepper(
            context,
            self._scheduler,
            self._cache,
            cold,
            self._executor,
            self._outbox,
            speculator,
            disturbed=lambda: self._copying or not inbox.empty(),
        )
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
            deliver=self._prepared,
        )

    @property
    def _copying(self) -> bool:
        """Whether something is to be done between steps for the next worker."""
        return self._files is not None or self._copies.busy

    def _prepared(self, result: Prepared | Refused) -> None:
        """From the preparing thread. A request that only waits has no part in what may go wrong."""
        if isinstance(result, Prepared):
            self._channel.send(Tokenized(result.id))
        self._inbox.put(result)

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
                self._begin_work()
                self._stepper.step()

    def _begin_work(self) -> None:
        """With the first request the worker before this one has stopped."""
        if not self._began:
            self._began = True
            self._share_cores(shared=False)

    def _share_cores(self, *, shared: bool) -> None:
        if self._waits is None:
            return
        if shared:
            self._waits.begin()
        else:
            self._waits.end()

    def _take_messages(self) -> None:
        try:
            while True:
                idle = self._paused or not (self._copying or self._scheduler.has_work)
                if idle:
                    self._outbox.flush()
                self._handle(self._inbox.get(block=idle))
        except queue.Empty:
            return

    def _handle(self, message: ToWorker | Prepared | Refused) -> None:
        if self._paused:
            return
        match message:
            case Generate(id=request) if request not in self._stepper:
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
                self._stepper.forget(request)
            case ShareCores(shared=shared):
                self._began = True  # it is the present one, with or without a request
                self._share_cores(shared=shared)
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
            case _ if not isinstance(message, Prepared | Refused):
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
            self._stepper.add(job, prepared.salt)
            return
        self._outbox.send(Started(job.id, job.generation.n_prompt, job.form))
        deltas = (Delta(job.id, prepared.late_text, ()),) if prepared.late_text else ()
        echoes = () if echo is None else (echo.message(),)
        self._stepper.send_step(deltas, (job.end(0),), echoes=echoes)
