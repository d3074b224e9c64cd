"""Credentials that change under a running gateway with queries in flight, without a failed query."""

import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.harness import Gateway, Mount, Process, Simulator, plain_client, serving, until

PAIRS = {f"mounted-key-{number}": f"mounted-secret-{number}" for number in range(4)}
NAMES = ("access_key", "secret_key", "next_access_key", "next_secret_key")
SETTINGS = {
    "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": "",
    "SD_GATEWAY_CREDENTIALS__SECRET_KEY": "",
    # Every query makes one call, and no stale response hides a failure.
    "SD_GATEWAY_UPSTREAM__RETRIES": "0",
    "SD_GATEWAY_CACHE__RUNNING_SECONDS": "0",
    "SD_GATEWAY_CACHE__STALE_WHILE_REVALIDATE_SECONDS": "0",
    "SD_GATEWAY_CACHE__STALE_IF_ERROR_SECONDS": "0",
    "SD_GATEWAY_LOG__LEVEL": "debug",
}
CALLERS, TASKS, ENOUGH = 6, 10, 60


class Callers:
    """Clients that query without a pause, each with its own tasks, until they are stopped."""

    def __init__(self, gate: Gateway, tasks: list[str]) -> None:
        self._gate = gate
        self._tasks = tasks
        self._over = threading.Event()
        self.answers: list[tuple[int, str]] = []

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Query for as long as the context is open."""
        with ThreadPoolExecutor(CALLERS) as pool:
            share = len(self._tasks) // CALLERS
            asked = [pool.submit(self._ask, self._tasks[n * share : (n + 1) * share]) for n in range(CALLERS)]
            try:
                yield
            finally:
                self._over.set()
        for one in asked:
            one.result()

    def more(self) -> None:
        """Wait until many more queries have been answered than were in flight."""
        wanted = len(self.answers) + ENOUGH
        until(lambda: len(self.answers) >= wanted, "the callers are answered")

    def _ask(self, tasks: list[str]) -> None:
        with plain_client(self._gate.url) as client:
            for task in itertools.cycle(tasks):
                if self._over.is_set():
                    return
                response = client.get(f"/v1/progress/{task}")
                self.answers.append((response.status_code, response.text))


class Scene:
    """A running gateway over a mounted secret, clients, and an upstream with selectable keys."""

    def __init__(self, simulator: Simulator, mount: Mount, process: Process, gate: Gateway) -> None:
        self._simulator = simulator
        self._mount = mount
        self.process = process
        self.gate = gate
        tasks = [simulator.task() for _ in range(CALLERS * TASKS)]
        self.callers = Callers(gate, tasks)

    def let_in(self, *numbers: int) -> None:
        """Make the upstream accept these pairs, and no other."""
        keys = [f"mounted-key-{number}" for number in numbers]
        self._simulator.control("PUT", "/pairs", pairs={key: PAIRS[key] for key in keys})

    def mount(self, active: int, following: int) -> None:
        """Replace the secret with these pairs."""
        publish(self._mount, active, following)

    def reloaded(self, times: int) -> None:
        """Wait until this number of pairs has been read."""
        until(lambda: self.gate.metric("credentials_reloads_total", result="ok") == times, "files are read")

    def signing(self) -> str:
        """Return the slot that signs."""
        slot: str = self.gate.client.get("/readyz").json()["credentials"]["slot"]
        return slot

    def refused(self) -> int:
        """Return how many calls the upstream has refused."""
        refused: int = self._simulator.stats()["refused"]
        return refused


def publish(mount: Mount, active: int, following: int) -> None:
    mount.publish(
        access_key=f"mounted-key-{active}\n",
        secret_key=f"mounted-secret-{active}\n",
        next_access_key=f"mounted-key-{following}\n",
        next_secret_key=f"mounted-secret-{following}\n",
    )


@pytest.fixture
def scene(simulator: Simulator, tmp_path: Path) -> Iterator[Scene]:
    """Return a scene with pair 0 active, pair 1 next, and running clients; check at the end for failures."""
    folder = tmp_path / "secret"
    folder.mkdir()
    mount = Mount(folder)
    publish(mount, 0, 1)
    files = {f"SD_GATEWAY_CREDENTIALS__{name}_FILE".upper(): str(mount.file(name)) for name in NAMES}
    endpoint = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}
    with serving(tmp_path, SETTINGS | files | endpoint) as (process, gate):
        scene = Scene(simulator, mount, process, gate)
        scene.let_in(0)
        with scene.callers.asking():
            scene.callers.more()
            yield scene
            scene.callers.more()
    assert {status for status, _ in scene.callers.answers} == {200}
    said = process.output + json.dumps(scene.callers.answers)
    assert "credentials" in said
    assert not [secret for secret in (*PAIRS, *PAIRS.values()) if secret in said]


def test_rotation_process_follows_a_swap_while_both_pairs_count(scene: Scene) -> None:
    """With both pairs valid the secret is swapped, then only the new one is valid: no call is refused."""
    scene.let_in(0, 2)
    scene.mount(active=2, following=3)
    scene.reloaded(4)
    scene.callers.more()
    scene.let_in(2)
    scene.callers.more()
    assert scene.signing() == "active"
    assert scene.refused() == 0


def test_rotation_process_does_not_wait_for_the_next_poll(scene: Scene) -> None:
    """The old pair is revoked while the secret is swapped: refused calls are signed again at once."""
    scene.let_in(0, 2)
    scene.mount(active=2, following=3)
    scene.let_in(2)
    scene.callers.more()
    assert scene.signing() == "active"
    assert scene.refused() <= CALLERS


def test_rotation_process_promotes_the_next_pair(scene: Scene) -> None:
    """The active pair is revoked without warning: the next one signs until a new active one is mounted."""
    scene.let_in(1)
    scene.callers.more()
    assert scene.signing() == "next"
    assert 0 < scene.refused() <= CALLERS
    assert scene.process.output.count("credentials_promoted") == 1
    scene.mount(active=1, following=2)
    scene.reloaded(4)
    scene.callers.more()
    assert scene.signing() == "active"
    assert scene.refused() <= CALLERS


def test_rotation_process_reports_new_pairs_that_are_refused(scene: Scene) -> None:
    """The old pair keeps signing, but `/readyz` says that the mounted ones do not work."""
    scene.mount(active=2, following=3)
    scene.reloaded(4)
    scene.callers.more()
    degraded = until(lambda: scene.gate.client.get("/readyz").json()["degraded"], "it is degraded")
    cause = "the upstream refused the gateway's credentials; an earlier pair signs until the gateway restarts"
    assert degraded == [f"credentials: {slot} key pair: {cause}" for slot in ("active", "next")]
    scene.mount(active=0, following=1)
    until(lambda: not scene.gate.client.get("/readyz").json()["degraded"], "the old pair is mounted again")
