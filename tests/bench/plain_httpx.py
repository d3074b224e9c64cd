"""A service without a gateway: the httpx client with signed calls, a fixed number in flight.

    python plain_httpx.py PORT IN_FLIGHT SECONDS

prints the number of calls and the CPU seconds used, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid

import httpx
import uvloop

from gateway.domain.envelope import read_envelope
from gateway.domain.task import Operation, TaskKey
from gateway.upstream.signing import signed_headers

_OPERATION = Operation.SD_GET_PROGRESS


async def call(port: int, in_flight: int, seconds: float) -> tuple[int, float]:
    """Make calls for this time; return their number and their CPU seconds."""
    calls = 0
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", limits=limits, trust_env=False
    ) as client:
        ends = time.monotonic() + seconds
        used = time.process_time()

        async def work() -> None:
            nonlocal calls
            while time.monotonic() < ends:
                task_id = uuid.uuid4().hex
                body = json.dumps({"taskId": task_id}).encode()
                headers = signed_headers(
                    _OPERATION.path,
                    body,
                    access_key="bench-key",
                    secret_key="bench-secret",
                    timestamp_ms=int(time.time() * 1000),
                    nonce=str(uuid.uuid4()),
                )
                response = await client.post(_OPERATION.path, content=body, headers=headers)
                read_envelope(response.content, TaskKey(_OPERATION, task_id), redact=str)
                calls += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work())
        return calls, time.process_time() - used


if __name__ == "__main__":
    json.dump(uvloop.run(call(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))), sys.stdout)
