"""Commands in odd surroundings: they work, or end in a line that says why."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import KEY, SECRET

COMMAND = str(Path(sys.executable).with_name("sd-gateway"))
# Each ends by itself: nothing listens where they ask, and the port is not ours to listen on.
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
ENVIRONMENT = {
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
    """Run a command; return its exit status and what it says."""
    done = subprocess.run(
        [*prefix, COMMAND, *arguments],
        env=ENVIRONMENT | env,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace")


def is_told_well(status: int, says: str) -> None:
    """Make sure that a command worked, or said in lines what is wrong."""
    assert status in {0, 1, 2}, says
    assert "Traceback" not in says
    assert "Exception ignored" not in says
    assert not set("\x1b\x9b\ufffd") & set(says)
    assert SECRET not in says


def deleted(folder: Path) -> Callable[[], None]:
    """Return what goes into a folder and deletes it."""

    def go() -> None:
        (folder / "gone").mkdir()
        os.chdir(folder / "gone")
        (folder / "gone").rmdir()

    return go


def unreadable(folder: Path) -> Callable[[], None]:
    """Return what goes into a folder that may not be read."""

    def go() -> None:
        os.chdir(folder)
        folder.chmod(0)
        if os.geteuid() == 0:
            os.chown(folder, 1, 1)

    return go


def oddly_named(folder: Path) -> Callable[[], None]:
    """Return what goes into a folder whose name is no text, and would be obeyed by a terminal."""

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
    """A working directory that is gone, may not be read or has an odd name is no bug of ours."""
    # Root may read everything, but for what it gives up.
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    status, says = ran(
        COMMANDS[command], before=where(tmp_path), prefix=prefix if where is unreadable else ()
    )
    is_told_well(status, says)
    if where is unreadable and command in {"check", "serve"}:
        assert (status, says) == (
            2,
            "sd-gateway: config/gateway.toml: cannot be looked for: Permission denied\n",
        )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_surroundings_may_have_no_standard_streams(closed: tuple[int, ...], command: str) -> None:
    """A stream that is closed swallows what is written, and no socket takes its number."""

    def close() -> None:
        for number in closed:
            os.close(number)

    is_told_well(*ran(COMMANDS[command], before=close))


@pytest.mark.parametrize("command", COMMANDS)
def test_surroundings_may_have_no_reader(command: str) -> None:
    """A reader that has left is a failure, without a word about it at the interpreter's end."""
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
    is_told_well(done.returncode, done.stderr.decode())
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
    """Locales, proxies, certificates, and variables that are no text."""
    status, says = ran(COMMANDS[command], **env)
    is_told_well(status, says)
    if any(name.startswith("SD_GATEWAY_") and "\udce9" in value for name, value in env.items()):
        told = (2, f"sd-gateway: {next(iter(env))}: is not UTF-8\n")
        assert command == "watch" or (status, says) == told


@pytest.mark.parametrize(
    "env",
    [{"ALL_PROXY": "socks5://127.0.0.1:9"}, {"HTTP_PROXY": "garbage://x"}, {"SSL_CERT_FILE": "/nonexistent"}],
)
def test_surroundings_that_watch_cannot_use_are_told(env: dict[str, str]) -> None:
    """A proxy that is not supported, or certificates that are not there, are told in a line."""
    status, says = ran(["watch", "--gateway", "https://gateway.invalid", "task"], **env)
    is_told_well(status, says)
    assert status == 2
    assert says.startswith("sd-gateway: https://gateway.invalid: ")
    assert says.count("\n") == 1


@pytest.mark.parametrize("root_path", ["/caf\u00e9", "/a b", "/a\x1b[31m", "/a?b", "/a%20b", "/\u0663"])
def test_surroundings_root_path_is_of_ascii(root_path: str) -> None:
    """What no path of a URL has as it stands would match no request."""
    status, says = ran(["serve"], SD_GATEWAY_SERVER__ROOT_PATH=root_path)
    is_told_well(status, says)
    assert status == 2
    assert says.startswith("sd-gateway: server.root_path = ")


@pytest.mark.parametrize("argument", ["\x1b[31m", "caf\udce9", "--\x9b31m", "\u202e"])
def test_surroundings_arguments_are_shown_harmless(argument: str) -> None:
    """What is wrong with an argument is told without what a terminal would obey."""
    for command in (
        [argument],
        ["check", argument],
        ["watch", argument],
        ["watch", "--gateway", argument, "t"],
    ):
        status, says = ran(command)
        is_told_well(status, says)
        assert status == 2
        assert "\u202e" not in says
