"""The wiring of settings."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from kvserve.daemon import policy_of
from kvserve.settings import Settings, load_settings
from kvserve.supervisor.launching import Policy
from kvserve.supervisor.preparing import Prepared
from tests.core.shapes import llama3_8b, machine
from tests.supervisor.stage import plan_for


def test_each_limit_of_the_supervisor_is_its_setting():
    limits = sorted({field.name for field in fields(Policy)} & set(Settings.model_fields))
    assert "pause_timeout" in limits
    numbers = {name: 11 + n for n, name in enumerate(limits) if name != "speculate"}
    settings = load_settings({**numbers, "speculate": "off"}, environ={})
    model = SimpleNamespace(path=Path("/m.gguf"), identity="identity", shape=llama3_8b())
    decider = SimpleNamespace()
    policy = policy_of(Prepared(settings, model, "m", machine(8), decider, plan_for(8192)))
    assert {name: getattr(policy, name) for name in limits} == numbers | {"speculate": "off"}
