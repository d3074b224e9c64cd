"""Runs replicas, clients and random faults, and judges what the clients saw: a check of consistency.

    python -m tests.replicas.history --seed 3 --seconds 60

Starts a Valkey with a clock that can be stepped, a simulated upstream whose tasks move, and three
`sd-gateway serve`, each with a fault-injecting proxy between it and the store. The seed decides the faults
and what each client does next; times still differ from run to run. Prints violations by promise and by the
last fault before them, and a summary. The exit status is 1 if a promise was violated. `--faults freeze,evict`
selects some of the faults, `--save FILE` writes the history.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.simulator import create_simulator
from tests.replicas.asking import FAILURES, Connection, Rank, Reply, events, rank
from tests.replicas.fleet import SteppedStore, variables
from tests.replicas.judging import Answer, Call, Fault, History, Report, grouped, rebased, violations
from tests.support.fault_proxy import FaultProxy
from tests.support.harness import KEY, SECRET, Json, Process, free_port, plain_client, running, until

REPLICAS = 3
TASKS = 6  # that clients choose from
RUNNING_SECONDS = (5.0, 15.0)
TERMINAL_SECONDS = 3.0  # how long an ended task stays among them
EVICTED = 0.3  # of all keys, each time
SHOWN = 4  # violations of a promise that are printed for each fault


class Upstream:
    """A simulated upstream that notes which state it sent, and when."""

    def __init__(self, calls: list[Call], latency_seconds: float) -> None:
        self._calls = calls
        self._app: ASGIApp = create_simulator(pairs={KEY: SECRET}, latency_seconds=latency_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note a response of the vendor's operation."""
        if not scope["path"].startswith("/scc/"):
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                data = json.loads(message["body"]).get("data") or {}
                if "taskId" in data:
                    self._calls.append(Call(arrived, time.monotonic(), data["taskId"], sent_rank(data)))
            await send(message)

        await self._app(scope, receive, noting)


def sent_rank(data: Json) -> Rank:
    """Return the rank of the vendor's data; see `asking.rank`."""
    if data["status"] == "waiting":
        return (0, -float(data["lastQueueRemaining"]))
    return (1, -float(data["etaRelative"])) if data["status"] == "running" else (2, 0.0)


@dataclass
class Member:
    """A replica, on a port of its own that it keeps when it restarts, and its link to the store."""

    number: int
    folder: Path
    settings: Json
    proxy: FaultProxy
    port: int = field(default_factory=free_port)
    life: int = 0
    process: Process | None = None

    def start(self) -> None:
        """Start the process."""
        server = {"port": self.port, **self.settings.get("server", {})}
        self.process = Process("serve", cwd=self.folder, env=variables(self.settings | {"server": server}))

    def kill(self) -> None:
        """Kill the process."""
        assert self.process is not None
        self.process.signal(signal.SIGKILL)
        self.process.exit_status()
        self.life += 1

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process is not None
        self.process.signal(number)

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.alive:
            self.signal(signal.SIGKILL)
            self.process.exit_status()


@dataclass
class World:
    """Everything that runs, and what is known of it."""

    history: History
    store: SteppedStore
    members: list[Member]
    create: Callable[[Json], str]
    random: random.Random
    began: float
    ends: float
    tasks: list[str] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)
    harmed: set[int] = field(default_factory=set)

    @property
    def going_on(self) -> bool:
        return time.monotonic() < self.ends


# --- clients ----------------------------------------------------------------------------------------------


class Client:
    """A client that follows one task after the other at random replicas."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.random = random.Random(f"{world.random.random()} {name}")
        self.task = ""
        self.tag = ""
        self.known: Rank | None = None
        self.patience = self.random.choice([0.4, 20.0])
        self._connections = {member.number: Connection(member.port) for member in world.members}

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            async with connection:
                pass

    def choose(self) -> Member:
        """Return a replica; change to another task if this one has ended."""
        if not self.task or self.task not in self.world.tasks:
            self.task, self.tag, self.known = self.random.choice(self.world.tasks), "", None
        return self.random.choice(self.world.members)

    async def get(self, member: Member, path: str, headers: dict[str, str], kind: str) -> Reply | None:
        """Query a replica; record a missing answer."""
        sent, life = time.monotonic(), member.life
        connection = self._connections[member.number]
        patience = self.patience + (self.world.history.wait_seconds if kind == "long poll" else 0.0)
        try:
            async with asyncio.timeout(patience):
                return await connection.get(path, headers)
        except FAILURES as exc:
            given_up = isinstance(exc, TimeoutError) and patience < 10
            if not given_up:  # an impatient client proves nothing
                received = time.monotonic()
                self.world.history.answers.append(
                    Answer(sent, received, member.number, self.task, status=0, kind=kind, life=life)
                )
            await asyncio.sleep(0.02)
            return None

    def note(self, member: Member, life: int, reply: Reply, kind: str, named: Rank | None) -> Answer:
        """Record an answer for this client's task."""
        body, found = "", None
        if reply.status == 200:
            body, found = digest(reply.body), rank(reply.json())
        elif reply.status == 304:
            found = named
        else:
            body = reply.body.decode(errors="replace")
        answer = Answer(
            reply.sent,
            reply.received,
            member.number,
            self.task,
            status=reply.status,
            rank=found,
            named=named,
            etag=reply.headers.get("etag", ""),
            body=body,
            cache_status=reply.headers.get("cache-status", ""),
            kind=kind,
            life=life,
        )
        self.world.history.answers.append(answer)
        note_end(self.world, answer)
        return answer

    async def poll(self, *, every: tuple[float, float], tagged: bool, wait: bool = False) -> None:
        """Poll until the end, with the last tag or without one; or ask for long polls."""
        kind = "long poll" if wait else "poll"
        while self.world.going_on:
            member = self.choose()
            life = member.life
            named = self.known if tagged else None
            headers = {"If-None-Match": self.tag} if named is not None else {}
            query = f"?wait={self.world.history.wait_seconds:g}" if wait else ""
            reply = await self.get(member, f"/v1/progress/{self.task}{query}", headers, kind)
            if reply is not None:
                answer = self.note(member, life, reply, kind, named)
                if answer.status == 200:
                    self.tag, self.known = answer.etag, answer.rank
            await asyncio.sleep(self.random.uniform(*every))

    async def batch(self, *, every: float) -> None:
        """Ask for several tasks at once, with the last tag if the answer had one."""
        known: dict[str, Rank] = {}
        tag, tasks = "", list[str]()
        while self.world.going_on:
            member = self.choose()
            life = member.life
            if tasks != self.world.tasks[:4]:
                tasks, tag, known = self.world.tasks[:4], "", {}
            path = "/v1/progress?" + "&".join(f"taskId={task}" for task in tasks)
            reply = await self.get(member, path, {"If-None-Match": tag} if tag else {}, "batch")
            if reply is not None and reply.status == 200:
                for item in reply.json()["items"]:
                    if "error" in item:
                        continue
                    found = rank(item)
                    self.world.history.answers.append(
                        Answer(
                            reply.sent,
                            reply.received,
                            member.number,
                            item["taskId"],
                            rank=found,
                            named=known.get(item["taskId"]) if tag else None,
                            kind="batch",
                            life=life,
                        )
                    )
                    known[item["taskId"]] = found
                tag = reply.headers.get("etag", "")
            await asyncio.sleep(every)

    async def follow(self) -> None:
        """Follow streams; disconnect at random, and go on elsewhere with Last-Event-ID."""
        last_id = ""
        while self.world.going_on:
            before = self.task
            member = self.choose()
            if self.task != before:
                last_id = ""
            life, sent = member.life, time.monotonic()
            named = self.known if last_id else None
            with suppress(*FAILURES):
                async with (
                    asyncio.timeout(self.random.uniform(0.2, 4)),
                    aclosing(events(member.port, f"/v1/progress/{self.task}/events", last_id)) as stream,  # type: ignore[type-var]
                ):
                    async for event in stream:
                        if event.name != "progress":
                            continue
                        found = rank(json.loads(event.data))
                        answer = Answer(
                            sent,
                            event.received,
                            member.number,
                            self.task,
                            rank=found,
                            named=named,
                            etag=f'"{event.id}"',
                            body=digest(event.data.encode()),
                            kind="stream",
                            life=life,
                        )
                        self.world.history.answers.append(answer)
                        note_end(self.world, answer)
                        last_id, named, self.known = event.id, found, found
            await asyncio.sleep(self.random.uniform(0.0, 0.1))


def digest(body: bytes) -> str:
    """Return a short text that stands for a body."""
    return hashlib.blake2b(body, digest_size=8).hexdigest()


def note_end(world: World, answer: Answer) -> None:
    """Note when the first client saw the end of a task."""
    if answer.terminal:
        world.ended.setdefault(answer.task, answer.received)


async def supply(world: World) -> None:
    """Replace ended tasks by new ones."""
    while world.going_on:
        now = time.monotonic()
        kept = [task for task in world.tasks if now - world.ended.get(task, now) < TERMINAL_SECONDS]
        while len(kept) < TASKS:
            kept.append(await asyncio.to_thread(world.create, life(world.random)))
        world.tasks[:] = kept
        await asyncio.sleep(0.2)


def life(chance: random.Random) -> Json:
    """Return the life of a task that changes at each query."""
    return {
        "waitingSeconds": chance.uniform(0, 2),
        "runningSeconds": chance.uniform(*RUNNING_SECONDS),
        "steps": 100_000,
        "outcome": chance.choice(["succeeded", "succeeded", "failed", "canceled"]),
    }


async def watch_readiness(world: World, member: Member) -> None:
    """Ask a replica ten times a second whether it uses the store."""
    async with Connection(member.port) as connection:
        while world.going_on:
            with suppress(*FAILURES):
                async with asyncio.timeout(1):
                    reply = await connection.get("/readyz")
                lines = reply.json()["degraded"]
                up = reply.status == 200 and not any(line.startswith("store") for line in lines)
                world.history.reports.append(Report(reply.sent, reply.received, member.number, up))
            await asyncio.sleep(0.1)


# --- faults -----------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """One fault at work: what it is, and how to end it."""

    name: str
    member: Member | None
    seconds: float
    end: Callable[[], object]
    round_trip: float = 0.0


def _freeze(world: World, member: Member) -> Scenario:
    member.signal(signal.SIGSTOP)
    seconds = world.random.choice([0.06, 0.3, 1.0, 2.5, 4.5])
    return Scenario("freeze", member, seconds, lambda: member.signal(signal.SIGCONT))


def _kill(world: World, member: Member) -> Scenario:
    member.kill()
    return Scenario("kill", member, world.random.uniform(0, 2), member.start)


def _delay(world: World, member: Member) -> Scenario:
    there, back = (world.random.uniform(0, 0.015) for _ in range(2))
    member.proxy.delay(to_server=there, to_client=back)
    return Scenario("delay", member, world.random.uniform(2, 4), member.proxy.heal, there + back)


def _distant(world: World, member: Member) -> Scenario:
    there, back = (world.random.uniform(0.03, 0.3) for _ in range(2))
    member.proxy.delay(to_server=there, to_client=back)
    return Scenario("distant", member, world.random.uniform(2, 4), member.proxy.heal, there + back)


def _cut(world: World, member: Member) -> Scenario:
    to_server, to_client = world.random.choice([(True, False), (False, True), (True, True)])
    member.proxy.stall(to_server=to_server, to_client=to_client)
    return Scenario("cut", member, world.random.uniform(0.2, 4), member.proxy.heal)


def _half_open(world: World, member: Member) -> Scenario:
    member.proxy.half_open()
    member.proxy.drop()
    return Scenario("half-open", member, world.random.uniform(1, 4), member.proxy.heal)


def _drop(world: World, member: Member) -> Scenario:
    member.proxy.refuse()
    member.proxy.drop()
    return Scenario("drop", member, world.random.uniform(0, 2), member.proxy.heal)


def _clock(world: World, _: Member) -> Scenario:
    world.store.step(world.random.choice([-600, 600, -5, 5]))
    return Scenario("clock", None, 0, int)


def _evict(world: World, _: Member) -> Scenario:
    over, chance = threading.Event(), random.Random(world.random.random())

    def evict() -> None:
        while not over.wait(chance.uniform(0.01, 0.1)):
            with suppress(redis.RedisError):
                for name in world.store.client.scan_iter(count=10_000):
                    if chance.random() < EVICTED:
                        world.store.client.delete(name)

    thread = threading.Thread(target=evict)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return Scenario("evict", None, world.random.uniform(0.1, 2), end)


def _restart(world: World, _: Member) -> Scenario:
    world.store.kill()
    return Scenario("store restart", None, world.random.uniform(0, 3), world.store.start)


def _store_frozen(world: World, _: Member) -> Scenario:
    world.store.freeze()
    return Scenario("store frozen", None, world.random.uniform(0.1, 4), world.store.thaw)


def _read_only(world: World, _: Member) -> Scenario:
    world.store.client.replicaof("127.0.0.1", "1")
    return Scenario(
        "read-only", None, world.random.uniform(2.6, 4), lambda: world.store.client.replicaof("NO", "ONE")
    )


def _full(world: World, _: Member) -> Scenario:
    world.store.configure(maxmemory=1)
    return Scenario("full", None, world.random.uniform(2.6, 4), lambda: world.store.configure(maxmemory=0))


SCENARIOS: dict[str, Callable[[World, Member], Scenario]] = {
    "freeze": _freeze,
    "kill": _kill,
    "delay": _delay,
    "distant": _distant,
    "cut": _cut,
    "half-open": _half_open,
    "drop": _drop,
    "clock": _clock,
    "evict": _evict,
    "store-restart": _restart,
    "store-frozen": _store_frozen,
    "read-only": _read_only,
    "full": _full,
}


# These leave a replica as it is otherwise: they may overlap with another fault.
MILD = ("delay", "evict", "clock")


async def harm(world: World, names: Collection[str], *, first: float) -> None:
    """Apply one fault after the other, in a random order, each of them once before any is repeated."""
    if not names:
        return
    queue: list[str] = []
    await asyncio.sleep(first)
    while time.monotonic() < world.ends - 10:
        queue = queue or world.random.sample(sorted(names), len(names))
        free = [member for member in world.members if member.number not in world.harmed]
        await harm_once(world, queue.pop(), world.random.choice(free))
        await asyncio.sleep(world.random.uniform(2, 5))


async def harm_once(world: World, name: str, member: Member) -> None:
    """Apply a fault and end it."""
    world.harmed.add(member.number)
    began = time.monotonic()
    scenario = await asyncio.to_thread(SCENARIOS[name], world, member)
    try:
        await asyncio.sleep(scenario.seconds)
    finally:
        await asyncio.to_thread(scenario.end)
    ended = time.monotonic()
    world.harmed.discard(member.number)
    concerned = None if scenario.member is None else scenario.member.number
    world.history.faults.append(Fault(scenario.name, concerned, began, ended, scenario.round_trip))
    sys.stderr.write(
        f"{began - world.began:6.1f} s  {scenario.name}, {ended - began:.2f} s, "
        f"{'store' if concerned is None else f'replica {concerned}'}\n"
    )


# --- the run ----------------------------------------------------------------------------------------------


@contextmanager
def world(folder: Path, history: History, *, seed: int, seconds: float) -> Iterator[World]:
    """Start everything; `history` has the settings, and receives what happens."""
    upstream = Upstream(history.calls, history.upstream_seconds)
    with ExitStack() as stack:
        store = stack.enter_context(SteppedStore.valkey(folder))
        url = stack.enter_context(running(upstream, lifespan="off", date_header=False))
        control = stack.enter_context(plain_client(url))
        members = []
        for number in range(REPLICAS):
            proxy = stack.enter_context(FaultProxy(store.port))
            settings: Json = {
                "upstream": {
                    "endpoint": url,
                    "timeout_seconds": 10,
                    "attempt_timeout_seconds": 5,
                    "requests_per_second": 100,  # far away, but each call takes a permit from the store
                },
                "store": {"url": proxy.url, "timeout_seconds": history.store_timeout},
                "cache": {
                    "running_seconds": history.lifetime,
                    "waiting_seconds": history.lifetime,
                    "stale_while_revalidate_seconds": history.stale_seconds,
                },
            }
            member = Member(number, folder, settings, proxy)
            members.append(member)
            stack.callback(member.close)
            member.start()

        def create(life: Json) -> str:
            answer = control.post("/_simulator/tasks", json={"life": life})
            return str(answer.json()["taskId"])

        for member in members:
            with plain_client(f"http://127.0.0.1:{member.port}") as client:
                until(lambda client=client: shares(client), "the replica uses the store")  # type: ignore[misc]
        began = time.monotonic()
        chance = random.Random(seed)
        yield World(history, store, members, create, chance, began, began + seconds)


def shares(client: httpx.Client) -> bool:
    """Return whether a replica answers, and reports no problem with its store."""
    with suppress(ValueError, httpx.HTTPError):
        answer = client.get("/readyz")
        return answer.status_code == httpx.codes.OK and not answer.json()["degraded"]
    return False


async def live(world: World, names: list[str]) -> None:
    """Run clients and faults until the end."""
    world.tasks[:] = [await asyncio.to_thread(world.create, life(world.random)) for _ in range(TASKS)]

    clients: list[Client] = []

    def client(name: str) -> Client:
        clients.append(Client(world, name))
        return clients[-1]

    work: list[Awaitable[None]] = [
        supply(world),
        harm(world, names, first=3.0),
        harm(world, set(names) & set(MILD), first=10.0),
    ]
    work += [watch_readiness(world, member) for member in world.members]
    work += [client(f"tagged {n}").poll(every=(0.01, 0.06), tagged=True) for n in range(6)]
    work += [client(f"untagged {n}").poll(every=(0.1, 0.1), tagged=False) for n in range(6)]
    work += [client(f"fast {n}").poll(every=(0.01, 0.03), tagged=False) for n in range(3)]
    work += [client(f"long {n}").poll(every=(0.0, 0.05), tagged=True, wait=True) for n in range(4)]
    work += [client(f"stream {n}").follow() for n in range(6)]
    work += [client("batch").batch(every=0.1)]
    await asyncio.gather(*work)
    for each in clients:
        await each.close()
    await asyncio.sleep(0.1)  # the transports that were closed last


def summary(history: History, found: list[str]) -> str:
    """Return what happened, in a few lines."""
    kinds = Counter(answer.kind for answer in history.answers)
    statuses = Counter(answer.status for answer in history.answers)
    faults = Counter(fault.name for fault in history.faults)
    promises = Counter(line.split()[0] for line in found)

    def counts(counter: Counter[Any]) -> str:
        return ", ".join(f"{name} {number}" for name, number in sorted(counter.items())) or "none"

    return (
        f"answers     {len(history.answers)}: {counts(kinds)}\n"
        f"statuses    {counts(statuses)}\n"
        f"calls       {len(history.calls)} for {len({call.task for call in history.calls})} tasks\n"
        f"faults      {counts(faults)}\n"
        f"violations  {len(found)}: {counts(promises)}"
    )


def run(*, seed: int, seconds: float, names: list[str], **settings: float) -> History:
    """Run once with these `settings` of `History`; return the history."""
    history = History(replicas=REPLICAS, **settings)  # type: ignore[arg-type]  # all are numbers
    with (
        tempfile.TemporaryDirectory() as folder,
        world(Path(folder), history, seed=seed, seconds=seconds) as given,
    ):
        asyncio.run(live(given, names))
        return rebased(given.history, given.began)


def main() -> int:
    """Run with the arguments of the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--faults", default=",".join(SCENARIOS), help="comma separated; empty: none")
    parser.add_argument("--save", type=Path, help="write the history as JSON")
    given = parser.parse_args()
    names = [name for name in given.faults.split(",") if name]
    if unknown := set(names) - set(SCENARIOS):
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}")
    # The collector takes 0.3 s for the answers of ten minutes, and stops clients and upstream meanwhile.
    gc.disable()
    history = run(seed=given.seed, seconds=given.seconds, names=names)
    if given.save:
        given.save.write_text(json.dumps(asdict(history)))
    found = violations(history)
    groups = grouped(history, found)
    for name, lines in groups.items():
        print(f"{name}: {len(lines)}")  # noqa: T201
        for line in lines[:SHOWN]:
            print(f"    {line}")  # noqa: T201
    print(summary(history, found))  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
