"""From a `Generate` message to a request that the engine can run: rendered, tokenized, checked.

Runs on a thread of its own, so that decoding never waits for a long prompt or a slow template.
"""

import json
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvserve.dialects.form import MARKERS, Form
from kvserve.dialects.watch import CallWatch
from kvserve.errors import InvalidRequest, KvserveError
from kvserve.ipc.messages import ChatPrompt, Failed, Generate, NeedsContext, TextPrompt, Tools
from kvserve.worker.calls import CallConstraints, functions_of
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.grammar import Constraining, GrammarCompiler
from kvserve.worker.llama import Vocab
from kvserve.worker.sampling import Sampler
from kvserve.worker.scoring import PromptEcho
from kvserve.worker.sequences import Generation, Limits, Tokens

_MARKERS = re.compile(f"({'|'.join(map(re.escape, MARKERS))})")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with its tokens. `late_text` is what its resumed tokens held back, where they
    already end the answer, `constrained_by` the request's field that the constraint comes from."""

    id: int
    generation: Generation
    sampler: Sampler
    late_text: str = ""
    salt: str = ""
    n_logprobs: int | None = None
    constraint: Constraining | None = None
    echo: PromptEcho | None = None
    form: Form | None = None
    constrained_by: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that ends before it began."""

    id: int
    answer: Failed | NeedsContext


class Preparer:
    """Prepares requests one after the other, in the order of `submit`.

    `wanted` tells whether a request is still to be answered; `deliver` gets the result of each
    one that is, on this class's thread.
    """

    def __init__(
        self,
        vocab: Vocab,
        renderer: ChatRenderer,
        n_ctx: int,
        n_ctx_train: int,
        *,
        wanted: Callable[[int], bool],
        deliver: Callable[[Prepared | Refused], None],
    ) -> None:
        self._vocab = vocab
        self._renderer = renderer
        self._n_ctx = n_ctx
        self._n_ctx_train = n_ctx_train
        self._wanted = wanted
        self._deliver = deliver
        self._grammars = GrammarCompiler(vocab.n_tokens, vocab.grammar_tokenizer)
        self._calls = CallConstraints(
            self._grammars,
            mark=self._grammar_mark,
            piece=vocab.piece,
            tokens_of=lambda text: vocab.tokenize(
                text, add_special=False, parse_special=False
            ).tolist(),
        )
        self._inbox: queue.SimpleQueue[Generate] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="prepare", daemon=True).start()

    def submit(self, request: Generate) -> None:
        """Queue a request; returns at once."""
        self._inbox.put(request)

    def prepare(self, request: Generate) -> Prepared | Refused:
        """Prepare one request. Never raises: whatever goes wrong ends this request alone."""
        try:
            return self._prepare(request)
        except KvserveError as error:
            answer = Failed(request.id, error.code, error.message, error.param)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            answer = Failed(
                request.id, "internal_error", "the worker could not prepare this request"
            )
        return Refused(request.id, answer)

    def _run(self) -> None:
        while True:
            request = self._inbox.get()
            if self._wanted(request.id):
                self._deliver(self.prepare(request))

    def _prepare(self, request: Generate) -> Prepared | Refused:
        prompt, form = self._tokens(request)
        self._check_ids(request.resume, "resume")
        self._check_ids(request.sampling.logit_bias, "logit_bias")
        # Without growth, what was generated already ends the answer where it fills the context.
        n_tokens = len(prompt) + (len(request.resume) if request.may_grow else 0)
        if n_tokens + 1 > self._n_ctx:
            return Refused(request.id, NeedsContext(request.id, n_tokens))
        end = max(self._n_ctx, self._n_ctx_train) if request.may_grow else self._n_ctx
        # What was delivered already is the answer's, also where it is longer than the room.
        room = max(end - len(prompt), len(request.resume))
        limits = Limits(
            max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
            min_tokens=request.min_tokens,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
        )
        vocab = self._vocab
        tools = _tools(request)
        watch = CallWatch(form, functions_of(tools)) if tools and form else None
        generation = Generation(prompt, limits, watch)
        late_text = generation.replay(request.resume, vocab.piece, vocab.ends)
        constraint = self._constraint(request, form)
        if constraint is not None and constraint.complete and generation.finish is None:
            late_text += generation.end()
        bans_ends = request.ignore_eos or request.min_tokens > 0
        sampler = Sampler(
            request.sampling,
            generation,
            forbidden=vocab.forbidden_tokens,
            end_tokens=vocab.end_tokens if bans_ends else np.empty(0, dtype=np.int64),
            piece=vocab.piece,
            constraint=constraint,
        )
        return Prepared(
            id=request.id,
            generation=generation,
            sampler=sampler,
            late_text=late_text,
            salt=request.cache_salt,
            n_logprobs=request.n_logprobs,
            constraint=constraint,
            form=form,
            constrained_by="response_format" if tools is None else "tools",
            echo=PromptEcho(request.id, prompt, request.n_logprobs, vocab.piece)
            if request.echo
            else None,
        )

    def _constraint(self, request: Generate, form: Form | None) -> Constraining | None:
        tools = _tools(request)
        if tools is not None and form is not None:
            return self._calls.make(tools, form, request.grammar, request.resume)
        if request.grammar is not None:
            return self._grammars.compile(request.grammar, request.resume)
        return None

    def _grammar_mark(self, text: str) -> str:
        """Special tokens by their numbers, what stands between them as text."""
        parts = [part for part in _MARKERS.split(text) if part]
        tokens = [self._vocab.special(part) for part in parts]
        return " ".join(
            json.dumps(part, ensure_ascii=False) if token is None else f"<[{token}]>"
            for part, token in zip(parts, tokens, strict=True)
        )

    def _tokens(self, request: Generate) -> tuple[Tokens, Form | None]:
        prompt, form = request.prompt, None
        if isinstance(prompt, ChatPrompt):
            text = self._renderer.render(prompt)
            form = self._renderer.form(prompt, text)
            if form is not None and request.grammar is not None and prompt.tools is None:
                # The grammar holds from the first token on: there is no room for reasoning.
                form = replace(form, thinking=False)
            # Templates write BOS themselves or leave it to the tokenizer; twice confuses a model.
            bos = self._vocab.bos_text
            add_special = not (bos and text.startswith(bos))
            tokens = self._vocab.tokenize(text, add_special=add_special, parse_special=True)
        elif isinstance(prompt, TextPrompt):
            tokens = self._vocab.tokenize(prompt.text, add_special=True, parse_special=False)
        else:
            self._check_ids(prompt.tokens, "prompt")
            tokens = np.array(prompt.tokens, dtype=np.int32)
        if len(tokens) == 0 and self._vocab.adds_bos:
            tokens = np.array([self._vocab.bos], dtype=np.int32)
        if len(tokens) == 0:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return tokens, form

    def _check_ids(self, ids: tuple[int, ...] | dict[int, float], param: str) -> None:
        n_vocab = self._vocab.n_tokens
        if ids and not (min(ids) >= 0 and max(ids) < n_vocab):
            raise InvalidRequest(
                f"{param} holds a token id outside 0 to {n_vocab - 1}", param=param
            )


def _tools(request: Generate) -> Tools | None:
    return request.prompt.tools if isinstance(request.prompt, ChatPrompt) else None
