"""`python -m kvserve.worker.render`: renders chat templates, in a process of its own.

A template comes with the model file and is code by somebody else. Here it has Jinja's sandbox, a
limit on memory and no descriptor but its one socket (standard input); the time limit is the
worker's, which kills this process (`chat.py`).
"""

import functools
import json
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from kvserve.worker import render_frames
from kvserve.worker.lifetime import die_with_parent
from kvserve.worker.render_frames import Answer, Render

MAX_MEMORY_BYTES = 512 * 2**20


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, with which training code marks the model's own words: its body."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Parse up to `{% endgeneration %}` and leave the body as it is."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def build_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A sandbox with what Hugging Face's `apply_chat_template` gives to templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render(compile_template: Callable[[str], jinja2.Template], job: Render) -> Answer:
    """Render one job; whatever goes wrong becomes the answer's `error`, in one line."""
    try:
        template = compile_template(job.source)
        pieces: list[str] = []
        n_chars = 0
        for piece in template.generate(job.variables):
            n_chars += len(piece)
            if n_chars > job.max_chars:
                return Answer(error=f"the prompt is longer than {job.max_chars} characters")
            pieces.append(piece)
        return Answer(text="".join(pieces))
    except MemoryError:
        return Answer(error="the template ran out of memory")
    except RecursionError:
        return Answer(error="the template is nested too deeply")
    except Exception as error:
        return Answer(error=_one_line(error))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:500]


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes `<`, `>` and `&` for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_listed,
    )


def _listed(value: object) -> list[Any]:
    """What filters such as `map` give, which Hugging Face's JSON refuses and llama.cpp's writes."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"a {type(value).__name__} has no JSON")


def main() -> None:
    """Say that the process is ready, then answer jobs until the worker closes its end."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compile_template = functools.lru_cache(maxsize=1)(build_environment().from_string)
    decoder = msgspec.msgpack.Decoder(Render)
    with socket.socket(fileno=sys.stdin.fileno()) as sock:
        render_frames.send(sock, Answer(text=""))
        while (body := render_frames.receive(sock)) is not None:
            render_frames.send(sock, render(compile_template, decoder.decode(body)))


if __name__ == "__main__":
    main()
