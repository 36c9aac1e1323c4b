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
    was drawn since the last delta, `n_read` of the tokens are in the text. `goes_on` tells whether
    another token is wanted."""

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
    n_read: int = 0
    goes_on: bool = True

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
        """Add a drawn token, and tell whether there is to be another; on any thread.

        Its text is only looked at where the end may hang on that: `read` does the rest.
        """
        if self.broken:
            self.goes_on = False
            return False
        generation = self.generation
        generation.take(token)
        self.tokens.append(token)
        if self.constraint is None and not generation.limits.stop:
            self.goes_on = not generation.surely_ends(ends=vocab.ends(token))
        else:
            self.read(vocab)
            self.goes_on = generation.finish is None and not self.broken
        return self.goes_on

    def read(self, vocab: Vocab) -> None:
        """Add the text of the tokens that were accepted."""
        generation = self.generation
        first = generation.n_tokens - len(self.tokens)
        for index in range(self.n_read, len(self.tokens)):
            token = self.tokens[index]
            self.text += generation.read(first + index, vocab.piece(token), ends=vocab.ends(token))
        self.n_read = len(self.tokens)
        if generation.finish is None and self.constraint is not None and self.constraint.complete:
            self.text += generation.end()

    def ask(self, n_ctx: int) -> Ask:
        """What a proposer is told: after the next token there may be so many more."""
        generation = self.generation
        n_left = generation.limits.max_tokens - generation.n_generated
        n_most = min(n_left, n_ctx - generation.n_tokens) - 1
        return Ask(self.id, generation.buffer, generation.n_tokens, n_most)

    def take_delta(self) -> Delta:
        """What is new, to be sent."""
        delta = Delta(self.id, self.text, tuple(self.tokens))
        self.text, self.tokens, self.n_read = "", [], 0
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
