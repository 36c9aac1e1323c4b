"""An evaluation from the load to the last answer: text first, then tasks, then speed."""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Context, start_backend  # isort: skip

from collections.abc import Callable

import msgspec

from kvserve.ipc.evaluating import EvalAnswer, EvalRequest, Opened
from kvserve.worker.answering import Answering
from kvserve.worker.contexts import Weights
from kvserve.worker.load_log import LoadLog
from kvserve.worker.pacing import Timing
from kvserve.worker.reading import TextScores

Emit = Callable[[EvalAnswer], None]


def evaluate(request: EvalRequest, emit: Emit) -> None:
    """Load the model and answer all units that are not done. Raises LoadError, DecodeError,
    CacheFull, and UsageError for a text that is too short."""
    log = LoadLog()
    start_backend(log)
    small = msgspec.structs.replace(request.load, n_ctx=256, n_seq_max=1)
    context = Context(small, log, lambda _fraction: None)
    weights = Weights(context, request.load)
    parts: list[TextScores | Answering | Timing] = []
    if request.reading is not None:
        parts.append(TextScores(weights, request.reading, request.pairs))
    if request.prompts:
        parts.append(Answering(weights, request.prompts, request.pairs))
    if request.pacing is not None:
        parts.append(Timing(weights, request.pacing, request.pairs))
    done = frozenset(request.done)
    costs = {unit: cost for part in parts for unit, cost in part.costs.items() if unit not in done}
    emit(Opened(weights.vocab.n_tokens, weights.n_ctx_train, costs))
    for part in parts:
        part.run(done, emit)
