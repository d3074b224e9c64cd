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

from gateway.simulator.control import Control, explain
from gateway.simulator.faults import Call, Faults
from gateway.simulator.gate import Gate
from gateway.simulator.ledger import Ledger
from gateway.simulator.limit import Limit
from gateway.simulator.tasks import DEFAULT_LIFE, OPERATIONS, Life, Task
from gateway.simulator.wire import ControlError, envelope, parse_object

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

    `pairs` maps access keys to secrets and is looked up at each request. `clock` gives Unix seconds:
    what the simulator believes is now, and says in `Date`. Every answer of a vendor operation takes
    `latency_seconds`; a task made without a life of its own has `life`. `limit` is how many calls a
    second are taken, the others being throttled; 0: all. `faults` are in force from the start, each
    as a control request would set it. `random` draws task IDs and the chance of faults.

    Raises: ControlError for a fault that makes no sense, or None where there was no JSON object.
    """
    random = random or SystemRandom()
    gate, played, ledger = Gate(pairs, clock=clock), Faults(random), Ledger()
    flow = Limit(gate, clock=clock)
    flow.calls = limit
    for given in faults:
        played.put(given)
    tasks: FIFOCache[str, Task] = FIFOCache(MAX_TASKS)
    vendor = Vendor(
        gate=gate,
        limit=flow,
        tasks=tasks,
        faults=played,
        ledger=ledger,
        clock=clock,
        latency_seconds=latency_seconds,
    )
    control = Control(
        gate=gate,
        limit=flow,
        tasks=tasks,
        faults=played,
        ledger=ledger,
        clock=clock,
        random=random,
        life=life,
    )
    return Starlette(
        routes=[Route("/scc/{operation:path}", vendor), *control.routes()],
        exception_handlers={ControlError: explain},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Vendor:
    """`/scc/…`, as bare ASGI: faults need the protocol, and every answer is stamped."""

    gate: Gate
    limit: Limit
    tasks: Mapping[str, Task]
    faults: Faults
    ledger: Ledger
    clock: Callable[[], float]
    latency_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["date"] = formatdate(self.clock(), usegmt=True)
                headers["x-ca-request-id"] = str(uuid.uuid4()).upper()
            await send(message)

        with suppress(ClientDisconnect), self.ledger.flight():
            answer = await self._answer(Request(scope, receive))
            await answer(scope, receive, stamped)

    async def _answer(self, request: Request) -> ASGIApp:
        operation, target = request.path_params["operation"], _target(request.scope)
        body = await request.body()
        self.ledger.requests.append(
            {
                "method": request.method,
                "target": target,
                "headers": request.headers.items(),
                "body": body[:MAX_LOGGED_BODY].decode(errors="replace"),
            }
        )
        now, task_id = self.clock(), _task_id(body)
        if operation in OPERATIONS:
            self.ledger.count(operation, task_id, now)
        refusal = self._refusal(request, operation, target, body)
        # An answer is as of its call's arrival, however late it is sent: so answers can overtake.
        throttled = None if refusal else self.limit.judge()
        answer = refusal or throttled or self._right_answer(operation, task_id, now)
        call = Call(operation, task_id, answer, self.gate.legacy, request.receive)
        if self.latency_seconds:
            await call.pause(self.latency_seconds)
        if refusal:
            self.ledger.refused += 1
            return refusal  # faults play on accepted calls only: none may hide a wrong signature
        if throttled:
            return throttled
        return await self.faults.play(call)

    def _refusal(self, request: Request, operation: str, target: str, body: bytes) -> Response | None:
        if operation not in OPERATIONS:
            return self.gate.refuse(404, "API Not Found")
        if request.method != "POST":
            return self.gate.refuse(405, "Unsupported Method", "I405UM")
        return self.gate.judge(request.method, target, request.headers, body)

    def _right_answer(self, operation: str, task_id: str | None, now: float) -> Response:
        # The vendor documents no error codes: these two are the simulator's own.
        if task_id is None:
            return envelope(None, err_code="INVALID_PARAMETER", err_message="taskId is missing")
        task = self.tasks.get(task_id)
        if task is None or not task.known(now):
            return envelope(None, err_code="TASK_NOT_FOUND", err_message="the task does not exist")
        return envelope(task.data(operation, now))


def _target(scope: Scope) -> str:
    # As sent, undecoded: that is what was signed.
    path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    return f"{path}?{query}" if query else path


def _task_id(body: bytes) -> str | None:
    value = (parse_object(body) or {}).get("taskId")
    return value if isinstance(value, str) and value else None
