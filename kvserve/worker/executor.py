"""Carries a plan out: changes the memory, decodes the batch, draws tokens."""

from collections.abc import Callable, Mapping
from functools import partial

from kvserve.worker.batches import Batch as Plan
from kvserve.worker.cell_rules import Clear, Copy, Cut, Operation, Store
from kvserve.worker.drawing import Drawer, Drawn, Round, Rows, Wish
from kvserve.worker.job import Job
from kvserve.worker.llama import Batch, Context


class Executor:
    """Works on `context`, draws with `drawer`. `store` copies a sequence that is about to be given
    up."""

    def __init__(self, context: Context, drawer: Drawer, store: Callable[[Store], None]) -> None:
        self._context = context
        self._drawer = drawer
        self._store = store
        self._batch = Batch(context.n_batch)
        self._round: Round | None = None
        self._tokens: list[int] = []

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

    def submit(self, plan: Plan, jobs: Mapping[int, Job]) -> None:
        """Begin to compute a batch. Raises CacheFull or DecodeError."""
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
        if plan.n_pad:
            n_outputs = len(batch.outputs) + plan.n_pad
            batch.pad(plan.n_pad, wanted=n_outputs <= self._context.n_outputs)
        if plan.n_idle:
            batch.want_more(plan.n_idle)
        self._round = None
        self._context.submit(batch)

    def submit_again(self) -> None:
        """The same for the next token of all requests in the batch, which is the one that was
        drawn."""
        self._batch.advance(self._tokens)
        self._context.submit(self._batch)

    def wait(self) -> None:
        """Return when the batch is computed."""
        self._context.wait()

    def draw(self, plan: Plan, jobs: Mapping[int, Job]) -> list[tuple[Wish, Drawn]]:
        """Draw tokens from what was decoded; the jobs have accepted them."""
        n_outputs = len(self._batch.outputs)
        if not n_outputs:
            return []
        logits = self._context.logits(n_outputs)
        if self._round is None:
            self._round = Round(self._wishes(plan, jobs, logits), logits.shape[1])
        drawn = self._drawer.draw(logits, self._round)
        self._tokens = [draws[-1][0] for draws in drawn]
        return list(zip(self._round.wishes, drawn, strict=True))

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
