"""The source of each setting, in errors and for `sd-gateway config`; variables that are no settings."""

import re
from pathlib import Path

import pytest

from gateway.settings.errors import SettingsError
from gateway.settings.known_settings import ALL, SECTIONS
from gateway.settings.loading import Loaded, load, load_with_sources
from gateway.settings.model import Settings
from gateway.settings.variables import PREFIX, variable_of

FILE = """\
# A comment, and text in which brackets and line breaks end nothing:
[server]
host = "a[b"  # ]
trusted_hosts = [
  "a.example.com",  # ["
  'b.example.com',
]

[ upstream ] # dotted keys, too
  retries = 1
stage = '''
'''
[log]
level = 'debug'
"""


def loaded(tmp_path: Path, toml: str, **environ: str) -> Loaded:
    """Load settings from a file with this text, and from variables."""
    file = tmp_path / "gw.toml"
    file.write_text(toml, encoding="utf-8")
    return load_with_sources(file, environ)


def mistakes(tmp_path: Path, toml: str, **environ: str) -> list[str]:
    """Return the lines about invalid settings, with the name of the file shortened."""
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, toml, **environ)
    return [line.replace(f"{tmp_path}/", "") for line in caught.value.mistakes]


def sources(tmp_path: Path, toml: str, **environ: str) -> dict[str, str]:
    """Return the source of each setting that does not have its default."""
    found = loaded(tmp_path, toml, **environ).sources
    known = {f"{section}.{key}": found.source_of((section, key)) for section, key in ALL}
    return {name: source.replace(f"{tmp_path}/", "") for name, source in known.items() if source}


def test_sources_have_the_line_of_each_setting(tmp_path: Path) -> None:
    """Lists and texts of several lines, comments and quotes do not change the lines of other settings."""
    assert sources(tmp_path, FILE) == {
        "server.host": "gw.toml:3",
        "server.trusted_hosts": "gw.toml:4",
        "upstream.retries": "gw.toml:10",
        "upstream.stage": "gw.toml:11",
        "log.level": "gw.toml:14",
    }


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("\n\nserver.port = 'x'", "gw.toml:3"),
        ("\nserver = { host = 'h', port = 'x' }", "gw.toml:2"),
        ("[ 'server' ]\r\n\"port\" = 'x'\r\n", "gw.toml:2"),
        ("\ufeff[server]\nport = 'x'", "gw.toml:2"),
        ('[server]\nhost = """\n\\"""\n"""\nport = "x"', "gw.toml:5"),
        ("[server]\nhost = ''''a'''''\nport = 'x'", "gw.toml:3"),
        ("[server]\ncors_origins = [[\n]]\nport = 1", "gw.toml:2"),
        ("[log]\n[server.port]\n# x\nx = 1", "gw.toml:2"),
        ("# [server]\n# port = 'x'\n[server]\nport = 'x'", "gw.toml:4"),
    ],
)
def test_sources_name_the_line_of_an_error(tmp_path: Path, toml: str, line: str) -> None:
    """An error has the line in which its key begins, in every notation of TOML."""
    [message] = mistakes(tmp_path, toml)
    assert message.startswith(f"{line}: server.")


def test_sources_name_every_source(tmp_path: Path) -> None:
    """Each line begins with the source of the value: a variable, or file and line."""
    toml = "[server]\nport = 1\nhost = 2\n\n[upstream]\nendpoint = 'a'\nretries = 99\n[cash]"
    environ = {"SPEEDPIX_ENDPOINT": "b", "SD_GATEWAY_SERVER__PORT": "x", "SD_GATEWAY_CASH__FLOW": "1"}
    sections = ", ".join(f"{PREFIX}{section}__…".upper() for section in SECTIONS)
    assert mistakes(tmp_path, toml, **environ) == [
        f"SD_GATEWAY_CASH__FLOW: unknown setting; known: {sections}",
        "gw.toml:3: server.host = 2: must be a host name or an IP address",
        'SD_GATEWAY_SERVER__PORT: server.port = "x": must be a whole number from 0 to 65535',
        'SPEEDPIX_ENDPOINT: upstream.endpoint = "b": must be an http or https URL',
        "gw.toml:7: upstream.retries = 99: must be a whole number from 0 to 10",
        "gw.toml:8: cash: unknown section; did you mean [cache]?",
    ]


def test_sources_report_variables_although_the_file_is_broken(tmp_path: Path) -> None:
    """Errors in the names of variables are reported even if the file cannot be parsed."""
    assert [line.split(": ")[0] for line in mistakes(tmp_path, "[", SD_GATEWAY_X="1")] == [
        "gw.toml:1:2",
        "SD_GATEWAY_X",
    ]


def test_sources_do_not_repeat_a_variable(tmp_path: Path) -> None:
    """Two variables for one setting are an error, because their order has no meaning."""
    environ = {"SD_GATEWAY_LOG__LEVEL": "info", "SD_GATEWAY_log__level": "debug"}
    line = "SD_GATEWAY_log__level: log.level is already set by SD_GATEWAY_LOG__LEVEL"
    assert mistakes(tmp_path, "", **environ) == [line]


def test_sources_follow_the_precedence(tmp_path: Path) -> None:
    """The source is the one with precedence; a secret's file is replaced together with its value."""
    toml = "[credentials]\naccess_key_file = 'f'\nsecret_key = 's'\n[upstream]\nendpoint = 'https://a'"
    environ = {"SPEEDPIX_ENDPOINT": "https://b", "SPEEDPIX_APP_KEY": "k"}
    assert sources(tmp_path, toml, **environ) == {
        "credentials.access_key": "SPEEDPIX_APP_KEY",
        "credentials.access_key_file": "SPEEDPIX_APP_KEY",
        "credentials.secret_key": "gw.toml:3",
        "upstream.endpoint": "SPEEDPIX_ENDPOINT",
    }
    own = {"SD_GATEWAY_UPSTREAM__ENDPOINT": "https://c"}
    assert sources(tmp_path, "", **environ, **own)["upstream.endpoint"] == "SD_GATEWAY_UPSTREAM__ENDPOINT"


# What Kubernetes sets in pods for services named sd-gateway (port 80, named http) and sd-gateway-metrics.
OF_SERVICES = {
    "SD_GATEWAY_SERVICE_HOST": "10.0.0.1",
    "SD_GATEWAY_SERVICE_PORT": "80",
    "SD_GATEWAY_SERVICE_PORT_HTTP": "80",
    "SD_GATEWAY_PORT": "tcp://10.0.0.1:80",
    "SD_GATEWAY_PORT_80_TCP": "tcp://10.0.0.1:80",
    "SD_GATEWAY_PORT_80_TCP_PROTO": "tcp",
    "SD_GATEWAY_PORT_80_TCP_PORT": "80",
    "SD_GATEWAY_PORT_80_TCP_ADDR": "10.0.0.1",
    "SD_GATEWAY_METRICS_SERVICE_HOST": "fd00::1",
    "SD_GATEWAY_METRICS_SERVICE_PORT": "9090",
    "SD_GATEWAY_METRICS_PORT": "tcp://[fd00::1]:9090",
    "SD_GATEWAY_METRICS_PORT_9090_TCP_ADDR": "fd00::1",
    "SD_GATEWAY_SERVER_PORT": "tcp://10.0.0.2:80",  # of a service named sd-gateway-server
}


def test_variables_of_kubernetes_are_ignored(tmp_path: Path) -> None:
    """The variables that Kubernetes sets for services whose name begins with sd-gateway are no mistakes."""
    found = loaded(tmp_path, "", **OF_SERVICES)
    assert found.settings == Settings()
    assert sorted(found.ignored) == sorted(OF_SERVICES)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SD_GATEWAY_PORT", "80"),
        ("SD_GATEWAY_SERVER_PORT", "80"),
        ("SD_GATEWAY_SERVICE_PORT", "http"),
        ("SD_GATEWAY_SERVER__PORT", "tcp://10.0.0.1:80"),
        ("SD_GATEWAY_STORE__SERVICE_HOST", "10.0.0.1"),
        ("SD_GATEWAY_PORT_80", "80"),
    ],
)
def test_variables_of_users_are_not_ignored(tmp_path: Path, variable: str, value: str) -> None:
    """A variable that only resembles those of Kubernetes is an error."""
    [message] = mistakes(tmp_path, "", **{variable: value})
    assert message.startswith(f"{variable}: ")


def test_variable_of_the_watch_command_is_no_setting(tmp_path: Path) -> None:
    """SD_GATEWAY_URL is for `sd-gateway watch`, and does not stop the gateway."""
    assert loaded(tmp_path, "", SD_GATEWAY_URL="http://gateway").settings == Settings()
    [message] = mistakes(tmp_path, "", SD_GATEWAY_ULR="http://gateway")
    assert message == "SD_GATEWAY_ULR: unknown setting; did you mean SD_GATEWAY_URL?"


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ('["a", "b"]', ["a", "b"]),
        (' [ "a,b" ]\n', ["a,b"]),
        ("[]", []),
        ("[::1], a", ["[::1]", "a"]),
        ("[fd00::1]", ["[fd00::1]"]),
        ("a,[::1]", ["a", "[::1]"]),
    ],
)
def test_variable_with_a_list_may_be_json(value: str, items: list[str]) -> None:
    """A list in a variable is comma-separated or a JSON array; an IPv6 address in brackets is no array."""
    assert load(None, {variable_of("server", "trusted_hosts"): value}).server.trusted_hosts == items


@pytest.mark.parametrize("value", ['["a", "b"', "[a]", '["a",]', '["a"] b', "[" * 50_000])
def test_variable_with_invalid_json_is_an_error(tmp_path: Path, value: str) -> None:
    """Text that begins like a JSON array and is none is an error, not a list of odd names."""
    [message] = mistakes(tmp_path, "", SD_GATEWAY_SERVER__TRUSTED_HOSTS=value)
    assert message.endswith(': must be comma-separated, or a JSON array such as ["a", "b"]')


def test_variable_names_belong_to_one_setting_each() -> None:
    """The name of a variable, with or without the second underscore, stands for one setting only."""
    assert len({variable_of(*setting) for setting in ALL}) == len(ALL)
    assert len({variable_of(*setting).replace("__", "_") for setting in ALL}) == len(ALL)


# Texts of pydantic, of its parsers and of Python.
FOREIGN = (
    r"[Ii]nput should|[Vv]alue error|unable to parse|valid (integer|string|number|list|boolean)|pattern|type="
)

WRONG_VALUES = [
    "true",
    "-1",
    "1.5",
    "nan",
    "'x y'",
    "''",
    "[]",
    "[[1]]",
    "{a = 1}",
    "2026-01-01",
    f"'{'@' * 9}'",
]


@pytest.mark.parametrize("value", WRONG_VALUES)
def test_errors_never_have_the_text_of_a_validator(tmp_path: Path, value: str) -> None:
    """For every setting with a wrong value, the message is the gateway's own, with source, key and value."""
    lines = [f"{section}.{key} = {value}" for section, key in ALL]
    found: list[str] = []
    for number, line in enumerate(lines):  # one by one: a validator of a section needs valid values
        try:
            loaded(tmp_path, "\n" * number + line)
        except SettingsError as exc:
            [message] = exc.mistakes
            name = line.split(" = ")[0]
            assert re.match(
                rf"{re.escape(str(tmp_path))}/gw\.toml:{number + 1}: {name}(\[0\])? = ", message
            ), message
            found.append(message)
    assert len(found) > 10
    assert not [message for message in found if re.search(FOREIGN, message)]
