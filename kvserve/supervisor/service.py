"""What the API needs of the supervisor, as a protocol; tests give it a scripted one."""

from contextlib import AbstractContextManager
from typing import Protocol

from kvserve.core.plan import Plan
from kvserve.supervisor.admission import GenerationSpec, Ticket
from kvserve.supervisor.news import Listener
from kvserve.supervisor.status import ReloadOutcome, Status


class Service(Protocol):
    """The supervisor as its callers see it. All methods are for the event loop's thread."""

    @property
    def ready(self) -> bool:
        """Whether a worker serves, and new requests need not wait for a reload."""
        ...

    def submit(self, spec: GenerationSpec) -> Ticket:
        """Put a request in line. A refusal (Overloaded, NotReady) is raised by iteration."""
        ...

    def status(self) -> Status:
        """The state at this moment."""
        ...

    def listen(self) -> AbstractContextManager[Listener]:
        """Be told what happens from now on."""
        ...

    async def plan(self, n_ctx: int | None) -> Plan:
        """What would be chosen now for `n_ctx` tokens (None: the longest that fits).

        The running worker's memory counts as free. Raises DoesNotFit, UsageError.
        """
        ...

    async def change_context(self, n_ctx: int | None) -> ReloadOutcome:
        """Plan for another context and reload where the plan differs.

        Raises DoesNotFit and UsageError before anything changed, ReloadInProgress while another
        change runs, WorkerFailed after a rollback to the previous plan.
        """
        ...

    async def stop(self) -> None:
        """Refuse new requests, give running ones a moment, end the worker."""
        ...
