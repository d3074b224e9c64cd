"""The interface for spans, and the default implementation, which creates none.

    request (server)   in the caller's trace or a new one; linked to the in-flight requests that it waited for
    flight             one in-flight request, in a trace of its own, because it serves many callers
      call (client)    one HTTP request to the upstream, with its number and outcome

`opentelemetry.py` creates real spans. It needs optional packages, so nothing of it is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.domain.task import TaskKey


@dataclass(slots=True)
class SpanRecord:
    """The result of the work in a span; it is recorded when the span ends.

    Attributes:
        context: The span context, for links from other spans; None without tracing.
        outcome: "ok" or a problem code.
        status: The HTTP status of the upstream response, if there is one.
        invoke_id: The vendor's ID of the call, if the response has one.
    """

    context: Any = None
    outcome: str = "internal"
    status: int | None = None
    invoke_id: str | None = None


class Tracing(Protocol):
    """Creates spans. Each span ends with its context manager."""

    def in_flight_span(self, key: TaskKey) -> AbstractContextManager[SpanRecord]:
        """Return the span of an in-flight request."""
        ...

    def call_span(self, key: TaskKey, *, number: int) -> AbstractContextManager[SpanRecord]:
        """Return the span of one call; `number` is its number within its query, from 0."""
        ...

    async def aclose(self) -> None:
        """Send the remaining spans."""
        ...


class NoTracing:
    """Creates no spans. All work shares one record, which is never read."""

    def __init__(self) -> None:
        self._shared = nullcontext(SpanRecord())

    def in_flight_span(self, key: TaskKey) -> AbstractContextManager[SpanRecord]:
        """See `Tracing.in_flight_span`."""
        return self._shared

    def call_span(self, key: TaskKey, *, number: int) -> AbstractContextManager[SpanRecord]:
        """See `Tracing.call_span`."""
        return self._shared

    async def aclose(self) -> None:
        """See `Tracing.aclose`."""


def tracing_enabled(environ: Mapping[str, str]) -> bool:
    """Return whether the standard OpenTelemetry variables enable traces: an exporter or endpoint is set."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return bool(exporter) or any(environ.get(name) for name in endpoints)
