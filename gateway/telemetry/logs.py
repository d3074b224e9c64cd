"""Structured logs: one pipeline for the lines of the gateway and of its libraries.

The pipeline redacts every event, so callers need not. Redaction precedes rendering and works on the event's
values, so that a line stays valid JSON. `log_writer.py` writes the lines.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from gateway.domain.printable import json_text, printable
from gateway.settings.model import Log
from gateway.telemetry.log_writer import LogWriter
from gateway.telemetry.redaction import Excerpt, Redactor

# httpx logs every request at INFO. uvicorn logs every start and stop, and warns about each invalid request.
# OpenTelemetry warns about each failed attempt to reach a collector, and about lost spans.
_LIBRARY_LEVELS = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "opentelemetry": logging.ERROR,
    "uvicorn.error": logging.ERROR,
}


class Handler(logging.Handler):
    """Formats records and passes the lines to a `LogWriter`."""

    def __init__(self) -> None:
        super().__init__()
        self._encoding = sys.stderr.encoding or "utf-8"
        self.writer = LogWriter(sys.stderr.fileno(), describe_loss=self._describe_loss)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of a record."""
        try:
            self.writer.write(self._line(record))
        except Exception:  # noqa: BLE001  # as all handlers of `logging` do
            self.handleError(record)

    def close(self) -> None:
        """Write the queued lines, for a limited time. `logging` calls this at exit."""
        self.writer.close()
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(self._encoding, "backslashreplace")

    def _describe_loss(self, lines: int) -> bytes:
        logger = logging.getLogger(__name__)
        event = "log_lines_dropped"
        record = logger.makeRecord(
            logger.name, logging.WARNING, "", 0, event, (), None, extra={"lines": lines}
        )
        return self._line(record)


def lost_lines() -> int:
    """Return the number of log lines that were not written."""
    handlers = logging.getLogger().handlers
    return sum(handler.writer.lost for handler in handlers if isinstance(handler, Handler))


def configure(settings: Log, *, redactor: Redactor) -> None:
    """Write the log lines of the whole process to stderr, in the configured format and level."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    console = settings.format == "console"
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        if console
        else _render_json
    )
    handler = Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.StackInfoRenderer(),
                structlog.processors.format_exc_info,
                _Redaction(redactor),
                *([_escape] if console else []),
                renderer,
            ],
        )
    )
    level = settings.level.upper()
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(capture=True)
    for name, library_level in _LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(library_level)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    # At the end of the grace period uvicorn logs how many requests it cancels, and then an error for each.
    return record.exc_info is None or record.exc_info[0] is not asyncio.CancelledError


_as_json = structlog.processors.JSONRenderer(ensure_ascii=False)
_LINES = {"exception", "stack"}  # fields that keep their line breaks


def _render_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    return json_text(str(_as_json(logger, method, event)))


def _escape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters, because a line may quote callers or the upstream."""
    return {printable(key): _escaped(value, lines=key in _LINES) for key, value in event.items()}


def _escaped(value: Any, *, lines: bool = False) -> Any:
    if isinstance(value, str):
        return printable(value, keep="\n\t" if lines else "")
    if isinstance(value, dict):
        return {printable(str(key)): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


class _Redaction:
    """A structlog processor that redacts every key and value of an event, nested ones included."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        # One check of the whole line costs less than a check of each value. NUL joins the values, because no
        # form of a secret contains it.
        texts: list[str] = []
        for key, value in event.items():
            if type(value) is str:
                texts.append(value)
            elif not (value is None or isinstance(value, bool | int | float)):
                break
            texts.append(key)
        else:
            if not self._redactor.suspects("\0".join(texts)):
                return event
        return {self._redactor(key): self._redact(value) for key, value in event.items()}

    def _redact(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict):
            return {self._redactor(str(key)): self._redact(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._redact(item) for item in value]
        if isinstance(value, Excerpt):
            return self._redactor(str(value))[: value.limit]
        return self._redactor(str(value))
