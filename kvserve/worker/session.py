"""A worker's life from its start to the engine's loop."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from kvserve.core.dtypes import KvType
from kvserve.dialects.form import MARKERS
from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import (
    Awake,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    Progress,
    Transcode,
    Transcoded,
)
from kvserve.worker import llama
from kvserve.worker.arriving import Incoming, incoming_for
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.compiled import MISSING
from kvserve.worker.engine import Engine, Inbox
from kvserve.worker.load_log import LoadLog
from kvserve.worker.openmp import BriefWaits
from kvserve.worker.speculation.drafting import DraftProposer
from kvserve.worker.speculation.either import EitherProposer
from kvserve.worker.speculation.lookup import LookupProposer
from kvserve.worker.speculation.proposal import Proposer
from kvserve.worker.speculation.speculator import Speculator
from kvserve.worker.step_rows import whole_rows
from kvserve.worker.templates import ChatTemplate, choose

_PROGRESS_FRAMES = 20
_DRAFT_BATCH = 512
_ALL_LAYERS = 999


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    context: llama.Context
    renderer: ChatRenderer
    template: ChatTemplate


MakeSpeculator = Callable[..., Speculator]


def serve(
    channel: WorkerChannel, inbox: Inbox, make_speculator: MakeSpeculator = Speculator
) -> int:
    """Wait for the load, greet, load, serve. Returns only where the model could not be loaded,
    with the exit status; otherwise the reader thread ends the process."""
    channel.send(Awake())
    load, incoming = _wait_for_load(inbox, channel)
    log = LoadLog()
    # Not before the load: from here on a GPU has a context of this process.
    llama.start_backend(log)
    if MISSING is not None:
        print(f"drawing tokens with NumPy: {MISSING}", file=sys.stderr, flush=True)
    channel.send(Hello(os.getpid(), "llama.cpp", llama.VERSION, llama.system_info()))
    waits = None if load.n_gpu_layers else BriefWaits()
    if waits is not None:
        waits.begin()
    begun = time.monotonic()
    try:
        model = _load(load, log, channel)
        speculator, speculation = _speculation(load, model.context, log, make_speculator)
    except llama.LoadError as error:
        channel.send(LoadFailed(error.message, error.out_of_memory))
        return 1
    context = model.context
    engine = Engine(
        context,
        channel,
        model.renderer,
        inbox,
        load.n_seq_max,
        load.cache_ram_bytes,
        speculator,
        load.n_draft,
        waits,
    )
    carried = engine.take_in(incoming, load.carried) if incoming is not None else None
    channel.send(
        Loaded(
            n_ctx=context.n_ctx,
            n_ctx_train=context.n_ctx_train,
            n_vocab=context.vocab.n_tokens,
            memory=log.memory(),
            template=model.template.name,
            load_seconds=time.monotonic() - begun,
            flash_attn=load.flash_attn,
            carried=carried,
            speculation=speculation,
        )
    )
    engine.run()
    return 0


def _speculation(
    load: Load, context: llama.Context, log: LoadLog, make: MakeSpeculator
) -> tuple[Speculator | None, str]:
    """What proposes tokens, and its name, or why there is nothing. Raises LoadError."""
    if load.speculate == "off":
        return None, "off"
    if (reason := context.cannot_take_back) is not None:
        return None, f"off: {reason}"
    if not load.n_draft:
        return None, "off: the plan has no room for it"
    proposer: Proposer = LookupProposer()
    if load.speculate == "draft":
        proposer = EitherProposer(proposer, _draft_proposer(load, context, log))
    whole = int if context.model.wholly_on_gpu else whole_rows
    return make(proposer, load.n_draft_each, load.n_draft, whole=whole), load.speculate


def _draft_proposer(load: Load, context: llama.Context, log: LoadLog) -> DraftProposer:
    if load.draft_path is None:
        raise llama.LoadError("there is no draft model to speculate with")
    n_batch = min(load.n_batch, _DRAFT_BATCH)
    small = structs.replace(
        load,
        model_path=load.draft_path,
        type_k=KvType.F16,
        type_v=KvType.F16,
        n_batch=n_batch,
        n_ubatch=n_batch,
        n_gpu_layers=_ALL_LAYERS if load.n_gpu_layers else 0,
        n_cpu_moe=0,
        n_draft=0,
    )
    log.forget_errors()
    try:
        draft = llama.Context(small, log, lambda _share: None)
    except llama.LoadError as error:
        message = f"draft model: {error.message}"
        raise llama.LoadError(message, out_of_memory=error.out_of_memory) from error
    difference = context.vocab.difference(draft.vocab) or draft.cannot_take_back
    if difference is not None:
        raise llama.LoadError(f"the draft model does not suit the model: {difference}")
    return DraftProposer(draft, context.vocab.n_tokens)


def _wait_for_load(inbox: Inbox, channel: WorkerChannel) -> tuple[Load, Incoming | None]:
    incoming: Incoming | None = None
    while True:
        message = inbox.get()
        if isinstance(message, Transcode):
            incoming = _incoming(message, incoming)
            incoming.begin(message.carried, ahead=message.ahead)
            incoming.then(lambda: channel.send(Transcoded()))
        elif isinstance(message, Load):
            if not message.carried:
                if incoming is not None:
                    incoming.abandon()
                return message, None
            again = Transcode(message.carried, message.type_k, message.type_v)
            incoming = _incoming(again, incoming)
            incoming.begin(message.carried)
            return message, incoming
        else:
            print(f"unexpected before Load: {message!r}", file=sys.stderr, flush=True)


def _incoming(message: Transcode, begun: Incoming | None) -> Incoming:
    """What has begun already, where that is for the same types."""
    fresh = incoming_for(message)
    if begun is None:
        return fresh
    if begun.pair == fresh.pair:
        return begun
    begun.abandon()
    return fresh


def _load(load: Load, log: LoadLog, channel: WorkerChannel) -> _LoadedModel:
    n_sent = 0

    def on_progress(fraction: float) -> None:
        nonlocal n_sent
        if int(fraction * _PROGRESS_FRAMES) > n_sent:
            n_sent = int(fraction * _PROGRESS_FRAMES)
            channel.send(Progress(fraction))

    context = llama.Context(load, log, on_progress)
    log.close_load()
    vocab = context.vocab
    vocab.show(MARKERS)
    template = choose(context.model.architecture, context.model.chat_template, vocab.has)
    renderer = ChatRenderer(template, bos_text=vocab.bos_text, eos_text=vocab.eos_text)
    renderer.start()
    return _LoadedModel(context, renderer, template)
