"""From chat messages to a prompt's text, by a template that is not trusted."""

import os
import socket
import subprocess
import sys
import time

import msgspec

from kvserve.dialects.form import Form, form_of
from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import ChatPrompt
from kvserve.worker import render_frames
from kvserve.worker.conversation import template_messages, template_tools
from kvserve.worker.render_frames import Answer, Render
from kvserve.worker.templates import ChatTemplate

_RENDER_S = 2.0
_START_S = 15.0
_MAX_TEMPLATE_CHARS = 512 * 1024
_MAX_PROMPT_CHARS = 8 * 2**20
_MARK = "\u2063kvserve:continue\u2063"
"""Stands at the end of an answer that is to be continued, to be found again in the prompt: the
answer's own words may come again in what the template puts after it."""
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "TZ")
"""What the template process sees of the environment, which holds API keys too."""


class ChatRenderer:
    """Renders prompts in a child process, which a template that hangs or dies takes with it.

    `bos_text` and `eos_text` are what templates know as `bos_token` and `eos_token`. For one
    thread at a time.
    """

    def __init__(
        self, template: ChatTemplate, *, bos_text: str, eos_text: str, render_s: float = _RENDER_S
    ) -> None:
        self._template = template
        self._tokens = {"bos_token": bos_text, "eos_token": eos_text}
        self._render_s = render_s
        self._form = form_of(template.source)
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._child: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Start the process before it is needed; it takes a quarter of a second.

        Raises RuntimeError where it does not come up.
        """
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "kvserve.worker.render"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        self._sock = ours
        try:
            ready = render_frames.receive(ours, time.monotonic() + _START_S)
        except (OSError, ValueError):
            ready = None
        if ready is None:
            self.close()
            raise RuntimeError("the template process did not start")

    def render(self, prompt: ChatPrompt) -> str:
        """The text for `prompt`, ending where the answer begins.

        Raises InvalidRequest, with the template's own words where it refuses the messages.
        """
        if len(self._template.source) > _MAX_TEMPLATE_CHARS:
            raise self._refusal(f"it is longer than {_MAX_TEMPLATE_CHARS} characters")
        answer = self._ask(self._job(prompt))
        if answer.text is None and any(message.tool_calls for message in prompt.messages):
            # Some templates join a call's arguments to a text.
            answer = self._ask_again(prompt, answer)
        if answer.text is None:
            raise self._refusal(answer.error or "it gave no text")
        if not prompt.continue_final:
            return answer.text
        text, mark, _ = answer.text.rpartition(_MARK)
        if not mark:
            raise self._refusal("it does not show the last message, which was to be continued")
        return text

    def close(self) -> None:
        """End the process."""
        if self._sock is not None:
            self._sock.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._sock = self._child = None

    def form(self, prompt: ChatPrompt, text: str) -> Form | None:
        """How the answer to `prompt`, rendered as `text`, writes reasoning and calls; None where
        it writes neither."""
        if not self._form.reasons and prompt.tools is None:
            return None
        if prompt.continue_final:
            return self._form.going_on(prompt.messages[-1].content)
        return self._form.after(text)

    def _job(self, prompt: ChatPrompt, *, as_text: bool = False) -> Render:
        messages = template_messages(prompt, self._form, as_text=as_text)
        if prompt.continue_final and messages:
            # Where there are calls, some dialects have None for no text.
            messages[-1]["content"] = (messages[-1]["content"] or "") + _MARK
        variables: dict[str, object] = {
            **prompt.template_kwargs,
            **self._tokens,
            "messages": messages,
            "tools": template_tools(prompt, self._form),
            "documents": None,
            "add_generation_prompt": not prompt.continue_final,
        }
        return Render(self._template.source, variables, _MAX_PROMPT_CHARS)

    def _ask_again(self, prompt: ChatPrompt, first: Answer) -> Answer:
        answer = self._ask(self._job(prompt, as_text=True))
        return first if answer.text is None else answer

    def _ask(self, job: Render) -> Answer:
        """Ask the process; one that is gone is replaced, and the new one asked once more."""
        answer = self._ask_once(job) or self._ask_once(job)
        if answer is None:
            raise self._refusal("its process ended twice")
        return answer

    def _ask_once(self, job: Render) -> Answer | None:
        """The answer; None where the process is gone. Raises InvalidRequest where it is late."""
        if self._sock is None:
            self.start()
        sock = self._sock
        assert sock is not None
        deadline = time.monotonic() + self._render_s
        try:
            sock.settimeout(self._render_s)
            render_frames.send(sock, job)
            body = render_frames.receive(sock, deadline)
            if body is not None:
                return self._decoder.decode(body)
        except TimeoutError:
            self.close()
            raise self._refusal(f"it took longer than {self._render_s:g} s") from None
        except (OSError, ValueError, msgspec.MsgspecError):
            pass
        self.close()
        return None

    def _refusal(self, problem: str) -> InvalidRequest:
        name = self._template.name
        return InvalidRequest(
            f"the chat template ({name}) cannot be rendered: {problem}", param="messages"
        )
