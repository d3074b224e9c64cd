"""The command line: help, suggestions and arguments."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gateway.cli.command_line import create_parser
from gateway.cli.completion import SHELLS, completion_script
from gateway.cli.main import main
from gateway.cli.watch import argument_types
from gateway.settings.known_settings import is_known
from gateway.settings.variables import PREFIX, URL_VARIABLE


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line of the message for wrong usage, which has exit status 2."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["wach", "A"], "sd-gateway: error: unknown command 'wach'; did you mean watch?"),
        (["Serve"], "unknown command 'Serve'; did you mean serve?"),
        (["fly"], "unknown command 'fly'; the commands are serve, watch, check, config, demo, simulate, "),
        (["x\x1b[2Jy"], "unknown command 'x\\x1b[2Jy'; the commands are "),
        (["--verson"], "unknown option --verson; did you mean --version?"),
        (
            ["watch", "A", "--gatway", "http://g"],
            "watch: error: unknown option --gatway; did you mean --gateway?",
        ),
        (["watch", "--gatway=http://g", "A"], "unknown option --gatway; did you mean --gateway?"),
        (["serve", "--fast"], "unknown option --fast; the options are --help, --config"),
        (["demo", "--port", "1"], "unknown option --port; did you mean --simulator-port?"),
        (["completion", "tcsh"], "argument SHELL: invalid choice: 'tcsh'"),
    ],
)
def test_wrong_usage_is_answered_with_a_suggestion(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelled command or option is named, with a similar one or with all."""
    assert says in refused(*words, capsys=capsys)


def test_options_may_be_abbreviated_and_follow_two_dashes() -> None:
    """An unambiguous abbreviation is no mistake, and neither is a word after `--`."""
    options = create_parser().parse(["watch", "--gate", "http://g", "--", "--A"[2:]])
    assert (str(options.gateway), options.task_ids) == ("http://g", ["A"])


LIBRARIES = {"asyncio", "httpx", "pydantic", "prometheus_client", "starlette", "structlog", "uvicorn"}
SERVER = {"gateway.server.connection", "uvicorn"}
LIST_MODULES = """
import atexit, sys
from gateway.__main__ import main
atexit.register(lambda: print("", *filter(sys.modules.get, sys.modules), sep="\\n"))
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("words", "status", "unused"),
    [
        (["--version"], 0, LIBRARIES),
        (["--help"], 0, LIBRARIES),
        (["wach"], 2, LIBRARIES),
        (["completion", "bash"], 0, LIBRARIES),
        (["serve", "--config", "absent"], 2, {"rich", "gateway.cli.watch", "gateway.simulator"}),
        (["watch", "A", "--timeout", "0"], 2, SERVER | {"gateway.stores", "prometheus_client"}),
        (["config", "--config", "absent"], 2, SERVER | {"httpx", "starlette"}),
        (["check", "--config", "absent"], 2, SERVER | {"gateway.app", "starlette"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_imports_only_what_it_uses(words: list[str], status: int, unused: set[str]) -> None:
    """Imports are most of the time that a command needs to start."""
    ran = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, *words], capture_output=True, text=True, check=False
    )
    assert ran.returncode == status, ran.stderr
    imported = set(ran.stdout.splitlines())
    assert "gateway.cli.main" in imported
    assert not imported & unused


@pytest.mark.parametrize("command", ["", *create_parser().commands])
def test_help_has_examples_and_exit_statuses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each help has examples that parse, variables that exist, and the exit statuses; on 80 columns."""
    with pytest.raises(SystemExit) as ended:
        main([*([command] if command else []), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n" in text
    assert "exit status:\n  0 " in text
    assert max(map(len, text.splitlines())) <= 100
    commands = create_parser().commands
    examples = re.findall(r"^  (?:\w+=\S+ )*(?:eval \")?\$?\(?sd-gateway (\S+)", text, re.MULTILINE)
    assert examples
    assert set(examples) <= {*commands}
    for name in re.findall(rf"{PREFIX}(\w+)", text):
        section, _, key = name.lower().partition("__")
        known = is_known(section, key) or name == "SECTION__KEY" or PREFIX + name == URL_VARIABLE
        assert known, name


def test_help_names_the_variables_of_each_command() -> None:
    """Commands with settings name the vendor's variables, and `watch` names its own."""
    commands = create_parser().commands
    for name in ("serve", "check", "config"):
        assert "SPEEDPIX_APP_SECRET" in str(commands[name].epilog)
    assert URL_VARIABLE in str(commands["watch"].epilog)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8080", "http://localhost:8080"),
        ("gateway.example.com", "http://gateway.example.com"),
        ("[::1]:9000/prefix", "http://[::1]:9000/prefix"),
        ("https://g/prefix/", "https://g/prefix/"),
    ],
)
def test_gateway_needs_no_scheme(text: str, url: str) -> None:
    """Without a scheme, the URL is http."""
    assert argument_types.gateway_url(text) == httpx.URL(url)


def test_header_is_split() -> None:
    """Space around the value is no part of it, and the value may have a colon."""
    assert argument_types.header("Authorization:  Bearer a:b ") == ("Authorization", "Bearer a:b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hush", "must be 'Name: value'"),
        ("bad name: hush", "must be 'Name: value'"),
        (": hush", "must be 'Name: value'"),
        ("A: hush\r\nB: c", "the value of A has a character that is not allowed"),
        ("A: hüsh", "the value of A has a character that is not allowed"),
        ("Last-Event-ID: hush", "Last-Event-ID is set by the command itself"),
    ],
)
def test_header_that_cannot_be_sent_is_refused(text: str, says: str) -> None:
    """The message does not show the value, which may be a password."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        argument_types.header(text)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--timeout", "0"], "argument --timeout: '0' is not above 0"),
        (["--cacert", "absent.pem"], "argument --cacert: absent.pem: cannot be read: No such file"),
        (["--cacert", "/dev/null"], "argument --cacert: /dev/null: has no certificate in PEM format"),
        (["--save", "/dev/null/x"], "argument --save: /dev/null/x: Not a directory"),
        (["--save", "/dev/null"], "argument --save: /dev/null: Not a directory"),
    ],
)
def test_watch_refuses_arguments_that_cannot_work(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be read, or a directory that cannot be written to, is wrong usage."""
    assert says in refused("watch", "A", *words, capsys=capsys)


def test_watch_names_the_variable_of_a_wrong_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong SD_GATEWAY_URL is reported like a wrong setting."""
    monkeypatch.setenv(URL_VARIABLE, "ftp://g")
    assert main(["watch", "A"]) == 2
    assert capsys.readouterr().err.startswith("sd-gateway: SD_GATEWAY_URL: must be HOST:PORT, ")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_are_current(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`sd-gateway completion` prints what shtab generates from the command line; `make docs` updates it."""
    from tests.docs.completion import script  # noqa: PLC0415  # needs shtab, which the other tests do not

    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == completion_script(shell) == script(shell)


def test_save_creates_its_directory(tmp_path: Path) -> None:
    """The directory of --save is created, with its parents."""
    assert argument_types.directory(str(tmp_path / "a" / "b")).is_dir()
