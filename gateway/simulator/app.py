"""The simulated upstream as an application: the vendor's operations and the control API."""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from random import Random, SystemRandom
from typing import Any

from cachetools import FIFOCache
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.simulator.api_gateway import Gate
from gateway.simulator.call_record import CallRecord
from gateway.simulator.control import Control, explain
from gateway.simulator.faults import Call, Faults
from gateway.simulator.images import image_route
from gateway.simulator.json_bodies import ControlError, envelope, parse_object
from gateway.simulator.limit import Limit
from gateway.simulator.tasks import DEFAULT_LIFE, OPERATIONS, Life, Task

MAX_TASKS = 100_000
MAX_LOGGED_BODY = 65_536


def create_simulator(
    *,
    pairs: Mapping[str, str],
    clock: Callable[[], float] = time.time,
    latency_seconds: float = 0.0,
    life: Life = DEFAULT_LIFE,
    limit: int = 0,
    faults: Iterable[Mapping[str, Any] | None] = (),
    random: Random | None = None,
) -> Starlette:
    """Return the simulated upstream as an ASGI application.

    `pairs` maps access keys to secrets and is looked up at each request. `clock` returns Unix seconds: the
    simulator's time, also in `Date`. Every response of a vendor operation takes `latency_seconds`. `life` is
    the default life of tasks. `limit`: maximum calls per second, others are throttled; 0: no limit. `faults`
    are active from the start, in the form of control requests. `random` generates task IDs and decides the
    probability of faults.

    Raises: ControlError for an invalid fault; None among `faults` stands for text that was no JSON object.
    """
    random = random or SystemRandom()
    gate, active_faults, calls = Gate(pairs, clock=clock), Faults(random), CallRecord()
    flow_limit = Limit(gate, clock=clock)
    flow_limit.calls = limit
    for given in faults:
        active_faults.put(given)
    tasks: FIFOCache[str, Task] = FIFOCache(MAX_TASKS)
    vendor = Vendor(
        gate=gate,
        limit=flow_limit,
        tasks=tasks,
        faults=active_faults,
        calls=calls,
        clock=clock,
        latency_seconds=latency_seconds,
    )
    control = Control(
        gate=gate,
        limit=flow_limit,
        tasks=tasks,
        faults=active_faults,
        calls=calls,
        clock=clock,
        random=random,
        life=life,
    )
    return Starlette(
        routes=[Route("/scc/{operation:path}", vendor), image_route(clock), *control.routes()],
        exception_handlers={ControlError: explain},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Vendor:
    """`/scc/…` as a plain ASGI application: faults need access to the protocol."""

    gate: Gate
    limit: Limit
    tasks: Mapping[str, Task]
    faults: Faults
    calls: CallRecord
    clock: Callable[[], float]
    latency_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:  # Date and X-Ca-Request-Id in every response
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["date"] = formatdate(self.clock(), usegmt=True)
                headers["x-ca-request-id"] = str(uuid.uuid4()).upper()
            await send(message)

        with suppress(ClientDisconnect), self.calls.in_flight():
            answer = await self._answer(Request(scope, receive))
            await answer(scope, receive, send_with_headers)

    async def _answer(self, request: Request) -> ASGIApp:
        operation, target = request.path_params["operation"], _target(request.scope)
        body = await request.body()
        self.calls.requests.append(
            {
                "method": request.method,
                "target": target,
                "headers": request.headers.items(),
                "body": body[:MAX_LOGGED_BODY].decode(errors="replace"),
            }
        )
        now, task_id = self.clock(), _task_id(body)
        if operation in OPERATIONS:
            self.calls.count(operation, task_id, now)
        base_url = f"{request.url.scheme}://{request.url.netloc}"
        refusal = self._refusal(request, operation, target, body)
        # A response has the state at the arrival of its call, however late it is sent: so responses can
        # overtake.
        throttled = None if refusal else self.limit.check()
        answer = refusal or throttled or self._normal_response(operation, task_id, now, base_url)
        call = Call(operation, task_id, answer, self.gate.legacy, request.receive)
        if self.latency_seconds:
            await call.pause(self.latency_seconds)
        if refusal:
            self.calls.refused += 1
            return refusal  # faults apply to accepted calls only: none may hide a wrong signature
        if throttled:
            return throttled
        return await self.faults.apply(call)

    def _refusal(self, request: Request, operation: str, target: str, body: bytes) -> Response | None:
        if operation not in OPERATIONS:
            return self.gate.refuse(404, "API Not Found")
        if request.method != "POST":
            return self.gate.refuse(405, "Unsupported Method", "I405UM")
        return self.gate.check(request.method, target, request.headers, body)

    def _normal_response(self, operation: str, task_id: str | None, now: float, base_url: str) -> Response:
        # The vendor documents no error codes; the simulator defines these two.
        if task_id is None:
            return envelope(None, err_code="INVALID_PARAMETER", err_message="taskId is missing")
        task = self.tasks.get(task_id)
        if task is None or not task.known(now):
            return envelope(None, err_code="TASK_NOT_FOUND", err_message="the task does not exist")
        return envelope(task.data(operation, now, base_url=base_url))


def _target(scope: Scope) -> str:
    # As sent, not decoded: this text is signed.
    path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _task_id(body: bytes) -> str | None:
    value = (parse_object(body) or {}).get("taskId")
    return value if isinstance(value, str) and value else None
