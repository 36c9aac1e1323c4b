"""Many choices of one request share what its tools say."""

import json

from kvserve.api.wire import ChatFormat
from kvserve.dialects.form import Form
from kvserve.ipc.messages import ChatMessage, ChatPrompt, Tools


def test_tools_are_read_once_for_all_choices(monkeypatch) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    prompt = ChatPrompt((ChatMessage("user", "Hi"),), tools=Tools(json.dumps(tools)))
    written = ChatFormat("model", 0)
    first = written.reader(prompt, Form())
    monkeypatch.setattr(json, "loads", None)
    second = written.reader(prompt, Form())
    assert first is not None
    assert second is not None
    assert first is not second
