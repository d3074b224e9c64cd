"""The unit for systemd: systemd accepts it, it is confined, and the gateway runs within its confinement."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.settings.loading import load
from tests.docs.markdown import ROOT
from tests.support.harness import COMMAND, KEY, SECRET, Gateway, Process, Simulator, free_port, plain_client
from tests.support.programs import required

UNIT = ROOT / "config" / "sd-gateway.service"
CONFINED = ROOT / "tests" / "support" / "confined.py"

# `systemd-analyze security` rates from 0 (best) to 100. systemd 252 gives 11, mostly for network access.
MAX_EXPOSURE = 15
PR_GET_MDWE = 66


def directives(name: str) -> list[str]:
    """Return the values of every line of the unit with this name."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; skip the test if it is not installed."""
    command = [required("systemd-analyze"), "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def allowed_calls() -> list[str]:
    """Return the names of the system calls that SystemCallFilter allows."""
    listed = analyze("syscall-filter").stdout
    sets: dict[str, list[str]] = {}
    for line in listed.splitlines():
        if line.startswith("@"):
            sets[line] = members = []
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())

    def expand(name: str) -> Iterator[str]:
        for member in sets[name]:
            yield from expand(member) if member.startswith("@") else (member,)

    allowed = set(expand("@default"))  # always allowed
    for value in directives("SystemCallFilter"):
        names = {call for name in value.removeprefix("~").split() for call in expand(name)}
        allowed = allowed - names if value.startswith("~") else allowed | names
    return sorted(allowed)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has no complaint, once the command exists."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/sd-gateway/bin/sd-gateway", str(COMMAND)))
    verified = analyze("verify", "--man=no", str(unit))
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_systemd_rates_the_unit_as_confined() -> None:
    """The exposure is not above a threshold."""
    rated = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(UNIT))
    assert rated.returncode == 0, rated.stdout + rated.stderr


def test_systemd_stops_the_service_after_its_grace_period() -> None:
    """SIGTERM starts the shutdown, and systemd waits longer than it takes."""
    assert directives("KillSignal") == ["SIGTERM"]
    [seconds] = directives("TimeoutStopSec")
    assert int(seconds) >= load(None, {}).server.drain_seconds + 5


def test_systemd_starts_the_service_with_valid_settings(tmp_path: Path) -> None:
    """The variables are settings, and name the credentials that are loaded."""
    environ = dict(value.replace("%d", str(tmp_path)).split("=", 1) for value in directives("Environment"))
    pair = load(None, environ).credentials
    loaded = {value.partition(":")[0] for value in directives("LoadCredential")}
    assert {pair.access_key_file, pair.secret_key_file} == {tmp_path / name for name in loaded}


def test_systemd_opens_enough_files() -> None:
    """The limit of open files suffices for the default number of connections."""
    settings = load(None, {})
    [limit] = directives("LimitNOFILE")
    assert int(limit) >= settings.server.max_connections + settings.upstream.max_in_flight + 100


def test_systemd_confinement_permits_the_gateway(tmp_path: Path, simulator: Simulator) -> None:
    """The gateway serves, reports its process metrics, and stops, with only the unit's system calls.

    Its memory is never writable and executable.
    """
    if ctypes.CDLL(None).prctl(PR_GET_MDWE, 0, 0, 0, 0) < 0:
        pytest.skip("MemoryDenyWriteExecute cannot be tried: it needs Linux 6.3")
    calls = tmp_path / "calls"
    calls.write_text("\n".join(allowed_calls()))
    port = free_port()
    env = {
        "SD_GATEWAY_SERVER__PORT": str(port),
        "SD_GATEWAY_SERVER__MAX_CONNECTIONS": "100",
        "SPEEDPIX_ENDPOINT": simulator.url,
        "SPEEDPIX_APP_KEY": KEY,
        "SPEEDPIX_APP_SECRET": SECRET,
    }
    arguments = [str(CONFINED), str(calls), sys.executable, "-m", "gateway", "serve"]
    with (
        Process(*arguments, cwd=tmp_path, env=env, program=Path(sys.executable)) as process,
        plain_client(f"http://127.0.0.1:{port}") as client,
    ):
        process.says("listening")
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
        assert Gateway(client).get(simulator.task()).status_code == 200
        assert "process_cpu_seconds_total " in client.get("/metrics").text
        process.signal()
        assert process.exit_status() == 0
    assert not re.search(r'"level": "(warning|error)"|Traceback', process.output), process.output
