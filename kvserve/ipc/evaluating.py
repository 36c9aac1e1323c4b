"""What the evaluating process (`python -m kvserve.worker.evaluate`) reads and writes, as JSON.

One `EvalRequest` on stdin; on stdout one line for each answer, as soon as it is known, so that
whatever was measured before an interruption stands.
"""

import os

import msgspec

from kvserve.ipc.messages import Load

REFERENCE = "f16:f16"
"""The pair that all others are compared with. As a candidate it is the control: the same types,
computed in micro-batches of half the size, so that it shows what rounding alone does."""


BAD_INPUT_STATUS = os.EX_DATAERR
"""The process's exit status where what was asked cannot be measured, whatever the machine."""
N_WARM_UP = 2
"""Decode steps before those that are timed."""
N_OUTPUTS = 128
"""Tokens of a batch that is scored: the logits of one are 1 MiB with a vocabulary of 262,144."""
MOST_STATE_BYTES = 2**30
"""A larger sequence is not carried: its copy would take as much memory again."""


class Reading(msgspec.Struct, frozen=True):
    """How a text is scored.

    Each of the `n_chunks` pieces of text fills a context of each of the `depths`: a prefix that is
    only read, `n_prefill` tokens that are read in batches and scored, and `n_decode` tokens that
    are decoded one by one and scored. Pieces begin at places drawn from `seed`, or follow each
    other from the start of the text where `in_order`. With `carried` the last part is also scored
    on a cache that was transcoded from the reference's.
    """

    text: str
    depths: tuple[int, ...]
    n_chunks: int
    n_prefill: int
    n_decode: int
    seed: int
    carried: bool = True
    in_order: bool = False


class Prompted(msgspec.Struct, frozen=True):
    """One task item: what to complete greedily, and where to stop."""

    task: str
    index: int
    prompt: str
    stop: str
    max_tokens: int
    chat: bool = False


class Pacing(msgspec.Struct, frozen=True):
    """Which depths speed is measured at, and over how many tokens. `deepest` limits some pairs to
    depths that fit, -1 for none of them."""

    depths: tuple[int, ...]
    n_prefill: int
    n_decode: int
    deepest: dict[str, int] = {}

    @property
    def n_ctx(self) -> int:
        """Cells that the deepest of all takes."""
        return max(self.depths) + self.n_beside

    @property
    def n_beside(self) -> int:
        """Cells that a measurement takes beside those of its depth."""
        return self.n_prefill + self.n_decode + N_WARM_UP


class EvalRequest(msgspec.Struct, frozen=True):
    """What to measure on one model. `load` is the reference; its context size is set as needed.

    `done` are the units of answers that are known already.
    """

    load: Load
    pairs: tuple[str, ...]
    reading: Reading | None = None
    prompts: tuple[Prompted, ...] = ()
    pacing: Pacing | None = None
    done: tuple[str, ...] = ()


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The model is loaded. `costs` are all units that will be answered, in order, with the tokens
    that each takes; an answer of a unit means that those before it are over."""

    n_vocab: int
    n_ctx_train: int
    costs: dict[str, int]


class Scored(msgspec.Struct, frozen=True, tag="scored"):
    """One pair on one piece of text, in one mode: `prefill`, `decode` or `carried`.

    For each position: KLD in nats against the reference, whether the likeliest token is the same,
    and the log probabilities (natural) of the text's own next token.
    """

    unit: str
    pair: str
    mode: str
    depth: int
    klds: tuple[float, ...]
    same_top: tuple[bool, ...]
    reference: tuple[float, ...]
    candidate: tuple[float, ...]


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """What a pair completed a prompt with, up to the stop."""

    unit: str
    pair: str
    task: str
    index: int
    text: str


class Timed(msgspec.Struct, frozen=True, tag="timed"):
    """A pair's speed in tokens/s at a depth."""

    unit: str
    pair: str
    depth: int
    prefill_tps: float
    decode_tps: float


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """A unit is over; all its answers came before."""

    unit: str


class Skipped(msgspec.Struct, frozen=True, tag="skipped"):
    """A unit, or the part of it that `what` names, could not be measured."""

    unit: str
    what: str
    reason: str


EvalAnswer = Opened | Scored | Answered | Timed | Finished | Skipped
