"""The budget of processor time for renderings of the metrics, on clocks that the test advances."""

import asyncio
import gzip
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gateway.api.metrics_rendering import MetricsRenderer
from tests.support.ticked import TickedLoop

RENDERING_SECONDS = 0.05
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Bench:
    """A renderer whose renderings take 50 ms each of processor time."""

    def __init__(self, loop: TickedLoop) -> None:
        registry = CollectorRegistry()
        self.loop = loop
        self.renderings = 0
        self.value = 0.0
        self._cpu = 0.0
        Gauge("value", "A value that the test sets.", registry=registry).set_function(self._read)
        self._renderer = MetricsRenderer(registry, clock=loop.time, cpu_clock=lambda: self._cpu)

    def request(self, accept: str = "", *, compress: bool = False) -> asyncio.Task[tuple[bytes, str]]:
        task = self.loop.create_task(self._renderer.render(accept, compress=compress))
        self.loop.settle()
        return task

    def _read(self) -> float:
        self.renderings += 1
        self._cpu += RENDERING_SECONDS
        return self.value


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Provide a renderer on a manual clock."""
    loop = TickedLoop()
    yield Bench(loop)
    loop.close()
    assert loop.faults == []


def test_metrics_renderings_take_a_bounded_share_of_the_processor(bench: Bench) -> None:
    """Requests at any rate cause renderings for half a second, and then for a tenth of the time."""
    tasks = []
    for _ in range(3000):
        tasks += [bench.request(), bench.request()]
        bench.loop.advance(0.01)
    bench.loop.advance(1.0)
    assert all(task.done() for task in tasks)
    assert 60 <= bench.renderings <= (0.5 + 0.1 * 31) / RENDERING_SECONDS + 1


def test_metrics_renderings_of_ordinary_scrapes_are_immediate(bench: Bench) -> None:
    """A scrape every second never waits."""
    for _ in range(100):
        assert bench.request().done()
        bench.loop.advance(1.0)
    assert bench.renderings == 100


def test_metrics_of_a_request_that_waits_are_current(bench: Bench) -> None:
    """Requests that wait share one rendering for each format, which is newer than all of them."""
    while bench.request().done():
        pass
    before = bench.renderings
    plain, same = bench.request(), bench.request()
    openmetrics, compressed = bench.request(OPENMETRICS), bench.request(compress=True)
    bench.value = 7.0
    bench.loop.advance(3.0)
    assert plain.result() == same.result()
    assert b"value 7.0" in plain.result()[0]
    assert openmetrics.result()[0].endswith(b"# EOF\n")
    assert openmetrics.result()[1].startswith("application/openmetrics-text")
    assert gzip.decompress(compressed.result()[0]) == plain.result()[0]
    assert bench.renderings == before + 3


def test_metrics_with_an_absurd_accept_are_text(bench: Bench) -> None:
    """A very long Accept is not parsed."""
    assert bench.request(OPENMETRICS + "," * 1000).result()[1].startswith("text/plain")
