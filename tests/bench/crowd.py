"""Connections that never finish their headers, and reconnect when they are closed.

    python crowd.py PORT SLOW IDLE SECONDS

Slow connections send one byte per second, idle ones nothing. They are opened evenly over SECONDS, so they are
also closed and opened again evenly. The program prints "open" when all are connected. A line on standard
input ends it; it then prints its counts as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from contextlib import suppress

import uvloop

_BYTE_SECONDS = 1.0


class Crowd:
    """The connections, and the lifetime of each slow one."""

    def __init__(self, port: int, number: int) -> None:
        self._port = port
        self._number = number
        self.complete = asyncio.Event()
        self.open = 0
        self.refused = 0
        self.lifetimes: list[float] = []

    async def hold(self, *, after: float, slowly: bool) -> None:
        """Connect, send slowly or nothing, and reconnect when closed, until cancelled."""
        await asyncio.sleep(after)
        loop = asyncio.get_running_loop()
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                self.refused += 1
                await asyncio.sleep(_BYTE_SECONDS)
                continue
            began = loop.time()
            self.open += 1
            if self.open == self._number:
                self.complete.set()
            sending = loop.create_task(_send(writer)) if slowly else None
            try:
                with suppress(OSError):
                    await reader.read()  # until it is closed
                if slowly:
                    self.lifetimes.append(loop.time() - began)
            finally:
                self.open -= 1
                if sending is not None:
                    sending.cancel()
                writer.close()


async def _send(writer: asyncio.StreamWriter) -> None:
    for byte in itertools.chain(b"GET / HTTP/1.1\r\nX-Slow: ", itertools.repeat(ord("x"))):
        writer.write(bytes([byte]))
        await asyncio.sleep(_BYTE_SECONDS)


async def run(port: int, slow: int, idle: int, opening_seconds: float) -> None:
    """Open all connections, wait for a line of input, and print the counts."""
    number = slow + idle
    crowd = Crowd(port, number)
    loop = asyncio.get_running_loop()
    # Slow connections are spread evenly among the idle ones.
    kinds = [(place + 1) * slow // number > place * slow // number for place in range(number)]
    members = [
        loop.create_task(crowd.hold(after=place / number * opening_seconds, slowly=slowly))
        for place, slowly in enumerate(kinds)
    ]
    await crowd.complete.wait()
    _print("open")
    await asyncio.to_thread(sys.stdin.readline)
    seen = {"open": crowd.open, "refused": crowd.refused, "lifetimes": crowd.lifetimes}
    for member in members:
        member.cancel()
    await asyncio.gather(*members, return_exceptions=True)
    _print(json.dumps(seen))


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.nice(19)  # low priority, because it shares a core with the healthy client
    uvloop.run(run(*map(int, sys.argv[1:4]), float(sys.argv[4])))
