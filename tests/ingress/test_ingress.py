"""The gateway behind real reverse proxies: what clients use, idle connections, and a shutdown."""

import asyncio
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import httpx
import pytest

from tests.ingress.proxies import INGRESSES, Backend, Ingress, nginx_keepalive
from tests.support.harness import (
    KEY,
    SECRET,
    Gateway,
    Process,
    Simulator,
    plain_client,
    serving,
    until,
)
from tests.support.programs import needs
from tests.support.proxies import Address, buffering_nginx

pytestmark = pytest.mark.timeout(180)

QUICK = {"running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2}
CLIENTS = 200
IDLE_SECONDS = 1.0  # the proxy then closes an idle connection to the gateway
POSTING_SECONDS = 4.0
LOADING_CLIENTS = 20

Launch = Callable[..., Gateway]


@pytest.fixture(params=INGRESSES)
def ingress(request: pytest.FixtureRequest) -> Ingress:
    """Return a proxy."""
    return INGRESSES[request.param]


@contextmanager
def behind(
    ingress: Ingress,
    folder: Path,
    *gates: Gateway,
    idle: float | None = None,
    fails_over: bool = False,
) -> Iterator[Gateway]:
    """Run a proxy in front of gateways; yield a client of it, once it passes requests on."""
    servers = [f"{host}:{port}" for host, port in (gate.address for gate in gates)]
    with (
        ingress.run(folder, Backend(servers, idle, fails_over)) as (host, port),
        plain_client(f"http://{host}:{port}") as client,
    ):
        # Traefik reads its routes, and HAProxy checks its servers, after they listen.
        until(lambda: client.get("/healthz").status_code == 200, "the proxy passes requests on")
        yield Gateway(client)


@pytest.fixture
def front(ingress: Ingress, tmp_path: Path, simulator: Simulator, launch: Launch) -> Iterator[Gateway]:
    """Run a proxy in front of a gateway whose snapshots become stale quickly."""
    gate = launch(simulator.url, cache=QUICK)
    with behind(ingress, tmp_path, gate) as front:
        yield front


# What clients use


def test_ingress_serves_the_page(front: Gateway) -> None:
    """The page, its scripts and the OpenAPI document arrive complete."""
    page = front.client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.text.rstrip().endswith("</html>")
    assert front.client.get("/openapi.json").json()["openapi"].startswith("3.1")


def test_ingress_returns_entity_tags(
    ingress: Ingress, tmp_path: Path, simulator: Simulator, launch: Launch
) -> None:
    """A tag that a client sends back gives 304, also if the proxy has compressed the response and the tag."""
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate = launch(simulator.url)
    with behind(ingress, tmp_path, gate) as front:
        first = front.get(task)
        assert (first.status_code, first.json()["progress"]) == (200, 0.25)
        assert (first.headers.get("content-encoding") == "gzip") == ingress.compresses
        assert ("-gzip" in first.headers["etag"]) == ingress.compresses
        again = front.get(task, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = front.client.head(f"/v1/progress/{task}")
        assert (head.status_code, head.content) == (200, b"")


def test_ingress_passes_long_polls(front: Gateway, simulator: Simulator) -> None:
    """A long poll returns when the task changes, and with 304 when its time is up."""
    task = simulator.task(data={"status": "running", "progress": 0.25})
    etag = front.get(task).headers["etag"]
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(front.get, task, params={"wait": "20"}, headers={"If-None-Match": etag})
        until(lambda: poll.done() or front.metric("watchers", kind="longpoll") == 1, "the poll waits")
        assert not poll.done()
        simulator.script(task, status="running", progress=0.5)
        response = poll.result()
    assert (response.status_code, response.json()["progress"]) == (200, 0.5)
    etag = response.headers["etag"]
    assert front.get(task, params={"wait": "1"}, headers={"If-None-Match": etag}).status_code == 304


def progress_of(lines: Iterator[str]) -> Iterator[float]:
    """Yield the progress of each event of a stream; end with the stream's end event."""
    for line in lines:
        if line.startswith("event: end"):
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))["progress"]


def test_ingress_passes_events_one_by_one(front: Gateway, simulator: Simulator) -> None:
    """Each event arrives before the next change, and the stream ends with the task."""
    task = simulator.task(data={"status": "running", "progress": 0.0})
    with front.client.stream("GET", f"/v1/progress/{task}/events") as stream:
        assert stream.status_code == 200
        events = progress_of(stream.iter_lines())
        for step in range(1, 4):
            assert next(events) == (step - 1) / 10
            simulator.script(task, status="running", progress=step / 10)
        assert next(events) == 0.3
        simulator.script(task, status="succeeded", progress=1)
        assert list(events) == [1]


def test_ingress_passes_posts(front: Gateway, simulator: Simulator) -> None:
    """The vendor's path works with small and large bodies; a failure arrives as the gateway sends it."""
    task = simulator.task(data={"status": "running", "progress": 0.25})
    assert front.native(task).json()["data"]["progress"] == 0.25
    body = json.dumps({"taskId": task}).encode().ljust(60_000)
    large = front.client.post("/scc/sd_get_progress", content=body)
    assert large.json()["data"]["taskId"] == task
    assert front.native("not/an/id").json()["errCode"] == "invalid-task-id"
    assert front.client.post("/scc/other", json={}).status_code == 404


def test_ingress_that_buffers_delays_events_only(
    tmp_path: Path, simulator: Simulator, launch: Launch
) -> None:
    """Behind two nginx that buffer, no event arrives before the stream ends; long polls work."""
    task = simulator.task(data={"status": "running", "progress": 0.25})
    gate = launch(simulator.url, cache=QUICK)
    address = "{}:{}".format(*gate.address)
    with buffering_nginx("nginx-twice", tmp_path, address) as url, plain_client(url) as client:
        front = Gateway(client)
        with pytest.raises(httpx.ReadTimeout):
            front.client.get(f"/v1/progress/{task}/events", timeout=2)
        assert front.get(task, params={"wait": "1"}).json()["progress"] == 0.25


@needs("nginx")
def test_ingress_reaches_a_unix_socket(tmp_path: Path, simulator: Simulator) -> None:
    """Behind nginx, a gateway on a Unix socket serves queries and streams, and knows its clients."""
    folder = Path(mkdtemp())  # pytest's folder is closed to the workers of nginx, which have another user
    folder.chmod(0o755)
    path = folder / "gateway.sock"
    env = {
        "SD_GATEWAY_SERVER__UDS": str(path),
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
        "SD_GATEWAY_LIMITS__REQUESTS_PER_SECOND": "0.001",
    }
    task = simulator.task()
    proxy = tmp_path / "proxy"
    proxy.mkdir()
    forwarded = "proxy_set_header X-Forwarded-For $http_x_client;"
    with (
        Process("serve", cwd=tmp_path, env=env) as process,
        nginx_keepalive(proxy, Backend([f"unix:{path}"]), options=forwarded) as (host, port),
        plain_client(f"http://{host}:{port}") as client,
    ):
        process.says('"event": "started"')
        statuses = [
            client.get(f"/v1/progress/{task}", headers={"X-Client": name}).status_code
            for name in ("192.0.2.1", "192.0.2.1", "192.0.2.2")
        ]
        assert statuses == [200, 429, 200]
        events = f"/v1/progress/{task}/events"
        with client.stream("GET", events, headers={"X-Client": "192.0.2.3"}) as stream:
            assert any("event: progress" in line for line in stream.iter_lines())
        process.signal()
        assert process.exit_status() == 0
    folder.rmdir()  # the gateway has removed its socket


# Idle connections


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: str) -> int:
    """Send a query in a POST; return the status of its response."""
    body = json.dumps({"taskId": task}).encode()
    writer.write(
        b"POST /scc/sd_get_progress HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split()[1])
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    return status


async def post_repeatedly(address: Address, task: str, seen: Counter[int], *, pause: float) -> None:
    """Post on one connection, with pauses of about `pause` seconds."""
    reader, writer = await asyncio.open_connection(*address)
    until_time = time.monotonic() + POSTING_SECONDS
    while time.monotonic() < until_time:
        seen[await post(reader, writer, task)] += 1
        await asyncio.sleep(pause + random.uniform(-0.02, 0.005))
    writer.close()


def test_ingress_meets_no_closed_connection(
    ingress: Ingress, tmp_path: Path, simulator: Simulator, launch: Launch
) -> None:
    """200 clients that post at the pace of the proxy's idle timeout receive no 502.

    A POST is not repeated: if the gateway closed an idle connection first, the client would get an error.
    """
    task = simulator.finished()
    # The default, which the other tests shorten.
    gate = launch(simulator.url, server={"keep_alive_seconds": 620})
    seen: Counter[int] = Counter()

    async def run(address: Address) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(post_repeatedly(address, task, seen, pause=IDLE_SECONDS))

    with behind(ingress, tmp_path, gate, idle=IDLE_SECONDS) as front:
        asyncio.run(run(front.address))
    assert set(seen) == {200}, seen
    assert seen[200] >= 2 * CLIENTS


# A shutdown


def load(
    front: Gateway, method: str, done: threading.Event, tasks: Iterator[str], seen: Counter[int]
) -> None:
    """Query tasks on one connection until the event is set."""
    with plain_client(front.url) as client:
        gate = Gateway(client)
        while not done.is_set():
            task = next(tasks)
            response = gate.get(task) if method == "GET" else gate.native(task)
            seen[response.status_code] += 1


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_ingress_hides_a_shutdown(
    ingress: Ingress, tmp_path: Path, simulator: Simulator, method: str
) -> None:
    """While one of two gateways stops under load, clients of a proxy that tries again receive no error.

    Most proxies do not repeat a POST that they have sent. They try another gateway only if one refuses the
    connection.
    """
    env = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}
    seen: Counter[int] = Counter()
    done = threading.Event()
    tasks = itertools.cycle([simulator.task() for _ in range(20)])
    (tmp_path / "proxy").mkdir()
    with (
        serving(tmp_path, env) as (leaving, first),
        serving(tmp_path, env) as (_, second),
        behind(ingress, tmp_path / "proxy", first, second, fails_over=True) as front,
        ThreadPoolExecutor(LOADING_CLIENTS) as pool,
    ):
        clients = [pool.submit(load, front, method, done, tasks, seen) for _ in range(LOADING_CLIENTS)]
        try:
            until(lambda: seen[200] > 20 * LOADING_CLIENTS, "the load runs")
            assert first.metric("cache_lookups_total") > 0
            leaving.signal()
            assert leaving.exit_status() == 0
            before = seen[200]
            until(lambda: seen[200] > before + 20 * LOADING_CLIENTS, "the load continues")
        finally:
            done.set()
        for client in clients:
            client.result()
    assert set(seen) == {200}, seen
