"""The life of the daemon is the table, all of it and nothing else."""

import itertools

import pytest

from kvserve.core.lifecycle import TRANSITIONS, Event, IllegalTransition, Phase, advance, diagram


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_listed_pairs_advance_and_all_others_raise(phase: Phase, event: Event) -> None:
    if (phase, event) in TRANSITIONS:
        assert advance(phase, event) is TRANSITIONS[phase, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} cannot happen while {phase}"):
            advance(phase, event)


def test_every_phase_can_be_reached_and_left_for_the_end() -> None:
    def reachable(start: Phase) -> set[Phase]:
        seen, todo = {start}, [start]
        while todo:
            here = todo.pop()
            for (phase, _), following in TRANSITIONS.items():
                if phase is here and following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    assert reachable(Phase.IDLE) == set(Phase)
    assert all(Phase.STOPPED in reachable(phase) for phase in Phase)


def test_the_diagram_shows_every_transition() -> None:
    drawn = diagram()
    assert drawn.count(" --> ") == len(TRANSITIONS) + 2
