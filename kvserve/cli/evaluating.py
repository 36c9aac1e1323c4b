"""`kvserve eval`: what each K-V pair costs this model on this machine."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from kvserve.cli.failing import writable
from kvserve.cli.models import NamedModel, open_model
from kvserve.core.eval_room import Need
from kvserve.core.loss import REFERENCE_PAIR, Quality
from kvserve.core.machine import Backend
from kvserve.core.memory import kv_bytes
from kvserve.core.plan import Launch
from kvserve.errors import UsageError
from kvserve.eval.corpus import BUNDLED, read_corpus
from kvserve.eval.report import report
from kvserve.eval.scope import Scope, narrowed, preset, shortened
from kvserve.eval.session import Job, Outcome, run
from kvserve.eval.tables import quality_text
from kvserve.eval.target import Placed, Target, read_target
from kvserve.eval.tasks.suite import make_items, prompts
from kvserve.ipc.evaluating import (
    MOST_STATE_BYTES,
    N_OUTPUTS,
    EvalRequest,
    Prompted,
    Reading,
)
from kvserve.settings import load_settings
from kvserve.supervisor.profiles import Profiles

INTERRUPTED = 130
"""The exit status that shells give to a program ended by Ctrl-C."""
FORMS = ("auto", "completion", "chat")
"""How tasks are put: `auto` takes the chat template of a model that has one."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What is measured; the rest comes from the settings."""

    quick: bool
    full: bool
    pairs: str | None
    ctx: str | None
    chunks: int | None
    tasks: str | None
    form: str
    corpus: Path | None
    seed: int
    html: Path | None
    as_json: bool


def evaluate(flags: Mapping[str, object], config: Path | None, options: EvalOptions) -> None:
    """Measure, store the profile, print the tables. What was measured so far is printed after an
    interrupt, and the same command goes on from there."""
    settings = load_settings(flags, config=config)
    model = open_model(settings)
    scope = narrowed(
        preset(quick=options.quick, full=options.full),
        n_ctx_train=model.file.shape.n_ctx_train,
        pairs=options.pairs,
        ctx=options.ctx,
        chunks=options.chunks,
        tasks=options.tasks,
    )
    if not scope.depths and not scope.tasks:
        raise UsageError("--ctx none and no tasks: nothing to measure; name --tasks", param="ctx")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed}: write 0 or more", param="seed")
    if options.html is not None:
        writable(options.html, "html")
    target = read_target(settings, model.file)
    if options.ctx is None:
        scope = _within_room(target, scope)
    if options.form not in FORMS:
        raise UsageError(f"--form {options.form}: one of {', '.join(FORMS)}", param="form")
    text = read_corpus(options.corpus)
    reading = Reading(
        text=text,
        depths=scope.depths,
        n_chunks=scope.n_chunks,
        n_prefill=scope.n_prefill,
        n_decode=scope.n_decode,
        seed=options.seed,
        carried=scope.carried,
    )
    has_template = model.file.shape.has_chat_template
    chat = options.form == "chat" or (options.form == "auto" and has_template)
    items = make_items(scope.tasks, scope.n_items, scope.n_lines, options.seed)
    asked = prompts(items, chat=chat)
    placed = _place(target, scope, asked)
    job = Job(
        request=EvalRequest(
            load=placed.load,
            pairs=tuple(str(pair) for pair in scope.pairs),
            reading=reading if scope.depths else None,
            prompts=asked,
        ),
        environment=placed.environment,
        key=placed.key,
        model_id=model.id,
        settings=_about(scope, options, text, chat=chat),
        items=items,
    )
    outcome = run(job, Profiles(), sys.stderr)
    if options.html is not None:
        _write_report(options.html, model, job, outcome)
    print_outcome(outcome, options.as_json)


def _within_room(target: Target, scope: Scope) -> Scope:
    """The preset's depths, as far as there is memory for them; the user is told."""
    if not scope.depths:
        return scope
    longest = target.longest(_text_need(target, scope))
    fitting = shortened(scope, longest)
    if fitting.depths != scope.depths:
        asked, given = (",".join(map(str, s.depths)) for s in (scope, fitting))
        print(
            f"note     memory has room for {longest} tokens beside an f16 reference: measured at "
            f"{given}, not at {asked}",
            file=sys.stderr,
        )
    return fitting


def _place(target: Target, scope: Scope, asked: tuple[Prompted, ...]) -> Placed:
    """Where the weights go, with room for all that is measured. Raises DoesNotFit, UsageError."""
    n_task = max((_at_most(prompt) for prompt in asked), default=0)
    n_ctx = min(n_task, target.model.shape.n_ctx_train)
    tasks = Need(n_ctx, 1, N_OUTPUTS, flag="--quick, or --tasks within")
    if not scope.depths:
        return target.place(tasks)
    placed = target.place(_text_need(target, scope))
    # One context of twice the size is as good as two.
    return target.place(tasks) if n_task > 2 * max(scope.depths) else placed


def _at_most(prompt: Prompted) -> int:
    """A prompt's tokens, generously: text has three bytes a token or more."""
    return len(prompt.prompt.encode()) // 2 + prompt.max_tokens


def _text_need(target: Target, scope: Scope) -> Need:
    n_ctx = max(scope.depths)
    launch = Launch(Backend.CPU, REFERENCE_PAIR, n_ctx, 1, 512, 512, 0)
    state = sum(kv_bytes(layer, launch) for layer in target.model.shape.layers)
    # A cache that is carried is held twice, as f16 and transcoded.
    copies = 2 * state if scope.carried and state <= MOST_STATE_BYTES else 0
    n_rows = scope.n_prefill + scope.n_decode
    return Need(n_ctx, 2, N_OUTPUTS, n_rows, copies)


def _write_report(path: Path, model: NamedModel, job: Job, outcome: Outcome) -> None:
    """All that is known of the model, this run's figures included."""
    known = Profiles().read(job.model_id, job.key).quality
    quality = known.joined(outcome.quality)
    n_ctx = max((row.depth for row in quality.losses), default=256)
    shape = model.file.shape
    kv = {}
    for pair in {row.pair for row in quality.losses}:
        launch = Launch(Backend.CPU, pair, n_ctx, 1, 512, 512, 0)
        kv[pair] = sum(kv_bytes(layer, launch) for layer in shape.layers)
    about = {
        "model": f"{shape.name or job.model_id} {shape.quantization or ''}".strip(),
        "device": job.key.device,
        "llama-cpp-python": job.key.build.partition(" ")[0],
        **job.settings,
    }
    try:
        path.expanduser().write_text(report(quality, about, kv, n_ctx), "utf-8")
    except OSError as error:
        raise UsageError(f"--html {path}: {error.strerror}", param="html") from error


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """The tables, or JSON; then where they are kept. Exits with 130 after an interrupt."""
    if as_json:
        print(json.dumps(quality_document(outcome.quality), indent=1))
    else:
        print(quality_text(outcome.quality) or "nothing was measured")
    for skipped in outcome.skipped:
        print(f"skipped  {skipped.unit}, {skipped.what}: {skipped.reason}", file=sys.stderr)
    if outcome.path is None:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    print(f"profile  {outcome.path}", file=sys.stderr)


def quality_document(quality: Quality) -> dict[str, object]:
    """Measurements as plain JSON values, pairs written as `q8_0:q4_0`."""

    def rows(found: tuple[object, ...]) -> list[dict[str, object]]:
        return [{**asdict(row), "pair": str(row.pair)} for row in found]  # type: ignore[call-overload, attr-defined]

    return {
        "losses": rows(quality.losses),
        "tasks": rows(quality.tasks),
        "speeds": rows(quality.speeds),
    }


def _about(scope: Scope, options: EvalOptions, text: str, *, chat: bool) -> dict[str, str]:
    return {
        "corpus": options.corpus.name if options.corpus else BUNDLED,
        "corpus_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": str(options.seed),
        "ctx": ",".join(map(str, scope.depths)),
        "positions": f"{scope.n_chunks} x ({scope.n_prefill} batched + {scope.n_decode} decoded)",
        "tasks": f"{scope.n_items} items each, as {'chat' if chat else 'completion'}",
    }
