"""Log lines: one form for all of the process, and no secret in any."""

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
from tests.harness import KEY, SECRET, Simulator, serving

SECRET_TEXT = "secret-in-a-log"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Return what tells all that was written to stderr; put logging back in the end."""
    root, quiet = logging.getLogger(), [logging.getLogger(name) for name in logs._LIBRARY_LEVELS]
    handlers = root.handlers[:]
    before = [(logger, logger.level, logger.filters[:]) for logger in (root, *quiet)]
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    for logger, level, filters in before:  # or tests to come would not hear what a library complains of
        logger.setLevel(level)
        logger.filters[:] = filters
    structlog.reset_defaults()


def configured(**settings: Any) -> structlog.stdlib.BoundLogger:
    """Configure the logs, with a secret to hide; return a logger."""
    redactor = Redactor()
    redactor.hide(SECRET_TEXT)
    logs.configure(Log(**settings), redactor=redactor)
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("test")
    return logger


def test_logs_are_lines_of_json(said: Callable[[], str]) -> None:
    """Each event is one line of JSON with its level, logger and time."""
    configured().info("done", count=3, none=None, yes=True)
    line = json.loads(said())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "done", "count": 3, "none": None, "yes": True, "level": "info", "logger": "test"}


def test_logs_hide_secrets_wherever_they_stand(said: Callable[[], str]) -> None:
    """Names, values, nested ones, exceptions and foreign loggers: the secret is in none."""
    logger = configured()
    logger.info("event secret-in-a-log", value=SECRET_TEXT)
    logger.info("deep", value={SECRET_TEXT: [{"a": (SECRET_TEXT, {SECRET_TEXT})}]})
    try:
        int(SECRET_TEXT)
    except ValueError:
        logger.exception("bug")
        logging.getLogger("foreign").exception("bug with %s", SECRET_TEXT)
    logging.getLogger("foreign").warning("extra", extra={"value": SECRET_TEXT.encode()})
    text = said()
    assert SECRET_TEXT not in text
    assert len(text.splitlines()) == 5
    assert all(json.loads(line) for line in text.splitlines())
    assert text.count("Traceback") == 2


def test_logs_have_a_level(said: Callable[[], str]) -> None:
    """What is below log.level is not told, ours or a library's."""
    logger = configured(level="warning")
    logger.info("quiet")
    logging.getLogger("foreign").info("quiet")
    logger.warning("loud")
    logging.getLogger("foreign").warning("loud")
    assert [json.loads(line)["event"] for line in said().splitlines()] == ["loud", "loud"]


def test_logs_keep_chatty_libraries_quiet(said: Callable[[], str]) -> None:
    """The HTTP client tells every request, with its headers, to whoever listens: nobody does."""
    configured(level="debug")
    for name in ("httpx", "httpcore", "httpcore.http11", "uvicorn.error"):
        logging.getLogger(name).info("request")
    logging.getLogger("opentelemetry.exporter").warning("retrying")
    assert said() == ""


def test_logs_take_warnings_in(said: Callable[[], str]) -> None:
    """Python's own warnings are lines like the others."""
    configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn(f"old {SECRET_TEXT}", DeprecationWarning, stacklevel=1)
    text = said()
    line = json.loads(text)
    assert (line["logger"], line["level"]) == ("py.warnings", "warning")
    assert SECRET_TEXT not in text


def test_logs_for_a_console(said: Callable[[], str]) -> None:
    """The console form has the same redaction, and tracebacks without their local variables."""
    logger = configured(format="console")
    local = SECRET_TEXT
    try:
        int(local)
    except ValueError:
        logger.exception("bug", value=local)
    text = said()
    assert "bug" in text
    assert "Traceback" in text
    assert SECRET_TEXT not in text


def test_logs_of_a_process_are_lines_of_json_without_a_secret(tmp_path: Path, simulator: Simulator) -> None:
    """At the most talkative level too; a request is one line, with id, route, task and status."""
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
    for said in process.lines:
        assert json.loads(said)
        assert KEY not in said
        assert SECRET not in said


HOSTILE = "a\x1b[2Jb\x9b31mc\x07d\x7fe\u202ef\r\ng\u2028h"


def fail() -> None:
    """Raise what a library may raise: an error with the words of others."""
    raise ValueError(HOSTILE)


@pytest.mark.parametrize("form", ["console", "json"])
def test_logs_escape_what_a_terminal_would_obey(said: Callable[[], str], form: str) -> None:
    """Control characters in a name, a value, deep in one or in a traceback are shown, not obeyed."""
    logger = configured(format=form)
    logger.info(HOSTILE, value=HOSTILE, deep={HOSTILE: [HOSTILE]}, **{HOSTILE: 1})
    try:
        fail()
    except ValueError:
        logger.exception("bug")
    text = said()
    assert not set("\x1b\x9b\x07\x7f\u202e\r\u2028") & set(text)
    assert "\\x1b[2J" in text or "\\u001b[2J" in text
    assert "Traceback" in text
    assert form == "console" or text.count("\n") == 2


def test_logs_cut_an_excerpt_after_they_have_redacted_it(said: Callable[[], str]) -> None:
    """A secret that the cut divides is hidden whole, and the rest is as long as was asked for."""
    configured().info("odd", status=Excerpt(f"'{SECRET_TEXT}' {'x' * 200}", 10), other="y" * 200)
    text = said()
    assert json.loads(text)["status"] == "'[redacted"
    assert json.loads(text)["other"] == "y" * 200
