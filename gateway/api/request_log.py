"""One log line a request: who asked for what, how it was answered, and what upstream had to do with it.

A crowd's lines are sampled by kind (route, class of status, problem, verdict), and a line that is not
written costs a look into a dictionary. Endpoints only leave their outcomes in the scope.
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
from gateway.progress.results import CacheResult, FetchFailure
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.redaction import Excerpt

Verdict = tuple[str, str | None]

SPAN = "span"  # in the scope's state: the TraceParent that is the request's own, where spans are made
_SERVER_ERROR = 500
_SHOWN = 64  # characters of a task ID, which may be none

log = structlog.get_logger(__name__)


def settled(scope: Scope, outcome: CacheResult | FetchFailure) -> CacheResult:
    """Leave a request's only outcome for its line; return the reading. Raises: the failure."""
    scope["state"]["outcomes"] = (outcome,)
    if isinstance(outcome, FetchFailure):
        raise outcome.raised()
    return outcome


class RequestLog:
    """Writes the lines."""

    def __init__(self, log_sampler: LogSampler) -> None:
        self._log_sampler = log_sampler
        self._logger = logging.getLogger(__name__)

    def tell(self, scope: Scope, *, method: str, route: str, status: int, seconds: float) -> None:
        """Write this request's line, unless enough of its kind are written."""
        if not self._logger.isEnabledFor(_level(route, status)):
            return
        state = scope["state"]
        outcomes: Sequence[CacheResult | FetchFailure] = state.get("outcomes", ())
        only = verdict(outcomes[0]) if len(outcomes) == 1 else None
        unnotified = self._log_sampler.take(kind(route, status, state.get("code"), only))
        if unnotified is not None:
            self.write(
                scope, method=method, route=route, status=status, seconds=seconds, unnotified=unnotified
            )

    def write(
        self, scope: Scope, *, method: str, route: str, status: int, seconds: float, unnotified: int
    ) -> None:
        """Write this request's line; `unnotified` are those of its kind that were not."""
        state = scope["state"]
        outcomes: Sequence[CacheResult | FetchFailure] = state.get("outcomes", ())
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
            "suppressed": unnotified or None,
        }
        told = {name: value for name, value in line.items() if value is not None}
        log.log(_level(route, status), "request", **told)


def kind(route: str, status: int, code: str | None, verdict: Verdict | None) -> Hashable:
    """Return what kind of line a request's is, to be sampled with its like; `verdict` is its outcome's."""
    return route, status // 100, code, verdict


def verdict(outcome: CacheResult | FetchFailure) -> Verdict:
    """Return how an answer came about, and the code of the failure that it tells or covers."""
    return outcome.source, outcome.failure.code if outcome.failure is not None else None


def trace_fields(scope: Scope) -> dict[str, str]:
    """Return what a log line says of a request's trace: the caller's span, and ours if there is one."""
    parent: TraceParent | None = trace_parent(scope)
    own: TraceParent | None = scope["state"].get(SPAN)
    fields = {} if parent is None else {"trace_id": parent.trace_id, "parent_id": parent.span_id}
    return fields if own is None else fields | {"trace_id": own.trace_id, "span_id": own.span_id}


def _level(route: str, status: int) -> int:
    if status >= _SERVER_ERROR:
        return logging.WARNING
    return logging.DEBUG if route in operator_endpoints.PROBES else logging.INFO


def _tasks(scope: Scope, outcomes: Sequence[CacheResult | FetchFailure]) -> dict[str, Any]:
    if len(outcomes) == 1:
        return {"task_id": outcomes[0].key.task_id}
    if outcomes:
        return {"tasks": len(outcomes)}
    if "tasks" in scope["state"]:
        return {"tasks": scope["state"]["tasks"]}
    task_id = scope.get("path_params", {}).get("taskId")  # of a request that came to nothing
    return {} if task_id is None else {"task_id": Excerpt(task_id, _SHOWN)}


def _cache(outcomes: Sequence[CacheResult | FetchFailure]) -> dict[str, Any]:
    if len(outcomes) != 1:
        return {"cache": dict(Counter(str(outcome.source) for outcome in outcomes)) or None}
    source, detail = verdict(outcomes[0])
    return {"cache": str(source), "detail": detail}


def _upstream(outcomes: Sequence[CacheResult | FetchFailure]) -> dict[str, Any]:
    """Tell of the calls that this request made or waited for."""
    fetches = [outcome.fetch for outcome in outcomes if outcome.fetch is not None]
    seconds = [fetch.upstream_seconds for fetch in fetches if fetch.upstream_seconds is not None]
    if not seconds:
        return {}
    invoke_ids = [fetch.invoke_id for fetch in fetches if fetch.invoke_id is not None]
    return {"upstream_seconds": round(max(seconds), 6), "upstream_invoke_id": ", ".join(invoke_ids) or None}
