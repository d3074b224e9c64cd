"""The gateway keeps working while the reader of its log does not read."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gateway.telemetry.log_writer import CLOSE_SECONDS, LogWriter
from tests.support.harness import COMMAND, KEY, SECRET, neutral_environment, plain_client, until

PIPE_BYTES = 4096
DROPPED = "sd_gateway_log_lines_dropped_total"
REQUESTS = 60  # of three kinds, each of which logs its first ten requests: more than the pipe holds


@contextmanager
def gateway(folder: Path, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a gateway that logs to this file descriptor."""
    env = {
        "SD_GATEWAY_SERVER__PORT": "0",
        "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
        "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
        "SD_GATEWAY_LOG__LEVEL": "debug",
    }
    with subprocess.Popen(
        [COMMAND, "serve"], cwd=folder, env=neutral_environment() | env, stderr=stderr
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def small_pipe() -> Iterator[tuple[IO[bytes], int]]:
    """Yield the two ends of a small pipe: a file to read from, and a descriptor to write to."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with os.fdopen(read, "rb") as reader:
        yield reader, write


def url_in(reader: IO[bytes]) -> str:
    """Read log lines until the gateway listens; return its URL."""
    for line in reader:
        event = json.loads(line)
        if event["event"] == "listening":
            return str(event["url"])
    raise AssertionError("it does not listen")


def ask(url: str) -> None:
    """Send requests that are logged."""
    with plain_client(url) as client:
        for number in range(REQUESTS):
            path = ("/healthz", "/readyz", "/nothing")[number % 3]
            assert client.get(path, headers={"X-Request-Id": f"{number}-{'x' * 100}"}).status_code < 500


def test_gateway_responds_while_its_log_reader_has_stopped(tmp_path: Path) -> None:
    """Requests are answered although the pipe is full; the reader gets every line when it continues."""
    with small_pipe() as (reader, write), gateway(tmp_path, write) as process:
        os.close(write)
        url = url_in(reader)
        ask(url)
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in reader]
        assert process.wait(10) == 0
    logged = [line["request_id"] for line in lines if line["event"] == "request"]
    assert len(logged) >= 30
    assert logged == sorted(logged, key=lambda name: int(name.partition("-")[0]))
    assert sum(len(json.dumps(line)) for line in lines) > PIPE_BYTES


def test_gateway_exits_although_its_log_reader_has_stopped(tmp_path: Path) -> None:
    """SIGTERM ends the process with status 0, a limited time later than with a reader."""
    with small_pipe() as (reader, write), gateway(tmp_path, write) as process:
        os.close(write)
        ask(url_in(reader))
        process.send_signal(signal.SIGTERM)
        assert process.wait(CLOSE_SECONDS + 10) == 0


def test_gateway_serves_although_its_log_reader_has_exited(tmp_path: Path) -> None:
    """Without a reader the lines are lost and counted; nothing else fails."""
    with small_pipe() as (reader, write), gateway(tmp_path, write) as process:
        os.close(write)
        url = url_in(reader)
        reader.close()
        ask(url)
        until(lambda: lost_lines(url) > 0, "lines are lost")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def lost_lines(url: str) -> float:
    """Return the metric."""
    with plain_client(url) as client:
        text = client.get("/metrics").text
    [value] = [line.split()[1] for line in text.splitlines() if line.startswith(DROPPED + " ")]
    return float(value)


def writer_to(descriptor: int, **limits: Any) -> LogWriter:
    """Return a writer that reports a loss in a line of its own."""
    return LogWriter(descriptor, describe_loss=lambda lines: b"lost %d\n" % lines, **limits)


def test_writer_drops_lines_beyond_its_limit_and_says_how_many() -> None:
    """When the reader continues it gets the queued lines, then the number of lost ones, then later lines."""
    with small_pipe() as (reader, write):
        writer = writer_to(write, max_queued_bytes=2 * PIPE_BYTES)
        lines = [b"%08d" % number + b"." * 91 + b"\n" for number in range(300)]
        for line in lines:
            writer.write(line)
        assert not writer.flush(0.05)
        assert 0 < writer.lost < 300 - 2 * PIPE_BYTES // 100 + 1
        kept = 300 - writer.lost
        assert [reader.readline() for _ in range(kept)] == lines[:kept]
        assert writer.flush(10)
        writer.write(b"later\n")
        writer.close(10)
        os.close(write)
        rest = reader.readlines()
        assert sorted(rest) == [b"later\n", b"lost %d\n" % (300 - kept)]


def test_writer_counts_the_lines_that_a_full_disk_refuses() -> None:
    """A refused write loses its lines. The writer continues with the next ones."""
    full = os.open("/dev/full", os.O_WRONLY)
    writer = writer_to(full)
    writer.write(b"one\n")
    writer.write(b"two\n")
    assert writer.flush(10)
    assert writer.lost == 2
    with small_pipe() as (reader, write):
        os.dup2(write, full)  # there is space again
        os.close(write)
        writer.write(b"three\n")
        writer.close(10)
        os.close(full)
        assert reader.readlines() == [b"three\n", b"lost 2\n"]


def test_writer_waits_for_a_non_blocking_pipe() -> None:
    """If another process has made the pipe non-blocking, no line is lost."""
    with small_pipe() as (reader, write):
        os.set_blocking(write, False)
        writer = writer_to(write)
        lines = [b"%099d\n" % number for number in range(200)]
        for line in lines:
            writer.write(line)
        assert not writer.flush(0.05)
        assert [reader.readline() for _ in lines] == lines
        writer.close(10)
        os.close(write)
    assert writer.lost == 0


def test_writer_closes_although_the_reader_has_stopped() -> None:
    """`close` waits no longer than it may."""
    with small_pipe() as (reader, write):
        writer = writer_to(write)
        for _ in range(100):
            writer.write(b"." * 99 + b"\n")
        started = time.monotonic()
        writer.close(0.2)
        assert time.monotonic() - started < 10
        os.close(write)
        reader.close()
