"""Cached responses over a store with a manual clock, for tests."""

import asyncio
from typing import Any, cast

from prometheus_client import CollectorRegistry

from gateway.api.cached_responses import CachedResponses
from gateway.api.trusted_hosts import TrustedHosts
from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.progress.service import ProgressService
from gateway.server.fast_path import HeadRenderer
from gateway.settings.model import Cache
from gateway.stores.memory import MemoryStore
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.upstream.client import UpstreamClient
from tests.support.seen import TAGS

KEY = TaskKey(Operation.SD_GET_PROGRESS, "abc")
TARGET = b"/v1/progress/abc"
SERVER_HEADERS = [(b"Server", b"100 %d")]


class Silence:
    """An upstream that never responds."""

    async def query(self, *_: object, **__: object) -> None:
        await asyncio.Event().wait()


class Bench:
    """Cached responses over a memory store and a manual clock; the upstream never responds."""

    def __init__(self, **given: Any) -> None:
        self.now = 1000.0
        self.store = MemoryStore(max_tasks=10, min_keep_stale_seconds=60, clock=self.clock)
        metrics = Metrics(CollectorRegistry(), gateway_version="test")
        self.registry = metrics.registry
        self.service = ProgressService(
            Cache(),
            store=self.store,
            upstream=cast("UpstreamClient", Silence()),
            metrics=metrics,
            tags=TAGS,
            timeout_seconds=10.0,
            clock=self.clock,
        )
        options: dict[str, Any] = {
            "tags": TAGS,
            "operations": list(Operation),
            "root_path": "",
            "hosts": TrustedHosts(["*"]),
            "cross_origin": False,
            "limiter": None,
            "log_sampler": LogSampler(clock=self.clock),
        }
        self.hits = CachedResponses(self.service, metrics=metrics, clock=self.clock, **(options | given))
        self.heads = HeadRenderer(self.hits.names)

    def clock(self) -> float:
        return self.now

    def keep(
        self, *, lifetime: float = 600.0, etag: str = '"one"', body: bytes = b"{}", version: int = 0
    ) -> Snapshot:
        """Store a snapshot that has just arrived; return it."""
        snapshot = Snapshot(
            KEY, self.now, lifetime, b"", Status.RUNNING, 0.5, None, body, etag, version=version
        )
        return self.store.put(snapshot)

    def ask(
        self,
        target: bytes = TARGET,
        headers: list[tuple[bytes, bytes]] | None = None,
        *,
        server_headers: list[tuple[bytes, bytes]] = SERVER_HEADERS,
    ) -> bytes | None:
        """Request a response and render it, as the server's fast path does."""
        traits = self.hits.traits([(b"x-request-id", b"mine"), *(headers or [])])
        found = traits and self.hits.answer(target, traits, ("127.0.0.1", 1))
        if not found:
            return None
        hit, request_id = found
        return b"%b%b\r\n\r\n%b" % (self.heads.render(hit, server_headers), request_id, hit.body)

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"sd_gateway_{name}", labels) or 0.0
