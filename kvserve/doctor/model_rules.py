"""The model file, and what `start` would choose for it now."""

from collections.abc import Iterator

from kvserve.core.plan import Plan
from kvserve.doctor.facts import Facts
from kvserve.doctor.findings import Finding, note, ok, problem
from kvserve.errors import DoesNotFit, KvserveError
from kvserve.units import format_bytes


def model(facts: Facts) -> Iterator[Finding]:
    """Whether the file can be read, and brings its chat template."""
    asked = facts.model
    if asked is None:
        return
    if asked.error is not None:
        yield problem(
            "model",
            asked.error.message,
            "it cannot be served",
            "name a whole GGUF file with --model",
        )
        return
    if asked.has_chat_template:
        yield ok("model", f"{asked.path}: readable, with a chat template")
    else:
        yield note(
            "model",
            f"{asked.path}: readable, without a chat template",
            "chat requests get a plain one that the model was not trained with; /v1/completions "
            "needs none",
            "take an instruct or chat variant of the model for chats",
        )
    if asked.plan is not None and facts.library.error is None:
        yield from _plan(asked.plan)


def _plan(plan: Plan | KvserveError) -> Iterator[Finding]:
    if isinstance(plan, DoesNotFit):
        yield problem(
            "plan",
            plan.message,
            "`kvserve start` would end with this",
            "; or ".join(plan.options) or "free memory, or take a smaller model",
        )
    elif isinstance(plan, KvserveError):
        yield problem(
            "plan", plan.message, "`kvserve start` would end with this", "change that setting"
        )
    else:
        launch = plan.chosen.launch
        size = format_bytes(plan.chosen.memory.total_bytes)
        yield ok(
            "plan",
            f"KV cache {launch.pair} at {launch.n_ctx} tokens, {launch.n_gpu_layers} layers on "
            f"the GPU: {size}, {format_bytes(plan.chosen.headroom_bytes)} to spare",
        )
        yield from _oracle(plan)


def _oracle(plan: Plan) -> Iterator[Finding]:
    if not plan.confirmed:
        yield note(
            "oracle",
            "llama.cpp could not be asked to lay this plan out",
            "its size rests on formulas alone, a few percent off for unusual models",
            "nothing; more `reserve` makes it safer",
        )
        return
    error = plan.chosen.formula_error
    if plan.differences and error is not None:
        yield note(
            "oracle",
            f"computed sizes are {100 * error:+.1f} % off llama.cpp's own for this model",
            "its own are used, so the plan is right; without them it would not be",
            "report the model's architecture, with the output of `kvserve plan --json`",
        )
    else:
        yield ok("oracle", "llama.cpp laid the plan out, and agrees with the computed sizes")
