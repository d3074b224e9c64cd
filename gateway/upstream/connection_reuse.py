"""Connection reuse: whether a response can belong to another task's call on the same connection.

    names the task                         -> it is the task's; the connection is reused
    names no task, on a new connection     -> it is the task's; the connection is closed
    names no task, on a reused connection  -> UnattributedResponse; the connection is closed
    names another task, on a new one       -> the query fails; the connection is closed
    names another task, on a reused one    -> UnattributedResponse; all idle connections are closed

The upstream, or a proxy in front of it, may get out of step on a connection: it then answers each request
with the response to the request before. A success names its task, but a rejection does not. So a failure
counts only if no other call was made on its connection. Otherwise the call is repeated on a new connection,
with a permit of its own (`retry_policy.py`).

A connection is reused only after a response that names its task, or that concerns the account: refused
credentials and throttling. Until this is known, no other call uses the connection. So there are never more
repeats than such responses, however many unknown tasks are requested. A task that has failed is queried on a
new connection until it succeeds. If it is polled, it costs one call each time.

A first response is trusted. If a proxy confuses the responses of several connections, a rejection or a result
of another task cannot be recognized.
"""

from __future__ import annotations

import structlog
from cachetools import LRUCache

from gateway.domain.errors import (
    CredentialsRefused,
    ResponseForAnotherTask,
    UnattributedResponse,
    UpstreamError,
    UpstreamThrottled,
)
from gateway.domain.task import TaskKey
from gateway.telemetry.log_sampling import LogSampler
from gateway.upstream.transport import HttpResponse, Transport

# More than the queries that fail between a failure and its repeat. If a task is dropped from the list, it may
# cost another repeat.
_MAX_FAILED_TASKS = 4096

log = structlog.get_logger(__name__)


class ConnectionReuse:
    """Decides which calls need a new connection, and which failures must be confirmed on one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._failed_tasks: LRUCache[TaskKey, None] = LRUCache(_MAX_FAILED_TASKS)
        self._log_sampler = LogSampler(first=1)

    def needs_new_connection(self, key: TaskKey) -> bool:
        """Tell whether the call must be made on a new connection.

        The response to a query for a result does not contain the task ID.
        """
        return key.operation.is_result or key in self._failed_tasks

    def on_success(self, key: TaskKey) -> None:
        """Allow the next call for this task on a reused connection."""
        if self._failed_tasks:
            self._failed_tasks.pop(key, None)

    def may_reuse_connection(self, key: TaskKey, response: HttpResponse, error: UpstreamError) -> bool:
        """Return whether the connection of a failure may be reused: only if it concerns the account.

        Args:
            key: The requested task.
            response: The response that is a failure.
            error: The failure.

        Raises:
            UnattributedResponse: The failure may belong to the call for another task. The next call for this
                task will be made on a new connection.
        """
        if isinstance(error, (CredentialsRefused, UpstreamThrottled)):
            return True
        self._failed_tasks[key] = None
        if response.reused and isinstance(error, ResponseForAnotherTask):
            self._transport.close_idle_connections()
            if (suppressed := self._log_sampler.take(key.operation)) is not None:
                log.warning("connection_out_of_step", operation=key.operation, suppressed=suppressed)
        if response.reused and not error.transient:  # a transient failure is retried anyway
            raise UnattributedResponse("the upstream's answer may be for another task")
        return False
