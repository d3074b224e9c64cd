"""The parts of the image that can be tested without building it: Dockerfile, context, health check."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gateway import __version__
from tests.support.harness import Gateway, free_port
from tests.support.programs import required

ROOT = Path(__file__).parents[2]

# A line that ends with a backslash continues in the next one.
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of this name, in order."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def stages() -> list[str]:
    """Return the text of each stage."""
    return re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]


def copied() -> list[str]:
    """Return every path that is copied from the build context."""
    sources: list[str] = []
    for arguments in instructions("COPY"):
        if "--from=" not in arguments:
            sources += [word for word in arguments.split() if not word.startswith("--")][:-1]
    return sources


def ignored() -> tuple[list[str], list[str]]:
    """Return the patterns of .dockerignore that exclude, and those that include again, in order."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return [p for p in patterns if not p.startswith("!")], [p[1:] for p in patterns if p.startswith("!")]


# --- the Dockerfile ---------------------------------------------------------------------------------------


def test_image_dockerfile_passes_hadolint() -> None:
    """Hadolint has no finding of any severity."""
    linted = subprocess.run(
        [required("hadolint"), "--no-color", "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_image_has_one_pinned_base() -> None:
    """Both stages use the same base, pinned by digest, so the built environment runs in the final stage."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=")
    assert re.fullmatch(
        f"BASE=python:{re.escape(oldest)}-slim-bookworm@sha256:[0-9a-f]{{64}}", instructions("ARG")[0]
    )
    assert (
        "imagetools inspect python:3.11-slim-bookworm" in DOCKERFILE
    )  # the command that prints the current digest
    assert instructions("FROM") == ["${BASE} AS build", "${BASE}"]


def test_image_installs_only_packages_with_a_known_hash() -> None:
    """Every installation uses a lock file with hashes, or the project's own wheel without an index."""
    pips = [
        command
        for run in instructions("RUN")
        for command in re.split(r" && ", run)
        if re.search(r"pip\b.* (install|wheel) ", command)
    ]
    locked = [command for command in pips if "--require-hashes" in command]
    own = [command for command in pips if "--no-index" in command]
    assert len(locked) == len(own) == 2
    assert sorted(pips) == sorted(locked + own)
    assert all("--no-deps" in command for command in own)
    assert [Path(re.findall(r"-r (\S+)", command)[0]) for command in locked] == [
        Path("requirements-package.lock"),
        Path("requirements-image.lock"),
    ]


def test_image_has_the_tested_versions() -> None:
    """The image has the versions that the tests use, including those of the extras."""

    def pins(lock: str) -> set[str]:
        pins = re.findall(r"^[^#\s].*==[^ ;]+", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"\[.*\]", "", pin) for pin in pins}  # without extras

    assert pins("requirements.lock") < pins("requirements-image.lock") < pins("requirements-dev.lock")


def test_image_runs_without_root_and_without_a_shell() -> None:
    """The user is a number, so that Kubernetes can check it; the process receives signals directly."""
    final = stages()[-1]
    [user] = re.findall(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert all(int(number) >= 10_000 for number in user)
    for instruction in ("ENTRYPOINT", "CMD"):
        [command] = re.findall(rf"^{instruction} (.*)$", final, re.MULTILINE)
        assert isinstance(json.loads(command), list)
    [check] = re.findall(r"^HEALTHCHECK .*?CMD (.*)$", final, re.MULTILINE)
    assert json.loads(check)[-2:] == ["-m", "gateway.cli.health_check"]
    assert re.findall(r"^STOPSIGNAL (.*)$", final, re.MULTILINE) == ["SIGTERM"]
    assert "RUN" not in final  # it would need a shell, and might leave a cache behind


def test_image_is_labelled_with_its_version() -> None:
    """The label has the package's version."""
    assert re.findall(r'image\.version="([^"]*)"', DOCKERFILE) == [__version__]


# --- the context ------------------------------------------------------------------------------------------


def test_image_context_holds_exactly_what_is_copied() -> None:
    """Every copied path exists, and .dockerignore includes these paths and no others."""
    assert all((ROOT / source).exists() for source in copied())
    excluded, included = ignored()
    assert sorted(included) == sorted(copied())
    assert excluded[0] == "*"  # so no secret, no .venv and no test is sent


def test_image_context_holds_no_bytecode() -> None:
    """Bytecode of this machine is excluded from the package."""
    assert ignored()[0][1:] == ["**/__pycache__", "**/*.pyc"]


# --- the health check -------------------------------------------------------------------------------------


def checked(cwd: Path, **env: str) -> tuple[int, str]:
    """Run the health check as the container does; return its exit status and output."""
    command = [sys.executable, "-m", "gateway.cli.health_check"]
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_image_is_healthy_while_the_gateway_answers(gate: Gateway, tmp_path: Path, host: str) -> None:
    """It uses the port of the settings, and the loopback address if the gateway listens on all addresses."""
    port = str(gate.address[1])
    env = {"SD_GATEWAY_SERVER__HOST": host, "SD_GATEWAY_SERVER__PORT": port}
    assert checked(tmp_path, **env) == (0, "")


def test_image_is_healthy_on_the_port_of_the_settings_file(gate: Gateway, tmp_path: Path) -> None:
    """It reads a mounted config/gateway.toml, as `serve` does."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gateway.toml").write_text(f"[server]\nport = {gate.address[1]}\n")
    assert checked(tmp_path) == (0, "")


def test_image_is_unhealthy_when_the_port_is_closed(tmp_path: Path) -> None:
    """A stopped gateway is reported in one line, without a traceback."""
    status, output = checked(tmp_path, SD_GATEWAY_SERVER__PORT=str(free_port()))
    assert status == 1
    assert output.startswith("unhealthy: ")
    assert output.count("\n") == 1


def test_image_is_unhealthy_with_wrong_settings(tmp_path: Path) -> None:
    """Settings that stop the start make the container unhealthy."""
    status, output = checked(tmp_path, SD_GATEWAY_SERVER__PORT="high")
    assert status == 1
    assert "server.port" in output


def test_image_is_unhealthy_when_another_server_responds(simulator_url: str, tmp_path: Path) -> None:
    """A server without /healthz is not the gateway."""
    port = simulator_url.rpartition(":")[2]
    assert checked(tmp_path, SD_GATEWAY_SERVER__PORT=port) == (1, "unhealthy: status 404\n")
