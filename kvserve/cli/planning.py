"""`kvserve plan`: the decision, without starting anything."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from kvserve.api.plan_documents import plan_document
from kvserve.cli.models import open_draft, open_model
from kvserve.cli.tables import plan_text
from kvserve.core.dtypes import LADDER
from kvserve.core.machine import Build, Gpu, Machine
from kvserve.core.plan import Plan
from kvserve.core.selector import select
from kvserve.device.host import read_host
from kvserve.gguf.model import ModelFile
from kvserve.settings import Settings, environment_warnings, load_settings
from kvserve.supervisor.preparing import prepare, with_draft
from kvserve.supervisor.profiles import NOTHING_KNOWN


def show_plan(
    flags: Mapping[str, object], config: Path | None, *, as_json: bool, confirm: bool = False
) -> None:
    """Print what `start` would choose here, or on a GPU with `--vram-free` bytes free. With
    `confirm` llama.cpp lays the candidates out first, as `start` has it do."""
    settings = load_settings(flags, config=config)
    for warning in environment_warnings(os.environ):
        print(f"note     {warning}", file=sys.stderr)
    model, draft = open_model(settings), open_draft(settings)
    known = NOTHING_KNOWN
    if settings.vram_free is not None:
        plan = _plan_elsewhere(settings, model.file, draft, settings.vram_free)
    else:
        prepared = prepare(settings, model.file, model.id, draft=draft, confirm=confirm)
        plan, known = prepared.plan, prepared.known
    print(json.dumps(plan_document(plan), indent=2) if as_json else plan_text(plan, known))


def _plan_elsewhere(
    settings: Settings, model: ModelFile, draft: ModelFile | None, free_bytes: int
) -> Plan:
    """For a machine that is like this one but for its GPU: one card with so much free, and a
    build that has kernels for every pair of the ladder, as the image has."""
    gpu = Gpu(index=0, uuid="", name="GPU", total_bytes=free_bytes, free_bytes=free_bytes)
    build = Build(version="", cuda=True, kv_pairs=frozenset(LADDER))
    machine = Machine(host=read_host(), gpus=(gpu,), build=build)
    request = with_draft(settings.to_request(machine), draft, model)
    return select(model.shape, machine, request)
