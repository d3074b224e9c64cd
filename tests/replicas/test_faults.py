"""Several replicas while the store, its network, its clock or the upstream fails: real processes.

Bounds on times are generous, because machines are busy. The measured values are printed (`pytest -rP`).
"""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from statistics import quantiles
from typing import TypeVar

import pytest

from tests.replicas.asking import Connection, Reply, ask_all, late_steps_back, poll, rank, steps_back
from tests.replicas.fleet import MOVING, Replica, SteppedStore, fleet
from tests.replicas.leases import hold_leases
from tests.support.fault_proxy import FaultProxy
from tests.support.harness import Gateway, Json, Simulator, eventually, fresh_id, until
from tests.support.storeserver import StoreServer

_T = TypeVar("_T")
PATIENT = 1.0  # store.timeout_seconds where the test is not about it: a busy machine causes no timeout


def show(**measured: object) -> None:
    """Print what was measured."""
    print(" ".join(f"{name}={value}" for name, value in measured.items()))  # noqa: T201


def flat(lists: Iterable[list[_T]]) -> list[_T]:
    """Return the items of all lists."""
    return list(chain.from_iterable(lists))


def lasting(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds for so many seconds from now."""
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() < ends


def moving(simulator: Simulator, count: int) -> list[str]:
    """Create tasks that have changed at each query."""
    return [simulator.task(life=MOVING) for _ in range(count)]


async def poll_each(
    ports: list[int], tasks: list[str], *, every: float, seconds: float, tagged: bool = False
) -> list[list[Reply]]:
    """Poll each task from one client, which queries the replicas in turn."""
    going_on = lasting(seconds)
    polls = (poll(ports, task, every=every, going_on=going_on, tagged=tagged) for task in tasks)
    return await asyncio.gather(*polls)


# The store's clock


@pytest.mark.parametrize("step", [-600.0, 600.0])
def test_replicas_survive_a_clock_step(
    step: float, stepped_store: SteppedStore, simulator: Simulator, tmp_path: Path
) -> None:
    """A step of the store's clock by ten minutes changes nothing after two seconds: new and hot tasks."""
    settings: Json = {
        "upstream": {"endpoint": simulator.url, "requests_per_second": 5, "timeout_seconds": 8},
        "store": {"url": stepped_store.url, "timeout_seconds": PATIENT},
        "cache": {"running_seconds": 0.5},
    }
    with fleet(tmp_path, settings, settings) as replicas:
        ports = [one.port for one in replicas]
        [hot] = moving(simulator, 1)
        asyncio.run(poll_each(ports, [hot], every=0.05, seconds=1))
        began = time.monotonic()

        async def step_amid_queries() -> list[list[Reply]]:
            # They wait for permits, so the rate limiter's state is in the store at the time of the step.
            waiting = asyncio.create_task(ask_all(ports[:1], moving(simulator, 10)))
            await asyncio.sleep(0.3)
            stepped_store.step(step)
            polled = await poll_each(ports, [hot], every=0.1, seconds=2)
            await waiting
            return polled

        polled = asyncio.run(step_amid_queries())
        before = simulator.calls(hot)
        new = asyncio.run(ask_all(ports, moving(simulator, 4)))
        polled += asyncio.run(poll_each(ports, [hot], every=0.05, seconds=1.5))
        renewed = simulator.calls(hot) - before
    back = sum(map(steps_back, polled))
    statuses = [reply.status for reply in new]
    show(statuses=statuses, renewed=renewed, back=back, seconds=time.monotonic() - began)
    assert statuses == [200] * 8
    assert renewed >= 1
    assert back == 0


# Leases


def test_replicas_keep_many_leases(store: StoreServer, simulator: Simulator, tmp_path: Path) -> None:
    """Hundreds of slow queries over a store 10 ms away: one call for each, and every client is answered."""
    tasks = 400
    replies = hold_leases(store, simulator, tmp_path, tasks=tasks, seconds=4.5, round_trip=0.01)
    failed = [reply.status for reply in replies if reply.status != 200]
    calls = simulator.calls()
    show(calls=calls, failed=len(failed), slowest=max(reply.seconds for reply in replies))
    assert not failed
    assert calls <= tasks * 1.02


# One replica's own trouble


@pytest.mark.parametrize("trouble", [FaultProxy.refuse, FaultProxy.half_open])
def test_replicas_do_not_share_the_trouble_of_one(
    trouble: Callable[[FaultProxy], None], store: StoreServer, simulator: Simulator, tmp_path: Path
) -> None:
    """One replica cannot reach the upstream. No query fails on the others, although it asks first."""
    with FaultProxy(simulator.client.base_url.port or 80) as egress, ExitStack() as stack:

        def settings(endpoint: str) -> Json:
            return {
                "upstream": {"endpoint": endpoint, "timeout_seconds": 4, "attempt_timeout_seconds": 0.5},
                "store": {"url": store.url, "timeout_seconds": PATIENT},
                "cache": {"running_seconds": 0.5, "stale_if_error_seconds": 0, "error_seconds": 1},
            }

        severed = settings(f"http://127.0.0.1:{egress.port}")
        healthy = settings(simulator.url)
        replicas = stack.enter_context(fleet(tmp_path, severed, healthy, healthy))
        first, *others = [one.port for one in replicas]
        trouble(egress)
        egress.drop()
        tasks = moving(simulator, 10)

        async def crowd() -> tuple[list[Reply], list[Reply]]:
            going_on = lasting(3)
            alone = [asyncio.create_task(poll([first], task, every=0.2, going_on=going_on)) for task in tasks]

            missing = set(tasks)

            def has_had_all() -> bool:
                names = b" ".join(store.client.keys())  # type: ignore[arg-type]
                missing.difference_update({task for task in missing if task.encode() in names})
                return not missing

            # A lease ends with the first failed call, and its key with it.
            await eventually(has_had_all, "the severed replica has had each lease")
            polls = [poll([port], task, every=0.2, going_on=going_on) for task in tasks for port in others]
            answered = await asyncio.gather(*polls)
            return flat(await asyncio.gather(*alone)), flat(answered)

        alone, answered = asyncio.run(crowd())
    failed = [reply.status for reply in answered if reply.status != 200]
    slowest = max(reply.seconds for reply in answered)
    show(
        failed=f"{len(failed)} of {len(answered)}",
        codes=sorted(set(failed)),
        slowest=slowest,
        severed_ok=sum(reply.status == 200 for reply in alone),
    )
    assert not failed
    # One attempt of the severed replica, then one's own.
    assert slowest < 5 * 0.5 + 1


# A store that answers, but stores nothing


@pytest.mark.parametrize(
    ("harm", "cause"),
    [(StoreServer.forbid_writes, "read-only"), (StoreServer.fill, "full")],
    ids=["read-only", "full"],
)
def test_replicas_notice_a_store_that_stores_nothing(
    harm: Callable[[StoreServer], None],
    cause: str,
    store: StoreServer,
    simulator: Simulator,
    tmp_path: Path,
) -> None:
    """With one hot task, all replicas notice soon that the store is read-only or full, and say so.

    The timeout is long, so that the cause on a busy machine is not that the store is slow.
    """
    settings: Json = {
        "upstream": {"endpoint": simulator.url},
        "store": {"url": store.url, "timeout_seconds": 1},
    }
    with fleet(tmp_path, *[settings] * 3) as replicas, ThreadPoolExecutor(1) as pool:
        [hot] = moving(simulator, 1)
        ports = [one.port for one in replicas]
        over = threading.Event()
        polling = pool.submit(
            lambda: asyncio.run(poll(ports, hot, every=0.1, going_on=lambda: not over.is_set()))
        )
        until(lambda: simulator.calls(hot) >= 2, "the task is polled")
        harm(store)
        until(lambda: not any(one.shares for one in replicas), "all replicas notice it")
        over.set()
        replies = polling.result()
        told = [one.gateway.client.get("/readyz").json()["degraded"] for one in replicas]
        logged = [re.findall(r'.*"store_down".*', one.process.output) for one in replicas]
    show(told=told, back=steps_back(replies))
    for lines in told:
        assert any(cause in line for line in lines if line.startswith("store"))
    for lines in logged:
        assert any(cause in line for line in lines)


# A distant or silent store


def cached(simulator: Simulator, replicas: list[Replica]) -> str:
    """Return a task that every replica has in its cache for long."""
    task_id = simulator.finished()
    for one in replicas:
        assert one.gateway.get(task_id).status_code == 200
    return task_id


@pytest.mark.parametrize(
    ("round_trip", "timeout"),
    [
        (0.02, 0.05),
        (0.045, 0.05),
        (0.2, 1),
    ],
)
def test_replicas_serve_hits_at_any_distance_of_the_store(
    round_trip: float, timeout: float, store: StoreServer, simulator: Simulator, tmp_path: Path
) -> None:
    """A hit takes as long with a distant store as with a near one."""
    with ExitStack() as stack:
        far = stack.enter_context(FaultProxy(store.port))
        settings = [
            {"upstream": {"endpoint": simulator.url}, "store": {"url": url, "timeout_seconds": timeout}}
            for url in (far.url, store.url)
        ]
        replicas = stack.enter_context(fleet(tmp_path, *settings))
        task_id = cached(simulator, replicas)
        far.delay(round_trip=round_trip)

        async def crowd() -> list[list[Reply]]:
            going_on = lasting(2)
            return await asyncio.gather(
                *(poll([one.port], task_id, every=0.02, going_on=going_on) for one in replicas)
            )

        there, here = ([reply.seconds for reply in replies] for replies in asyncio.run(crowd()))
    slow, reference = (quantiles(times, n=20)[-1] for times in (there, here))
    show(p95_ms=slow * 1000, max_ms=max(there) * 1000, reference_ms=reference * 1000)
    assert slow < 5 * reference + 0.005


def test_replicas_do_not_flap(store: StoreServer, simulator: Simulator, tmp_path: Path) -> None:
    """A store that is farther away than its timeout allows is given up, and tried ever less often."""
    with FaultProxy(store.port) as far:
        settings: Json = {
            "upstream": {"endpoint": simulator.url},
            "store": {"url": far.url, "timeout_seconds": 0.05},
            "cache": {"running_seconds": 0.2},
        }
        with fleet(tmp_path, settings) as replicas:
            far.delay(round_trip=0.12)
            tasks = moving(simulator, 5)
            polled = asyncio.run(poll_each([replicas[0].port], tasks, every=0.05, seconds=6))
            changes = len(re.findall(r'"store_(?:up|down)"', replicas[0].process.output)) - 1
    slowest = max(reply.seconds for replies in polled for reply in replies)
    show(changes=changes, slowest=slowest)
    assert changes <= 3  # down, perhaps once more up and down
    assert slowest < 1


def test_replicas_serve_hits_while_the_store_is_silent(
    store: StoreServer, simulator: Simulator, tmp_path: Path
) -> None:
    """With a long timeout, a store that stops replying delays no hit."""
    settings: Json = {
        "upstream": {"endpoint": simulator.url},
        "store": {"url": store.url, "timeout_seconds": 1},
    }
    with fleet(tmp_path, settings) as replicas:
        task_id = cached(simulator, replicas)
        store.freeze()
        try:
            ports = [one.port for one in replicas]
            [replies] = asyncio.run(poll_each(ports, [task_id], every=0.02, seconds=3.5))
        finally:
            store.thaw()
    slowest = max(reply.seconds for reply in replies)
    show(slowest=slowest, hits=len(replies))
    assert {reply.status for reply in replies} == {200}
    assert slowest < 0.5


# A crowd


def test_replicas_renew_before_they_ask_for_new_tasks(
    store: StoreServer, simulator: Simulator, tmp_path: Path
) -> None:
    """Crowds of new IDs on two replicas use up the common limit; hot tasks of the third stay up to date."""
    hot_tasks, seconds = 3, 5.0
    settings: Json = {
        "upstream": {"endpoint": simulator.url, "requests_per_second": 10, "timeout_seconds": 5},
        "store": {"url": store.url, "timeout_seconds": PATIENT},
    }
    with fleet(tmp_path, *[settings] * 3) as replicas:
        *crowded, third = [one.port for one in replicas]
        hot = moving(simulator, hot_tasks)
        asyncio.run(poll_each([third], hot, every=0.1, seconds=1))
        before = sum(map(simulator.calls, hot))

        async def ask_anew(port: int, going_on: Callable[[], bool]) -> None:
            async with Connection(port) as connection:
                while going_on():
                    await connection.get(f"/v1/progress/{fresh_id()}")
                    await asyncio.sleep(0.05)

        async def crowd() -> list[list[Reply]]:
            going_on = lasting(seconds)
            strangers = [asyncio.create_task(ask_anew(port, going_on)) for port in crowded for _ in range(20)]
            polled = await poll_each([third], hot, every=0.1, seconds=seconds)
            for each in strangers:
                each.cancel()
            await asyncio.gather(*strangers, return_exceptions=True)
            return polled

        polled = asyncio.run(crowd())
        calls = sum(map(simulator.calls, hot)) - before
        total = simulator.calls()
    oldest = max(float(reply.headers["age"]) for replies in polled for reply in replies)
    show(calls=calls, of=hot_tasks * seconds, total=total, oldest=oldest)
    assert calls >= 0.6 * hot_tasks * seconds
    assert total >= 30  # the crowd was there, and the limit was used


# Evicted keys


def test_replicas_never_go_back_when_keys_are_evicted(
    store: StoreServer, simulator: Simulator, tmp_path: Path
) -> None:
    """Keys disappear all the time, and one replica is 15 ms away from the store.

    A client that returns its tag sees no step back. Any other client polls every 100 ms, and receives no
    response older than one that it had 100 ms before. To this, the longest response time is added: a busy
    machine delivers messages as late as responses.
    """
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(store.port)) for _ in range(3)]
        settings: list[Json] = [
            {
                "upstream": {"endpoint": simulator.url},
                "store": {"url": proxy.url, "timeout_seconds": PATIENT},
                "cache": {"running_seconds": 1},
            }
            for proxy in proxies
        ]
        replicas = stack.enter_context(fleet(tmp_path, *settings))
        proxies[2].delay(to_server=0.005, to_client=0.015)
        ports = [one.port for one in replicas]
        # Separate tasks: clients with tags make the replicas query again, so they keep a task up to date.
        of_untagged, of_tagged = moving(simulator, 5), moving(simulator, 5)

        async def crowd() -> tuple[list[list[Reply]], list[list[Reply]]]:
            return await asyncio.gather(
                poll_each(ports, of_untagged, every=0.1, seconds=6),
                poll_each(ports, of_tagged, every=0.01, seconds=6, tagged=True),
            )

        pool = stack.enter_context(ThreadPoolExecutor(1))
        polling = pool.submit(lambda: asyncio.run(crowd()))
        evicted = 0
        while not polling.done():
            evicted += sum(store.client.delete(name) for name in store.client.scan_iter(count=1000))
            time.sleep(0.03)
        untagged, tagged = polling.result()
    slowest = max(reply.seconds for replies in (*untagged, *tagged) for reply in replies)
    late = sum(late_steps_back(replies, 0.1 + slowest) for replies in untagged)
    back = sum(map(steps_back, tagged))
    show(evicted=evicted, slowest=slowest, back_without_tags=late, back_with_tags=back)
    assert evicted > 10
    assert (late, back) == (0, 0)


# Gateways that differ


@pytest.fixture
def elsewhere(simulator: Simulator) -> Iterator[str]:
    """Return another address of the same upstream."""
    with FaultProxy(simulator.client.base_url.port or 80) as proxy:
        yield f"http://127.0.0.1:{proxy.port}"


@pytest.mark.parametrize("difference", ["endpoint", "stage", "access_key"])
def test_replicas_of_different_accounts_share_nothing(
    difference: str, elsewhere: str, store: StoreServer, simulator: Simulator, tmp_path: Path
) -> None:
    """A gateway with another endpoint, stage or access key on the same store makes its own calls."""
    simulator.reset(pairs=simulator.pairs | {"another-key": "another-secret"})
    one: Json = {
        "upstream": {"endpoint": simulator.url},
        "store": {"url": store.url, "timeout_seconds": PATIENT},
        "cache": {"running_seconds": 60},
    }
    other: Json = {
        "endpoint": one | {"upstream": {"endpoint": elsewhere}},
        "stage": one | {"upstream": {"endpoint": simulator.url, "stage": "TEST"}},
        "access_key": one | {"credentials": {"access_key": "another-key", "secret_key": "another-secret"}},
    }[difference]
    with fleet(tmp_path, one, one, other) as replicas:
        task_id = simulator.task()
        calls = []
        for each in replicas:
            assert each.gateway.get(task_id).status_code == 200
            calls.append(simulator.calls(task_id))
    show(calls=calls)
    assert calls == [1, 1, 2]


@pytest.mark.parametrize("patient_first", [True, False])
def test_replicas_apply_the_smaller_lifetime(
    patient_first: bool,  # noqa: FBT001
    store: StoreServer,
    simulator: Simulator,
    tmp_path: Path,
) -> None:
    """A replica with a short lifetime refreshes what another one with a long lifetime has stored."""
    settings: list[Json] = [
        {
            "upstream": {"endpoint": simulator.url},
            "store": {"url": store.url, "timeout_seconds": PATIENT},
            "cache": {"running_seconds": lifetime, "stale_while_revalidate_seconds": 0},
        }
        for lifetime in (30, 0.5)
    ]
    with fleet(tmp_path, *settings) as (patient, impatient):
        gateways = [patient.gateway, impatient.gateway]
        [task_id] = moving(simulator, 1)
        answers = [shown(each, task_id) for each in (gateways if patient_first else gateways[::-1])]
        time.sleep(0.8)
        answers.append(shown(impatient.gateway, task_id))
        calls = simulator.calls(task_id)
    show(calls=calls, max_age=[each["max-age"] for each in answers])
    assert calls == 2
    assert rank(answers[2]) > rank(answers[0])


def shown(gateway: Gateway, task_id: str) -> Json:
    """Return a response's JSON, with the lifetime from Cache-Control."""
    answer = gateway.get(task_id)
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body | {"max-age": answer.headers["cache-control"]}


# Fan-out


def test_replicas_receive_what_they_need(store: StoreServer, simulator: Simulator, tmp_path: Path) -> None:
    """What the store sends is in proportion to the changes that clients of the receiving replica want."""
    each, seconds = 8, 3.0
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(store.port)) for _ in range(3)]
        settings: list[Json] = [
            {
                "upstream": {"endpoint": simulator.url},
                "store": {"url": proxy.url, "timeout_seconds": PATIENT},
                "cache": {"running_seconds": 0.25},
            }
            for proxy in proxies
        ]
        replicas = stack.enter_context(fleet(tmp_path, *settings))
        groups = [[fresh_id() for _ in range(each)] for _ in replicas]
        common = fresh_id()
        tasks = [*flat(groups), common]
        for number in range(2):
            for task_id in tasks:
                script(simulator, task_id, number)
        before = [proxy.counts() for proxy in proxies]

        async def crowd() -> list[list[Reply]]:
            going_on = lasting(seconds)
            polls = [
                poll([one.port], task_id, every=0.1, going_on=going_on, tagged=True)
                for one, own in zip(replicas, groups, strict=True)
                for task_id in [*own, common]
            ]
            changing = asyncio.create_task(change(going_on))
            replies = await asyncio.gather(*polls)
            await changing
            return replies

        async def change(going_on: Callable[[], bool]) -> None:
            number = 2
            while going_on():
                for task_id in tasks:
                    await asyncio.to_thread(script, simulator, task_id, number)
                number += 1

        replies = asyncio.run(crowd())
        after = [proxy.counts() for proxy in proxies]
    wanted = sum(len(reply.body) for client in replies for reply in client)
    sent = sum(late.to_client - early.to_client for early, late in zip(before, after, strict=True))
    show(out_of_the_store=sent, to_clients=wanted, ratio=sent / wanted)
    assert wanted > 50_000
    assert sent <= 1.5 * wanted


def script(simulator: Simulator, task_id: str, number: int) -> None:
    """Let a task's next response be another one, of about 4 kB."""
    state = {"sampling_step": number, "preview": f"{number:08d}" * 500}
    simulator.script(task_id, status="running", progress=min(number / 10_000, 0.9), state=state)
