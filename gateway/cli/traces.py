"""Creates the tracing that the environment asks for."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.settings.errors import SettingsError
from gateway.settings.extras import describe_missing
from gateway.telemetry.tracing import NoTracing, Tracing, tracing_enabled


def create_tracing(environ: Mapping[str, str]) -> Tracing:
    """Return the tracing.

    Raises:
        SettingsError: A variable is invalid, or the packages of the extra `otel` are missing.
    """
    if not tracing_enabled(environ):
        return NoTracing()
    try:
        # Imported on demand: it takes a third of a second and needs optional packages.
        from gateway.telemetry import opentelemetry  # noqa: PLC0415
    except ImportError as exc:
        raise SettingsError([f"OTEL_*: {describe_missing(exc.name, extra='otel')}"]) from exc
    return opentelemetry.from_environment(environ)
