"""Log lines: one format for the whole process, and no secrets."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.settings.model import Log
from gateway.telemetry import logs
from gateway.telemetry.redaction import Excerpt, Redactor
from tests.support.harness import KEY, SECRET, Simulator, serving

SECRET_TEXT = "secret-in-a-log"


@pytest.fixture
def stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Return a function that returns the output on stderr; restore logging afterwards."""
    root, quiet = logging.getLogger(), [logging.getLogger(name) for name in logs._LIBRARY_LEVELS]
    handlers = root.handlers[:]
    before = [(logger, logger.level, logger.filters[:]) for logger in (root, *quiet)]

    def written() -> str:
        for handler in root.handlers:
            if isinstance(handler, logs.Handler):
                assert handler.writer.flush(5)
        return capfd.readouterr().err

    yield written
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    for logger, level, filters in before:  # otherwise later tests would miss warnings of libraries
        logger.setLevel(level)
        logger.filters[:] = filters
    structlog.reset_defaults()


def configured(**settings: Any) -> structlog.stdlib.BoundLogger:
    """Configure logging with a secret to redact; return a logger."""
    redactor = Redactor()
    redactor.add_secrets(SECRET_TEXT)
    logs.configure(Log(**settings), redactor=redactor)
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("test")
    return logger


def test_logs_are_lines_of_json(stderr: Callable[[], str]) -> None:
    """Each event is one line of JSON with its level, logger and time."""
    configured().info("done", count=3, none=None, yes=True)
    line = json.loads(stderr())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "done", "count": 3, "none": None, "yes": True, "level": "info", "logger": "test"}


def test_logs_redact_secrets_everywhere(stderr: Callable[[], str]) -> None:
    """The secret is redacted in names, values, nested values, exceptions and lines of other loggers."""
    logger = configured()
    logger.info("event secret-in-a-log", value=SECRET_TEXT)
    logger.info("deep", value={SECRET_TEXT: [{"a": (SECRET_TEXT, {SECRET_TEXT})}]})
    try:
        int(SECRET_TEXT)
    except ValueError:
        logger.exception("bug")
        logging.getLogger("foreign").exception("bug with %s", SECRET_TEXT)
    logging.getLogger("foreign").warning("extra", extra={"value": SECRET_TEXT.encode()})
    text = stderr()
    assert SECRET_TEXT not in text
    assert len(text.splitlines()) == 5
    assert all(json.loads(line) for line in text.splitlines())
    assert text.count("Traceback") == 2


def test_logs_respect_the_level(stderr: Callable[[], str]) -> None:
    """Lines below log.level are dropped, also those of libraries."""
    logger = configured(level="warning")
    logger.info("quiet")
    logging.getLogger("foreign").info("quiet")
    logger.warning("loud")
    logging.getLogger("foreign").warning("loud")
    assert [json.loads(line)["event"] for line in stderr().splitlines()] == ["loud", "loud"]


def test_logs_suppress_verbose_libraries(stderr: Callable[[], str]) -> None:
    """The HTTP client logs every request with its headers; these lines are dropped at every level."""
    configured(level="debug")
    for name in ("httpx", "httpcore", "httpcore.http11", "uvicorn.error"):
        logging.getLogger(name).info("request")
    logging.getLogger("opentelemetry.exporter").warning("retrying")
    assert stderr() == ""


def test_logs_include_python_warnings(stderr: Callable[[], str]) -> None:
    """Python warnings become log lines, redacted like the others."""
    configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn(f"old {SECRET_TEXT}", DeprecationWarning, stacklevel=1)
    text = stderr()
    line = json.loads(text)
    assert (line["logger"], line["level"]) == ("py.warnings", "warning")
    assert SECRET_TEXT not in text


def test_logs_in_console_format(stderr: Callable[[], str]) -> None:
    """The console format has the same redaction, and tracebacks without local variables."""
    logger = configured(format="console")
    local = SECRET_TEXT
    try:
        int(local)
    except ValueError:
        logger.exception("bug", value=local)
    text = stderr()
    assert "bug" in text
    assert "Traceback" in text
    assert SECRET_TEXT not in text


def test_logs_of_a_process_are_json_without_secrets(tmp_path: Path, simulator: Simulator) -> None:
    """At level debug, every line is JSON; a request is one line with ID, route, task and status."""
    task = simulator.task()
    env = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url, "SD_GATEWAY_LOG__LEVEL": "debug"}
    with serving(tmp_path, env) as (process, gate):
        gate.get(task, headers={"x-request-id": "look-for-me"})
        line = json.loads(process.says(r'(\{.*"look-for-me".*\})'))
        process.signal()
        process.exit_status()
    assert (line["event"], line["method"], line["status"], line["task_id"]) == ("request", "GET", 200, task)
    assert line["route"].startswith("/v1/progress/{taskId")
    assert line["seconds"] >= 0
    for text in process.lines:
        assert json.loads(text)
        assert KEY not in text
        assert SECRET not in text


HOSTILE = "a\x1b[2Jb\x9b31mc\x07d\x7fe\u202ef\r\ng\u2028h"


def fail() -> None:
    """Raise an error whose message quotes untrusted text."""
    raise ValueError(HOSTILE)


@pytest.mark.parametrize("form", ["console", "json"])
def test_logs_escape_control_characters(stderr: Callable[[], str], form: str) -> None:
    """Control characters in a name, a value, a nested value or a traceback are escaped."""
    logger = configured(format=form)
    logger.info(HOSTILE, value=HOSTILE, deep={HOSTILE: [HOSTILE]}, **{HOSTILE: 1})
    try:
        fail()
    except ValueError:
        logger.exception("bug")
    text = stderr()
    assert not set("\x1b\x9b\x07\x7f\u202e\r\u2028") & set(text)
    assert "\\x1b[2J" in text or "\\u001b[2J" in text
    assert "Traceback" in text
    assert form == "console" or text.count("\n") == 2


def test_logs_truncate_an_excerpt_after_redaction(stderr: Callable[[], str]) -> None:
    """A secret at the cut is redacted as a whole, and the excerpt has the requested length."""
    configured().info("odd", status=Excerpt(f"'{SECRET_TEXT}' {'x' * 200}", 10), other="y" * 200)
    text = stderr()
    assert json.loads(text)["status"] == "'[redacted"
    assert json.loads(text)["other"] == "y" * 200
