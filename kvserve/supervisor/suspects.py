"""Which requests may be what kills the workers."""

from collections.abc import Iterable

from kvserve.supervisor.admission import Job, Stage

MAX_CRASHES = 2
"""A request that was decoded or read in this many dying workers, the last of which brought it no
further, is not given to another one."""
MAX_CRASHES_GETTING_ON = 8
"""Nor is one that was in so many, whatever it got."""


def blamed(running: Iterable[Job]) -> list[Job]:
    """A worker died with these requests, in the order in which it got them: note that on those
    that it decoded or was reading, and name those that are not given to another one.

    It reads one after the other, so of those that are not read yet the first alone counts.
    """
    jobs = list(running)
    decoded = [job for job in jobs if job.stage is Stage.DECODING]
    being_read = [job for job in jobs if job.stage is Stage.SENT][:1]
    return [job for job in decoded + being_read if _is_to_blame(job)]


def _is_to_blame(job: Job) -> bool:
    job.n_crashes += 1
    # One that got on since the last crash did not cause it, or not at once.
    stuck = len(job.tokens) <= job.n_before_crash
    job.n_before_crash = len(job.tokens)
    return job.n_crashes >= (MAX_CRASHES if stuck else MAX_CRASHES_GETTING_ON)
