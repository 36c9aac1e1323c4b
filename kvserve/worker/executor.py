"""Carries a plan out: changes the memory, decodes the batch, draws tokens."""

from collections.abc import Callable, Mapping
from functools import partial

from kvserve.worker.batches import Batch as Plan
from kvserve.worker.cell_rules import Clear, Copy, Cut, Operation, Store
from kvserve.worker.drawing import Drawer, Drawn, Rows, Wish
from kvserve.worker.job import Job
from kvserve.worker.llama import Batch, Context


class Executor:
    """Works on `context`, draws with `drawer`. `store` copies a sequence that is about to be given
    up; `meanwhile` is called when a batch was handed over, while the device computes it."""

    def __init__(
        self,
        context: Context,
        drawer: Drawer,
        store: Callable[[Store], None],
        meanwhile: Callable[[], None],
    ) -> None:
        self._context = context
        self._drawer = drawer
        self._store = store
        self._meanwhile = meanwhile
        self._batch = Batch(context.n_batch)

    def change_memory(self, operations: tuple[Operation, ...]) -> None:
        """Carry the operations out in order."""
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
                    self._store(operation)

    def decode(self, plan: Plan, jobs: Mapping[int, Job]) -> None:
        """Compute a batch; returns when it is done. Raises CacheFull or DecodeError."""
        batch = self._batch
        batch.clear()
        for chunk in plan.chunks:
            tokens = jobs[chunk.id].generation.tokens
            batch.add(
                tokens[chunk.start : chunk.start + chunk.count],
                chunk.start,
                chunk.slot,
                last=chunk.last,
                scored=chunk.scored,
            )
            if chunk.draft:
                batch.add(chunk.draft, chunk.start + chunk.count, chunk.slot, scored=True)
        self._context.submit(batch)
        self._meanwhile()
        self._context.wait()

    def draw(self, plan: Plan, jobs: Mapping[int, Job]) -> list[tuple[Wish, Drawn]]:
        """Draw tokens from what was decoded; the jobs have accepted them."""
        n_outputs = len(self._batch.outputs)
        if not n_outputs:
            return []
        logits = self._context.logits(n_outputs)
        wishes = self._wishes(plan, jobs, logits)
        return list(zip(wishes, self._drawer.draw(logits, wishes), strict=True))

    def _wishes(self, plan: Plan, jobs: Mapping[int, Job], logits: Rows) -> list[Wish]:
        wishes, first = [], 0
        for chunk in plan.chunks:
            job, end = jobs[chunk.id], first + chunk.n_outputs
            if chunk.scored and job.echo is not None:
                job.echo.take(chunk.start, logits[first:end])
            elif chunk.last:
                accept = partial(job.accept, self._context.vocab)
                wishes.append(Wish(job.id, first, job.sampler, accept, job.n_logprobs, chunk.draft))
            first = end
        return wishes
