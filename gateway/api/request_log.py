"""The request log: one line per request, with its route, status, cache status and upstream calls.

At high rates lines are sampled by route, status class, problem code and cache status. A line that is not
written costs one dictionary lookup. Endpoints only store their results in the scope.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import structlog
from starlette.types import Scope

from gateway.api import operator_endpoints
from gateway.api.trace_context import TraceParent, trace_parent
from gateway.progress.outcomes import LookupFailure, LookupSuccess
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.redaction import Excerpt

# A cache status, and the code of the failure that was returned or replaced by a stale snapshot.
OutcomeLabels = tuple[str, str | None]

SPAN = "span"  # key in the scope's state: the TraceParent of the request's own span, with tracing on
_SERVER_ERROR = 500
_LOGGED_ID_CHARS = 64  # of a task ID in the path, which may be invalid

log = structlog.get_logger(__name__)


def record_outcome(scope: Scope, outcome: LookupSuccess | LookupFailure) -> LookupSuccess:
    """Record the result of a request for its log line, and return it. Raises: the failure, if it is one."""
    scope["state"]["outcomes"] = (outcome,)
    if isinstance(outcome, LookupFailure):
        raise outcome.copy_to_raise()
    return outcome


class RequestLog:
    """Writes the request log."""

    def __init__(self, log_sampler: LogSampler) -> None:
        self._log_sampler = log_sampler
        self._logger = logging.getLogger(__name__)

    def log(self, scope: Scope, *, method: str, route: str, status: int, seconds: float) -> None:
        """Write the line of a request, unless it is sampled out."""
        if not self._logger.isEnabledFor(_level(route, status)):
            return
        state = scope["state"]
        outcomes: Sequence[LookupSuccess | LookupFailure] = state.get("outcomes", ())
        labels = outcome_labels(outcomes[0]) if len(outcomes) == 1 else None
        suppressed = self._log_sampler.take(sampling_key(route, status, state.get("code"), labels))
        if suppressed is not None:
            self.write(
                scope, method=method, route=route, status=status, seconds=seconds, suppressed=suppressed
            )

    def write(
        self, scope: Scope, *, method: str, route: str, status: int, seconds: float, suppressed: int
    ) -> None:
        """Write the line of a request; `suppressed` is the number of similar lines that were not written."""
        state = scope["state"]
        outcomes: Sequence[LookupSuccess | LookupFailure] = state.get("outcomes", ())
        line: dict[str, Any] = {
            "request_id": state["request_id"],
            "method": method,
            "route": route,
            **_tasks(scope, outcomes),
            "status": status,
            "code": state.get("code"),
            "seconds": round(seconds, 6),
            **_cache(outcomes),
            **_upstream(outcomes),
            **trace_fields(scope),
            "suppressed": suppressed or None,
        }
        fields = {name: value for name, value in line.items() if value is not None}
        log.log(_level(route, status), "request", **fields)


def sampling_key(route: str, status: int, code: str | None, labels: OutcomeLabels | None) -> Hashable:
    """Return the key under which a request's line is sampled; `labels` are those of its only result."""
    return route, status // 100, code, labels


def outcome_labels(outcome: LookupSuccess | LookupFailure) -> OutcomeLabels:
    """Return the cache status, and the code of the failure, whether returned or replaced by a snapshot."""
    return outcome.cache_status, outcome.failure.code if outcome.failure is not None else None


def trace_fields(scope: Scope) -> dict[str, str]:
    """Return the trace fields of a log line: the client's span, and our own if there is one."""
    parent: TraceParent | None = trace_parent(scope)
    own: TraceParent | None = scope["state"].get(SPAN)
    fields = {} if parent is None else {"trace_id": parent.trace_id, "parent_id": parent.span_id}
    return fields if own is None else fields | {"trace_id": own.trace_id, "span_id": own.span_id}


def _level(route: str, status: int) -> int:
    if status >= _SERVER_ERROR:
        return logging.WARNING
    return logging.DEBUG if route in operator_endpoints.PROBES else logging.INFO


def _tasks(scope: Scope, outcomes: Sequence[LookupSuccess | LookupFailure]) -> dict[str, Any]:
    if len(outcomes) == 1:
        return {"task_id": outcomes[0].key.task_id}
    if outcomes:
        return {"tasks": len(outcomes)}
    if "tasks" in scope["state"]:
        return {"tasks": scope["state"]["tasks"]}
    task_id = scope.get("path_params", {}).get("taskId")  # of a request without a result
    return {} if task_id is None else {"task_id": Excerpt(task_id, _LOGGED_ID_CHARS)}


def _cache(outcomes: Sequence[LookupSuccess | LookupFailure]) -> dict[str, Any]:
    if len(outcomes) != 1:
        return {"cache": dict(Counter(str(outcome.cache_status) for outcome in outcomes)) or None}
    source, detail = outcome_labels(outcomes[0])
    return {"cache": str(source), "detail": detail}


def _upstream(outcomes: Sequence[LookupSuccess | LookupFailure]) -> dict[str, Any]:
    """Return the log fields of the upstream calls that this request waited for."""
    fetches = [outcome.fetch_outcome for outcome in outcomes if outcome.fetch_outcome is not None]
    seconds = [fetch.upstream_seconds for fetch in fetches if fetch.upstream_seconds is not None]
    if not seconds:
        return {}
    invoke_ids = [fetch.invoke_id for fetch in fetches if fetch.invoke_id is not None]
    return {"upstream_seconds": round(max(seconds), 6), "upstream_invoke_id": ", ".join(invoke_ids) or None}
