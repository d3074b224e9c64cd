"""Processes under measurement: CPU affinity, kernel counters, start and stop."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_END_SECONDS = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_UTIME = 11  # fields of /proc/PID/stat after the command's name; see proc(5)


class Cores(NamedTuple):
    """One core for the measured server; the others for load, upstream and this process."""

    server: set[int]
    load: set[int]


def choose_cores() -> Cores:
    """Divide the available cores. Raises: RuntimeError if there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        raise RuntimeError("a server and its load need a core each, and there is only one")
    # The load uses the lowest core, which handles the interrupts on most machines.
    return Cores({cores[-1]}, set(cores[:-1]))


@contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """Run on these cores. Processes started inside inherit them from the start."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """Raise the limit of open files to the hard limit, for processes started inside.

    Raises: RuntimeError if the hard limit is below `count`.
    """
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise RuntimeError(f"{count} open files are needed, and the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@contextmanager
def started(
    command: Sequence[str | Path], *, cores: Collection[int], folder: Path, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in `folder`, log its output there, and end it on exit."""
    with (folder / f"{Path(command[0]).name}.log").open("ab") as output, pinned(cores):
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Return different free ports of 127.0.0.1."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of processes, user and system, of all threads."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(fields[_UTIME]) + int(fields[_UTIME + 1]) for fields in stats) / _TICKS


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of processes, including shared pages."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * _PAGE


def descriptors(pids: Iterable[int]) -> int:
    """Return the number of open files of processes, including sockets."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)


def connections_to(port: int, pids: Iterable[int]) -> int:
    """Return the number of sockets connected to this TCP port, including those closed by the peer."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir()]
    held = {str(file.readlink()) for file in files if file.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[2].rpartition(":")[2], 16) == port and f"socket:[{row[9]}]" in held for row in rows)


def children(pid: int) -> list[int]:
    """Return the child processes of a process that it has not yet reaped."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
