"""The mask of the next token is computed elsewhere, while the model decodes."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from llguidance import LLTokenizer

from kvserve.ipc.messages import Grammar
from kvserve.worker.grammar import Constraint, GrammarCompiler

_WAIT_S = 20.0


class Gate(ThreadPoolExecutor):
    """Runs jobs on threads of its own, each once it is let through."""

    def __init__(self) -> None:
        super().__init__(1)
        self.opened = threading.Semaphore(0)
        self.threads: list[int] = []

    def submit(self, job, /, *arguments, **named) -> Future:
        def wait_and_run():
            assert self.opened.acquire(timeout=_WAIT_S)
            self.threads.append(threading.get_ident())
            return job(*arguments, **named)

        return super().submit(wait_and_run)


@pytest.fixture
def gate():
    with Gate() as made:
        yield made


def constraint(gate: Gate, pattern: str) -> Constraint:
    tokenizer = LLTokenizer("byte")
    compiler = GrammarCompiler(tokenizer.vocab_size, lambda: tokenizer)
    compiler._executor = gate
    return compiler.compile(Grammar("regex", pattern))


def allowed(one: Constraint) -> set[str]:
    row = np.zeros(one._n_vocab, dtype=np.float32)
    one.apply(row)
    return {chr(token) for token in np.flatnonzero(row == 0) if token < 256}


def test_a_token_is_accepted_without_a_wait_for_its_mask(gate: Gate) -> None:
    one = constraint(gate, "a[bc]d")
    gate.opened.release()
    assert allowed(one) == {"a"}
    one.accept(ord("a"))
    # The gate is closed: nobody has computed the next mask, and nobody waited for it.
    assert not one.complete
    assert len(gate.threads) == 1
    gate.opened.release()
    assert allowed(one) == {"b", "c"}
    assert threading.get_ident() not in gate.threads


def test_the_end_needs_no_mask(gate: Gate) -> None:
    one = constraint(gate, "ab")
    for char in "ab":
        gate.opened.release()
        assert allowed(one) == {char}
        one.accept(ord(char))
    assert one.complete
    assert len(gate.threads) == 2
