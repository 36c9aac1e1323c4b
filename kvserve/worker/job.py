"""A request that the engine runs: its tokens and text, and what a step has added to them."""

from dataclasses import dataclass, field

from kvserve.dialects.form import Form
from kvserve.ipc.messages import Delta, End
from kvserve.worker.grammar import Constraining
from kvserve.worker.llama import Vocab
from kvserve.worker.prepare import Prepared
from kvserve.worker.sampling import Sampler
from kvserve.worker.scoring import PromptEcho
from kvserve.worker.sequences import Generation
from kvserve.worker.speculation.proposal import Ask


@dataclass(slots=True)
class Job:
    """`constrained_by` names the field that asks for its constraint; `text` and `tokens` are what
    was drawn since the last delta."""

    id: int
    generation: Generation
    sampler: Sampler
    n_logprobs: int | None = None
    constraint: Constraining | None = None
    echo: PromptEcho | None = None
    form: Form | None = None
    constrained_by: str = ""
    started: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)

    @staticmethod
    def of(prepared: Prepared) -> "Job":
        """The job of a request that was prepared."""
        return Job(
            prepared.id,
            prepared.generation,
            prepared.sampler,
            prepared.n_logprobs,
            prepared.constraint,
            prepared.echo,
            prepared.form,
            prepared.constrained_by,
        )

    @property
    def broken(self) -> bool:
        """Whether its grammar cannot be followed any further."""
        return self.constraint is not None and self.constraint.error is not None

    def accept(self, vocab: Vocab, token: int) -> bool:
        """Add a drawn token, and tell whether there is to be another; on any thread."""
        if self.broken:
            return False
        generation = self.generation
        text = generation.accept(token, vocab.piece(token), ends=vocab.ends(token))
        if generation.finish is None and self.constraint is not None and self.constraint.complete:
            text += generation.end()
        self.text += text
        self.tokens.append(token)
        return generation.finish is None

    def ask(self, n_ctx: int) -> Ask:
        """What a proposer is told: after the next token there may be so many more."""
        generation = self.generation
        n_left = generation.limits.max_tokens - generation.n_generated
        n_most = min(n_left, n_ctx - generation.n_tokens) - 1
        return Ask(self.id, generation.buffer, generation.n_tokens, n_most)

    def take_delta(self) -> Delta:
        """What is new, to be sent."""
        delta = Delta(self.id, self.text, tuple(self.tokens))
        self.text, self.tokens = "", []
        return delta

    def end(self, n_cached: int) -> End:
        """The end of a finished request, `n_cached` of whose tokens were in the cache."""
        generation = self.generation
        assert generation.finish is not None
        return End(
            self.id,
            generation.finish.reason,
            generation.n_prompt,
            generation.n_generated,
            min(n_cached, generation.n_prompt),
            stop_text=generation.finish.stop_text,
        )
