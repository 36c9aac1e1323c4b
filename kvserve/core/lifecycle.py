"""The daemon's life as one table: which event leads from which phase to which.

`supervisor/situation` is the only user; the diagram in docs/architecture.md is drawn from
this table by `diagram`. An unlisted pair raises.
"""

from enum import StrEnum


class Phase(StrEnum):
    """Where the daemon stands. Requests are answered in SERVING, OVERLAPPING and DRAINING, and
    queue elsewhere. In OVERLAPPING and HANDOVER two workers live."""

    IDLE = "idle"
    LOADING = "loading"
    SERVING = "serving"
    OVERLAPPING = "overlapping"
    DRAINING = "draining"
    HANDOVER = "handover"
    LEAVING = "leaving"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Event(StrEnum):
    """What moves the daemon from one phase to another."""

    SPAWN = "spawn"
    LOADED = "loaded"
    LOST = "lost"
    OVERLAP = "overlap"
    RELOAD = "reload"
    DRAINED = "drained"
    HAND_OVER = "hand_over"
    GIVE_UP = "give_up"
    RETRY = "retry"
    STOP = "stop"


TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.IDLE, Event.SPAWN): Phase.LOADING,
    (Phase.IDLE, Event.GIVE_UP): Phase.FAILED,
    (Phase.IDLE, Event.STOP): Phase.STOPPED,
    (Phase.LOADING, Event.LOADED): Phase.SERVING,
    (Phase.LOADING, Event.LOST): Phase.IDLE,
    (Phase.LOADING, Event.STOP): Phase.STOPPING,
    (Phase.SERVING, Event.OVERLAP): Phase.OVERLAPPING,
    (Phase.SERVING, Event.RELOAD): Phase.DRAINING,
    (Phase.SERVING, Event.LOST): Phase.IDLE,
    (Phase.SERVING, Event.STOP): Phase.STOPPING,
    (Phase.OVERLAPPING, Event.RELOAD): Phase.DRAINING,
    (Phase.OVERLAPPING, Event.LOST): Phase.IDLE,
    (Phase.OVERLAPPING, Event.STOP): Phase.STOPPING,
    (Phase.DRAINING, Event.HAND_OVER): Phase.HANDOVER,
    (Phase.DRAINING, Event.DRAINED): Phase.LEAVING,
    (Phase.DRAINING, Event.LOST): Phase.IDLE,
    (Phase.DRAINING, Event.STOP): Phase.STOPPING,
    (Phase.HANDOVER, Event.LOADED): Phase.SERVING,
    (Phase.HANDOVER, Event.LOST): Phase.IDLE,
    (Phase.HANDOVER, Event.STOP): Phase.STOPPING,
    (Phase.LEAVING, Event.LOST): Phase.IDLE,
    (Phase.LEAVING, Event.STOP): Phase.STOPPING,
    (Phase.FAILED, Event.RETRY): Phase.IDLE,
    (Phase.FAILED, Event.STOP): Phase.STOPPED,
    (Phase.STOPPING, Event.LOST): Phase.STOPPED,
}


class IllegalTransition(Exception):
    """An event that the table does not list for this phase: a bug in the caller."""


def advance(phase: Phase, event: Event) -> Phase:
    """The phase that follows. Raises IllegalTransition for an unlisted pair."""
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        raise IllegalTransition(f"{event} cannot happen while {phase}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.IDLE}"]
    lines += [f"    {a} --> {b}: {event}" for (a, event), b in TRANSITIONS.items()]
    lines.append(f"    {Phase.STOPPED} --> [*]")
    return "\n".join(lines)
