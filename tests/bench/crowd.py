"""Connections that never finish their headers, and come again when they are closed.

    python crowd.py PORT SLOW IDLE SECONDS

The slow ones send a byte a second, the idle ones nothing. They come one after the other, within so
many seconds, and so they are closed and come again. "open" is said when all are connected; a line
on standard input ends them, and what they saw is said as JSON.
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
    """The connections, and how long each slow one was borne."""

    def __init__(self, port: int, number: int) -> None:
        self._port = port
        self._number = number
        self.complete = asyncio.Event()
        self.open = 0
        self.refused = 0
        self.borne: list[float] = []

    async def dawdle(self, *, after: float, slowly: bool) -> None:
        """Connect, send slowly or nothing, connect again when closed; until cancelled."""
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
                    self.borne.append(loop.time() - began)
            finally:
                self.open -= 1
                if sending is not None:
                    sending.cancel()
                writer.close()


async def _send(writer: asyncio.StreamWriter) -> None:
    for byte in itertools.chain(b"GET / HTTP/1.1\r\nX-Slow: ", itertools.repeat(ord("x"))):
        writer.write(bytes([byte]))
        await asyncio.sleep(_BYTE_SECONDS)


async def come(port: int, slow: int, idle: int, opening_seconds: float) -> None:
    """Connect them all, stay until a line comes in, and tell."""
    number = slow + idle
    crowd = Crowd(port, number)
    loop = asyncio.get_running_loop()
    # The slow ones evenly among the idle.
    kinds = [(place + 1) * slow // number > place * slow // number for place in range(number)]
    members = [
        loop.create_task(crowd.dawdle(after=place / number * opening_seconds, slowly=slowly))
        for place, slowly in enumerate(kinds)
    ]
    await crowd.complete.wait()
    _say("open")
    await asyncio.to_thread(sys.stdin.readline)
    seen = {"open": crowd.open, "refused": crowd.refused, "borne": crowd.borne}
    for member in members:
        member.cancel()
    await asyncio.gather(*members, return_exceptions=True)
    _say(json.dumps(seen))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.nice(19)  # it shares a core with the healthy client, and must not hold that up itself
    uvloop.run(come(*map(int, sys.argv[1:4]), float(sys.argv[4])))
