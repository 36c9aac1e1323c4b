"""One evaluation: from what is asked to a profile on disk, with a file to go on from between."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import msgspec

from kvserve.core.dtypes import CachePair, parse_pair
from kvserve.core.loss import Quality, Speed
from kvserve.eval.partial import Partial, Result, fingerprint
from kvserve.eval.process import EVALUATE_ARGV, measure
from kvserve.eval.progress import Progress
from kvserve.eval.statistics import text_losses
from kvserve.eval.tasks.suite import Items
from kvserve.eval.tasks.suite import results as task_results
from kvserve.ipc.evaluating import (
    Answered,
    EvalAnswer,
    EvalRequest,
    Finished,
    Opened,
    Scored,
    Skipped,
    Timed,
)
from kvserve.supervisor.profiles import Profile, ProfileKey, Profiles


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured, and for whom. `settings` go into the profile, for people; `items` are what
    the request's prompts were made of; `predicted` are decode speeds over f16's, by pair and depth,
    that bandwidth alone would give."""

    request: EvalRequest
    environment: Mapping[str, str]
    key: ProfileKey
    model_id: str
    settings: dict[str, str]
    items: Items = field(default_factory=dict)
    predicted: Mapping[tuple[CachePair, int], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found; `path` is the profile, None where the evaluation was interrupted.
    `n_resumed` units were measured by an earlier run."""

    quality: Quality
    skipped: tuple[Skipped, ...]
    path: Path | None
    n_resumed: int


def run(
    job: Job,
    profiles: Profiles,
    out: TextIO,
    argv: tuple[str, ...] = EVALUATE_ARGV,
    clock: Callable[[], float] = time.time,
) -> Outcome:
    """Measure what an earlier, interrupted run left, and store it all. Progress goes to `out`.

    An interrupt (Ctrl-C) ends it with what is done. Raises WorkerFailed or UsageError; what was
    done before is kept then too.
    """
    mark = fingerprint(job.request, repr(job.key))
    path = profiles.path(job.model_id, job.key).with_suffix(f".{mark[:8]}.partial")
    with Partial(path, mark) as partial:
        n_resumed = len(partial.done)
        try:
            _measure(job, partial, out, argv)
        except KeyboardInterrupt:
            return _outcome(job, partial, None, n_resumed)
        quality = quality_of(partial.results, job)
        known = profiles.read(job.model_id, job.key)
        profile = Profile(
            key=job.key,
            model_id=job.model_id,
            measured_at=clock(),
            settings=job.settings,
            quality=known.quality.joined(quality),
        )
        written = profiles.write(profile)
        outcome = _outcome(job, partial, written, n_resumed)
        partial.discard()
        return outcome


def _measure(job: Job, partial: Partial, out: TextIO, argv: tuple[str, ...]) -> None:
    progress: Progress | None = None
    costs: dict[str, int] = {}

    def take(answer: EvalAnswer) -> None:
        nonlocal progress
        partial.add(answer)
        if isinstance(answer, Opened):
            costs.update(answer.costs)
            progress = Progress(sum(costs.values()), out)
        elif isinstance(answer, Finished) and progress is not None:
            progress.step(costs.get(answer.unit, 0), answer.unit)

    request = msgspec.structs.replace(job.request, done=partial.done)
    try:
        measure(request, job.environment, take, argv)
    finally:
        if progress is not None:
            progress.close()


def _outcome(job: Job, partial: Partial, path: Path | None, n_resumed: int) -> Outcome:
    results = partial.results
    skipped = tuple(answer for answer in results if isinstance(answer, Skipped))
    return Outcome(quality_of(results, job), skipped, path, n_resumed)


def quality_of(results: list[Result], job: Job) -> Quality:
    """All answers as rows."""
    scored = [answer for answer in results if isinstance(answer, Scored)]
    timed = [answer for answer in results if isinstance(answer, Timed)]
    texts: dict[tuple[str, CachePair], dict[int, str]] = {}
    for answer in results:
        if isinstance(answer, Answered):
            found = texts.setdefault((answer.task, parse_pair(answer.pair)), {})
            found[answer.index] = answer.text
    return Quality(
        losses=tuple(text_losses(scored)),
        tasks=tuple(task_results(job.items, texts)),
        speeds=tuple(_speed(answer, job) for answer in timed),
    )


def _speed(timed: Timed, job: Job) -> Speed:
    pair = parse_pair(timed.pair)
    predicted = job.predicted.get((pair, timed.depth))
    return Speed(pair, timed.depth, timed.prefill_tps, timed.decode_tps, predicted)
