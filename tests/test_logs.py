import io
import json
import logging
import os
import stat

import pytest
import structlog

from kvserve.errors import UsageError
from kvserve.logs import close_logs, configure_logs


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def configure(tmp_path):
    """Configures logging to a stream that it returns, with a file below `tmp_path/state`."""

    def to_stream(stream=None, **options):
        stream = stream or io.StringIO()
        options = {"level": "info", "form": "auto", "file": tmp_path / "state" / "log"} | options
        configure_logs(stream=stream, **options)
        return stream

    yield to_stream
    close_logs()


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def written(tmp_path) -> list[dict[str, object]]:
    return lines((tmp_path / "state" / "log").read_text())


def test_events_are_json_lines_in_the_file_and_in_a_pipe(configure, tmp_path):
    stream = configure()
    structlog.get_logger("kvserve.test").info("plan chosen", n_ctx=8192)
    (line,) = lines(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "plan chosen",
        "n_ctx": 8192,
        "logger": "kvserve.test",
        "level": "info",
    }
    assert written(tmp_path)[0]["event"] == "plan chosen"


def test_a_terminal_gets_the_console_form_and_the_file_json(configure, tmp_path):
    stream = configure(Terminal())
    structlog.get_logger().info("plan chosen", n_ctx=8192)
    assert not stream.getvalue().startswith("{")
    assert "plan chosen" in stream.getvalue()
    assert written(tmp_path)[0]["n_ctx"] == 8192


def test_the_level_counts_for_all_loggers(configure):
    stream = configure(level="warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("other").info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(stream.getvalue())] == ["loud"]


def test_uvicorn_and_the_standard_library_go_the_same_way(configure, tmp_path):
    configure()
    logging.getLogger("uvicorn.access").info('"%s" %d', "GET /v1/models", 200)
    logging.getLogger("other").warning("hello", extra={"pid": 7})
    access, other = written(tmp_path)
    assert (access["event"], access["logger"]) == ('"GET /v1/models" 200', "uvicorn.access")
    assert (other["event"], other["level"], other["pid"]) == ("hello", "warning", 7)


def test_a_traceback_is_one_json_line(configure, tmp_path):
    configure()
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        structlog.get_logger().exception("failed")
    (line,) = written(tmp_path)
    assert "RuntimeError: broken" in line["exception"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_secret_is_written_in_any_form(configure, tmp_path, form):
    key = 'sk-"quoted"-key'
    stream = configure(form=form, secrets=[key, ""])
    log = structlog.get_logger()
    log.info(f"got {key}", header=f"x {key} y", api_key="other-key", Authorization="Basic abc")
    log.info("header", seen="Authorization: Bearer unknown-key")
    try:
        raise RuntimeError(key)
    except RuntimeError:
        log.exception("failed")
    for text in (stream.getvalue(), (tmp_path / "state" / "log").read_text()):
        for secret in (key, json.dumps(key)[1:-1], "other-key", "Basic abc", "unknown-key"):
            assert secret not in text
        assert "[hidden]" in text


def test_the_file_is_the_users_alone(configure, tmp_path):
    configure()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "log").stat().st_mode) == 0o600


def test_every_file_is_the_users_alone_whatever_the_umask(configure, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "log").touch(mode=0o644)
    before = os.umask(0)
    try:
        configure(file_bytes=300)
        for _ in range(10):
            structlog.get_logger().info("x" * 200)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "state").iterdir()}
    assert modes == {0o600}
    assert len(list((tmp_path / "state").iterdir())) == 4


def test_no_state_directory_no_file(configure, tmp_path):
    configure(file=None)
    structlog.get_logger().info("x")
    assert list(tmp_path.iterdir()) == []


def test_configuring_again_replaces(configure, tmp_path):
    first, second = configure(), configure()
    structlog.get_logger().info("once")
    assert first.getvalue() == ""
    assert len(lines(second.getvalue())) == 1
    assert len(written(tmp_path)) == 1


def test_a_state_directory_that_cannot_be_is_one_line(configure, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="--state-dir: cannot write") as error:
        configure(file=blocked / "state" / "log")
    assert "\n" not in error.value.message


def test_old_files_are_few_and_none_is_larger_than_allowed(configure, tmp_path):
    configure(file_bytes=1000)
    for _ in range(50):
        structlog.get_logger().info("x" * 200)
    sizes = [file.stat().st_size for file in (tmp_path / "state").iterdir()]
    assert len(sizes) == 4
    assert max(sizes) <= 1000
