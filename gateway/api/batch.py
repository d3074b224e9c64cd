"""GET /v1/progress?taskId=A&taskId=B: many tasks in one response, each with its own snapshot or problem.

Without `wait`, the response comes at once. With `wait` (a long poll), it comes when a task changes. An item
also says how old its snapshot is, and if its update is overdue, why (`progress/overdue_detector.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import ClientLimits, client_key
from gateway.api.problems import problem_document, status_and_title
from gateway.api.progress_response import age_seconds
from gateway.api.requests import LONG_POLL, free_headers, header, query_parameters
from gateway.api.server_extensions import DisconnectListener, all_while_connected, take_turn
from gateway.api.task_parameters import TaskParameters
from gateway.api.wait_parameter import requested_wait
from gateway.domain.entity_tag import EntityTags, digest_of, matches, possible_tags
from gateway.domain.errors import GatewayError
from gateway.domain.snapshot import Snapshot, render_json
from gateway.domain.task import Status, TaskKey
from gateway.progress.outcomes import CacheStatus, LookupFailure, LookupSuccess
from gateway.progress.service import ProgressService
from gateway.progress.unanswered_tasks import RETRY_SECONDS, too_many_tasks
from gateway.watch.hub import WatchHub
from gateway.watch.subscriber import Subscriber, SubscriptionKind


class BatchEndpoint:
    """Responds with the progress of several tasks."""

    def __init__(
        self,
        service: ProgressService,
        hub: WatchHub,
        *,
        tasks: TaskParameters,
        tags: EntityTags,
        clients: ClientLimits,
        max_wait_seconds: float,
    ) -> None:
        self._service = service
        self._hub = hub
        self._tasks = tasks
        self._tags = tags
        self._clients = clients
        self._max_wait_seconds = max_wait_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 200 with the items in the order of the request and a summary, or 304."""
        parameters = query_parameters(scope, "api", "wait", repeated="taskId")
        keys = self._tasks.in_query(parameters)
        if_none_match = header(scope["headers"], b"if-none-match")
        wait, headers = requested_wait(scope, parameters, longest=self._max_wait_seconds)
        self._clients.charge(scope, len(keys))
        seen = {} if if_none_match is None else self._tags.revisions_of_batch(if_none_match, keys)
        if wait:
            scope["state"][LONG_POLL] = True
            free_headers(scope)
            if_none_match = if_none_match and possible_tags(if_none_match, tasks=len(keys))
            outcomes = await self._wait_for_change(scope, receive, keys, if_none_match, wait, seen=seen)
        else:
            await take_turn(scope, tasks=len(keys), connected=False)
            outcomes = await self._read(scope, receive, keys, seen)
        scope["state"]["outcomes"] = outcomes  # for the request log
        stale = {outcome.key: self._stale_code(outcome.key) for outcome in outcomes}
        digest = _digest(
            _Item.of(outcome.snapshot if isinstance(outcome, LookupSuccess) else outcome.failure).text(
                stale[outcome.key]
            )
            for outcome in outcomes
        )
        revisions = {
            outcome.key: (
                outcome.snapshot.revision if isinstance(outcome, LookupSuccess) else seen.get(outcome.key, 0)
            )
            for outcome in outcomes
        }
        tag = self._tags.issue_for_batch(digest, revisions)
        # Weak: problems contain the ID of their request, and two representations may differ in it.
        headers += [(b"cache-control", b"no-store"), (b"etag", b"W/" + tag.encode())]
        if if_none_match is not None and matches(if_none_match, tag):
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body"})
            return
        body = self._body(outcomes, stale, request_id=scope["state"]["request_id"])
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _body(
        self,
        outcomes: Sequence[LookupSuccess | LookupFailure],
        stale: Mapping[TaskKey, str | None],
        *,
        request_id: str,
    ) -> bytes:
        items: list[bytes] = []
        stale_count = 0
        for outcome in outcomes:
            if isinstance(outcome, LookupSuccess):
                code = stale[outcome.key]
                stale_count += code is not None
                age = self._service.age(outcome.snapshot)  # `outcome.age` is that of the lookup
                added = render_json({"ageSeconds": age_seconds(age), "stale": code})
                items.append(b"%b,%b" % (outcome.snapshot.body[:-1], added[1:]))
            else:
                status, title = status_and_title(outcome.failure)
                problem = problem_document(outcome.failure, status, title, request_id=request_id)
                items.append(render_json({"taskId": outcome.key.task_id, "error": problem}))
        snapshots = [outcome.snapshot for outcome in outcomes if isinstance(outcome, LookupSuccess)]
        summary = render_json(summarize(snapshots, errors=len(outcomes) - len(snapshots), stale=stale_count))
        return b'{"items":[%s],"summary":%s}' % (b",".join(items), summary)

    def _stale_code(self, key: TaskKey) -> str | None:
        reason = self._service.overdue_detector.error(key)
        return None if reason is None else reason.code

    async def _read(
        self,
        scope: Scope,
        receive: Receive,
        keys: Sequence[TaskKey],
        seen: Mapping[TaskKey, int],
        *,
        others_known: bool = False,
    ) -> list[LookupSuccess | LookupFailure]:
        """Return the result of each task.

        When too many tasks are unanswered already, new ones fail.

        Raises: ClientDisconnect when the client disconnects first, Overloaded when all tasks would fail.
        `seen`: the revisions that the client has received, by task. It must not receive older ones.
        `others_known`: the response has other tasks, too, whose results are known.
        """
        lookups = {key: self._service.lookup(key, seen.get(key, 0)) for key in keys}
        cached = {key: result for key, result in lookups.items() if result is not None}
        missing = [key for key in keys if key not in cached]
        if not missing:
            return list(cached.values())
        client, unanswered = client_key(scope), self._hub.unanswered_tasks
        new = [key for key in missing if self._hub.would_add_unanswered_task(key)]
        refused: dict[TaskKey, LookupFailure] = {}
        if not unanswered.has_room(client, len(new)):
            failure = too_many_tasks()
            refused = {key: self._service.refuse_lookup(key, failure) for key in new}
            if not others_known and [each.failure for each in refused.values()] == [failure] * len(keys):
                raise too_many_tasks()  # a new one: the traceback of `failure` would refer to `refused`
        queried = [key for key in missing if key not in refused]
        with unanswered.counted(client, len(new) - len(refused)):
            if queried:
                await take_turn(scope, tasks=len(queried))
            read = await all_while_connected(
                scope,
                receive,
                asyncio.gather(
                    *(
                        self._service.get_after_miss(key, client=client, seen_revision=seen.get(key, 0))
                        for key in queried
                    )
                ),
                tasks=len(queried),
            )
        outcomes = self._renewed(cached, seen) | dict(zip(queried, read, strict=True)) | refused
        return [outcomes[key] for key in keys]

    def _renewed(
        self, outcomes: Mapping[TaskKey, LookupSuccess | LookupFailure], seen: Mapping[TaskKey, int]
    ) -> dict[TaskKey, LookupSuccess | LookupFailure]:
        """Return the outcomes of cached tasks after a query of others, which may have taken seconds."""
        return {
            key: self._service.peek(key, seen.get(key, 0)) or outcome for key, outcome in outcomes.items()
        }

    async def _wait_for_change(
        self,
        scope: Scope,
        receive: Receive,
        keys: Sequence[TaskKey],
        if_none_match: str | None,
        wait: float,
        *,
        seen: Mapping[TaskKey, int],
    ) -> list[LookupSuccess | LookupFailure]:
        """Wait until the representation differs from the client's, or every task has ended.

        Without If-None-Match, it must differ from the one on arrival. Only the hub's schedules call the
        upstream meanwhile. A task counts as one lookup. `seen`: as in `_read`. When too many tasks are
        unanswered already, new ones fail after a shorter wait.

        Raises: ClientDisconnect when the client disconnects first, Overloaded when all tasks would fail.
        """
        client = client_key(scope)
        new = {key for key in keys if self._hub.would_add_unanswered_task(key)}
        has_room = self._hub.unanswered_tasks.has_room(client, len(new))
        # If all tasks are new, `counted_as_unanswered` refuses them.
        watched = keys if has_room else [key for key in keys if key not in new] or keys
        if len(watched) < len(keys):
            wait = min(wait, RETRY_SECONDS)  # then the others are tried again
        with self._clients.subscription(scope):
            with self._hub.counted_as_unanswered(watched, client=client):
                await take_turn(scope, tasks=len(watched))
                await self._service.read_arrived_messages()
            latest = self._latest_on_arrival(keys, watched, if_none_match, seen)
            with self._hub.subscribe(
                watched, SubscriptionKind.LONGPOLL, client=client, seen_revisions=seen
            ) as subscriber:
                async with DisconnectListener(scope, receive, subscriber.disconnect, tasks=len(watched)):
                    with subscriber.expiring(wait):
                        while not latest.is_over(subscriber):
                            await latest.wait_for_change(subscriber)
                            await take_turn(scope, tasks=len(watched))  # many may respond to one change
                            latest.take(subscriber)
                await self._service.read_arrived_messages()
        known: dict[TaskKey, LookupSuccess | LookupFailure] = {}
        for key in watched:
            outcome: LookupSuccess | LookupFailure | None = self._service.peek(key, seen.get(key, 0))
            if outcome is None and (failure := latest.failure(key)) is not None:
                outcome = LookupFailure(key, failure, CacheStatus.NEGATIVE)
            if outcome is not None:
                self._service.count_lookup(outcome)
                known[key] = outcome
        missing = [key for key in keys if key not in known]
        if missing:  # as in `ProgressEndpoint`: join the schedules' in-flight requests
            read = await self._read(scope, receive, missing, seen, others_known=bool(known))
            known = self._renewed(known, seen) | dict(zip(missing, read, strict=True))
        return [known[key] for key in keys]

    def _latest_on_arrival(
        self,
        keys: Sequence[TaskKey],
        watched: Sequence[TaskKey],
        if_none_match: str | None,
        seen: Mapping[TaskKey, int],
    ) -> _Latest:
        # A function of its own: no variable of a long poll has a snapshot, whose body may be large.
        refused, followed = _Item.of(too_many_tasks()), set(watched)
        items = {key: refused for key in keys if key not in followed}
        for key in watched:
            if (result := self._service.peek(key, seen.get(key, 0))) is not None:
                items[key] = _Item.of(result.snapshot)
        stale = {key: self._stale_code(key) for key in watched if key in items}
        return _Latest(keys, items, stale, if_none_match)


class _Item(NamedTuple):
    """What the tag of a batch depends on. A long poll keeps this instead of a snapshot with a large body."""

    digest: str  # of the body; empty for a failure
    terminal: bool
    failure: GatewayError | None

    @classmethod
    def of(cls, value: Snapshot | GatewayError) -> _Item:
        if isinstance(value, Snapshot):
            return cls(value.etag.partition(".")[0], value.terminal, None)
        return cls("", False, value)  # noqa: FBT003 - named above

    def text(self, stale: str | None) -> str:
        """Return a text that changes with the body and its `stale`, or with the problem."""
        return (
            f"{self.digest} {stale or ''}" if self.failure is None else f"{self.failure.code} {self.failure}"
        )


class _Latest:
    """The latest snapshot or failure of each task during a long poll."""

    def __init__(
        self,
        keys: Sequence[TaskKey],
        on_arrival: dict[TaskKey, _Item],
        stale: dict[TaskKey, str | None],
        if_none_match: str | None,
    ) -> None:
        self._keys = keys
        self._latest = on_arrival
        self._stale = stale
        if if_none_match is None:
            if_none_match = self._digest() if len(on_arrival) == len(keys) else ""
        self._if_none_match = if_none_match

    def failure(self, key: TaskKey) -> GatewayError | None:
        """Return the failure of a task, if it has no newer snapshot."""
        return self._latest[key].failure if key in self._latest else None

    async def wait_for_change(self, subscriber: Subscriber) -> None:
        """Return when the long poll must respond. Raises: ClientDisconnect."""
        while not self.is_over(subscriber):
            await subscriber.wait()
            self.take(subscriber)
            if subscriber.disconnected:
                raise ClientDisconnect

    def take(self, subscriber: Subscriber) -> None:
        """Take the unsent updates and overdue notices of the subscriber."""
        for update in subscriber.take_unsent():
            latest = update.snapshot or update.failure
            if latest is not None:
                self._latest[update.key] = _Item.of(latest)
        self._stale.update((each.key, each.code) for each in subscriber.take_overdue_notices())

    def is_over(self, subscriber: Subscriber) -> bool:
        """Tell whether the long poll must respond.

        Either the representation is complete, and has changed or ended, or the time is over.
        """
        if subscriber.must_end:
            return True
        if len(self._latest) < len(self._keys):
            return False
        # `*` matches every digest, so none is computed.
        changed = self._if_none_match != "*" and not matches(self._if_none_match, self._digest())
        return changed or all(
            item.terminal if item.failure is None else key in subscriber.not_found_keys
            for key, item in self._latest.items()
        )

    def _digest(self) -> str:
        return _digest(self._latest[key].text(self._stale.get(key)) for key in self._keys)


def _digest(texts: Iterable[str]) -> str:
    """Return the digest of a batch with these items; see `_Item.text`."""
    return digest_of("".join(f"{len(text)} {text}" for text in texts).encode())


def summarize(snapshots: list[Snapshot], *, errors: int, stale: int = 0) -> dict[str, Any]:
    """Return the summary of a batch: the mean `progress`, the largest `etaSeconds` of unfinished tasks."""
    counts: dict[str, int] = dict.fromkeys(Status, 0)
    for snapshot in snapshots:
        counts[snapshot.status or Status.UNKNOWN] += 1
    terminal = not errors and all(snapshot.terminal for snapshot in snapshots)
    # Without the zeros of ended tasks: a task with an unknown time left does not end now.
    etas = [eta for each in snapshots if not each.terminal and (eta := each.eta_seconds) is not None]
    progress = sum(snapshot.progress or 0.0 for snapshot in snapshots)
    return {
        "total": len(snapshots) + errors,
        **counts,
        "errors": errors,
        "stale": stale,
        "progress": round(progress / len(snapshots), 6) if snapshots else None,
        "etaSeconds": 0.0 if terminal else max(etas, default=None),
        "terminal": terminal,
    }
