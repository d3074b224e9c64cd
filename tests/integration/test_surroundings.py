"""Commands in unusual environments: they work, or end with one line that gives the reason."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.fork_server import can_fork, fork_command, read_at_start
from tests.support.harness import KEY, PATIENCE_SECONDS, SECRET, free_port, plain_client, until

COMMAND = str(Path(sys.executable).with_name("sd-gateway"))
# Each ends by itself: no server listens at the endpoint, and the address to listen on is not local.
COMMANDS = {
    "none": [],
    "version": ["--version"],
    "help": ["--help"],
    "check": ["check"],
    "serve": ["serve"],
    "simulate": ["simulate", "--host", "192.0.2.1"],
    "demo": ["demo", "--simulator-port", "1x"],
    "watch": ["watch", "--gateway", "https://gateway.invalid", "--api", "fax", "task"],
}
ENVIRONMENT = read_at_start(os.environ) | {
    "PATH": os.environ["PATH"],
    "SD_GATEWAY_CREDENTIALS__ACCESS_KEY": KEY,
    "SD_GATEWAY_CREDENTIALS__SECRET_KEY": SECRET,
    "SD_GATEWAY_UPSTREAM__ENDPOINT": "http://127.0.0.1:9",
    "SD_GATEWAY_SERVER__HOST": "192.0.2.1",
}


def ran(
    arguments: list[str],
    *,
    before: Callable[[], None] | None = None,
    prefix: tuple[str, ...] = (),
    **env: str,
) -> tuple[int, str]:
    """Run a command, after `before` in its process, or with `prefix`; return its exit status and output."""
    variables = ENVIRONMENT | env
    if not before and not prefix and can_fork(variables):
        process = fork_command(arguments, cwd=Path.cwd(), env=variables)
        with process.stdout as stream:
            output = stream.read()
        return process.wait(PATIENCE_SECONDS), output
    done = subprocess.run(
        [*prefix, COMMAND, *arguments],
        env=variables,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace")


def assert_clean_end(status: int, output: str) -> None:
    """Check that a command succeeded, or printed an error without traceback and control characters."""
    assert status in {0, 1, 2}, output
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    assert not set("\x1b\x9b\ufffd") & set(output)
    assert SECRET not in output


def deleted(folder: Path) -> Callable[[], None]:
    """Return a function that enters a folder and deletes it."""

    def go() -> None:
        (folder / "gone").mkdir()
        os.chdir(folder / "gone")
        (folder / "gone").rmdir()

    return go


def unreadable(folder: Path) -> Callable[[], None]:
    """Return a function that enters an unreadable folder."""

    def go() -> None:
        os.chdir(folder)
        folder.chmod(0)
        if os.geteuid() == 0:
            os.chown(folder, 1, 1)

    return go


def oddly_named(folder: Path) -> Callable[[], None]:
    """Return a function that enters a folder whose name is not UTF-8 and has terminal control characters."""

    def go() -> None:
        name = folder / "od\udcffd \n\x1b[31m"
        name.mkdir()
        os.chdir(name)

    return go


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("where", [deleted, unreadable, oddly_named])
def test_surroundings_may_be_any_folder(
    tmp_path: Path, where: Callable[[Path], Callable[[], None]], command: str
) -> None:
    """The working directory may be deleted, unreadable or have an unusual name."""
    # Root can read every folder unless it drops its capabilities.
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    status, output = ran(
        COMMANDS[command], before=where(tmp_path), prefix=prefix if where is unreadable else ()
    )
    assert_clean_end(status, output)
    if where is unreadable and command in {"check", "serve"}:
        assert (status, output) == (
            2,
            "sd-gateway: config/gateway.toml: cannot be looked for: Permission denied\n",
        )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_surroundings_may_have_no_standard_streams(closed: tuple[int, ...], command: str) -> None:
    """Output to a closed stream is discarded, and no socket gets its file descriptor."""

    def close() -> None:
        for number in closed:
            os.close(number)

    assert_clean_end(*ran(COMMANDS[command], before=close))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("full", [(1,), (2,), (1, 2)])
def test_surroundings_may_be_full(full: tuple[int, ...], command: str) -> None:
    """A command whose output is refused, as by a full disk, ends with the status of a failure."""
    status, output = ran(COMMANDS[command], before=partial(redirect, full))
    assert_clean_end(status, output)
    if 1 in full and command in {"none", "version", "help", "check"}:
        assert status == 1


@pytest.mark.parametrize("command", ["version", "help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_surroundings_that_are_full_fail_with_any_buffering(unbuffered: str, command: str) -> None:
    """A refused help or version is a failure, whether the write fails at once or at the end."""
    status, output = ran(COMMANDS[command], before=partial(redirect, (1,)), PYTHONUNBUFFERED=unbuffered)
    assert status == 1
    assert "No space left on device" in output


@pytest.mark.parametrize(
    "output", ["2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&- 2>/dev/full"]
)
def test_surroundings_without_output_do_not_stop_the_gateway(tmp_path: Path, output: str) -> None:
    """`serve` starts, serves and obeys SIGTERM although its output is closed or refused."""
    port = free_port()
    env = ENVIRONMENT | {"SD_GATEWAY_SERVER__HOST": "127.0.0.1", "SD_GATEWAY_SERVER__PORT": str(port)}
    with subprocess.Popen(
        ["sh", "-c", f'exec "$0" serve {output}', COMMAND], cwd=tmp_path, env=env
    ) as process:
        try:

            def listens() -> bool:
                assert process.poll() is None
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            until(listens, "the gateway listens")
            with plain_client(f"http://127.0.0.1:{port}") as client:
                assert client.get("/readyz").json()["ready"]
                assert client.get("/v1/progress/abc").json()["code"] == "upstream-unreachable"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()


def redirect(numbers: tuple[int, ...]) -> None:
    """Redirect these file descriptors to a device that refuses every write."""
    full = os.open("/dev/full", os.O_WRONLY)
    for number in numbers:
        os.dup2(full, number)
    os.close(full)


@pytest.mark.parametrize("command", COMMANDS)
def test_surroundings_may_have_no_reader(command: str) -> None:
    """A closed pipe is a failure, without an exception message at interpreter shutdown."""
    result, writing = os.pipe()
    os.close(result)
    done = subprocess.run(
        [COMMAND, *COMMANDS[command]],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert_clean_end(done.returncode, done.stderr.decode())
    if command in {"version", "help", "check"}:
        assert done.returncode == 1


@pytest.mark.parametrize("command", ["check", "serve", "watch"])
@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"HTTPS_PROXY": "socks5h://user:word@127.0.0.1:9", "HTTP_PROXY": "garbage://x"},
        {"HTTP_PROXY": "http://[::1", "ALL_PROXY": "\udcff"},
        {"SSL_CERT_FILE": "/nonexistent", "SSL_CERT_DIR": "/nonexistent"},
        {"TMPDIR": "/nonexistent", "COLUMNS": "0", "TERM": "\udce9"},
        {"SD_GATEWAY_SERVER__ROOT_PATH": "/caf\udce9"},
        {"SD_GATEWAY_SERVER__ROOT_PATH": "/a\x1b[31m\nb"},
        {"SD_GATEWAY_\udcff__A\x1b": "1"},
        {"SD_GATEWAY_UPSTREAM__ENDPOINT": "http://caf\udce9"},
        {"SD_GATEWAY_CREDENTIALS__SECRET_KEY": "caf\udce9-secret"},
        {"SD_GATEWAY_\x9b31m__A": "\x1b[2J"},
        {"SD_GATEWAY_STORE__URL": "valkey://\x1b:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "\udce9"},
    ],
    ids=lambda env: "-".join(env).encode("ascii", "replace").decode(),
)
def test_surroundings_may_have_any_environment(env: dict[str, str], command: str) -> None:
    """Locales, proxies, certificates, and variables that are not UTF-8."""
    status, output = ran(COMMANDS[command], **env)
    assert_clean_end(status, output)
    if any(name.startswith("SD_GATEWAY_") and "\udce9" in value for name, value in env.items()):
        expected = (2, f"sd-gateway: {next(iter(env))}: is not UTF-8\n")
        assert command == "watch" or (status, output) == expected


@pytest.mark.parametrize(
    "env",
    [{"ALL_PROXY": "socks4://127.0.0.1:9"}, {"HTTP_PROXY": "garbage://x"}, {"SSL_CERT_FILE": "/nonexistent"}],
)
def test_surroundings_that_watch_cannot_use_are_reported(env: dict[str, str]) -> None:
    """An unsupported proxy, or missing certificates, are reported in one line."""
    status, output = ran(["watch", "--gateway", "https://gateway.invalid", "task"], **env)
    assert_clean_end(status, output)
    assert status == 2
    assert output.startswith("sd-gateway: https://gateway.invalid: ")
    assert output.count("\n") == 1


@pytest.mark.parametrize("root_path", ["/caf\u00e9", "/a b", "/a\x1b[31m", "/a?b", "/a%20b", "/\u0663"])
def test_surroundings_root_path_is_ascii(root_path: str) -> None:
    """A root path that needs percent-encoding is refused: it would match no request."""
    status, output = ran(["serve"], SD_GATEWAY_SERVER__ROOT_PATH=root_path)
    assert_clean_end(status, output)
    assert status == 2
    assert output.startswith("sd-gateway: SD_GATEWAY_SERVER__ROOT_PATH: server.root_path = ")


@pytest.mark.parametrize("argument", ["\x1b[31m", "caf\udce9", "--\x9b31m", "\u202e"])
def test_surroundings_arguments_are_escaped(argument: str) -> None:
    """An error about an argument contains no terminal control characters."""
    for command in (
        [argument],
        ["check", argument],
        ["watch", argument],
        ["watch", "--gateway", argument, "t"],
    ):
        status, output = ran(command)
        assert_clean_end(status, output)
        assert status == 2
        assert "\u202e" not in output


def denied(arguments: list[str], **env: str) -> str:
    """Run a command without privileges; return the output, which says why it failed."""
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    status, output = ran(arguments, prefix=prefix, **env)
    assert_clean_end(status, output)
    assert status != 0
    return output


@pytest.mark.parametrize(
    "setting", ["CREDENTIALS__SECRET_KEY_FILE", "UPSTREAM__CA_FILE", "STORE__PASSWORD_FILE"]
)
def test_surroundings_file_without_permission(tmp_path: Path, setting: str) -> None:
    """A secret or certificate without permission is named, with the user who needs it."""
    file = tmp_path / "file"
    file.write_text("content")
    file.chmod(0)
    env = {f"SD_GATEWAY_{setting}": str(file)}
    if setting.startswith("CREDENTIALS"):
        env["SD_GATEWAY_CREDENTIALS__SECRET_KEY"] = ""
    if setting.startswith("STORE"):
        env["SD_GATEWAY_STORE__URL"] = "valkey://127.0.0.1:9"
    says = f"permission denied; user {os.geteuid()} must be able to read the file and enter its folder\n"
    line = next(line for line in denied(["check"], **env).splitlines(keepends=True) if line.endswith(says))
    assert str(file) in line


def test_surroundings_settings_file_without_permission(tmp_path: Path) -> None:
    """A settings file without permission is named, with the user who needs it."""
    file = tmp_path / "gateway.toml"
    file.touch(mode=0)
    output = denied(["check", "--config", str(file)])
    assert output == (
        f"sd-gateway: {file}: cannot be read: permission denied; "
        f"user {os.geteuid()} must be able to read the file and enter its folder\n"
    )


def test_surroundings_addresses_without_permission(tmp_path: Path) -> None:
    """For a port below 1024 or a socket in a foreign folder, setting and advice are reported."""
    port = "a port from 1024 on: lower ones need a privilege"
    local = {"SD_GATEWAY_SERVER__HOST": "127.0.0.1"}
    output = denied(["serve"], SD_GATEWAY_SERVER__PORT="81", **local)
    assert f"set server.port (SD_GATEWAY_SERVER__PORT) to {port}" in output
    output = denied(["serve"], SD_GATEWAY_SERVER__PORT="0", SD_GATEWAY_SERVER__METRICS_PORT="81", **local)
    assert f"set server.metrics_port (SD_GATEWAY_SERVER__METRICS_PORT) to {port}" in output
    output = denied(["simulate", "--port", "81"])
    assert output == f"sd-gateway: cannot listen on http://127.0.0.1:81: Permission denied; choose {port}\n"
    tmp_path.chmod(0o500)
    output = denied(["serve"], SD_GATEWAY_SERVER__UDS=str(tmp_path / "socket"))
    assert f"to another path in a folder in which user {os.geteuid()} can create files" in output
    tmp_path.chmod(0o700)
