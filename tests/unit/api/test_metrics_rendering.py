"""The budget of processor time for renderings of the metrics, on clocks that the test advances."""

import asyncio
import gzip
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gateway.api.metrics_rendering import OPENMETRICS, TEXT, Format, MetricsRenderer, choose_format
from tests.support.ticked import TickedLoop

RENDERING_SECONDS = 0.05


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

    def request(self, wanted: Format = TEXT, *, compress: bool = False) -> asyncio.Task[bytes]:
        task = self.loop.create_task(self._renderer.render(wanted, compress=compress))
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
    assert b"value 7.0" in plain.result()
    assert openmetrics.result().endswith(b"# EOF\n")
    assert gzip.decompress(compressed.result()) == plain.result()
    assert bench.renderings == before + 3


_OPEN = "application/openmetrics-text"
_PROMETHEUS_3 = (
    f"{_OPEN};version=1.0.0;escaping=allow-utf-8;q=0.6,{_OPEN};version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (
            _PROMETHEUS_3,
            OPENMETRICS,
        ),
        (_OPEN, OPENMETRICS),
        (_OPEN.upper() + " ; Version = 1.0.0", OPENMETRICS),
        (f"text/plain;q=0.1,{_OPEN};q=0.2", OPENMETRICS),
        (f"text/plain;version=0.0.4,{_OPEN};version=1.0.0;q=0.9", TEXT),
        (f'{_OPEN};version="1.0.0"', OPENMETRICS),
        (f"*/*,{_OPEN};q=0.1", TEXT),
        (f"text/*;q=0.2,{_OPEN};q=0.1", TEXT),
        (f"{_OPEN};version=0.0.1", TEXT),
        (f"{_OPEN};version=1.0.1234", TEXT),
        (f"{_OPEN};version=x", TEXT),
        (f"{_OPEN};q=0", TEXT),
        (f"{_OPEN};q=x", TEXT),
        ("text/plain;version=x", TEXT),
        ("", TEXT),
        ("*/*", TEXT),
        ("," * 31_000 + _OPEN, TEXT),
        (";" * 31_000 + _OPEN, TEXT),
    ],
)
def test_metrics_formats_are_text_and_openmetrics(accept: str, wanted: Format) -> None:
    """A client chooses one of two formats, whatever versions it invents."""
    assert choose_format([(b"accept", accept.encode())]) is wanted
