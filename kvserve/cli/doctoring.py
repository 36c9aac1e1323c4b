"""`kvserve doctor`: what stands between this machine and a served model, and what to do."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import typer

from kvserve.cli.models import open_draft, open_model
from kvserve.core.plan import Plan
from kvserve.doctor.diagnosis import diagnose
from kvserve.doctor.examination import examine
from kvserve.doctor.facts import Model
from kvserve.doctor.findings import Finding, Level
from kvserve.doctor.kernel_probe import probe_kernels
from kvserve.errors import KvserveError, UsageError
from kvserve.settings import Settings, load_settings
from kvserve.supervisor.preparing import prepare

_INDENT = " " * 9


def doctor(flags: Mapping[str, object], config: Path | None, *, probe: bool, as_json: bool) -> None:
    """Examine and print; with `probe` time the KV pairs too. Exits with status 1 where there is a
    problem. Raises UsageError where there is no model to probe with."""
    settings = load_settings(flags, config=config)
    if probe and settings.model is None:
        raise UsageError("--probe-kernels needs a model: add --model FILE.gguf", param="model")
    facts = examine(settings, _model(settings), os.environ)
    if probe and facts.model is not None and isinstance(facts.model.plan, Plan):
        launch = facts.model.plan.chosen.launch
        path = str(open_model(settings).file.path)
        facts = replace(facts, kernels=probe_kernels(path, launch, settings.n_threads(facts.host)))
    findings = diagnose(facts)
    n_problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if as_json:
        document = {"problems": n_problems, "findings": [asdict(f) for f in findings]}
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(line for finding in findings for line in _lines(finding)))
    if n_problems:
        raise typer.Exit(1)


def _lines(finding: Finding) -> list[str]:
    lines = [f"{finding.level:<9}{finding.check}: {finding.what}"]
    if finding.why is not None:
        lines.append(f"{_INDENT}why: {finding.why}")
    if finding.remedy is not None:
        lines.append(f"{_INDENT}do:  {finding.remedy}")
    return lines


def _model(settings: Settings) -> Model | None:
    """The model, where one is named, and the plan for it."""
    if settings.model is None:
        return None
    try:
        model = open_model(settings)
    except KvserveError as error:
        return Model(settings.model, error=error)
    try:
        plan: Plan | KvserveError = prepare(
            settings, model.file, model.id, draft=open_draft(settings), confirm=True
        ).plan
    except KvserveError as error:
        plan = error
    return Model(settings.model, has_chat_template=model.file.shape.has_chat_template, plan=plan)
