"""What the gateway tells of its work as spans, to whoever collects them; by itself, nothing.

    request (server)   in the caller's trace, or in a new one; linked to the flights that it waited for
    flight             a trace of its own: it serves many requests, and belongs to none
      call (client)    one call upstream, with its number and outcome

Who asks for spans gets them from `otel.py`, which needs packages that few installations want:
nothing of them is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.domain.task import TaskKey


@dataclass(slots=True)
class Mark:
    """What a span's work leaves to be told at its end, and the context by which others link to it.

    `outcome` is "ok" or a problem code; `status` and `invoke_id` are those of an upstream answer.
    """

    context: Any = None
    outcome: str = "internal"
    status: int | None = None
    invoke_id: str | None = None


class Tracing(Protocol):
    """Makes spans."""

    def flight(self, key: TaskKey) -> AbstractContextManager[Mark]:
        """Return the span of a flight."""
        ...

    def call(self, key: TaskKey, *, number: int) -> AbstractContextManager[Mark]:
        """Return the span of one call upstream; `number` counts a query's calls from 0."""
        ...

    async def aclose(self) -> None:
        """Send what is left to be sent."""
        ...


class Untraced:
    """Makes none: what is noted on its mark, one for all, nobody reads."""

    def __init__(self) -> None:
        self._nothing = nullcontext(Mark())

    def flight(self, key: TaskKey) -> AbstractContextManager[Mark]:
        """See `Tracing.flight`."""
        return self._nothing

    def call(self, key: TaskKey, *, number: int) -> AbstractContextManager[Mark]:
        """See `Tracing.call`."""
        return self._nothing

    async def aclose(self) -> None:
        """See `Tracing.aclose`."""


def asked_for(environ: Mapping[str, str]) -> bool:
    """Tell whether OpenTelemetry's own variables ask for spans: they name a place or a form for them."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    places = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return bool(exporter) or any(environ.get(place) for place in places)
