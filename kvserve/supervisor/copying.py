"""Most of what a pause would have to copy is copied ahead of it, while the worker still answers."""

import asyncio
from dataclasses import replace

import structlog

from kvserve.ipc.messages import CopiedAhead, CopyAhead, TakeAhead, Transcode
from kvserve.supervisor.carry import Copied, adopt_copies, export_limit
from kvserve.supervisor.loading import Loads
from kvserve.supervisor.states import Attempt, Draining, Overlapping, TranscodedAhead

log = structlog.get_logger(__name__)

SLOWEST_EXPORT = 2**29
"""Bytes a second that a worker which exports its sequences makes at least."""
_SLOWEST_REWRITE = 2**27

Replaced = Overlapping | Draining
"""The states of a worker that another one is to follow."""


class Copying(Loads):
    """The worker is asked to copy; the next one, or the process that it will run in, is given what
    was copied, and the pause waits until that has been dealt with."""

    def _export_limit(self, state: Replaced) -> int:
        """Bytes that may be exported on the way to the next worker."""
        following = state.following
        carry_bytes = self._policy.carry_limit(following.plan)
        if following.beside_bytes is not None:
            carry_bytes = min(carry_bytes, following.beside_bytes)
        pair, following_pair = (
            plan.chosen.launch.pair for plan in (state.attempt.plan, following.plan)
        )
        return export_limit(carry_bytes, pair, following_pair)

    def _asked_to_copy(self, state: Replaced) -> Replaced:
        """The state with its worker asked to copy, once, where somebody would notice the pause; how
        long that may take is its `waits_until`."""
        limit = self._export_limit(state)
        if state.following.copied is None and limit and self._requests.running:
            state.worker.send(CopyAhead(limit))
            state = replace(state, following=replace(state.following, copied=Copied()))
        if state.following.copied is None:
            return replace(state, waits_until=0.0)
        return replace(state, waits_until=self._patience(state, SLOWEST_EXPORT))

    def _patience(self, state: Replaced, slowest: int) -> float:
        """Until when something is waited for that makes `slowest` bytes a second at least."""
        kv_bytes = state.attempt.plan.chosen.memory.kv_bytes
        seconds = min(self._export_limit(state), kv_bytes) / slowest
        return self._clock() + self._policy.pause_timeout + seconds

    def _on_copied_ahead(self, message: CopiedAhead) -> None:
        state = self._state
        if not isinstance(state, Overlapping | Draining) or state.following.copied is None:
            return
        copied = adopt_copies(state.worker.pid, message)
        log.info(
            "copied ahead of the pause",
            n_sequences=len(copied.descriptors),
            n_bytes=copied.n_bytes,
            seconds=round(message.seconds, 3),
        )
        state = replace(state, following=replace(state.following, copied=copied))
        self._update(self._passed_on(state))

    def _on_spawned_ahead(self) -> None:
        match self._state:
            case Draining(kill_at=None, successor=None) as state:
                self._update(self._passed_on(self._asked_to_copy(replace(state, awake=True))))

    def _on_dealt_with(self) -> None:
        """The next worker, or its process, has done with the copies what can be done ahead."""
        if isinstance(self._state, Overlapping | Draining):
            self._update(replace(self._state, waits_until=0.0))

    def _passed_on(self, state: Replaced) -> Replaced:
        """The state with the copies given to whoever comes next, as soon as both are there."""
        copied = state.following.copied
        if copied is None or copied.asked:
            return state
        if not copied.paths:
            return replace(state, waits_until=0.0)
        pair = state.following.plan.chosen.launch.pair
        if isinstance(state, Overlapping):
            if state.successor is None or state.answered is None:
                return state
            state.successor.send(TakeAhead(copied.paths, pair.k, pair.v))
        elif state.awake and state.kill_at is None and state.successor is None:
            message = Transcode(copied.paths, pair.k, pair.v, ahead=True)
            self._beside(self._transcode_ahead(message))
        else:
            return state
        return replace(state, waits_until=self._patience(state, _SLOWEST_REWRITE))

    async def _transcode_ahead(self, message: Transcode) -> None:
        await self._spawner.transcode_ahead(message)
        self.post(TranscodedAhead())

    def _without_copies(self, attempt: Attempt) -> Attempt:
        """An attempt whose predecessor is gone: what that one copied has no end, and proves
        nothing."""
        if attempt.copied is not None:
            self._beside(asyncio.to_thread(attempt.copied.close))
        return replace(attempt, copied=None)
