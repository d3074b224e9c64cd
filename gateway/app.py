"""The composition root: creates, connects, opens and closes all components."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from copy import copy
from functools import partial
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway import __version__
from gateway.api import operator_endpoints
from gateway.api.batch import BatchEndpoint
from gateway.api.cached_responses import CachedResponses, CachedResponsesFirst
from gateway.api.client_limits import ClientLimits, ClientTokenBuckets, RateLimitMiddleware
from gateway.api.events import EventsEndpoint
from gateway.api.metrics_port import metrics_application
from gateway.api.middleware.client_address import ClientAddress
from gateway.api.middleware.cross_site import Cors, SameSite
from gateway.api.middleware.host_and_prefix import HostAndPrefix
from gateway.api.middleware.telemetry import RequestTelemetry
from gateway.api.pages import Pages, simulator_origin
from gateway.api.problems import Problems
from gateway.api.progress import ProgressEndpoint
from gateway.api.results import ResultsEndpoint
from gateway.api.task_parameters import TaskParameters
from gateway.api.trusted_hosts import TrustedHosts
from gateway.api.vendor_paths import UnknownOperation, VendorEndpoint
from gateway.domain.entity_tag import EntityTags
from gateway.progress.service import ProgressService
from gateway.server.application_parts import Application, FastPath
from gateway.server.graceful_shutdown import GracefulShutdown
from gateway.settings.model import Limits, Server, Settings
from gateway.stores.base import Store
from gateway.stores.create_store import create_store
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from gateway.telemetry.tracing import NoTracing, Tracing
from gateway.upstream.client import UpstreamClient
from gateway.upstream.credential_rotation import CredentialRotation
from gateway.upstream.credentials import Credentials
from gateway.upstream.loop_detection import USER_AGENT
from gateway.upstream.signed_calls import SignedCalls
from gateway.watch.hub import WatchHub

_ANY_ADDRESS = {"*", "0.0.0.0/0", "::/0"}  # in server.trusted_proxies

log = structlog.get_logger(__name__)


def create_app(settings: Settings, *, redactor: Redactor, tracing: Tracing | None = None) -> Application:
    """Create the application, which opens its resources in its lifespan.

    `redactor` learns the secrets when they are loaded; the log configuration must use the same one. `tracing`
    is closed with the application.

    Raises: SettingsError when an optional package is missing, or a secret file cannot be read.
    """
    tracing = tracing or NoTracing()
    metrics = Metrics(CollectorRegistry(), gateway_version=__version__)
    credentials = Credentials(settings.credentials, redactor=redactor, metrics=metrics)
    tags = EntityTags(
        lambda: None if credentials.signing_pair is None else credentials.signing_pair.pair.secret_key
    )
    store = create_store(
        settings,
        tags=tags,
        identity=partial(_account, settings, credentials),
        redactor=redactor,
        metrics=metrics,
    )
    metrics.measure_cache(
        entries=store.__len__,
        size=store.size,
        max_entries=settings.cache.max_tasks,
        max_bytes=settings.cache.max_bytes,
    )
    signed_calls = SignedCalls(
        settings.upstream, redactor=redactor, metrics=metrics, user_agent=USER_AGENT, tracing=tracing
    )
    rotation = CredentialRotation(credentials, refusal_seconds=settings.cache.error_seconds)
    upstream = UpstreamClient(
        settings.upstream,
        signed_calls=signed_calls,
        rotation=rotation,
        metrics=metrics,
        take_permits=store.take_permits if settings.store.url.get_secret_value() else None,
        announce_throttling=store.announce_throttling,
    )
    store.add_throttling_listener(upstream.slow_down)
    service = ProgressService(
        settings.cache,
        store=store,
        upstream=upstream,
        metrics=metrics,
        tags=tags,
        timeout_seconds=settings.upstream.timeout_seconds,
        tracing=tracing,
    )
    hub = WatchHub(settings.watch, service=service, store=store, metrics=metrics)
    shutdown = GracefulShutdown()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(tracing.aclose)
            await stack.enter_async_context(store)
            await stack.enter_async_context(signed_calls)
            stack.push_async_callback(service.aclose)
            stack.push_async_callback(hub.aclose)
            await stack.enter_async_context(_running(credentials.poll_files()))
            await stack.enter_async_context(_running(_announce_shutdown(shutdown, hub)))
            _log_start(settings, signed_calls, has_any_pair=credentials.has_any_pair)
            yield
        log.info("stopped")

    why_not_ready = partial(_why_not_ready, shutdown, store, credentials)

    def degraded() -> list[str]:
        store_trouble = [f"store: {store.trouble}"] if store.trouble else []
        return [
            *(f"upstream: {signed_calls.format_with_cause(code)}" for code in upstream.problem_codes),
            *store_trouble,
            *credentials.describe_faults(),
            *rotation.describe_faults(),
        ]

    def signing_key_pair() -> dict[str, Any] | None:
        signing = credentials.signing_pair
        return None if signing is None else {"slot": signing.slot, "generation": signing.generation}

    pages = Pages(
        root_path=settings.server.root_path, image_origin=simulator_origin(settings.upstream.endpoint)
    )
    problems = Problems([operation.path for operation in settings.upstream.operations], pages)
    limiter = _limiter(settings.limits)
    clients = ClientLimits(limiter, max_subscriptions=settings.limits.subscriptions_per_client)
    app = Starlette(
        routes=[
            *_task_routes(settings, service, hub, clients=clients, metrics=metrics, tags=tags),
            *_vendor_routes(settings, service),
            Route("/healthz", operator_endpoints.healthz),
            Route("/readyz", operator_endpoints.readyz(why_not_ready, degraded, signing_key_pair)),
            *(
                []
                if settings.server.metrics_port
                else [Route("/metrics", operator_endpoints.metrics(metrics.registry))]
            ),
            Route("/openapi.json", operator_endpoints.openapi()),
            *pages.routes(),
            operator_endpoints.OptionsRoute(),
        ],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    server, log_sampler, hosts = settings.server, LogSampler(), TrustedHosts(settings.server.allowed_hosts)
    with_middleware = _add_middleware(
        app.router,
        server,
        hosts=hosts,
        limiter=limiter,
        metrics=metrics,
        problems=problems,
        log_sampler=log_sampler,
    )
    app.middleware_stack = with_middleware
    metrics_asgi = metrics_application(metrics.registry, problems=problems)
    if not isinstance(tracing, NoTracing):  # the request's span is the outermost layer, and records hits, too
        app.middleware_stack = _with_spans(with_middleware, tracing, root_path=server.root_path)
        return Application(app, metrics_asgi, metrics, shutdown)
    hits = CachedResponses(
        service,
        tags=tags,
        operations=settings.upstream.operations,
        root_path=server.root_path,
        hosts=hosts,
        cross_origin=bool(server.cors_origins),
        limiter=limiter,
        address_headers=server.client_address_headers,
        metrics=metrics,
        log_sampler=log_sampler,
        set_client=with_middleware.set_client,
    )
    behind_fast_path = copy(app)
    app.middleware_stack = CachedResponsesFirst(with_middleware, hits=hits)
    if not server.edge:
        return Application(app, metrics_asgi, metrics, shutdown)
    return Application(app, metrics_asgi, metrics, shutdown, FastPath(hits, behind_fast_path))


def _why_not_ready(shutdown: GracefulShutdown, store: Store, credentials: Credentials) -> list[str]:
    reasons = {
        "draining": shutdown.begun.is_set(),
        # Without the store, a new replica would repeat the queries of the others.
        "connecting to the store": store.starting,
        "no credentials": not credentials.has_any_pair,
    }
    return [reason for reason, applies in reasons.items() if applies]


def _with_spans(app: ASGIApp, tracing: Tracing, *, root_path: str) -> ASGIApp:
    from gateway.api.middleware.request_spans import RequestSpans  # noqa: PLC0415  # its SDK is an extra
    from gateway.telemetry.opentelemetry import OpenTelemetryTracing  # noqa: PLC0415

    if not isinstance(tracing, OpenTelemetryTracing):
        return app
    return RequestSpans(app, tracer=tracing.tracer, root_path=root_path)


def _log_start(settings: Settings, signed_calls: SignedCalls, *, has_any_pair: bool) -> None:
    proxy = signed_calls.proxy
    through = {} if proxy is None else {"proxy": proxy.shown, "proxy_source": proxy.source}
    log.info("started", version=__version__, endpoint=settings.upstream.endpoint, **through)
    if not has_any_pair:
        log.warning("credentials_missing", effect="not ready, queries fail", hint="run `sd-gateway check`")
    if settings.limits.requests_per_second:
        _warn_if_limit_is_evadable(settings.server)


def _account(settings: Settings, credentials: Credentials) -> str:
    """Return what identifies the vendor's account: replicas share data only if it is the same."""
    signing = credentials.signing_pair
    access_key = "" if signing is None else signing.pair.access_key
    return f"{settings.upstream.endpoint}\n{settings.upstream.stage}\n{access_key}"


def _warn_if_limit_is_evadable(server: Server) -> None:
    headers = server.client_address_headers
    if headers and _ANY_ADDRESS & {*server.trusted_proxies}:
        log.warning(
            "client_rate_limit_evadable",
            setting="server.trusted_proxies",
            effect=f"any client can choose its address by {' or '.join(headers)}",
        )


def _limiter(limits: Limits) -> ClientTokenBuckets | None:
    return ClientTokenBuckets(limits.requests_per_second) if limits.requests_per_second else None


def _add_middleware(
    app: ASGIApp,
    server: Server,
    *,
    hosts: TrustedHosts,
    limiter: ClientTokenBuckets | None,
    metrics: Metrics,
    problems: Problems,
    log_sampler: LogSampler,
) -> ClientAddress:
    if limiter is not None:
        app = RateLimitMiddleware(app, limiter=limiter)
    app = SameSite(app, origins=server.cors_origins)
    if server.cors_origins:
        app = Cors(app, server=server, problems=problems)
    app = HostAndPrefix(app, root_path=server.root_path, hosts=hosts)
    app = RequestTelemetry(app, metrics=metrics, problems=problems, log_sampler=log_sampler)
    return ClientAddress(app, trusted_proxies=server.trusted_proxies, headers=server.client_address_headers)


def _task_routes(
    settings: Settings,
    service: ProgressService,
    hub: WatchHub,
    *,
    clients: ClientLimits,
    metrics: Metrics,
    tags: EntityTags,
) -> list[BaseRoute]:
    tasks = TaskParameters(settings.upstream.operations, max_tasks=settings.limits.max_tasks_per_request)
    events = EventsEndpoint(
        hub,
        tasks=tasks,
        tags=tags,
        clients=clients,
        metrics=metrics,
        heartbeat_seconds=settings.watch.heartbeat_seconds,
    )
    one = ProgressEndpoint(
        service,
        hub,
        tasks=tasks,
        tags=tags,
        clients=clients,
        max_wait_seconds=settings.watch.max_wait_seconds,
    )
    batch = BatchEndpoint(
        service,
        hub,
        tasks=tasks,
        tags=tags,
        clients=clients,
        max_wait_seconds=settings.watch.max_wait_seconds,
    )
    results = ResultsEndpoint(service, tasks=tasks)
    return [
        Route("/v1/progress/{taskId}", one, methods=["GET"]),
        Route("/v1/progress/{taskId}/events", events, methods=["GET"]),
        Route("/v1/progress/{taskId:path}", one, methods=["GET"]),
        Route("/v1/progress", batch, methods=["GET"]),
        Route("/v1/events", events, methods=["GET"]),
        Route("/v1/results/{taskId}", results, methods=["GET"]),
        Route("/v1/results/{taskId:path}", results, methods=["GET"]),
    ]


def _vendor_routes(settings: Settings, service: ProgressService) -> list[BaseRoute]:
    operations = settings.upstream.operations
    routes = [
        Route(
            operation.path,
            VendorEndpoint(
                operation,
                service,
                max_body_bytes=settings.limits.max_body_bytes,
                body_seconds=settings.server.header_seconds,
            ),
        )
        for operation in operations
    ]
    return [*routes, Route("/scc/{path:path}", UnknownOperation(operations))]


async def _announce_shutdown(shutdown: GracefulShutdown, hub: WatchHub) -> None:
    await shutdown.begun.wait()
    hub.begin_shutdown()


@asynccontextmanager
async def _running(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run a background task for as long as the context is open."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
